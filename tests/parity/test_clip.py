"""CLIPTextModel and CLIPTextModelWithProjection: random small configs, against transformers."""

import random

import pytest
import torch
from _native import NativeText
from _parity import assert_half_parity, assert_parity, assert_sensitive, reference_and_truth
from _random_weights import fill_random, weights_of
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import accel

VOCABULARY = 99
EOS = 97
ACTIVATIONS = ["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh"]


def random_config(rng: random.Random) -> dict:
    heads = rng.choice([1, 2, 3, 4])
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * rng.choice([4, 8, 11]),
        "intermediate_size": rng.choice([16, 50, 128]),
        "projection_dim": rng.choice([8, 30]),
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": heads,
        "max_position_embeddings": rng.choice([12, 77]),
        "hidden_act": rng.choice(ACTIVATIONS),
        "layer_norm_eps": rng.choice([1e-5, 1e-3]),
        "eos_token_id": rng.choice([2, EOS]),
        "bos_token_id": 0,
        "pad_token_id": 1,
    }


def random_ids(rng: random.Random, batch: int, tokens: int) -> torch.Tensor:
    """Texts of several lengths: an end token somewhere, other ids after it, one without any."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    ids = torch.randint(3, EOS, (batch, tokens), generator=generator)
    for row in range(batch - 1 if batch > 1 else batch):
        first = rng.randrange(tokens)
        ids[row, first] = EOS
        ids[row, rng.randrange(first, tokens)] = EOS
    return ids


def outputs(result) -> dict:
    """Tensors of a transformers result, hidden states by their number."""
    found = {key: value for key, value in result.items() if isinstance(value, torch.Tensor)}
    for index, state in enumerate(result.get("hidden_states") or ()):
        found[f"hidden_states.{index}"] = state
    return found


def call_with(ids, mask, hidden_states):
    def call(module, _cast):
        return outputs(module(ids, attention_mask=mask, output_hidden_states=hidden_states))

    return call


def native_of(module, weights=None, **options) -> NativeText:
    config = dict(module.config.to_dict(), architectures=[type(module).__name__], dtype=None)
    return NativeText(config, weights or weights_of(module), **options)


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("seed", range(12))
def test_random_config(cls, seed):
    rng = random.Random(seed)
    config = random_config(rng)
    module = fill_random(cls(CLIPTextConfig(**config)), seed)
    native = native_of(module)
    for tokens in (config["max_position_embeddings"], rng.randint(1, 11)):
        ids = random_ids(rng, rng.randint(1, 3), tokens)
        mask = None
        if rng.random() < 0.5:
            generator = torch.Generator().manual_seed(seed)
            mask = (torch.rand(ids.shape, generator=generator) < 0.7).long()
            mask[:, 0] = 1
        hidden_states = rng.random() < 0.5
        reference, truth = reference_and_truth(module, call_with(ids, mask, hidden_states))
        found = native(ids, mask, hidden_states)
        assert set(truth) == set(found)
        bound = assert_parity(found, reference, truth)
    other = native(ids.roll(1, -1) if tokens > 1 else (ids + 1) % EOS, mask, hidden_states)
    for name in truth:
        if tokens > 1:
            assert_sensitive(other[name], found[name], bound, f"input_ids, {name}")
    native.assert_ran()


@pytest.mark.parametrize("eos", [2, EOS])
def test_end_of_text_rules(eos):
    """eos_token_id 2 pools at the highest id, another one at its first position (else at 0)."""
    config = random_config(random.Random(2)) | {"eos_token_id": eos, "max_position_embeddings": 12}
    module = fill_random(CLIPTextModel(CLIPTextConfig(**config)), 1)
    native = native_of(module)
    ids = torch.tensor([[5, 98, EOS, 6], [EOS, 98, EOS, 98], [5, 6, 8, 7]])
    expected = {2: [1, 1, 2], EOS: [2, 0, 0]}[eos]
    reference, truth = reference_and_truth(module, call_with(ids, None, False))
    found = native(ids)
    bound = assert_parity(found, reference, truth)
    for row, token in enumerate(expected):
        assert (found["pooler_output"][row] == found["last_hidden_state"][row, token]).all()
        other = found["last_hidden_state"][row, (token + 1) % 4]
        assert_sensitive(other, found["pooler_output"][row], bound, "position of the end token")
    native.assert_ran()


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip(skip):
    """As diffusers' encode_prompt: the final norm of hidden_states[-(clip_skip + 1)]."""
    config = random_config(random.Random(4)) | {"num_hidden_layers": 3}
    module = fill_random(CLIPTextModel(CLIPTextConfig(**config)), 1)
    native = native_of(module)
    ids = random_ids(random.Random(1), 2, 9)

    def call(module, _cast):
        states = module(ids, output_hidden_states=True).hidden_states
        return {"clip_skip": module.final_layer_norm(states[-(skip + 1)])}

    reference, truth = reference_and_truth(module, call)
    found = native(ids, clip_skip=skip)
    bound = assert_parity(found, reference, truth)
    assert_sensitive(native(ids)["last_hidden_state"], found["clip_skip"], bound, "clip_skip")
    native.assert_ran()


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
def test_weight_names_of_old_and_new_files(cls):
    """With the text_model. prefix, without it, and with the position_ids of old files."""
    config = random_config(random.Random(4))
    module = fill_random(cls(CLIPTextConfig(**config)), 1)
    ids = random_ids(random.Random(1), 2, 9)
    bare = {k.removeprefix("text_model."): v for k, v in weights_of(module).items()}
    positions = torch.arange(config["max_position_embeddings"])[None]
    projection = {k: v for k, v in bare.items() if k.startswith("text_projection")}
    inner = {k: v for k, v in bare.items() if k not in projection}
    files = [
        inner | projection | {"embeddings.position_ids": positions},
        {f"text_model.{k}": v for k, v in inner.items()}
        | projection
        | {"text_model.embeddings.position_ids": positions},
    ]
    reference, truth = reference_and_truth(module, call_with(ids, None, False))
    for weights in files:
        native = native_of(module, weights)
        assert_parity(native(ids), reference, truth)
        native.assert_ran()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    """Weights in half precision, and results where dtype= asks for it."""
    cases = []
    for seed in range(4):
        rng = random.Random(seed)
        config = random_config(rng)
        module = fill_random(CLIPTextModelWithProjection(CLIPTextConfig(**config)), seed).to(dtype)
        native = native_of(module, dtype=dtype)
        ids = random_ids(rng, 2, 9)
        reference, truth = reference_and_truth(module, call_with(ids, None, False))
        cases.append((native(ids), reference, truth))
        native.assert_ran()
    assert_half_parity(cases)


def test_too_many_tokens_raise():
    config = random_config(random.Random(4)) | {"max_position_embeddings": 12}
    module = fill_random(CLIPTextModel(CLIPTextConfig(**config)), 1)
    native = native_of(module)
    with pytest.raises(accel.ShapeError, match="found 13, expected 1 to 12"):
        native(torch.full((1, 13), 5))

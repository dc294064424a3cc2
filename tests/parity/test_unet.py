"""UNet2DConditionModel: random small configs and SD 1.5 at full size, against diffusers."""

import dataclasses
import json
import os
import pathlib
import random

import pytest
import torch
from _native import NativeUNet
from _parity import assert_half_parity, assert_parity, assert_sensitive, reference_and_truth
from _random_weights import fill_random, weights_of
from diffusers import UNet2DConditionModel

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@dataclasses.dataclass
class Call:
    """Inputs of one call, as PyTorch tensors."""

    sample: torch.Tensor  # [b, c, h, w]
    timestep: object  # int, float, [] or [b]
    text: torch.Tensor  # [b, tokens, d]
    added: dict | None  # text_embeds [b, d], time_ids [b, n]
    mask: torch.Tensor | None  # [b, tokens], 1 keeps

    def to(self, dtype):
        added = self.added and {name: x.to(dtype) for name, x in self.added.items()}
        return dataclasses.replace(
            self, sample=self.sample.to(dtype), text=self.text.to(dtype), added=added
        )

    def on_module(self, module, cast):
        out = module(
            cast(self.sample),
            self.timestep,
            cast(self.text),
            added_cond_kwargs=cast(self.added),
            encoder_attention_mask=self.mask,
        )
        return {"sample": out.sample}

    def on_native(self, native):
        out = native(self.sample, self.timestep, self.text, self.added, self.mask)
        return {"sample": out}


def random_config(rng: random.Random) -> dict:
    """A small config; every option that is supported comes up in some of the seeds."""
    n = rng.randint(1, 4)
    groups = rng.choice([1, 2, 4, 8])
    heads = [rng.choice([1, 2, 3, 4]) for _ in range(n)]
    crosses = [rng.random() < 0.6 for _ in range(n)]
    certain = rng.randrange(n)
    crosses[certain] = True
    transformers = [rng.randint(0, 2) for _ in range(n)]
    transformers[certain] = rng.randint(1, 2)
    layers = rng.choice([1, 1, 2, [rng.randint(1, 2) for _ in range(n)]])
    text_time = rng.random() < 0.4
    config = {
        "in_channels": rng.choice([4, 9, 5]),
        "out_channels": rng.choice([4, 3, 8]),
        "center_input_sample": rng.random() < 0.2,
        "flip_sin_to_cos": rng.random() < 0.7,
        "freq_shift": rng.choice([0, 0, 1]),
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crosses],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in crosses[::-1]],
        "mid_block_type": rng.choice(["UNetMidBlock2DCrossAttn"] * 4 + ["UNetMidBlock2D", None]),
        "only_cross_attention": rng.choice([False, False, [rng.random() < 0.5 for _ in range(n)]]),
        "block_out_channels": [8 * rng.randint(1, 6) for _ in range(n)],
        "layers_per_block": layers,
        "downsample_padding": rng.choice([1, 1, 1, 0]),
        "mid_block_scale_factor": rng.choice([1, 1, 1.5]),
        "act_fn": rng.choice(["silu", "silu", "swish", "gelu", "relu"]),
        "norm_num_groups": groups,
        "norm_eps": rng.choice([1e-5, 1e-6, 1e-3]),
        "cross_attention_dim": rng.choice([8, 24, 33]),
        "transformer_layers_per_block": rng.choice([1, 1, 2, transformers]),
        "attention_head_dim": rng.choice([heads, heads[0]]),
        "use_linear_projection": rng.random() < 0.5,
        "upcast_attention": rng.random() < 0.3,
        "time_embedding_dim": rng.choice([None, None, 24]),
        "time_embedding_act_fn": rng.choice([None, None, "silu", "gelu"]),
        "timestep_post_act": rng.choice([None, None, "silu"]),
        "conv_in_kernel": rng.choice([3, 3, 1, 5]),
        "conv_out_kernel": rng.choice([3, 3, 1, 5]),
        "encoder_hid_dim": rng.choice([None, None, None, 20]),
    }
    if text_time:
        each = rng.choice([6, 8])
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": each,
            "projection_class_embeddings_input_dim": rng.choice([16, 21]) + each * 6,
        }
    return config


def random_call(config: dict, rng: random.Random, height: int, width: int) -> Call:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    batch, tokens = rng.randint(1, 3), rng.choice([1, 7, 77, 90])
    times = torch.tensor([3.0, 500.25, 77.0])[:batch]
    timestep = rng.choice([0, 987, 41.5, torch.tensor(999), times])
    added = mask = None
    if config.get("addition_embed_type"):
        each = config["addition_time_embed_dim"]
        width_of_text = config["projection_class_embeddings_input_dim"] - 6 * each
        ids = torch.randint(0, 1024, (batch, 6), generator=generator).float()
        added = {"text_embeds": normal(batch, width_of_text), "time_ids": ids}
    if tokens > 1 and rng.random() < 0.3:
        mask = (torch.rand(batch, tokens, generator=generator) < 0.7).float()
        mask[:, 0] = 1.0
    text = normal(batch, tokens, config.get("encoder_hid_dim") or config["cross_attention_dim"])
    return Call(normal(batch, config["in_channels"], height, width), timestep, text, added, mask)


def module_of(config: dict, seed: int) -> UNet2DConditionModel:
    return fill_random(UNet2DConditionModel(**config), seed)


def native_of(module: UNet2DConditionModel) -> NativeUNet:
    return NativeUNet(dict(module.config, _class_name="UNet2DConditionModel"), weights_of(module))


def check_sensitivity(native: NativeUNet, call: Call, before: dict, bound: float) -> None:
    """What the call is given shows in what it returns."""
    time = torch.as_tensor(call.timestep).float()
    changes = {
        "timestep": {"timestep": torch.where(time > 500, time - 400, time + 400)},
        "prompt": {"text": call.text.flip(-1) + 1.0},
        "sample": {"sample": call.sample.flip(-3) + 0.5},
    }
    if call.added:
        ids = call.added["time_ids"]
        changes["time_ids"] = {"added": {**call.added, "time_ids": ids.flip(-1) + 100}}
        embeds = call.added["text_embeds"]
        changes["text_embeds"] = {"added": {**call.added, "text_embeds": embeds + 1.0}}
    for what, change in changes.items():
        after = dataclasses.replace(call, **change).on_native(native)
        assert_sensitive(after["sample"], before["sample"], bound, what)


@pytest.mark.parametrize("seed", range(40))
def test_random_config(seed):
    rng = random.Random(seed)
    config = random_config(rng)
    module = module_of(config, seed)
    native = native_of(module)
    least = 2 ** len(config["block_out_channels"])
    sizes = [(2 * least, least), (least + rng.randint(0, 9), least + rng.randint(0, 9))]
    for height, width in sizes:
        call = random_call(config, rng, height, width)
        reference, truth = reference_and_truth(module, call.on_module)
        found = call.on_native(native)
        bound = assert_parity(found, reference, truth)
    check_sensitivity(native, call, found, bound)
    native.assert_ran()


def test_layers_of_each_attention():
    """Nested lists: transformer layers for each attention, other ones on the way up."""
    config = {
        "in_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "block_out_channels": [16, 24],
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "transformer_layers_per_block": [[1, 2], [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 1, 2], [0, 2, 1]],
    }
    module = module_of(config, 7)
    native = native_of(module)
    call = random_call(config, random.Random(3), 7, 9)
    reference, truth = reference_and_truth(module, call.on_module)
    assert_parity(call.on_native(native), reference, truth)
    native.assert_ran()


@pytest.mark.parametrize("added", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("batch", [1, 3])
def test_loop_mode_equals_single_calls(added, batch):
    """In our own loop all steps' time embeddings are made at once and one row is selected."""
    rng = random.Random(11)
    config = random_config(rng) | {"in_channels": 4, "encoder_hid_dim": None}
    config = {k: v for k, v in config.items() if "addition" not in k and "projection_c" not in k}
    if added:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 48,
        }
    module = module_of(config, 5)
    native = native_of(module)
    call = random_call(config, random.Random(batch), 16, 9)
    while call.sample.shape[0] != batch:
        call = random_call(config, rng, 16, 9)
    times = [999.0, 654.5, 12.0, 0.0]
    before = None
    for step, time in enumerate(times):
        call.timestep = time
        reference, truth = reference_and_truth(module, call.on_module)
        found = {"sample": native.loop(call.sample, times, step, call.text, call.added, call.mask)}
        bound = assert_parity(found, reference, truth)
        if before is not None:
            assert_sensitive(found["sample"], before, bound, "step")
        before = found["sample"]
    native.assert_ran()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    """Weights and inputs in half precision, the arithmetic in float32, results as the sample."""
    cases = []
    for seed in range(4):
        rng = random.Random(seed)
        config = random_config(rng)
        module = module_of(config, seed).to(dtype)
        native = native_of(module)
        call = random_call(config, rng, 16, 17).to(dtype)
        reference, truth = reference_and_truth(module, call.on_module)
        cases.append((call.on_native(native), reference, truth))
        native.assert_ran()
    assert_half_parity(cases)


def full_size(name: str) -> dict:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.slow
def test_sd15_full_size():
    """The real SD 1.5 UNet; ACCEL_TEST_SIZE=64 runs it at the latents of a 512x512 picture."""
    size = int(os.environ.get("ACCEL_TEST_SIZE", "32"))
    config = full_size("sd15_unet")
    with torch.device("meta"):
        module = UNet2DConditionModel(**config)
    module = fill_random(module.to_empty(device="cpu"), 1)
    native = native_of(module)
    call = random_call(config, random.Random(5), size, size)
    call = dataclasses.replace(
        call, sample=call.sample[:1], text=call.text[:1], timestep=987, mask=None
    )
    found = call.on_native(native)
    changed = dataclasses.replace(call, text=call.text + 1.0).on_native(native)
    native.assert_ran()
    native.close()
    with torch.no_grad():
        reference = call.on_module(module, lambda value: value)
        truth = exact(module, call)
    bound = assert_parity(found, reference, truth)
    assert_sensitive(changed["sample"], found["sample"], bound, "prompt")


def exact(module, call):
    """The truth without a second copy of 3.4 GB of weights: the module is float64 afterwards."""
    from _parity import doubled, exact_sinusoids

    with exact_sinusoids():
        return call.on_module(module.double(), doubled)

"""AutoencoderKL: random small configs, old weight names and the full SD VAE, against diffusers."""

import json
import os
import pathlib
import random

import pytest
import torch
from _native import NativeVAE
from _parity import (
    assert_half_parity,
    assert_parity,
    assert_sensitive,
    doubled,
    exact_sinusoids,
    reference_and_truth,
)
from _random_weights import fill_random, weights_of
from diffusers import AutoencoderKL

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def random_config(rng: random.Random) -> dict:
    n = rng.randint(1, 4)
    return {
        "in_channels": rng.choice([3, 3, 1, 4]),
        "out_channels": rng.choice([3, 3, 1, 4]),
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        "block_out_channels": [8 * rng.randint(1, 5) for _ in range(n)],
        "layers_per_block": rng.randint(1, 3),
        "act_fn": rng.choice(["silu", "silu", "gelu", "relu"]),
        "latent_channels": rng.choice([4, 4, 3, 16]),
        "norm_num_groups": rng.choice([1, 2, 4, 8]),
        "use_quant_conv": rng.random() < 0.6,
        "use_post_quant_conv": rng.random() < 0.6,
        "mid_block_add_attention": rng.random() < 0.7,
        "force_upcast": rng.random() < 0.5,
        "latents_mean": rng.choice([None, [0.5, 0.5, 0.5, 0.5]]),
    }


def native_of(module: AutoencoderKL, weights: dict | None = None) -> NativeVAE:
    config = dict(module.config, _class_name="AutoencoderKL")
    return NativeVAE(config, weights or weights_of(module))


def encode(image):
    def call(module, cast):
        posterior = module.encode(cast(image)).latent_dist
        return {"mean": posterior.mean, "logvar": posterior.logvar}

    return call


def decode(latents):
    return lambda module, cast: {"sample": module.decode(cast(latents)).sample}


def images(rng: random.Random, channels: int, least: int) -> torch.Tensor:
    """[b, channels, h, w] of any size from `least` up, odd ones too."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    height, width = least + rng.randint(0, 9), least + rng.randint(0, 9)
    return torch.randn(rng.randint(1, 3), channels, height, width, generator=generator)


@pytest.mark.parametrize("seed", range(24))
def test_random_config(seed):
    rng = random.Random(seed)
    config = random_config(rng)
    module = fill_random(AutoencoderKL(**config), seed)
    native = native_of(module)

    image = images(rng, config["in_channels"], 2 ** len(config["block_out_channels"]))
    reference, truth = reference_and_truth(module, encode(image))
    found = native.encode(image)
    bound = assert_parity(found, reference, truth)
    changed = native.encode(image + 1.0)
    for name in truth:
        assert_sensitive(changed[name], found[name], bound, f"sample, {name}")

    latents = images(rng, config["latent_channels"], 1)
    reference, truth = reference_and_truth(module, decode(latents))
    found = {"sample": native.decode(latents)}
    bound = assert_parity(found, reference, truth)
    assert_sensitive(native.decode(latents + 1.0), found["sample"], bound, "latents")
    native.assert_ran()


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_attention_names(as_convolutions):
    """Files from before diffusers 0.14: query, key, value, proj_attn, and some as convolutions."""
    config = random_config(random.Random(1)) | {"mid_block_add_attention": True}
    module = fill_random(AutoencoderKL(**config), 3)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in weights_of(module).items():
        for today, before in old.items():
            if f".{today}." in name:
                name = name.replace(f".{today}.", f".{before}.")
                if as_convolutions and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
        weights[name] = tensor
    assert set(weights) != set(weights_of(module))
    native = native_of(module, weights)
    latents = torch.randn(1, config["latent_channels"], 5, 6)
    reference, truth = reference_and_truth(module, decode(latents))
    assert_parity({"sample": native.decode(latents)}, reference, truth)
    native.assert_ran()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    """Weights and latents in half precision; the image comes back in theirs."""
    cases = []
    for seed in range(4):
        rng = random.Random(seed)
        config = random_config(rng)
        module = fill_random(AutoencoderKL(**config), seed).to(dtype)
        native = native_of(module)
        latents = images(rng, config["latent_channels"], 4).to(dtype)
        reference, truth = reference_and_truth(module, decode(latents))
        cases.append(({"sample": native.decode(latents)}, reference, truth))
        native.assert_ran()
    assert_half_parity(cases)


@pytest.mark.slow
def test_sd_full_size():
    """The real SD VAE; ACCEL_TEST_SIZE=64 runs it at 512x512 pixels."""
    size = int(os.environ.get("ACCEL_TEST_SIZE", "32"))
    config = json.loads((CONFIGS / "sd_vae.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    module = fill_random(AutoencoderKL(**config), 1)
    native = native_of(module)
    latents, image = torch.randn(1, 4, size, size), torch.randn(1, 3, 4 * size, 4 * size)
    found = {"sample": native.decode(latents), **native.encode(image)}
    changed = native.decode(latents.flip(-1))
    native.assert_ran()

    def both(module, cast):
        return decode(latents)(module, cast) | encode(image)(module, cast)

    reference = both(module, lambda value: value)
    with exact_sinusoids():
        truth = both(module.double(), doubled)
    bound = assert_parity(found, reference, truth)
    assert_sensitive(changed, found["sample"], bound, "latents")

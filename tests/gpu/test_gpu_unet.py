"""Full-size UNets against PyTorch in float32: SD 1.5, SD 2.1, SDXL, odd sizes, large batches."""

import pytest
import torch
from _gpu import (
    HALVES,
    check_errors,
    compiled,
    config_of,
    error,
    fill,
    free,
    half_parity,
    make,
    randn,
)


def inputs_of(name, batch, height, width, tokens=77):
    """callable(seed, dtype) -> arguments of the UNet for this size, in latent pixels."""
    config = config_of(name)
    wide = config["cross_attention_dim"]

    def inputs(seed, dtype):
        a = {"sample": randn(batch, 4, height, width, seed=seed, dtype=dtype),
             "timestep": 999 - 137 * seed,
             "encoder_hidden_states": randn(batch, tokens, wide, seed=seed + 50, dtype=dtype)}
        if config.get("addition_embed_type") == "text_time":
            sizes = torch.tensor([1024, 1024, 0, 0, 1024, 1024], device="cuda", dtype=dtype)
            a["added_cond_kwargs"] = {
                "text_embeds": randn(batch, 1280, seed=seed + 60, dtype=dtype),
                "time_ids": sizes.repeat(batch, 1)}
        return a

    return inputs


def call(module, a):
    return module(**a, return_dict=False)[0]


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("name", "size", "seeds"), [
    ("sd15_unet", (64, 64), 4), ("sd21_unet", (96, 96), 4), ("sdxl_base_unet", (128, 128), 4),
], ids=["sd15", "sd21", "sdxl"])
def test_full_size(name, size, seeds, dtype):
    half_parity(name, dtype, call, inputs_of(name, 2, *size), seeds)


# 768x512 and 1024x576 pixels, and sizes that are no multiple of 8 latent pixels
@pytest.mark.parametrize("size", [(96, 64), (128, 72), (65, 71), (33, 40)],
                         ids=lambda s: f"{s[1] * 8}x{s[0] * 8}")
def test_sizes(size):
    half_parity("sd15_unet", torch.float16, call, inputs_of("sd15_unet", 2, *size), 2)


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
def test_batches(batch):
    half_parity("sd15_unet", torch.float16, call, inputs_of("sd15_unet", batch, 64, 64),
                2 if batch == 50 else 4)


@pytest.mark.parametrize("tokens", [154, 93])
def test_long_prompts(tokens):
    half_parity("sd15_unet", torch.float16, call, inputs_of("sd15_unet", 2, 64, 64, tokens), 2)


def test_sdxl_sizes():
    """1152x896 pixels, and an odd one."""
    for size in ((112, 144), (75, 101)):
        half_parity("sdxl_base_unet", torch.float16, call, inputs_of("sdxl_base_unet", 1, *size),
                    2)


def test_float32():
    """No half precision: as near to PyTorch as two orders of summation are."""
    module = fill(make("sd15_unet"), 0)
    a = inputs_of("sd15_unet", 2, 64, 64)(0, torch.float32)
    truth = call(module, a)
    with compiled(module):
        found = call(module, a)
    assert 0.0 < error(found, truth) < 2e-5


def test_calls_are_alike():
    """Eager, recorded and replayed calls are the same bits; other inputs, prompts and steps are
    not; results are fresh tensors."""
    module = fill(make("sd15_unet", torch.float16), 1)
    inputs = inputs_of("sd15_unet", 2, 64, 64)
    a = inputs(1, torch.float16)
    truth = call(module, a)
    with compiled(module, runs=9):
        first = [call(module, a) for _ in range(5)]
        assert len({x.data_ptr() for x in first}) == 5
        kept = first[0].clone()
        b = inputs(2, torch.float16)
        others = [call(module, a | {key: b[key]}) for key in
                  ("sample", "timestep", "encoder_hidden_states")]
        again = call(module, a)
    for x in [*first, again]:
        assert torch.equal(x, kept)
    mine = error(kept, truth)
    for x in others:
        assert error(x, kept) > 5 * mine


def test_weights_of_other_dtypes_are_cast_once():
    """A float32 parameter among halves: PyTorch refuses such modules, the engine casts at load."""
    import accel

    config = config_of("sd15_unet")
    module = fill(make("sd15_unet", torch.float16), 3)
    a = inputs_of("sd15_unet", 2, 32, 32)(3, torch.float16)
    with compiled(module):
        expected = call(module, a)
    weights = {n: p.detach().float() if "conv" in n else p.detach()
               for n, p in module.state_dict().items()}
    unet = accel.UNet(config, weights, device="cuda", dtype="float16")
    found = torch.from_dlpack(unet(a["sample"], a["timestep"], a["encoder_hidden_states"]))
    assert accel.report(unet)["native_runs"] == 1
    check_errors([error(found.cuda(), expected) + 1e-9], [1e-3], "mixed dtypes")
    del unet, weights
    free()

"""Full-size UNets against PyTorch in float32: SD 1.5, SD 2.1, SDXL, odd sizes, large batches."""

import json

import pytest
import torch
from _gpu import HALVES, check_errors, compiled, config_of, error, fill, half_parity, make, randn

import accel


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


def parity(name, dtype, batch, height, width, tokens=77):
    case = f"{width * 8}x{height * 8}, batch {batch}" + f", {tokens} tokens" * (tokens != 77)
    half_parity(name, dtype, call, inputs_of(name, batch, height, width, tokens), case)


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("name", "size"), [
    ("sd15_unet", 64), ("sd21_unet", 96), ("sdxl_base_unet", 128)], ids=["sd15", "sd21", "sdxl"])
def test_full_size(name, size, dtype):
    parity(name, dtype, 2, size, size)


# 768x512 and 1024x576 pixels, another for SDXL, and sizes that are no multiple of 8 latent pixels
@pytest.mark.parametrize(("name", "height", "width"), [
    *(("sd15_unet", *s) for s in ((64, 96), (72, 128), (71, 65), (40, 33))),
    *(("sd21_unet", *s) for s in ((64, 96), (72, 128), (71, 65))),
    *(("sdxl_base_unet", *s) for s in ((64, 96), (72, 128), (112, 144), (75, 101)))])
def test_sizes(name, height, width):
    parity(name, torch.float16, 1 if "sdxl" in name else 2, height, width)


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
def test_batches(batch):
    parity("sd15_unet", torch.float16, batch, 64, 64)


@pytest.mark.parametrize("tokens", [154, 93])
def test_long_prompts(tokens):
    parity("sd15_unet", torch.float16, 2, 64, 64, tokens)


def test_float32():
    """No half precision: as near to PyTorch as two orders of summation are."""
    module = fill(make("sd15_unet"), 0)
    a = inputs_of("sd15_unet", 2, 64, 64)(0, torch.float32)
    truth = call(module, a)
    with compiled(module):
        found = call(module, a)
    assert 0.0 < error(found, truth) < 2e-5


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
def test_fused_against_unfused(dtype):
    """With all passes and with none: other kernels, and both as near to float32 as PyTorch is."""
    half, full = fill(make("sd15_unet", dtype), 7), make("sd15_unet")
    full.load_state_dict(half.state_dict())
    inputs = inputs_of("sd15_unet", 2, 64, 64)
    truth, a = call(full, inputs(7, torch.float32)), inputs(7, dtype)
    theirs, found, steps = error(call(half, a), truth), {}, {}
    for off in ("", "all"):
        with compiled(half, passes_off=off):
            found[off] = call(half, a)
            steps[off] = len(json.loads(accel.explain(half, json=True))["steps"])
    assert steps["all"] > 1.3 * steps[""], steps
    for off, result in found.items():
        # One seed, and unfused every result in between is rounded, as PyTorch's are.
        check_errors([error(result, truth)], [theirs],
                     f"sd15_unet {str(dtype)[6:]}, {'no passes' if off else 'all passes'}", 1.2)
    assert 0.0 < error(found["all"], found[""]) < 2 * theirs


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
    assert error(found.cuda(), expected) < 1e-3
    assert error(expected, call(fill(module, 4), a)) > 0.1

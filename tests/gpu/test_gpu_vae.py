"""The VAE at full size, in the halves too, and where float16 alone would not be finite."""

import pytest
import torch
from _gpu import HALVES, check_errors, compiled, error, fill, half_parity, make, randn

TRAP = ("conv_in.", "conv2.", "to_out.0.")  # the layers that write the residual stream


def encode(module, x):
    posterior = module.encode(x).latent_dist
    return {"mean": posterior.mean, "logvar": posterior.logvar}


def decode(module, z):
    return module.decode(z, return_dict=False)[0]


def parity(name, dtype, entry, batch, height, width):
    """Of pictures of height x width pixels."""
    channels, scale = (4, 8) if entry == "decode" else (3, 1)

    def inputs(seed, dtype):
        return randn(batch, channels, height // scale, width // scale, seed=seed, dtype=dtype)

    half_parity(name, dtype, decode if entry == "decode" else encode, inputs,
                f"{entry} {width}x{height}, batch {batch}")


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("pixels", [512, 1024])
@pytest.mark.parametrize("entry", ["decode", "encode"])
def test_full_size(entry, pixels, dtype):
    parity("sdxl_vae", dtype, entry, 1, pixels, pixels)


@pytest.mark.parametrize("entry", ["decode", "encode"])
@pytest.mark.parametrize(("height", "width"), [(512, 768), (576, 1024), (520, 568), (264, 320)])
def test_sizes(entry, height, width):
    parity("sd_vae", torch.float16, entry, 2, height, width)


def test_float32():
    module = fill(make("sd_vae"), 0)
    z = randn(1, 4, 64, 64, seed=1)
    truth = decode(module, z)
    with compiled(module):
        found = decode(module, z)
    assert 0.0 < error(found, truth) < 2e-5


# ---- activations of 3e5 --------------------------------------------------------------------------


def trap(module, seed):
    """Random weights whose residual stream reaches about 3e5, as SDXL's VAE does in places."""
    fill(module, seed)
    for name, p in module.named_parameters():
        if any(layer in name for layer in TRAP):
            p.mul_(6e4 if p.ndim > 1 else 1e4)
    return module


def largest_activation(module, call, x):
    """Largest value that any convolution of the module writes, and any block."""
    largest = []

    def look(_module, _inputs, result):
        if isinstance(result, torch.Tensor):
            largest.append(float(result.abs().max()))

    hooks = [m.register_forward_hook(look) for m in module.modules()]
    call(module, x)
    for hook in hooks:
        hook.remove()
    return max(largest)


@pytest.mark.parametrize("entry", ["decode", "encode"])
def test_large_activations_stay_finite(entry):
    """Where PyTorch's float16 is not finite, ours is, and at most 1.1 times as far from the truth
    as PyTorch's bfloat16."""
    call = decode if entry == "decode" else lambda m, x: encode(m, x)["mean"]
    shape = (1, 4, 64, 64) if entry == "decode" else (1, 3, 512, 512)
    full, half = make("sdxl_vae"), make("sdxl_vae", torch.float16)
    wide = make("sdxl_vae", torch.bfloat16)
    ours, theirs = [], []
    for seed in range(4):
        trap(half, seed)
        full.load_state_dict(half.state_dict())
        wide.load_state_dict(half.state_dict())
        x = randn(*shape, seed=seed)
        truth = call(full, x)
        assert largest_activation(full, call, x) > 3e5
        assert not torch.isfinite(call(half, x.half())).all()
        theirs.append(error(call(wide, x.bfloat16()), truth))
        with compiled(half):
            ours.append(error(call(half, x.half()), truth))
    check_errors(ours, theirs, f"trap {entry}, against bfloat16")


def test_force_upcast(tmp_path):
    """False while compiled in float16; the original in files and afterwards; .to() is obeyed."""
    import json

    import accel

    module = fill(make("sdxl_vae", torch.float16), 1)
    assert module.config.force_upcast is True
    accel.compile(module)
    z = randn(1, 4, 64, 64, seed=1)
    decode(module, z.half())
    assert module.config.force_upcast is False
    module.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["force_upcast"] is True
    module.to(dtype=torch.float32)
    assert next(module.post_quant_conv.parameters()).dtype == torch.float32
    found = decode(module, z)
    assert found.dtype == torch.float32
    report = accel.report(module)
    assert report["native_runs"] == 2 and not report["fallbacks"], report
    accel.decompile(module)
    assert module.config.force_upcast is True
    assert error(found, decode(module, z)) < 2e-5


# ---- past 2^31 elements --------------------------------------------------------------------------


def test_more_than_2_to_the_31_elements():
    """17 pictures of 1024x1024: tensors of 2.3e9 elements.  Each picture as if it were alone."""
    module = fill(make("sdxl_vae", torch.float16), 2)
    z = randn(17, 4, 128, 128, seed=3, dtype=torch.float16)
    with compiled(module, runs=4):
        together = decode(module, z)
        for i in (0, 15, 16):
            alone = decode(module, z[i : i + 1])
            assert error(together[i : i + 1], alone) < 2e-3

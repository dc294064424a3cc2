"""force_upcast of a compiled VAE in float16."""

import copy
import json
import pickle

import pytest
import torch
from diffusers import AutoencoderKL
from dropin import draw, loop_ran, pipeline

import accel

LARGE = ("conv_in.", "conv2.", "to_out.0.")  # the layers that write the residual stream


def make(large=False):
    module = AutoencoderKL(
        block_out_channels=[8, 16], norm_num_groups=4, layers_per_block=1, sample_size=32,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(generator=generator).mul_(0.25 if p.ndim == 1 else p[0].numel() ** -0.5)
            p.add_(1.0 if p.ndim == 1 and name.endswith("weight") else 0.0)
            if large and any(layer in name for layer in LARGE):
                p.mul_(3e4)
    return module.half().eval()


@torch.no_grad()
def decode(module, z):
    return module.decode(z, return_dict=False)[0]


def test_reads_false_while_compiled(tmp_path):
    module = make()
    accel.compile(module)
    assert module.config.force_upcast is False
    module.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["force_upcast"] is True
    for plain in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert plain.config.force_upcast is True
    assert AutoencoderKL.from_config(module.config).config.force_upcast is True
    z = torch.randn(1, 4, 6, 5)
    half = decode(module, z.half())
    module.to(dtype=torch.float32)
    full = decode(module, z)
    assert (half.dtype, full.dtype) == (torch.float16, torch.float32)
    report = accel.report(module)
    assert report["native_runs"] == 2 and not report["fallbacks"]
    accel.decompile(module)
    assert module.config.force_upcast is True
    torch.testing.assert_close(decode(module, z), full, rtol=0, atol=1e-4)


def test_a_config_that_says_false():
    module = make()
    module.register_to_config(force_upcast=False)
    before = module.config
    accel.compile(module)
    assert module.config is before
    accel.decompile(module)
    assert module.config is before and module.config.force_upcast is False


@pytest.mark.parametrize("kind", ["pt", "np", "latent"])
@pytest.mark.parametrize("upcast", [True, False])
def test_dtypes_of_a_pipeline_s_pictures(sdxl_folder, kind, upcast):
    """Those of stock, which decodes in float32 where the config says so."""
    plain, fast = (pipeline(sdxl_folder).to(torch.float16) for _ in range(2))
    for pipe in (plain, fast):
        pipe.vae.register_to_config(force_upcast=upcast)
    accel.compile(fast)
    options = {"output_type": kind, "num_inference_steps": 2}
    with loop_ran(fast):
        found = draw(fast, **options)
    truth = draw(plain, **options)
    assert found.dtype == truth.dtype and found.shape == truth.shape
    assert fast.vae.dtype == plain.vae.dtype == torch.float16
    assert accel.report(fast)["components"]["vae"]["native_runs"] == (kind != "latent")
    assert abs(found - truth).max() < 0.05 * abs(truth).max()


@pytest.mark.parametrize("entry", ["decode", "encode"])
def test_a_fallback_is_in_float32(entry):
    """Tiles are the original's; it would not be finite in float16."""
    module = make(large=True)
    module.enable_tiling()
    module.tile_latent_min_size, module.tile_sample_min_size = 8, 16
    call = decode if entry == "decode" else lambda m, x: m.encode(x).latent_dist.mean
    x = torch.randn(1, 4, 12, 12) if entry == "decode" else torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        assert not torch.isfinite(call(module, x.half())).all()
        truth = call(copy.deepcopy(module).float(), x.half().float())
        accel.compile(module)
        with pytest.warns(accel.FallbackWarning, match="tiling"):
            found = call(module, x.half())
    assert found.dtype == torch.float16 == module.dtype
    assert (found - truth).abs().max() <= 2e-3 * truth.abs().max()
    assert sum(accel.report(module)["fallbacks"].values()) == 1


def test_a_fallback_in_float16_says_so():
    """With gradients the original runs as it is."""
    module = accel.compile(make())
    z = torch.randn(1, 4, 8, 8).half().requires_grad_()
    with torch.enable_grad():
        with pytest.warns(accel.FallbackWarning, match="gradients.*in float16.*to.torch.float32"):
            assert module.decode(z).sample.dtype == torch.float16
        module.to(torch.float32)
        module.enable_tiling()
        module.tile_latent_min_size, module.tile_sample_min_size = 4, 8
        with pytest.warns(accel.FallbackWarning, match="tiling") as told:
            module.decode(z.detach().float())
    assert "float16" not in str(told[0].message)

"""Whole runs on the GPU: the shipped model's pictures, and 30 steps of SDXL."""

import json
import math
import pathlib

import numpy as np
import pytest
import torch
from _gpu import check_errors, error, fill, free, make, note, randn
from PIL import Image

import accel

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
RECORD = json.loads((REFERENCE / "reference.json").read_text())


def psnr(a, b):
    """Peak signal to noise ratio of two uint8 pictures, dB."""
    square = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if square == 0 else 10 * math.log10(255**2 / square)


def draw(pipe, picture):
    """One row of reference.json, [height, width, 3] uint8."""
    scheduler = pipe.scheduler_config | {"_class_name": picture["scheduler"]}
    image = pipe(
        picture["prompt"], negative_prompt=picture.get("negative_prompt"),
        num_inference_steps=RECORD["steps"], guidance_scale=RECORD["guidance_scale"],
        guidance_rescale=picture.get("guidance_rescale", 0.0),
        height=picture.get("height", 256), width=picture.get("width", 256), seed=picture["seed"],
        scheduler=scheduler | picture.get("options", {}), progress_bar=False,
    ).images[0]
    return np.asarray(image)


@pytest.mark.parametrize(("dtype", "least"), [("float16", 35), ("float32", 45)])
def test_the_shipped_model(dtype, least):
    pipe = accel.Pipeline.from_pretrained(accel.demo_model(), device="cuda", dtype=dtype)
    found = {}
    for picture in RECORD["pictures"]:
        before = accel.report(pipe)["components"]
        image = draw(pipe, picture)
        after = accel.report(pipe)["components"]
        for name in ("text_encoder", "unet", "vae"):
            assert after[name]["native_runs"] > before[name]["native_runs"], name
        expected = np.asarray(Image.open(REFERENCE / f"{picture['name']}.png"))
        found[picture["name"]] = psnr(image, expected)
        assert np.array_equal(image, draw(pipe, picture)), "two runs differ"
    note("PICTURES", dtype, ", ".join(f"{n} {v:.1f} dB" for n, v in found.items()),
         least=least, decibel={n: round(v, 2) for n, v in found.items()})
    assert min(found.values()) >= least, found


def sdxl_pipe(unet):
    """StableDiffusionXLPipeline around a UNet; prompts come as embeddings, results as latents."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading")
    pipe = StableDiffusionXLPipeline(
        vae=make("sdxl_vae", unet.dtype), text_encoder=None, text_encoder_2=None, tokenizer=None,
        tokenizer_2=None, unet=unet, scheduler=scheduler, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_run(pipe, seed):
    dtype = pipe.unet.dtype
    states = [randn(1, 77, 2048, seed=seed + i, dtype=dtype) for i in (1, 2)]
    pooled = [randn(1, 1280, seed=seed + i, dtype=dtype) for i in (3, 4)]
    # Latents in the truth's precision come as those of the half: the pipeline casts.
    return pipe(
        prompt_embeds=states[0], negative_prompt_embeds=states[1], pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=pooled[1], num_inference_steps=30, guidance_scale=5.0,
        latents=randn(1, 4, 128, 128, seed=seed + 5, dtype=dtype), height=1024, width=1024,
        output_type="latent").images


def test_30_steps_of_sdxl():
    """The latents at the end are no further from PyTorch's in float32 than PyTorch's float16."""
    half = fill(make("sdxl_base_unet", torch.float16), 5)
    full = make("sdxl_base_unet")
    full.load_state_dict(half.state_dict())
    truth = [sdxl_run(sdxl_pipe(full), 10 * s) for s in range(2)]
    del full
    free()
    pipe = sdxl_pipe(half)
    theirs = [error(sdxl_run(pipe, 10 * s), truth[s]) for s in range(2)]
    accel.compile(pipe)
    ours = [error(sdxl_run(pipe, 10 * s), truth[s]) for s in range(2)]
    report = accel.report(pipe)
    assert report["components"]["unet"]["native_runs"] == 60, report
    assert not report["components"]["unet"]["fallbacks"], report
    assert report["loop"]["native"] == 2, report["loop"]
    check_errors(ours, theirs, "30 steps of SDXL, float16", factor=1.0)

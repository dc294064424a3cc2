"""Our pictures of the shipped model against those of stock diffusers (tests/reference)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import accel

REFERENCE = Path(__file__).parents[1] / "reference"
RECORD = json.loads((REFERENCE / "reference.json").read_text())


@pytest.fixture(scope="module")
def pipe():
    """The shipped model."""
    return accel.Pipeline.from_pretrained(accel.demo_model())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 pictures, dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def draw(pipe, picture: dict, **changes) -> np.ndarray:
    """Draw one row of reference.json with our engine, [height, width, 3] uint8."""
    options = {
        "negative_prompt": picture.get("negative_prompt"),
        "num_inference_steps": RECORD["steps"],
        "guidance_scale": RECORD["guidance_scale"],
        "guidance_rescale": picture.get("guidance_rescale", 0.0),
        "height": picture.get("height", 256),
        "width": picture.get("width", 256),
        "seed": picture["seed"],
        "scheduler": pipe.scheduler_config
        | {"_class_name": picture["scheduler"]}
        | picture.get("options", {}),
        "progress_bar": False,
    }
    before = accel.report(pipe)["components"]
    image = pipe(picture["prompt"], **(options | changes)).images[0]
    after = accel.report(pipe)["components"]
    for name in ("text_encoder", "unet", "vae"):
        assert after[name]["native_runs"] > before[name]["native_runs"], name
    return np.asarray(image)


@pytest.mark.parametrize("picture", RECORD["pictures"], ids=lambda p: p["name"])
def test_same_picture_as_diffusers(pipe, picture):
    expected = np.asarray(Image.open(REFERENCE / f"{picture['name']}.png"))
    assert psnr(draw(pipe, picture), expected) >= 45


def test_another_seed_and_prompt_give_another_picture(pipe):
    picture = RECORD["pictures"][0]
    expected = np.asarray(Image.open(REFERENCE / f"{picture['name']}.png"))
    assert psnr(draw(pipe, picture, seed=picture["seed"] + 1), expected) < 25
    other = picture | {"prompt": RECORD["pictures"][1]["prompt"]}
    assert psnr(draw(pipe, other), expected) < 25

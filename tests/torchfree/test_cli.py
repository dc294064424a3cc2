"""The command line, as a user starts it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import accel


def run(*args, cwd=None, code=0):
    result = subprocess.run([sys.executable, "-m", "accel", *map(str, args)], capture_output=True,
                            text=True, timeout=120, cwd=cwd)
    assert result.returncode == code, result.stderr
    return result


def test_generate(sd_folder, tmp_path):
    args = ["generate", "the red house", "--model", sd_folder, "--steps", 2, "--seed", 7]
    result = run(*args, "-o", "deep/er/house.png", cwd=tmp_path)
    assert result.stdout == "deep/er/house.png\n"
    assert "2/2" in result.stderr and "seed 7" in result.stderr
    picture = np.asarray(Image.open(tmp_path / "deep/er/house.png"))
    pipe = accel.Pipeline.from_pretrained(sd_folder)
    expected = pipe("the red house", num_inference_steps=2, seed=7, progress_bar=False).images[0]
    assert np.array_equal(picture, np.asarray(expected))
    quiet = run(*args, "--quiet", "-o", "again.png", cwd=tmp_path)
    assert quiet.stdout == quiet.stderr == ""
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), picture)


def test_generate_options(sd_folder, tmp_path):
    run("generate", "a", "--model", sd_folder, "--steps", 2, "--seed", 7, "--size", "24x16",
        "--scheduler", "euler_a", "--negative", "b", "--guidance", 3, "--guidance-rescale", 0.5,
        "--eta", 0.1, "--clip-skip", 1, "--threads", 1, "-n", 2, "-q", cwd=tmp_path)
    pictures = sorted(p.name for p in tmp_path.iterdir())
    assert pictures == ["out-1.png", "out-2.png"]
    assert Image.open(tmp_path / "out-1.png").size == (24, 16)


@pytest.mark.parametrize(("args", "words"), [
    (["--model", "/nowhere"], "/nowhere/model_index.json"),
    (["--steps", "0"], "num_inference_steps"),
    (["--scheduler", "x"], "scheduler"),
    (["--guidance", "nan"], "guidance_scale"),
    (["--size", "9x9"], "multiple of 2"),
    (["--threads", "-1"], "threads"),
    (["-o", "picture.xyz"], "picture.xyz"),
])
def test_a_mistake_is_one_line(sd_folder, tmp_path, args, words):
    model = [] if "--model" in args else ["--model", sd_folder]
    result = run("generate", "a", *model, *args, cwd=tmp_path, code=1)
    assert words in result.stderr and result.stderr.startswith("accel: ")
    assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [[], ["generate"], ["paint", "x"],
                                  ["generate", "a", "--size", "x"]])
def test_usage(args):
    code = 0 if not args else 2
    result = run(*args, code=code)
    assert ("usage: accel" in result.stderr) == bool(args)


def test_help_names_every_command():
    text = run("--help").stdout
    assert all(c in text for c in ("generate", "info", "explain", "--version"))
    for command in ("generate", "info", "explain"):
        assert run(command, "--help").stdout.startswith(f"usage: accel {command}")
    assert run("--version").stdout == f"accel {accel.__version__}\n"


def test_info():
    for args in ([], ["info"], ["info", "--kernels"]):
        text = run(*args).stdout
        assert f"accel {accel.__version__}" in text
        assert "self-test:  passed" in text and "cuda" in text and "UNet2DConditionModel" in text
    assert "conv2d" in text


@pytest.mark.parametrize("part", ["unet", "vae", "vae_encoder", "text_encoder"])
def test_explain(sd_folder, part):
    text = run("explain", part, "--model", sd_folder, "--size", "32x32").stdout
    assert "arena" in text and "GFLOP" in text
    data = run("explain", part, "--model", sd_folder, "--size", "32x32", "--json").stdout
    assert json.loads(data)
    if part == "unet":
        assert "[2, 4, 16, 16]" in text
        more = run("explain", part, "--model", sd_folder, "--passes", "--batch", 1, "--tokens", 9)
        assert len(more.stdout) > 2 * len(text) and "[1, 9, 24]" in more.stdout
        both = json.loads(run("explain", part, "--model", sd_folder, "--size", "32x32", "--json",
                              "--passes", "--passes-off", "cse").stdout)
        assert both["plan"]["steps"] and "cse" not in [p["pass"] for p in both["passes"]]
        assert {"silu", "none"} <= {n["attr"].get("act") for p in both["passes"]
                                    for n in p["graph"]["nodes"]}


def test_explain_needs_no_weights(sd_folder, tmp_path):
    config = (sd_folder / "unet" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    for device in ("cpu", "null"):
        assert "arena" in run("explain", "--model", tmp_path, "--device", device).stdout

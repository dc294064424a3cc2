"""explain(profile=True): what is timed adds up, and is the plan's."""

import json
import subprocess
import sys

import numpy as np
import pytest

import accel
from accel import _core

SIZES = {"batch": 2, "height": 16, "width": 12, "tokens": 9}


@pytest.fixture(scope="module")
def unet(sd_folder):
    return accel.UNet.from_pretrained(sd_folder)


def test_tables_add_up(unet):
    plan = json.loads(unet.explain(json=True, **SIZES))
    data = json.loads(accel.explain(unet, profile=True, json=True, repeats=3, **SIZES))
    assert data["repeats"] == 3 and data["device"] == "cpu:0"
    assert data["peak_flops"] is None and data["steps"][0]["bound_ms"] is None
    steps = {s["step"]: s for s in data["steps"]}
    expected = [s for s in plan["steps"] if s["rate"] != "load"]
    assert list(steps) == [s["step"] for s in expected]
    for s in expected:
        found = steps[s["step"]]
        assert (found["kernel"], found["node"]) == (s["kernel"], s["node"])
        assert found["flops"] == s["flops"] and found["ms"] >= 0
    assert {s["section"] for s in data["sections"]} == {"prompt", "schedule", "step"}
    for table in ("sections", "classes", "kernels"):
        for key in ("ms", "flops", "bytes"):
            assert sum(r[key] for r in data[table]) == pytest.approx(
                sum(s[key] for s in data["steps"]), rel=1e-4)
        assert sum(r["steps"] for r in data[table]) == len(steps)
    whole = {s["section"]: s for s in data["sections"]}["step"]
    assert 0.2 < whole["ms"] / whole["whole_ms"] < 5  # the same work, on a shared machine


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_loop_s_profile_has_its_sampler(unet, batch):
    sizes = SIZES | {"batch": batch, "timesteps": 7}
    data = json.loads(accel.explain(unet, profile=True, json=True, repeats=3, loop=True, **sizes))
    assert 0 < data["sampler"]["before_ms"] < 1e3 and 0 < data["sampler"]["after_ms"] < 1e3
    text = accel.explain(unet, profile=True, repeats=1, loop=True, **sizes)
    assert "sampler, in each row of the loop: 0." in text
    alone = json.loads(accel.explain(unet, profile=True, json=True, repeats=1, **SIZES))
    assert alone["sampler"] is None
    assert "sampler, in" not in accel.explain(unet, profile=True, repeats=1, **SIZES)


@pytest.mark.parametrize(("given", "named"), [
    ({"peaks": (1e12,)}, "peaks"), ({"peaks": (1e12, 0)}, "peaks"), ({"peaks": 3}, "peaks"),
    ({"peaks": (1e12, float("nan"))}, "peaks"), ({"peaks": "ab"}, "peaks"),
    ({"repeats": -3}, "repeats"), ({"repeats": 2.5}, "repeats"), ({"passes": True}, "passes")])
def test_arguments_of_no_sense(unet, given, named):
    with pytest.raises(accel.InvalidArgument, match=f"^{named}: found"):
        accel.explain(unet, profile=True, **given, **SIZES)


def test_bounds(unet):
    data = json.loads(accel.explain(unet, profile=True, json=True, repeats=1, peaks=(1e9, 1e8),
                                    **SIZES))
    for s in data["steps"]:
        assert s["bound_ms"] == pytest.approx(1e3 * max(s["flops"] / 1e9, s["bytes"] / 1e8),
                                              abs=1e-6)
    for c in data["classes"]:
        mine = [s["bound_ms"] for s in data["steps"]
                if (s["op"], s["rate"]) == (c["class"], c["rate"])]
        assert c["bound_ms"] == pytest.approx(sum(mine), rel=1e-3, abs=1e-6)
    text = accel.explain(unet, profile=True, repeats=1, peaks=(1e9, 1e8), **SIZES)
    assert "of bound" in text and "lose most" in text


def test_a_profile_changes_nothing(unet):
    sample = np.random.default_rng(1).standard_normal((2, 4, 16, 12)).astype(np.float32)
    states = np.ones((2, 9, unet.config["cross_attention_dim"]), np.float32)
    before = np.asarray(unet(sample, 5, states))
    accel.explain(unet, profile=True, repeats=1, **SIZES)
    assert np.array_equal(np.asarray(unet(sample, 5, states)), before)


@pytest.mark.parametrize("part", ["unet", "vae", "vae_encoder", "text_encoder"])
def test_command_line(sd_folder, part):
    result = subprocess.run([sys.executable, "-m", "accel", "explain", part, "--model",
                             str(sd_folder), "--size", "32x32", "--profile"],
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "no fractions of a bound" in result.stdout and "take longest" in result.stdout


def test_what_cannot_run(sd_folder, unet):
    planned = _core.Model((sd_folder / "unet" / "config.json").read_text(), None, "cpu")
    sizes = unet.sizes(unet.config, SIZES)
    with pytest.raises(accel.InvalidArgument, match="no weights"):
        planned.profile(sizes)
    with pytest.raises(accel.InvalidArgument, match="height"):
        unet.profile(**{**SIZES, "height": 0})

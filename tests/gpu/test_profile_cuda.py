"""explain(profile=True) on a GPU: the marks between the steps are in a recording, what they say
adds up to what a call takes, and no class is faster than its bound."""

import json

import pytest
import torch
from _gpu import compiled, fill, make, note, randn

import accel

pytestmark = pytest.mark.alone
HALF = torch.float16


def unet():
    """SD 1.5's at 512x512, and a call of it."""
    args = (randn(2, 4, 64, 64, seed=1, dtype=HALF), 501, randn(2, 77, 768, seed=2, dtype=HALF))
    return (fill(make("sd15_unet", HALF), 1),
            lambda module: module(*args, return_dict=False)[0])


def call_ms(call, times=20):
    """Milliseconds of one call, the best of three rounds."""
    found = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / times)
    return min(found)


def test_what_is_timed_adds_up():
    module, call = unet()
    with compiled(module, runs=2 + 60 + 1):
        first = call(module)
        call(module)
        one = call_ms(lambda: call(module))
        data = json.loads(accel.explain(module, profile=True, json=True))
        text = accel.explain(module, profile=True)
        assert torch.equal(call(module), first)  # a profile changes nothing
    sections = {s["section"]: s for s in data["sections"]}
    step = sections["step"]
    assert data["device"] == "cuda:0" and data["sampler"] is None
    assert data["peak_flops"] > 1e12 and data["peak_bandwidth"] > 1e11
    ratio = step["ms"] / step["whole_ms"]
    note("PROFILE", "sd15_unet, float16", f"whole {step['whole_ms']:.3f} ms, {ratio:.3f} of it "
         f"summed over {step['steps']} steps, a call {one:.3f} ms", whole_ms=step["whole_ms"],
         summed_ms=step["ms"], call_ms=one, bound_ms=step["bound_ms"])
    assert step["steps"] > 200 and 0.9 < ratio < 1.5
    assert 0.5 * one < step["whole_ms"] < 1.2 * one
    assert 0.1 * step["whole_ms"] < step["bound_ms"] <= step["whole_ms"]
    for table in ("sections", "classes", "kernels"):
        assert sum(r["ms"] for r in data[table]) == pytest.approx(
            sum(s["ms"] for s in data["steps"]), rel=1e-4), table
    for c in data["classes"]:
        assert c["ms"] > 0 and c["bound_ms"] is not None, c
        # What runs once for a prompt is run again and again here: its weights may be in the cache.
        assert c["bound_ms"] <= (1.05 if c["rate"] == "step" else 2.0) * c["ms"], c
    assert all(s["ms"] > 0 for s in data["steps"])
    named = {c["class"] for c in data["classes"]}
    assert {"linear", "conv2d", "attention", "group_norm"} <= named
    for words in ("of bound", "lose most", "step     section: "):
        assert words in text, text


def test_a_loop_s_profile_has_its_sampler():
    module, call = unet()
    with compiled(module):
        call(module)
        data = json.loads(accel.explain(module, profile=True, json=True, repeats=3, loop=True,
                                        timesteps=20))
    sampler = data["sampler"]
    note("PROFILE", "sampler", json.dumps(sampler), **sampler)
    assert all(0 < sampler[part] < 1 for part in ("before_ms", "after_ms", "tail_ms"))

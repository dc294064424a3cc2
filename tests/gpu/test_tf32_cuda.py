"""TF32 follows PyTorch's switches at each call: exact without, as near as PyTorch's own with it;
always exact where compute capability, or ACCEL_FORCE_ARCH, is below 8.0."""

import contextlib
import json
import pathlib
import sys

import pytest
import torch
from _gpu import HAS_TF32, compiled, error, fill, make, randn

for folder in ("torchfree", "drop_in"):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / folder))

import tiny  # noqa: E402
from dropin import draw, loop_ran, pipeline  # noqa: E402

import accel  # noqa: E402

EXACT = 1e-5   # relative to float64, what float32 leaves
FACTOR = 1.5   # times PyTorch's own error with the same switches


def switch(matmul, conv):
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = conv


@contextlib.contextmanager
def new_switches(matmul, conv):
    """The form of PyTorch 2.9 and later; leaves the old one usable."""
    backends = torch.backends
    before = (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision,
              backends.cudnn.rnn.fp32_precision)
    names = {True: "tf32", False: "ieee"}
    try:
        backends.cuda.matmul.fp32_precision = names[matmul]
        backends.cudnn.conv.fp32_precision = backends.cudnn.rnn.fp32_precision = names[conv]
        yield
    finally:
        backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision, \
            backends.cudnn.rnn.fp32_precision = before


def vae_call(module, seed, dtype=torch.float32):
    return module.decode(randn(1, 4, 32, 32, seed=seed, dtype=dtype), return_dict=False)[0]


def unet_call(module, seed, dtype=torch.float32):
    return module(randn(2, 4, 32, 32, seed=seed, dtype=dtype), 500,
                  encoder_hidden_states=randn(2, 77, 768, seed=seed + 9, dtype=dtype),
                  return_dict=False)[0]


def clip_call(module, seed, dtype=torch.float32):
    ids = torch.arange(2 * 77, device="cuda").view(2, 77) * 37 % 49000 + seed
    return module(ids, return_dict=False)[0]


# Which switches matter: that of matmuls, that of convolutions.
CASES = {"sd_vae": (vae_call, (1, 1)), "sd15_unet": (unet_call, (1, 1)),
         "clip_l": (clip_call, (1, 0))}


@pytest.mark.parametrize("name", CASES)
def test_switches_are_read_at_each_call(name):
    call, matters = CASES[name]
    module = fill(make(name), 1)
    truth = call(fill(make(name, torch.float64), 1), 1, torch.float64)
    settings = [(False, False), (True, False), (False, True), (True, True)]
    theirs = {}
    for both in settings:
        switch(*both)
        theirs[both] = error(call(module, 1), truth)
    found = {}
    with compiled(module, runs=9):
        for both in (*settings, *reversed(settings)):  # the second time as recordings
            switch(*both)
            result = call(module, 1)
            assert torch.equal(found.setdefault(both, result), result), both
        switch(False, False)
        if hasattr(torch.backends.cudnn, "conv"):
            with new_switches(True, True):
                assert torch.equal(call(module, 1), found[True, True])
        else:
            call(module, 1)
        switch(True, True)
        steps = json.loads(accel.explain(module, json=True))["steps"]
    assert any(s["tf32"] for s in steps) == HAS_TF32
    errors = {both: error(result, truth) for both, result in found.items()}
    for both in settings:
        print(f"\nTF32 {name} matmul {both[0]:d} conv {both[1]:d}: ours {errors[both]:.3e}, "
              f"PyTorch's own {theirs[both]:.3e}", flush=True)
    assert errors[False, False] < EXACT
    for both in settings[1:]:
        asked = HAS_TF32 and any(b and m for b, m in zip(both, matters, strict=True))
        assert torch.equal(found[both], found[False, False]) != asked, both
        if asked:
            assert errors[both] > 3 * errors[False, False]  # it was TF32
        assert errors[both] <= FACTOR * max(theirs[both], EXACT), both


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("models") / "sd", "sd")


def test_the_loop_reads_them(folder):
    fast = accel.compile(pipeline(folder).to("cuda", torch.float32))
    found = []
    for both in ((False, False), (True, True), (False, False)):
        switch(*both)
        with loop_ran(fast):
            found.append(draw(fast, num_inference_steps=5))
    exact, rounded, again = (torch.as_tensor(x) for x in found)
    assert torch.equal(exact, again)
    if HAS_TF32:
        assert 1e-6 < float((rounded - exact).abs().max()) < 0.2
    else:
        assert torch.equal(rounded, exact)


def test_half_precision_has_one_plan():
    module = fill(make("clip_l", torch.float16), 1)
    with compiled(module, runs=2):
        exact = clip_call(module, 1)
        switch(True, True)
        assert torch.equal(clip_call(module, 1), exact)
        assert accel.report(module)["plans"] == 1

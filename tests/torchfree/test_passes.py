"""The fused graph against the graph as built, for whole networks on the CPU."""

import json

import numpy as np
import pytest

from accel import _core

PASSES = ("simplify", "cse", "merge_linears", "phase_upsample", "fuse_norm", "fuse_epilogue")
PARTS = {
    "unet": ("diffusion_pytorch_model", {"entry": "forward", "batch": 2, "height": 16, "width": 12,
                                             "tokens": 9, "timesteps": 1}),
    "vae": ("diffusion_pytorch_model", {"entry": "decode", "batch": 1, "height": 9, "width": 8}),
    "text_encoder": ("model", {"entry": "forward", "batch": 2, "tokens": 9}),
}  # fmt: skip


def random_inputs(model, args):
    """Random arrays for every input of the network."""
    rng = np.random.default_rng(7)
    arrays = {}
    for name, shape, dtype, is_output in model.io(args):
        if is_output:
            continue
        if dtype == "int64":
            arrays[name] = rng.integers(0, 20, shape, dtype=np.int64)
        else:
            arrays[name] = rng.standard_normal(shape).astype(dtype)
        if name == "timestep":
            arrays[name] = np.full(shape, 321.0, np.float32)
    return arrays


def run(folder, part, off):
    """Outputs by name, steps of the plan, and how often the network ran."""
    stem, args = PARTS[part]
    weights = _core.Weights()
    weights.add_folder(folder / part, stem)
    model = _core.Model((folder / part / "config.json").read_text(), weights, "cpu", off)
    outputs = {n: np.full(s, np.nan, d) for n, s, d, is_output in model.io(args) if is_output}
    model.run(args, random_inputs(model, args), outputs)
    steps = len(json.loads(model.explain(args, json=True))["steps"])
    return outputs, steps, model.stats()["runs"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("off", [*PASSES, "all"])
def test_a_pass_changes_no_result(sd_folder, part, off):
    fused, fewer, _ = run(sd_folder, part, "")
    plain, more, runs = run(sd_folder, part, off)
    assert runs == 1
    assert more >= fewer
    assert off != "all" or more > fewer
    for name, value in plain.items():
        scale = np.abs(value).max()
        assert np.isfinite(scale) and scale > 0
        assert np.abs(fused[name] - value).max() <= 1e-5 * scale, name


def test_an_unknown_pass_is_named(sd_folder):
    with pytest.raises(_core.InvalidArgument, match="nonsense"):
        run(sd_folder, "unet", "nonsense")

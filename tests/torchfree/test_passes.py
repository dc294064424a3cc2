"""The fused graph against the graph as built, for whole networks on the CPU."""

import json
from pathlib import Path

import numpy as np
import pytest

from accel import _core

PASSES = ("simplify", "cse", "merge_linears", "phase_upsample", "fuse_norm", "fuse_epilogue",
          "rescale")
PARTS = {
    "unet": ("diffusion_pytorch_model", {"entry": "forward", "batch": 2, "height": 16, "width": 12,
                                             "tokens": 9, "timesteps": 1}),
    "vae": ("diffusion_pytorch_model", {"entry": "decode", "batch": 1, "height": 9, "width": 8}),
    "text_encoder": ("model", {"entry": "forward", "batch": 2, "tokens": 9}),
}  # fmt: skip


CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = {
    "unet": {"batch": 2, "height": 64, "width": 64, "tokens": 77, "timesteps": 20, "loop": True},
    "vae": {"entry": "decode", "height": 64, "width": 64},
    "clip": {"tokens": 77},
}


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


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda p: p.stem)
def test_the_graph_after_each_pass_is_json(path):
    model = _core.Model(path.read_text(), None, "null")
    args = next(a for part, a in SIZES.items() if part in path.stem)
    explained = json.loads(model.explain(args, json=True, passes=True))
    text = model.explain(args, passes=True)
    titles = [line for line in text.splitlines() if line.startswith("== ")]
    assert [p["pass"] for p in explained["passes"]] == ["built", *PASSES]
    assert titles == [f"== {p['pass']}: {p['why']} ({len(p['graph']['nodes'])} nodes)"
                      for p in explained["passes"]]
    for dumped in explained["passes"]:
        check_graph(dumped["graph"], model.io(args))
    check_plan(explained["plan"], explained["passes"][-1]["graph"])
    assert explained["plan"] == json.loads(model.explain(args, json=True))


def check_graph(graph, io):
    """Every id is made once and before its use; inputs and outputs are the model's."""
    assert list(graph) == ["inputs", "weights", "nodes", "outputs"]
    sources = graph["inputs"] + graph["weights"]
    types = {v["id"]: (v["shape"], v["dtype"]) for v in sources}
    assert all(set(v) == {"id", "name", "rate", "dtype", "shape"} for v in sources)
    assert {v["rate"] for v in graph["weights"]} == {"load"}
    used = set()
    for node in graph["nodes"]:
        assert set(node) == {"rate", "op", "node", "output", "attr", "input"}
        assert all(i is None or i in types for i in node["input"]), node
        assert node["output"]["id"] not in types
        types[node["output"]["id"]] = (node["output"]["shape"], node["output"]["dtype"])
        used.update(node["input"])
        if node["op"] == "conv2d":
            assert len(node["attr"]["pad"]) == 4 and node["attr"]["stride"] in (1, 2)
        if node["op"] in ("linear", "conv2d", "group_norm"):
            assert isinstance(node["attr"]["act"], str)
        if node["op"] == "attention":
            assert node["attr"]["scale"] == pytest.approx(
                (types[node["input"][0]][0][2] / node["attr"]["heads"]) ** -0.5, rel=1e-6)
    assert {v["id"] for v in graph["weights"]} <= used
    ends = [(v["name"], *types[v["id"]], False) for v in graph["inputs"]]
    ends += [(v["name"], *types[v["id"]], True) for v in graph["outputs"]]
    assert sorted(ends) == sorted((n, list(s), d, out) for n, s, d, out in io)


def check_plan(plan, graph):
    """The plan calls what the graph has by the same names."""
    nodes = {(n["node"], n["op"]): n for n in graph["nodes"]}
    found = [nodes.get((s["node"], s["op"])) for s in plan["steps"]]
    assert sum(n is not None for n in found) > 0.9 * len(found)  # the others are copies of views
    for step, node in zip(plan["steps"], found, strict=True):
        if node is not None:
            assert (step["attr"], step["rate"]) == (node["attr"], node["rate"])
            assert len(step["input"]) == len(node["input"])

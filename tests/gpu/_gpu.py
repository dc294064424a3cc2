"""What the GPU tests share: full-size modules with random weights made on the GPU, and the bound.

The bound of the project: over the seeds, the mean of our errors against PyTorch in float32 is at
most 1.1 times that of PyTorch in the same half precision on the same weights (those the half
precision holds, in float32 too).  An error is the root mean square of the difference over that of
the truth.
"""

import contextlib
import gc
import json
import os
import pathlib

import torch

import accel

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FACTOR = 1.1
SEEDS = 4
HALVES = (torch.float16, torch.bfloat16)
HAS_TF32 = os.environ.get("ACCEL_FORCE_ARCH") != "75" and torch.cuda.is_available() and (
    torch.cuda.get_device_capability() >= (8, 0))


def note(kind, what, text, **figures):
    """Prints a line of the record, and adds it to the file that tools/gpu_test.py reads."""
    print(f"\n{kind} {what}: {text}", flush=True)
    path = os.environ.get("ACCEL_TEST_FIGURES")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"kind": kind, "what": what} | figures) + "\n")


def config_of(name):
    """A published config by the name of its file."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


def make(name, dtype=torch.float32, **changes):
    """The module of a published config on the GPU, in eval mode, its weights not filled."""
    config = config_of(name)
    with torch.device("cuda"):
        if "architectures" in config:
            import transformers

            cls = getattr(transformers, config["architectures"][0])
            module = cls(transformers.CLIPTextConfig(**config))
        else:
            import diffusers

            cls = getattr(diffusers, config["_class_name"])
            fields = {k: v for k, v in config.items() if not k.startswith("_")}
            module = cls(**(fields | changes))
    return module.to("cuda", dtype).eval()


@torch.no_grad()
def fill(module, seed):
    """Overwrites every parameter: variance 1/fan_in, biases and norms far from zero and one."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for name, p in module.named_parameters():
        value = torch.randn(p.shape, generator=generator, device="cuda")
        if p.ndim == 1:
            value = value.mul_(0.25).add_(1.0 if name.endswith("weight") else 0.0)
        elif "embedding" not in name or "linear" in name:
            value = value.mul_(p[0].numel() ** -0.5)
        p.copy_(value)
    return module


def randn(*shape, seed, dtype=torch.float32):
    """Normals on the GPU, rounded to half precision so that all dtypes see the same numbers."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16().to(dtype)


def rms(x):
    """Root mean square, in float64 but by pieces: results are large."""
    return (sum(p.double().square().sum() for p in x.flatten().split(1 << 26)) / x.numel()).sqrt()


def error(found, truth):
    """Relative root mean square; not finite counts as infinite."""
    found, truth = found.float(), truth.float()
    assert found.shape == truth.shape, (found.shape, truth.shape)
    if not torch.isfinite(found).all():
        return float("inf")
    return float(rms(found - truth) / rms(truth))


def free():
    """Gives PyTorch's cached memory back."""
    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def compiled(module, runs=1, passes_off=""):
    """The module with the engine in front; on the way out `runs` native runs must be reported, and
    no fallback."""
    accel.compile(module, passes_off=passes_off)
    try:
        yield module
        torch.cuda.synchronize()
        report = accel.report(module)
        assert not report["fallbacks"], report["fallbacks"]
        assert report["native_runs"] == runs, report
    finally:
        accel.decompile(module)


def check_errors(ours, theirs, what, factor=FACTOR):
    """The bound on the means; prints both, for the record."""
    mine, other = sum(ours) / len(ours), sum(theirs) / len(theirs)
    note("PARITY", what, f"ours {mine:.3e}, PyTorch's own {other:.3e}, {mine / other:.3f} of it "
         f"over {len(ours)} seeds", ours=mine, pytorch=other, ratio=round(mine / other, 4),
         allowed=factor, seeds=len(ours))
    assert 0.0 < other < 0.5, f"{what}: {other} proves nothing, choose another case"
    assert mine <= factor * other, f"{what}: found {ours}, PyTorch's own {theirs}"


def half_parity(name, dtype, call, inputs, case="", seeds=SEEDS, **changes):
    """The bound for one module: `call(module, inputs)` gives a tensor or a dict of tensors.

    The module is compiled once: for the later seeds the engine must notice the new weights.

    Parameters
    ----------
    inputs : callable(seed, dtype) -> what call takes
    case : str, what the record calls it beside the names of the module and the dtype
    """
    half, full = make(name, dtype, **changes), make(name, **changes)
    truths, ours, theirs = [], {}, {}
    for seed in range(seeds):
        fill(half, seed)
        full.load_state_dict(half.state_dict())
        truths.append(results(call(full, inputs(seed, torch.float32))))
        for key, found in results(call(half, inputs(seed, dtype))).items():
            assert found.dtype == dtype, key
            theirs.setdefault(key, []).append(error(found, truths[seed][key]))
    del full
    free()
    with compiled(half, runs=seeds):
        for seed in range(seeds):
            fill(half, seed)
            for key, found in results(call(half, inputs(seed, dtype))).items():
                assert found.dtype == dtype, key
                ours.setdefault(key, []).append(error(found, truths[seed][key]))
    for key in theirs:
        what = " ".join(filter(None, (name, str(dtype)[6:], case, key)))
        check_errors(ours[key], theirs[key], what)


def results(value):
    """A dict of tensors of whatever a call gave."""
    return value if isinstance(value, dict) else {"": value}

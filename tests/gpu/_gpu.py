"""What the GPU tests share: full-size modules with random weights made on the GPU, and the bound.

The bound of the project: over the seeds, the mean of our errors against PyTorch in float32 is at
most 1.1 times that of PyTorch in the same half precision on the same weights (those the half
precision holds, in float32 too).  An error is the root mean square of the difference over that of
the truth.
"""

import contextlib
import gc
import json
import pathlib

import torch

import accel

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FACTOR = 1.1
HALVES = (torch.float16, torch.bfloat16)


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
def compiled(module, runs=1):
    """The module with the engine in front; on the way out `runs` native runs must be reported, and
    no fallback."""
    accel.compile(module)
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
    print(f"\nPARITY {what}: ours {mine:.3e}, PyTorch's own {other:.3e}, "
          f"{mine / other:.3f} of it over {len(ours)} seeds", flush=True)
    assert 0.0 < other < 0.5, f"{what}: {other} proves nothing, choose another case"
    assert mine <= factor * other, f"{what}: found {ours}, PyTorch's own {theirs}"


def half_parity(name, dtype, call, inputs, seeds, **changes):
    """The bound for one module: `call(module, inputs)` gives a tensor or a dict of tensors.

    Parameters
    ----------
    inputs : callable(seed, dtype) -> what call takes
    """
    half, full = make(name, dtype, **changes), make(name, **changes)
    ours, theirs = {}, {}
    for seed in range(seeds):
        fill(half, seed)
        full.load_state_dict(half.state_dict())
        truth = results(call(full, inputs(seed, torch.float32)))
        reference = results(call(half, inputs(seed, dtype)))
        with compiled(half):
            found = results(call(half, inputs(seed, dtype)))
        for key, exact in truth.items():
            assert found[key].dtype == reference[key].dtype, key
            ours.setdefault(key, []).append(error(found[key], exact))
            theirs.setdefault(key, []).append(error(reference[key], exact))
        del truth, reference, found
        free()
    for key in ours:
        check_errors(ours[key], theirs[key], f"{name} {str(dtype)[6:]} {key}".rstrip())


def results(value):
    """A dict of tensors of whatever a call gave."""
    return value if isinstance(value, dict) else {"": value}

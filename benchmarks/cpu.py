"""Time accel against PyTorch eager on the CPU, and print README's tables.

    python benchmarks/cpu.py                 # everything
    python benchmarks/cpu.py models --pairs 5 --threads 2
    python benchmarks/cpu.py demo plans

Machines that are shared vary by a factor of two within minutes, so accel and PyTorch take turns on
the same module, with the same number of threads, and the figure that counts is the median of the
ratios of neighbouring calls.  Weights and inputs are random, never zeros.  Each timed module is
checked first: the outputs agree, and report() says that the native path ran.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "tests" / "configs"


def config_of(name: str) -> dict:
    """Return a published config, tests/configs/<name>.json."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print one Markdown table."""
    print(f"\n{title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


# ---- models against PyTorch eager ----------------------------------------------------------------


def randomise(module) -> None:
    """Fill every parameter so that activations stay of order one, zero-initialised ones too."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        fan_in = p[0].numel() if p.dim() > 1 else 1
        with torch.no_grad():
            p.normal_(0.0, (1.0 / fan_in) ** 0.5 if p.dim() > 1 else 0.1, generator=generator)
            if p.dim() == 1 and "norm" in name and name.endswith("weight"):
                p.add_(1.0)


def sd15_unet():
    """Return the SD 1.5 UNet and the arguments of one guided call at 512x512."""
    import torch
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel.from_config(config_of("sd15_unet"))
    args = (torch.randn(2, 4, 64, 64), torch.tensor(500), torch.randn(2, 77, 768))
    return module, "forward", args, lambda out: out.sample


def vae_decoder():
    """Return the SD VAE and the arguments of one 512x512 decode."""
    import torch
    from diffusers import AutoencoderKL

    module = AutoencoderKL.from_config(config_of("sd_vae"))
    return module, "decode", (torch.randn(1, 4, 64, 64),), lambda out: out.sample


def clip_l():
    """Return CLIP-L and the arguments of one call on two prompts."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    module = CLIPTextModel(CLIPTextConfig(**config_of("clip_l")))
    ids = torch.randint(0, 49408, (2, 77))
    ids[:, -1] = 49407
    return module, "forward", (ids,), lambda out: out.last_hidden_state


MODELS = {
    "SD1.5 UNet, 64x64 latents, batch 2, 77 tokens": sd15_unet,
    "VAE decode, 512x512": vae_decoder,
    "CLIP-L, 2 x 77 tokens": clip_l,
}


def native_runs(module) -> int:
    """Return how often the native path ran, and fail if the original forward ever did."""
    import accel

    report = accel.report(module)
    if report["fallbacks"]:
        raise SystemExit(f"the original forward ran: {report}")
    return report["native_runs"]


def compare(make, pairs: int) -> tuple[float, float, float]:
    """Return the medians of accel's and PyTorch's seconds and of their ratio."""
    import torch

    import accel

    module, method, args, pick = make()
    module.eval()
    randomise(module)
    stock = copy.deepcopy(module)
    stock.load_state_dict(module.state_dict(keep_vars=True), assign=True)  # one set of weights
    eager = getattr(stock, method)
    accel.compile(module)
    native = getattr(module, method)
    with torch.no_grad():
        ours, theirs = pick(native(*args)), pick(eager(*args))
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not error < 1e-3:
            raise SystemExit(f"{make.__name__}: the outputs differ by {error}")
        times = []
        for _ in range(pairs):
            start = time.perf_counter()
            native(*args)
            middle = time.perf_counter()
            eager(*args)
            times.append((middle - start, time.perf_counter() - middle))
    if native_runs(module) != pairs + 1:
        raise SystemExit(f"{make.__name__}: not every call was native")
    return (
        statistics.median(t[0] for t in times),
        statistics.median(t[1] for t in times),
        statistics.median(t[0] / t[1] for t in times),
    )


def models(options) -> None:
    """Print the table of models against PyTorch eager."""
    import torch

    import accel

    torch.set_num_threads(options.threads)
    accel.set_num_threads(options.threads)
    rows = []
    for name, make in MODELS.items():
        ours, theirs, ratio = compare(make, options.pairs)
        rows.append([name, f"{ours:.3f} s", f"{theirs:.3f} s", f"{ratio:.2f}"])
    table(
        f"fp32, {options.threads} threads, PyTorch {torch.__version__}, medians of "
        f"{options.pairs} alternating pairs",
        ["one call", "accel", "PyTorch eager", "accel / PyTorch"],
        rows,
    )


# ---- the demo, from process start to PNG ---------------------------------------------------------


def demo(options) -> None:
    """Print how long `accel generate` takes with the shipped model."""
    seconds = []
    env = dict(os.environ, ACCEL_THREADS=str(options.threads))
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.pairs):
            command = [sys.executable, "-m", "accel", "generate", "a red house by a lake at sunset"]
            command += ["--steps", "20", "--seed", str(i), "--quiet", "-o", f"{folder}/{i}.png"]
            start = time.perf_counter()
            subprocess.run(command, check=True, env=env, cwd=folder)
            seconds.append(time.perf_counter() - start)
    table(
        f"`accel generate`, 256x256, 20 steps with guidance, process start to PNG, "
        f"{options.threads} threads, {options.pairs} runs",
        ["median", "fastest", "slowest"],
        [[f"{f(seconds):.2f} s" for f in (statistics.median, min, max)]],
    )


# ---- plans: memory and time ----------------------------------------------------------------------

PLANS = [
    ("SD1.5 UNet 512x512, batch 2", "sd15_unet", {"entry": "forward", "batch": 2, "size": 64}),
    ("SDXL UNet 1024x1024, batch 2", "sdxl_base_unet",
     {"entry": "forward", "batch": 2, "size": 128}),
    ("SD VAE decode 512x512", "sd_vae", {"entry": "decode", "batch": 1, "size": 64}),
    ("SDXL VAE decode 1024x1024", "sdxl_vae", {"entry": "decode", "batch": 1, "size": 128}),
]


def plans(options) -> None:
    """Print arena against live-range lower bound, and planning time, on the null device."""
    from accel import _core

    rows = []
    for title, name, shape in PLANS:
        args = {
            "entry": shape["entry"],
            "batch": shape["batch"],
            "height": shape["size"],
            "width": shape["size"],
            "tokens": 77,
            "timesteps": 1,
        }
        milliseconds = []
        for _ in range(options.pairs):
            model = _core.Model(json.dumps(config_of(name)), None, device="null")
            model.io(args)
            milliseconds.append(model.stats()["plan_ms"])
        stats = model.stats()
        rows.append(
            [
                title,
                f"{stats['arena_bytes'] / 1e6:.1f} MB",
                f"{stats['arena_bytes'] / stats['bound_bytes']:.3f}",
                f"{statistics.median(milliseconds):.1f} ms",
            ]
        )
    table(
        "Plans on the null device",
        ["plan", "activation arena", "of the live-range lower bound", "time to plan"],
        rows,
    )


PARTS = {"models": models, "demo": demo, "plans": plans}


def main() -> None:
    """Run the parts named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--pairs", type=int, default=3, help="runs, or pairs of runs (3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both (all cores)")
    options = parser.parse_args()
    if set(options.parts) - PARTS.keys():
        parser.error(f"unknown part, expected some of {', '.join(PARTS)}")
    for name in options.parts or PARTS:
        PARTS[name](options)


if __name__ == "__main__":
    main()

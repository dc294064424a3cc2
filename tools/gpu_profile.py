#!/usr/bin/env python3
"""Where the time of one network goes on the GPU: accel.explain(profile=True) as text and JSON.

    python tools/gpu_profile.py sd15|sdxl|vae512|vae1024|clip_l|clip_bigg [--out FOLDER]

Random weights, float16; needs PyTorch and diffusers.  Prints the tables and writes
profile_<network>.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_networks
import torch

import accel


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("network", choices=gpu_networks.cases())
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--tiny", action="store_true", help="try this script on the CPU")
    args = parser.parse_args()
    gpu_networks.TINY = args.tiny
    torch.set_grad_enabled(False)
    _, config, call, _ = gpu_networks.cases()[args.network]
    module = accel.compile(gpu_networks.make(config, torch.float16))
    call(module, torch.float16)()
    report = accel.report(module)
    assert report["native_runs"] == 1, report
    print(accel.explain(module, profile=True))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"profile_{args.network}.json"
    path.write_text(accel.explain(module, profile=True, json=True))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

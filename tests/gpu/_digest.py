"""What one process computes, as digests: `python tests/gpu/_digest.py`, for test_processes.py.

Networks of full size and a whole loop in float16, each called often enough that recordings are
replayed.  Prints one JSON object, {what: digest}; every call of a network must give the same bits.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("ACCEL_TEST_FIGURES", None)
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "torchfree"), str(HERE.parent / "drop_in")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _gpu import compiled, fill, make, randn  # noqa: E402

import accel  # noqa: E402

CALLS = 4
HALF = torch.float16


def digest(x):
    x = x.cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    assert np.isfinite(x.astype(np.float32)).all() and x.std() > 0
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]


def same_calls(module, call):
    """The digest of a compiled module's call, the same each time."""
    with compiled(module, runs=CALLS):
        found = {digest(call(module)) for _ in range(CALLS)}
    assert len(found) == 1, "calls differ"
    return found.pop()


def unet(seed):
    sample = randn(2, 4, 64, 64, seed=seed, dtype=HALF)
    states = randn(2, 77, 768, seed=seed + 1, dtype=HALF)
    return lambda m: m(sample, 501, states, return_dict=False)[0]


def networks():
    module = fill(make("sd15_unet", HALF), 1)
    for seed in (1, 2):
        yield f"unet, seed {seed}", same_calls(module, unet(seed))
    module = fill(make("sd_vae", HALF), 1)
    z, x = randn(1, 4, 33, 40, seed=3, dtype=HALF), randn(1, 3, 256, 256, seed=4, dtype=HALF)
    yield "decode", same_calls(module, lambda m: m.decode(z, return_dict=False)[0])
    yield "encode", same_calls(module, lambda m: m.encode(x).latent_dist.mean)
    module = fill(make("clip_l", HALF), 1)
    ids = torch.randint(1, 49400, (2, 77), generator=torch.Generator().manual_seed(5)).cuda()
    yield "clip_l", same_calls(module, lambda m: m(ids).last_hidden_state)


def picture():
    """The shipped model's, twice."""
    pipe = accel.Pipeline.from_pretrained(accel.demo_model(), device="cuda", dtype="float16")
    found = {digest(pipe("a red house by a lake", num_inference_steps=8, seed=3, height=256,
                         width=256, output_type="np", progress_bar=False).images)
             for _ in range(2)}
    report = accel.report(pipe)["components"]
    assert all(report[n]["native_runs"] for n in ("text_encoder", "unet", "vae")), report
    assert len(found) == 1, "two runs differ"
    return found.pop()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    print(json.dumps(dict(networks()) | {"picture": picture()}))

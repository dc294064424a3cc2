"""What the parity tests share: the truth, the bound, and how the native models are called.

The truth is the same module in float64, its sinusoids too (diffusers computes those in float32
whatever the module's dtype, and at t = 999 float32 arguments are wrong by 6e-5).  The bound on our
largest error is three times PyTorch's own in float32, relative to the output's scale.
"""

import contextlib
import copy
import math

import numpy as np
import torch
from diffusers.models import embeddings

#: Added to the bound: four roundings of the largest output, where PyTorch happens to be exact.
FLOOR = 2.5e-7
FACTOR = 3.0


def _exact_timestep_embedding(
    timesteps, embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1,
    max_period=10000,
):  # fmt: skip
    half = embedding_dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float64)
    frequency = torch.exp(exponent / (half - downscale_freq_shift))
    angle = scale * timesteps[:, None].float().double() * frequency[None, :]
    halves = [torch.cos(angle), torch.sin(angle)]
    row = torch.cat(halves if flip_sin_to_cos else halves[::-1], dim=-1)
    return torch.nn.functional.pad(row, (0, embedding_dim % 2))


@contextlib.contextmanager
def exact_sinusoids():
    """While it is open, diffusers' timestep embeddings are computed in float64."""
    original = embeddings.get_timestep_embedding
    embeddings.get_timestep_embedding = _exact_timestep_embedding
    try:
        yield
    finally:
        embeddings.get_timestep_embedding = original


def doubled(value):
    """Floating-point tensors in `value` (nested in dicts, lists, tuples) as float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(doubled(item) for item in value)
    return value


@torch.no_grad()
def reference_and_truth(module, call):
    """`call(module, f)` with the module as it is and f the identity, then with both in float64.

    `call` returns a dict of tensors; so does each half of the result.
    """
    reference = call(module, lambda value: value)
    with exact_sinusoids():
        truth = call(copy.deepcopy(module).double(), doubled)
    return reference, truth


def to_numpy(value) -> np.ndarray:
    """An array of any tensor-like object, in float64."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float64)
    if not isinstance(value, torch.Tensor):
        value = torch.from_dlpack(value)
    return value.detach().double().numpy()


def largest_error(found, truth) -> float:
    """Largest absolute difference over the truth's largest absolute value."""
    found, truth = to_numpy(found), to_numpy(truth)
    assert found.shape == truth.shape, f"found {found.shape}, expected {truth.shape}"
    assert np.isfinite(found).all(), "found values that are not finite"
    assert np.isfinite(truth).all(), "the truth itself is not finite: choose another case"
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def assert_parity(found: dict, reference: dict, truth: dict, factor: float = FACTOR) -> float:
    """Checks every output of `truth`; returns the widest bound, for `assert_sensitive`."""
    widest = 0.0
    for name, exact in truth.items():
        theirs = largest_error(reference[name], exact)
        ours = largest_error(found[name], exact)
        bound = factor * theirs + FLOOR
        assert ours <= bound, f"{name}: error {ours:.2e}, PyTorch's own {theirs:.2e}"
        widest = max(widest, bound)
    assert 0.0 < widest < 1e-3, f"a bound of {widest:.2e} proves nothing: choose another case"
    return widest


def dtype_of(value) -> torch.dtype:
    """The dtype of any tensor-like object, as PyTorch's."""
    return getattr(torch, str(value.dtype).removeprefix("torch."))


def assert_half_parity(cases: list) -> None:
    """Mean of our largest errors at most 1.1 times PyTorch's own in the same half precision.

    cases : (found, reference, truth), each a dict of tensors
    """
    ours, theirs = [], []
    for found, reference, truth in cases:
        for name, exact in truth.items():
            assert dtype_of(found[name]) == reference[name].dtype, name
            ours.append(largest_error(found[name], exact))
            theirs.append(largest_error(reference[name], exact))
    assert 0.0 < np.mean(theirs) < 0.5, f"{np.mean(theirs)} proves nothing: choose other cases"
    assert np.mean(ours) <= 1.1 * np.mean(theirs), f"found {ours}, PyTorch's own {theirs}"


def assert_sensitive(changed, original, bound: float, what: str) -> None:
    """Changing `what` must change the output by far more than the bound of the comparison."""
    moved = largest_error(changed, original)
    assert moved > 100.0 * bound, f"{what}: the output moved by {moved:.2e}, bound {bound:.2e}"

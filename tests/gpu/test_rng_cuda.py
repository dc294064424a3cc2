"""accel.Generator against PyTorch's CUDA generator on this very card."""

import numpy as np
import pytest
import torch

import accel

COUNTS = (1, 5, 1000, 4 * 64 * 64, 2 * 4 * 128 * 128, 1 << 20, 3_000_001)
NEAR = 1e-5  # absolute, of values up to 6: logarithms and sines of two libraries


def both(seed):
    card = torch.cuda.get_device_properties(0)
    return (torch.Generator("cuda").manual_seed(seed),
            accel.Generator(seed, processors=card.multi_processor_count,
                            threads=card.max_threads_per_multi_processor))


@pytest.mark.parametrize("seed", [0, 42, 2**63 + 11])
def test_normals_and_states(seed):
    """Draws one after the other, each count twice, and what the generators then are."""
    theirs, ours = both(seed)
    worst = 0.0
    for count in COUNTS + COUNTS[::-1]:
        expected = torch.randn(count, generator=theirs, device="cuda").cpu().numpy()
        found = np.frombuffer(ours.normal(count), np.float32)
        assert found.shape == expected.shape and np.isfinite(found).all()
        worst = max(worst, float(np.abs(found - expected).max()))
        assert bytes(ours.to_torch_state()) == theirs.get_state().numpy().tobytes(), count
    assert worst < NEAR, worst
    a, b = (np.frombuffer(both(s)[1].normal(1000), np.float32) for s in (seed, seed + 1))
    assert np.abs(a - b).max() > 1


def test_half_precision():
    theirs, ours = both(7)
    for count in COUNTS:
        expected = torch.randn(count, generator=theirs, device="cuda", dtype=torch.float16)
        found = np.frombuffer(ours.normal(count, half=True), np.float32)
        difference = np.abs(found - expected.float().cpu().numpy())
        assert (difference <= 2e-3 * np.maximum(1, np.abs(found))).all(), difference.max()
    assert bytes(ours.to_torch_state()) == theirs.get_state().numpy().tobytes()


def test_a_state_goes_on_from_there():
    theirs, ours = both(3)
    torch.randn(1000, generator=theirs, device="cuda")
    ours.set_torch_state(theirs.get_state().numpy())
    expected = torch.randn(5000, generator=theirs, device="cuda").cpu().numpy()
    assert np.abs(np.frombuffer(ours.normal(5000), np.float32) - expected).max() < NEAR

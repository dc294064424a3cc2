"""Parity tests run without gradients, and PyTorch on one thread.

The models are small: on a busy machine PyTorch's threads wait for each other a hundred times longer
than they work.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield

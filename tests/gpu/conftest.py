"""Tests that need an NVIDIA GPU, PyTorch for CUDA and diffusers: `make test-gpu`.

Skipped, with one line, where there is no GPU.  The truth is PyTorch in float32 without TF32.  Tests
that are marked `alone` look at the memory of the whole GPU: nothing else may run beside them.
"""

import gc
import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from _figures import pytest_runtest_logreport  # noqa: E402, F401

torch = pytest.importorskip("torch")
HERE = pathlib.Path(__file__).parent


def pytest_configure(config):
    from diffusers.utils import logging

    logging.set_verbosity_error()  # a warning at each module.to(dtype)
    config.addinivalue_line("markers", "alone: looks at the memory of the whole GPU")


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason="no GPU")
    for item in items:
        if HERE in item.path.parents and not torch.cuda.is_available():
            item.add_marker(missing)


@pytest.fixture(autouse=True)
def _exact_and_clean():
    """No gradients, no TF32, and nothing of one test in the next one's memory."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield
    gc.collect()
    torch.cuda.empty_cache()

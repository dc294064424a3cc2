"""Tests of accel.compile: PyTorch and diffusers on the CPU, small modules, every weight random."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "torchfree"))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("models") / "sd", "sd")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("models") / "sdxl", "sdxl")


@pytest.fixture(scope="module")
def sd(sd_folder):
    """A stock pipeline and a compiled one."""
    import dropin

    return dropin.pair(sd_folder)


@pytest.fixture(scope="module")
def xl(sdxl_folder):
    import dropin

    return dropin.pair(sdxl_folder)

"""Parity tests: one thread each, since the machines that run them are small and shared."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: full-size models, tens of seconds each")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield

"""Fixtures of the tests that need no PyTorch: tiny model folders made by NumPy."""

import pytest
import tiny


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("models") / "sd", "sd")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("models") / "sdxl", "sdxl")

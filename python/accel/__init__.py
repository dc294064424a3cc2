"""accel: Stable Diffusion pipelines, fast.

Three ways in, one engine underneath::

    pipe.unet = accel.compile(pipe.unet)           # inside a diffusers program
    pipe = accel.compile(pipe)                     # every component of it
    pipe = accel.Pipeline.from_pretrained(folder)  # without PyTorch

Importing accel loads neither PyTorch nor diffusers, and needs no GPU.
"""

import importlib
from pathlib import Path as _Path

from . import _core
from ._core import (
    AccelError,
    Cancel,
    Cancelled,
    DeviceError,
    DTypeError,
    FileError,
    FormatError,
    InternalError,
    InvalidArgument,
    NumericError,
    OutOfMemory,
    ShapeError,
    Tensor,
    UnsupportedError,
    WeightsError,
)
from ._core import Rng as Generator
from ._core import version as __version__
from .threads import get_num_threads, set_num_threads

_core.set_library_folder(str(_Path(__file__).parent))

# name -> module that has it; imported when first asked for, so that `import accel` stays cheap
_LAZY = {
    "Pipeline": "pipeline",
    "UNet": "components",
    "VAE": "components",
    "TextEncoder": "components",
    "Tokenizer": "tokenizer",
    "compile": "compile_",
    "decompile": "compile_",
    "refresh": "compile_",
    "report": "reporting",
    "explain": "reporting",
    "FallbackWarning": "torch_native",
}

__all__ = [
    "AccelError",
    "Cancel",
    "Cancelled",
    "DTypeError",
    "DeviceError",
    "FallbackWarning",
    "FileError",
    "FormatError",
    "Generator",
    "InternalError",
    "InvalidArgument",
    "NumericError",
    "OutOfMemory",
    "Pipeline",
    "ShapeError",
    "Tensor",
    "TextEncoder",
    "Tokenizer",
    "UNet",
    "UnsupportedError",
    "VAE",
    "WeightsError",
    "__version__",
    "compile",
    "decompile",
    "demo_model",
    "explain",
    "get_num_threads",
    "refresh",
    "report",
    "set_num_threads",
]


def demo_model():
    """Folder of the small model that ships with accel: 256x256 landscapes."""
    return _Path(__file__).parent / "demo_model"


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module 'accel' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"accel.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__

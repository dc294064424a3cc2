"""PyTorch's switches for TF32: read in both of their forms, and part of what a plan is made for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from accel import _core, torch_tf32

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = {"batch": 2, "height": 16, "width": 16, "tokens": 7, "timesteps": 1}

# Each line changes a switch; what must be read then: matmuls 1, convolutions 2.
OLD = [
    ("pass", 2),
    ("torch.backends.cuda.matmul.allow_tf32 = True", 3),
    ("torch.backends.cudnn.allow_tf32 = False", 1),
    ("torch.backends.cuda.matmul.allow_tf32 = False", 0),
    ("torch.set_float32_matmul_precision('high')", 1),
    ("torch.set_float32_matmul_precision('highest')", 0),
    ("torch.set_float32_matmul_precision('medium')", 1),
    ("torch.backends.cudnn.allow_tf32 = True", 3),
]
NEW = [
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", 3),
    ("torch.backends.cudnn.conv.fp32_precision = 'ieee'", 1),
    ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", 0),
    ("torch.backends.cudnn.conv.fp32_precision = 'tf32'", 2),
]
EVERYWHERE = [
    ("torch.backends.fp32_precision = 'tf32'", 3),
    ("torch.backends.fp32_precision = 'ieee'", 0),
]


@pytest.mark.parametrize("steps", [OLD, NEW, OLD + NEW, NEW[:2] + OLD[5:], EVERYWHERE],
                         ids=["old", "new", "new_after_old", "old_after_new", "everywhere"])
def test_the_switches(steps):
    """In a process of its own: PyTorch cannot forget that a switch was touched."""
    script = "import torch, warnings\nwarnings.simplefilter('error')\n"
    script += "from accel import torch_tf32\n"
    for line, _ in steps:
        script += f"{line}\nprint(torch_tf32.allowed())\n"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True,
                          text=True)
    assert [int(line) for line in done.stdout.split()] == [want for _, want in steps]


def test_only_float32_on_a_gpu_asks(monkeypatch):
    monkeypatch.setattr(torch_tf32, "allowed", lambda: 3)
    assert torch_tf32.of(torch.device("cuda", 1), "float32") == 3
    assert torch_tf32.of(torch.device("cuda"), "float16") == 0
    assert torch_tf32.of(torch.device("cpu"), "float32") == 0


def explained(tf32, compute="float32", device="null"):
    """{(op, whether its weight is a convolution's): {tf32 of its steps}} of a UNet's plan."""
    model = _core.Model((CONFIGS / "sd15_unet.json").read_text(), None, device)
    args = SIZES | {"compute": compute, "io_dtype": compute, "tf32": tf32}
    found = {}
    for step in json.loads(model.explain(args, True))["steps"]:
        weight = len(step["input"]) > 1 and step["input"][1]
        conv = bool(weight) and weight["space"] in ("weight", "derived") and (
            len(weight["shape"]) > 3)
        found.setdefault((step["op"], conv), set()).add(step["tf32"])
    return found


@pytest.mark.parametrize("tf32", range(4))
def test_a_plan_is_made_for_them(tf32):
    found = explained(tf32)
    matmul, conv = {bool(tf32 & 1)}, {bool(tf32 & 2)}
    assert found[("linear", False)] == found[("attention", False)] == matmul
    # proj_in and conv_shortcut are 1x1 convolutions, which PyTorch gives to cuDNN
    assert found[("linear", True)] == found[("conv2d", True)] == found[("up_conv2d", True)] == conv
    assert found[("group_norm", False)] == {False}


def test_half_precision_does_not_ask():
    assert set().union(*explained(3, "float16").values()) == {False}


def test_a_device_without_it_is_exact():
    assert set().union(*explained(3, device="cpu").values()) == {False}


def test_an_unknown_value_is_refused_by_name():
    with pytest.raises(_core.InvalidArgument, match="tf32"):
        explained(-1)

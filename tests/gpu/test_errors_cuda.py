"""Bad input and bad luck on a GPU: one clear exception each, and what comes after it works.

What ruins a device or needs another library runs in a process of its own (_children.py).
"""

import ctypes
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
for folder in ("torchfree", "drop_in"):
    sys.path.insert(0, str(HERE.parent / folder))

import tiny  # noqa: E402
from _gpu import free  # noqa: E402
from dropin import inputs as inputs_of  # noqa: E402
from dropin import module, ran  # noqa: E402

import accel  # noqa: E402
from accel import _core, cli  # noqa: E402

PACKAGE = pathlib.Path(accel.__file__).parent
MB = 1 << 20
PART = tiny.PARTS["sd"]["unet"]
INPUTS = (np.ones((2, 4, 8, 8), np.float32), 500, np.ones((2, 5, 24), np.float32))


def unet(device="cuda", weights=None, **options):
    return accel.UNet(PART["config"], weights or tiny.weights(PART["shapes"]), device=device,
                      **options)


def run_child(*arguments, package=PACKAGE, **environment):
    paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": ":".join(paths)} | environment
    child = subprocess.run([sys.executable, str(HERE / "_children.py"), *arguments], env=env,
                           text=True, capture_output=True, timeout=120)
    assert child.returncode == 0, child.stderr
    print(f"\nCHILD {' '.join(arguments)} {environment}: {child.stdout.strip()}")
    return json.loads(child.stdout)


def test_info(capsys):
    assert cli.main(["info", "--kernels"]) == 0
    said = capsys.readouterr().out
    for words in (torch.cuda.get_device_name(), "driver for CUDA", "cuBLASLt", "cuDNN 9.",
                  "kernels on cuda", "self-test:  passed"):
        assert words in said, said


# ---- places and dtypes ---------------------------------------------------------------------------


def test_a_gpu_that_is_not_there():
    count = torch.cuda.device_count()
    expected = f'found "cuda:{count}", expected "cuda:0".*: this machine has {count} GPU'
    for make_one in (unet, lambda d: accel.Pipeline.from_pretrained(accel.demo_model(), device=d)):
        with pytest.raises(accel.DeviceError, match=expected):
            make_one(f"cuda:{count}")
    assert np.isfinite(unet()(*INPUTS)).all()


def test_tensors_of_several_places():
    """Host arrays are copied; tensors of another device are refused by name and nothing ran."""
    fast = unet()
    expected = fast(*INPUTS)
    here = [torch.tensor(INPUTS[0], device="cuda"), 500, torch.tensor(INPUTS[2])]
    assert np.array_equal(torch.from_dlpack(fast(*here)).cpu(), expected)
    there = [INPUTS[0], 500, torch.tensor(INPUTS[2], device="cuda")]
    assert np.array_equal(fast(*there), expected)
    runs = accel.report(fast)["native_runs"]

    class There:
        shape, dtype = INPUTS[0].shape, "float32"

        def __dlpack_device__(self):
            return 2, 1

    with pytest.raises(accel.DeviceError, match="sample: found a tensor on cuda:1, expected one "
                                                "in host memory or on cuda:0"):
        fast(There(), *INPUTS[1:])
    weights = tiny.weights(PART["shapes"])
    There.shape = weights["conv_in.weight"].shape
    with pytest.raises(accel.DeviceError, match="conv_in.weight: found a tensor on cuda:1"):
        unet(weights=weights | {"conv_in.weight": There()})
    if torch.cuda.device_count() > 1:
        with pytest.raises(accel.DeviceError, match="found a tensor on cuda:1"):
            fast(here[0].to("cuda:1"), 500, here[2])
    assert accel.report(fast)["native_runs"] == runs
    with pytest.raises(accel.DeviceError, match="expected one in host memory"):
        unet("cpu")(here[0], *INPUTS[1:])


def test_dtypes():
    fast = unet()
    for array in (INPUTS[0].astype(np.float64), INPUTS[0].astype(np.int8)):
        with pytest.raises(accel.DTypeError, match=f"sample: found {array.dtype}"):
            fast(array, *INPUTS[1:])
        on_gpu = torch.tensor(array, device="cuda")
        with pytest.raises(accel.DTypeError, match=f"sample: found {array.dtype}"):
            fast(on_gpu, *INPUTS[1:])
    weights = tiny.weights(PART["shapes"])
    name = "conv_in.weight"
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises((accel.AccelError, BufferError), match=name):
            unet(weights=weights | {name: torch.tensor(weights[name], device="cuda").to(dtype)})(
                *INPUTS)
    for dtype in ("float64", "int8"):
        with pytest.raises(accel.DTypeError, match=f"dtype: found '{dtype}'"):
            unet(dtype=dtype)
    assert np.isfinite(fast(*INPUTS)).all()


# ---- memory --------------------------------------------------------------------------------------


def take_all_but(room):
    """A tensor that leaves `room` bytes of the GPU, no more kept by accel or PyTorch."""
    free()
    _core.trim("cuda")
    return torch.empty(torch.cuda.mem_get_info()[0] - room, dtype=torch.uint8, device="cuda")


def taken():
    """Bytes of the GPU in use, but for what PyTorch would give back."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    available, total = torch.cuda.mem_get_info()
    return total - available


SHORT = re.compile(r"out of memory: (\d+) bytes were asked for, (\d+) of (\d+) bytes are free; "
                   r"this plan takes (\d+) bytes for activations, (\d+) between runs and (\d+) "
                   r"for derived weights")
ENDLESS = (np.zeros((8192, 4, 256, 256), np.float16), 500, np.zeros((8192, 5, 24), np.float16))


@pytest.mark.alone
def test_out_of_memory_names_sizes_and_leaves_nothing():
    """Too little room for the activations, for almost all of them, and for what comes after."""
    small = unet()
    expected = small(*INPUTS)
    large = (np.zeros((64, 4, 256, 256), np.float32), 500, np.zeros((64, 5, 24), np.float32))
    rooms, activations = [256 * MB], 0
    while rooms:
        room = rooms.pop(0)
        fresh, hog = unet(), take_all_but(room)
        total, before = torch.cuda.mem_get_info()[1], taken()
        for _ in range(2):
            with pytest.raises(accel.OutOfMemory) as caught:
                fresh(*large)
            said = str(caught.value)
            asked, there, whole, plan, *_ = map(int, SHORT.search(said).groups())
            assert isinstance(caught.value, MemoryError) and there < asked and whole == total, said
            assert taken() - before <= 8 * MB, (room, taken() - before, said)
            print(f"\nOOM {room >> 20} MB of room: {said}")
        if not activations:
            activations = plan
            assert asked == plan, said
            rooms = [plan - 32 * MB, plan + 64 * MB]
        assert np.array_equal(small(*INPUTS), expected)
        result = fresh(*INPUTS)
        del hog, fresh
        assert np.array_equal(result, expected)
    with pytest.raises(accel.OutOfMemory, match=SHORT):  # more than there ever was
        small(*ENDLESS)
    assert np.array_equal(small(*INPUTS), expected)


@pytest.mark.alone
def test_pytorchs_cache_is_given_back_first():
    """What PyTorch keeps for later is memory that a compiled module may have."""
    fast = accel.compile(module("unet", dtype=torch.float16).to("cuda"))
    args, _ = inputs_of("unet", "sd", torch.float16, batch=64, size=128)
    args = tuple(a.to("cuda") if isinstance(a, torch.Tensor) else a for a in args)
    with ran(fast, native=1):
        expected = fast(*args).sample
    accel.refresh(fast)
    hog = take_all_but(128 * MB)
    with pytest.raises(accel.OutOfMemory, match=SHORT):
        fast(*args)
    del hog  # PyTorch keeps it
    assert torch.cuda.mem_get_info()[0] < 300 * MB
    with ran(fast, native=1):
        assert torch.equal(fast(*args).sample, expected)
    free()


# ---- the caller's state --------------------------------------------------------------------------


def test_errors_of_others_stay():
    """An error that the caller's CUDA runtime remembers is still there after our calls."""
    maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split()[-1] for line in maps if "libcudart.so" in line}
    if len(paths) != 1:
        pytest.skip(f"PyTorch has no shared CUDA runtime of its own: {paths}")
    runtime = ctypes.CDLL(paths.pop())
    fast = unet()
    torch.cuda.synchronize()
    assert runtime.cudaSetDevice(999) == 101
    fast(*INPUTS)
    with pytest.raises(accel.DeviceError):
        unet("cuda:99")
    with pytest.raises(accel.OutOfMemory):
        fast(*ENDLESS)
    assert runtime.cudaPeekAtLastError() == 101
    assert runtime.cudaGetLastError() == 101 and runtime.cudaGetLastError() == 0
    assert torch.ones(3, device="cuda").sum().item() == 3  # and none of ours is there


def test_the_current_context_is_restored():
    for told in run_child("current").values():
        assert told["same"] and told["after"] == told["before"], told
        assert told["error"][0] == "DeviceError" and "cuda:9" in told["error"][1]


def test_current_device_is_restored():
    """Another GPU is used from threads on this one, and none gets a context that had none."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    told = run_child("second")
    assert told["active"] == [0, 1] and told["current"] is None and told["error"] < 1e-3, told
    torch.cuda.set_device(0)
    fast = unet("cuda:1")
    assert np.isfinite(fast(*INPUTS)).all() and torch.cuda.current_device() == 0
    compiled = accel.compile(module("unet").to("cuda:1"))
    args, _ = inputs_of("unet", "sd", torch.float32)
    args = tuple(a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in args)
    with ran(compiled, native=1):
        compiled(*args)
    assert torch.cuda.current_device() == 0


def test_fork():
    told = run_child("fork")
    assert told["status"] == 0 and told["same"]
    for kind, message in told["said"]:
        assert kind == "DeviceError" and "fork" in message, told


# ---- a lost device -------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "environment"), [
    ("weight", {}),
    ("weight", {"ACCEL_GRAPH": "off"}),
    ("states", {"ACCEL_GRAPH": "off"}),
    ("sample", {"ACCEL_GRAPH": "off"}),
    ("weight", {"ACCEL_SYNC": "1"}),
])
def test_a_lost_device(how, environment):
    told = run_child("lose", how, **environment)
    said = told["said"]
    if how == "sample" and said[0] is None:
        said = said[1:]  # only queued then
    first = said[0]
    assert first is not None and first[0] == "DeviceError", told
    assert "cuda:0 is lost" in first[1] and "cudaErrorIllegalAddress" in first[1]
    assert said == [first] * len(said)
    if environment.get("ACCEL_SYNC") == "1":
        assert first[1].startswith("conv_norm_out (cuda.group_norm")
        assert "ACCEL_SYNC" not in first[1]
    else:
        assert "ACCEL_SYNC=1 names the step" in first[1]


# ---- libraries -----------------------------------------------------------------------------------

SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
void *dlopen(const char *name, int flags)
{
    static void *(*real)(const char *, int);
    if (name && (strstr(name, "libcudnn") || strstr(name, "libcublas"))) { return 0; }
    if (!real) { *(void **)&real = dlsym(RTLD_NEXT, "dlopen"); }
    return real(name, flags);
}
"""


def test_no_cudnn_and_no_cublaslt(tmp_path):
    """Own kernels do all of it; one warning each, and report() says so."""
    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "shim.c", "-o", tmp_path / "shim.so",
                    "-ldl"], check=True)
    told = run_child("libraries", LD_PRELOAD=str(tmp_path / "shim.so"))
    assert [kind for kind, _ in told["warned"]] == ["RuntimeWarning"] * 2, told["warned"]
    for words in ("no cuBLASLt 12 or 13 was found: own kernels multiply",
                  "no cuDNN 9 was found: own kernels take convolutions"):
        assert sum(words in text for _, text in told["warned"]) == 1
        assert sum(words in text for text in told["missed"]) == 1
        assert words in told["text"]
    assert "cudnn" not in told["plan"].lower() and "cublas" not in told["plan"].lower()
    assert "cuda.conv2d." in told["plan"] and "cuda.linear." in told["plan"]
    assert told["runs"] == 1 and told["error"] < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accel.report(unet())["missed"] == []  # here they are


def test_no_kernel_for_this_gpu(tmp_path):
    """The library again, all but one file as it is, as if built for another GPU alone."""
    objects = ROOT / "build" / "c"
    patterns = ("kernels/cuda/*.cu.o", "cuda/kernels/cuda/*.o", "cuda/csrc/*.o")
    parts = [f for pattern in patterns for f in objects.glob(pattern)
             if f.name not in ("probe.cu.o", "context.o")]
    if not parts or not shutil.which("nvcc"):
        pytest.skip("no objects of the library, or no nvcc")
    copy = tmp_path / "copy" / "accel"
    copy.mkdir(parents=True)
    for file in PACKAGE.iterdir():
        if file.name not in ("libaccel_cuda.so", "__pycache__"):
            (copy / file.name).symlink_to(file)
    major, minor = torch.cuda.get_device_capability()
    other = "120" if major < 12 else "75"
    code = f"-gencode=arch=compute_{other},code=sm_{other}"
    flags = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-D_GNU_SOURCE", f'-DAC_CUDA_ARCHS="{other}"']
    kernels = ROOT / "kernels" / "cuda"
    for name in ("probe.cu", "context.c"):
        subprocess.run(["nvcc", code, *flags, "-c", kernels / name, "-o", tmp_path / f"{name}.o"],
                       check=True)
    subprocess.run(["nvcc", "-shared", "-cudart", "static", *parts, *tmp_path.glob("*.o"), "-ldl",
                    "-lpthread", "-o", copy / "libaccel_cuda.so"], check=True)
    told = run_child("refused", package=copy)
    kind, message = told["said"][0]
    assert told["said"] == [[kind, message]] * 2 and told["listed"] == [message]
    assert kind == "DeviceError"
    assert f"found a GPU of compute capability {major}.{minor}, expected one that this " in message
    assert f"built for ({other})" in message and f"ACCEL_CUDA_ARCHS={major}{minor}" in message

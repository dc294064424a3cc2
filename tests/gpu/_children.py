"""What test_errors_cuda.py runs in processes of their own, without PyTorch: each prints JSON.

    python _children.py NAME [ARGUMENT ...]
"""

import ctypes
import json
import os
import pathlib
import sys
import threading
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "torchfree"))

import numpy as np  # noqa: E402
import tiny  # noqa: E402

import accel  # noqa: E402
from accel import _core, info  # noqa: E402

PART = tiny.PARTS["sd"]["unet"]
RNG = np.random.default_rng(1)
INPUTS = (RNG.normal(size=(2, 4, 8, 8)).astype(np.float32), 500,
          RNG.normal(size=(2, 5, 24)).astype(np.float32))


class Nowhere:
    """A float32 tensor on a GPU at an address that is nobody's."""

    dtype = "float32"
    made = []  # who borrows one reads it to the end, and it has no deleter

    class Managed(ctypes.Structure):
        _fields_ = [("data", ctypes.c_uint64), ("device_type", ctypes.c_int32),
                    ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
                    ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                    ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p),
                    ("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p),
                    ("deleter", ctypes.c_void_p)]

    def __init__(self, shape):
        self.shape = tuple(shape)
        self.dims = (ctypes.c_int64 * len(shape))(*shape)
        self.managed = self.Managed(data=1 << 20, device_type=2, ndim=len(shape), code=2, bits=32,
                                    lanes=1, shape=self.dims)
        self.made.append(self)

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream=None):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p,
                                                       ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)


def unet(device="cuda", **changes):
    return accel.UNet(PART["config"], tiny.weights(PART["shapes"]) | changes, device=device)


def error_of(run):
    """[class, message], or None."""
    try:
        run()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def picture():
    return accel.Pipeline.from_pretrained(accel.demo_model(), device="cuda")("a", seed=1)


def lose(how):
    """Loses the device by a pointer that is no pointer, then tries everything once more."""
    good = unet()
    good(*INPUTS)
    if how == "weight":
        name = "conv_norm_out.weight"
        bad, inputs = unet(**{name: Nowhere(PART["shapes"][name])}), INPUTS
    elif how == "states":
        bad, inputs = good, (*INPUTS[:2], Nowhere(INPUTS[2].shape))
    else:  # the result stays on the GPU, and nobody waits for it
        bad, inputs = good, (Nowhere(INPUTS[0].shape), *INPUTS[1:])
    larger = (np.tile(INPUTS[0], (1, 1, 2, 2)), *INPUTS[1:])
    said = [error_of(lambda run=run, given=given: run(*given))
            for run, given in ((bad, inputs), (bad, inputs), (good, INPUTS), (good, larger),
                               (unet(), INPUTS))]
    said.append(error_of(good.profile))
    del good, bad
    said.append(error_of(picture))
    info.self_test()
    return {"said": said}


def libraries():
    """A run where dlopen finds neither cuDNN nor cuBLASLt."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = unet()
        unet()
    result, truth = fast(*INPUTS), unet("cpu")(*INPUTS)
    return {"warned": [[w.category.__name__, str(w.message)] for w in caught],
            "missed": accel.report(fast)["missed"], "text": str(accel.report(fast)),
            "plan": accel.explain(fast, batch=2, height=8, width=8, tokens=5),
            "runs": accel.report(fast)["native_runs"],
            "error": float(np.abs(result - truth).max() / np.abs(truth).max())}


def refused():
    """A library that has no code for this GPU."""
    said = [error_of(unet) for _ in range(2)]
    info.self_test()
    return {"said": said, "listed": [text for name, text, _ in info._devices() if name == "cuda"]}


def fork():
    """CUDA does not survive fork; the child says so, its CPU and the parent go on."""
    fast = unet()
    before = fast(*INPUTS)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = [error_of(lambda: fast(*INPUTS)), error_of(lambda: unet()(*INPUTS))]
        unet("cpu")(*INPUTS)
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = json.loads(pipe.read())
    return {"said": said, "status": os.waitpid(child, 0)[1],
            "same": bool(np.array_equal(fast(*INPUTS), before))}


def current():
    """In a thread without a context, and in one whose context is its own: both stay current."""
    driver = ctypes.CDLL("libcuda.so.1")
    fast = unet()
    expected = fast(*INPUTS)
    told = {}

    def now():
        context = ctypes.c_void_p()
        assert driver.cuCtxGetCurrent(ctypes.byref(context)) == 0
        return context.value

    def work(name, own):
        context = ctypes.c_void_p()
        if own:
            assert driver.cuCtxCreate_v2(ctypes.byref(context), 0, 0) == 0
        before = now()
        same = np.array_equal(fast(*INPUTS), expected)
        other = unet()  # opens, allocates
        same = same and np.array_equal(other(*INPUTS), expected)
        error = error_of(lambda: unet("cuda:9"))
        del other
        told[name] = {"before": before, "after": now(), "same": bool(same), "error": error}
        if own:
            assert driver.cuCtxDestroy_v2(context) == 0

    for name, own in (("none", False), ("own", True)):
        thread = threading.Thread(target=work, args=(name, own))
        thread.start()
        thread.join()
    return told


def second():
    """On cuda:1 from a process that never touched GPU 0: it is not touched, or changed, by us."""
    driver = ctypes.CDLL("libcuda.so.1")
    fast = unet("cuda:1")
    result, truth = fast(*INPUTS), unet("cpu")(*INPUTS)
    flags, active = ctypes.c_uint(), ctypes.c_int()
    state = []
    for index in (0, 1):
        assert driver.cuDevicePrimaryCtxGetState(index, ctypes.byref(flags),
                                                 ctypes.byref(active)) == 0
        state.append(active.value)
    del fast
    _core.trim("cuda:1")
    context = ctypes.c_void_p()
    assert driver.cuCtxGetCurrent(ctypes.byref(context)) == 0
    return {"active": state, "current": context.value,
            "error": float(np.abs(result - truth).max() / np.abs(truth).max())}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))

"""Devices by name, and tensors that lie on another one: one clear exception each, GPU or not."""

import ctypes

import numpy as np
import pytest
import tiny

import accel
from accel import _core, cli

PART = tiny.PARTS["sd"]["unet"]
SAMPLE, STATES = np.zeros((2, 4, 8, 8), np.float32), np.zeros((2, 5, 24), np.float32)


class There:
    """A tensor of another library on a GPU; nobody may ask for its data."""

    dtype = "float32"

    def __init__(self, shape, index=1, kind=2):
        self.shape, self.place = shape, (kind, index)

    def __dlpack_device__(self):
        return self.place

    def __dlpack__(self, **options):
        raise AssertionError("touched")


@pytest.fixture(scope="module")
def unet():
    return accel.UNet(PART["config"], tiny.weights(PART["shapes"]))


def has_gpu():
    try:
        return _core.device("cuda") is not None
    except accel.DeviceError:
        return False


@pytest.mark.parametrize(("inputs", "words"), [
    ((There(SAMPLE.shape), 1, STATES), "sample: found a tensor on cuda:1, expected one in host"),
    ((SAMPLE, 1, There(STATES.shape, 0)), "encoder_hidden_states: found a tensor on cuda:0"),
    ((There(SAMPLE.shape, 3, 10), 1, STATES), "sample: found a tensor on DLPack's device type 10"),
])
def test_inputs_elsewhere(unet, inputs, words):
    with pytest.raises(accel.DeviceError, match=words):
        unet(*inputs)


def test_weights_elsewhere():
    weights = tiny.weights(PART["shapes"])
    name = next(iter(weights))
    weights[name] = There(weights[name].shape)
    with pytest.raises(accel.DeviceError, match=f"{name}: found a tensor on cuda:1, expected one"):
        accel.UNet(PART["config"], weights)
    if not has_gpu():
        with pytest.raises(accel.DeviceError, match="expected one in host memory or on cuda:0"):
            accel.UNet(PART["config"], weights, device="cuda")


def test_the_loop_takes_host_tensors_on_the_cpu(unet):
    with pytest.raises(accel.DeviceError, match="text_embeds|states|cuda:1"):
        unet._run({"entry": "forward", "batch": 2, "height": 8, "width": 8, "tokens": 5,
                   "timesteps": 1},
                  {"sample": SAMPLE, "timestep": np.ones(1, np.float32),
                   "encoder_hidden_states": There(STATES.shape)})
    assert unet.compute == "float32"


def test_a_tensor_says_where_it_is():
    t = accel.Tensor((2, 3), "bfloat16")
    t.fill(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert t.device == "cpu" and t.__dlpack_device__() == (1, 0)
    assert "dltensor_versioned" in repr(t.__dlpack__(max_version=(1, 0), dl_device=(1, 0)))
    for options in ({"stream": 1}, {"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError):
            t.__dlpack__(**options)
    for device in ("null", "cpu:1", "nowhere"):
        with pytest.raises(accel.AccelError, match="device"):
            accel.Tensor((2,), "float32", device)
    if not has_gpu():
        with pytest.raises(accel.DeviceError, match="cuda"):
            accel.Tensor((2,), "float32", "cuda")


@pytest.mark.parametrize("what", ["timestep", "encoder_attention_mask"])
def test_small_inputs_elsewhere(unet, what):
    inputs = {"timestep": 1, what: There((2,) if what == "timestep" else (2, 5))}
    with pytest.raises(accel.DeviceError, match=f"{what}: found a tensor on cuda:1"):
        unet(SAMPLE, encoder_hidden_states=STATES, **inputs)


@pytest.mark.parametrize("device", ["cpu0", "gpu", "cuda:", "cuda:x", "cuda:-1", "", "cuda:9999"])
def test_names(sd_folder, device):
    with pytest.raises(accel.AccelError, match="device|cuda"):
        accel.Pipeline.from_pretrained(sd_folder, device=device)


def test_no_gpu_is_one_sentence(sd_folder, tmp_path, capsys):
    if has_gpu():
        pytest.skip("there is a GPU")
    with pytest.raises(accel.DeviceError, match="cuda"):
        accel.Pipeline.from_pretrained(sd_folder, device="cuda")
    assert cli.main(["generate", "a", "--model", str(sd_folder), "--device", "cuda", "-o",
                     str(tmp_path / "x.png")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("accel: ") and said.count("\n") == 1 and "cuda" in said


def test_dtypes(sd_folder):
    for dtype in ("float64", "int8", "half precision"):
        with pytest.raises(accel.DTypeError, match="dtype: found"):
            accel.Pipeline.from_pretrained(sd_folder, dtype=dtype)
    pipe = accel.Pipeline.from_pretrained(sd_folder, dtype="float16")
    assert pipe.unet.compute == "float32"  # the CPU's


def test_weights_tell_their_dtypes():
    weights = _core.Weights()
    weights.set("a", np.zeros((3, 4), np.float16))
    weights.set("b", np.zeros(5, np.float32))
    assert weights.dtypes() == {"float16": 12, "float32": 5}
    from accel.components import compute_dtype

    assert compute_dtype(weights, "cuda:1", None) == "float16"
    assert compute_dtype(weights, "cuda", "bfloat16") == "bfloat16"
    assert compute_dtype(weights, "cpu", "bfloat16") == "float32"
    assert compute_dtype(None, "cuda", None) == "float32"


def test_room_is_made_for_a_larger_run(unet):
    """Where memory is the caller's allocator's, before a run that would replace what there is."""
    expected = unet(SAMPLE, 1, STATES)
    large = np.zeros((2, 4, 64, 64), np.float32)
    args = {"entry": "forward", "batch": 2, "height": 64, "width": 64, "tokens": 5, "timesteps": 1}
    _core.trim("cpu")
    assert unet._model.make_room(args) == 0  # there is nothing
    unet(SAMPLE, 1, STATES)
    assert unet._model.make_room(args) > 0
    unet(large, 1, STATES)
    assert unet._model.make_room(args) == 0
    assert np.array_equal(unet(SAMPLE, 1, STATES), expected)


def capsule(name, major):
    """A DLPack exchange API of nothing; the second is kept alive with the first."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    api = (ctypes.c_uint32 * 32)(major)
    return new(ctypes.addressof(api), name, None), api


def test_allocators_that_are_none(unet):
    for major in (0, 1, 2):  # of another version, or without functions
        given, kept = capsule(b"dlpack_exchange_api", major)
        assert unet._model.use_memory(given) is False and kept[0] == major
    for wrong in (None, capsule(b"dltensor", 1)[0]):
        with pytest.raises(ValueError, match="Capsule"):
            unet._model.use_memory(wrong)


def test_trim():
    _core.trim("cpu")
    with pytest.raises(accel.InvalidArgument, match="device"):
        _core.trim("nowhere")


@pytest.mark.parametrize("device", [0, None, b"cpu", "", "gpu", "cuda:2000", "cuda:x", "cpu:"])
def test_no_device_of_that_name(device, sd_folder):
    makers = (lambda: accel.UNet(PART["config"], tiny.weights(PART["shapes"]), device=device),
              lambda: accel.Pipeline.from_pretrained(sd_folder, device=device))
    for make in makers:
        with pytest.raises((accel.InvalidArgument, accel.DeviceError), match="^device: found"):
            make()


def test_a_device_of_pytorch(sd_folder):
    torch = pytest.importorskip("torch")
    pipe = accel.Pipeline.from_pretrained(sd_folder, device=torch.device("cpu"))
    assert pipe.unet.device == "cpu"
    assert accel.VAE.from_pretrained(sd_folder, device=torch.device("cpu")).device == "cpu"

"""The networks one by one, without PyTorch: UNet, VAE, TextEncoder.

Each takes what diffusers' and transformers' folders hold (config.json and safetensors), or a config
and a dict of tensors.  Inputs may be NumPy arrays or any DLPack producers in host memory, or on the
GPU that computes.  Results are where the first input is.  In host memory they are NumPy arrays; a
bfloat16 one is an `accel.Tensor`, because NumPy has no such dtype.  On a GPU they are Tensors for
DLPack (`torch.from_dlpack`, `cupy.from_dlpack`), and nobody has waited for them; `np.asarray` waits
and copies.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import _core
from ._core import DeviceError, DTypeError, FileError, InvalidArgument, ShapeError, UnsupportedError
from .devices import missed

FLOATS = ("float32", "float16", "bfloat16")


# ---- arrays ------------------------------------------------------------------------------------


def dtype_name(dtype):
    """"float16" of a name, a NumPy dtype or a torch.dtype; None stays None."""
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else str(dtype)
    if not isinstance(dtype, str) and not name.startswith("torch."):
        with contextlib.suppress(TypeError):
            name = np.dtype(dtype).name
    name = name.removeprefix("torch.")
    name = {"half": "float16", "float": "float32", "fp16": "float16", "fp32": "float32",
            "bf16": "bfloat16"}.get(name, name)
    if name not in FLOATS:
        raise DTypeError(f"dtype: found {name!r}, expected one of {', '.join(FLOATS)}")
    return name


def array_dtype(x):
    """Name of the dtype of a tensor of any library."""
    return str(getattr(x, "dtype", "")).removeprefix("torch.")


def tensor_shape(x, what, rank):
    """Shape of `x` as a tuple; a ShapeError names `what` when it is no tensor of that rank."""
    shape = getattr(x, "shape", None)
    if shape is None:
        raise DTypeError(f"{what}: found {type(x).__name__}, expected a tensor")
    shape = tuple(int(d) for d in shape)
    if len(shape) != rank or 0 in shape:
        raise ShapeError(f"{what}: found {list(shape)}, expected {rank} dimensions, none of them 0")
    return shape


def empty(shape, dtype, device="cpu"):
    """A new contiguous array for a result."""
    if device != "cpu":
        return _core.Tensor(shape, dtype, device)
    return _core.Tensor(shape, dtype) if dtype == "bfloat16" else np.empty(shape, dtype)


def cast(x, dtype):
    """`x` in `dtype`; `x` itself, with any strides, where it has that dtype already."""
    return x if array_dtype(x) == dtype else _copy(x, dtype)


def dense(x, dtype):
    """`x` in `dtype` and contiguous."""
    if array_dtype(x) != dtype:
        return _copy(x, dtype)
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x)
    contiguous = getattr(x, "is_contiguous", None)
    if isinstance(x, _core.Tensor) or contiguous is not None and contiguous():
        return x
    return _copy(x, dtype)


def _copy(x, dtype):
    """A copy in host memory; of a GPU's tensor none: the engine takes it as it is, or names it."""
    if _place(x)[0] not in _HOST:
        return x
    out = _core.Tensor(tuple(x.shape), dtype)
    out.fill(x)
    return out


def _in_float32(x):
    """`x` in float32 and contiguous; a GPU's tensor of another dtype comes to host memory."""
    if _place(x)[0] == _CUDA and array_dtype(x) != "float32":
        x = to_numpy(x)
    return dense(x, "float32")


def to_numpy(x):
    """`x` as a NumPy array; bfloat16 becomes float32.  Waits for a tensor on a GPU."""
    if isinstance(x, np.ndarray):
        return x
    if _place(x)[0] == _CUDA:
        copy = _core.Tensor(tuple(x.shape), array_dtype(x))
        copy.fill(_InOrder(x))
        x = copy
    if array_dtype(x) == "bfloat16":
        return np.asarray(cast(x, "float32"))
    return np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)


# ---- devices -----------------------------------------------------------------------------------


_HOST = (1, 3)  # DLPack's device types of host memory, pageable and pinned
_PINNED, _CUDA = 3, 2


def _place(x):
    """DLPack's device type and index; without __dlpack__, host memory."""
    place = None if isinstance(x, np.ndarray) else getattr(x, "__dlpack_device__", None)
    return (1, 0) if place is None else tuple(int(n) for n in place())


class _InOrder:
    """A GPU tensor of another library, behind all that the library has queued for it."""

    def __init__(self, x):
        self.x = x

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()

    def __dlpack__(self, **options):
        options |= {"stream": 1}  # the legacy default stream
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(self.x, torch.Tensor):
            return self.x.__dlpack__(**options)
        with torch.cuda.device(self.x.device):  # PyTorch exports those of the current GPU alone
            return self.x.__dlpack__(**options)


def _pageable(x):
    """A GPU reads pinned memory when it comes to it, and the caller may be elsewhere by then."""
    return _copy(x, array_dtype(x)) if _place(x)[0] == _PINNED else x


def check_place(x, what, device):
    """True for a tensor on the GPU that is `device`, False for one in host memory; another one is
    a DeviceError."""
    kind, index = _place(x)
    if kind in _HOST:
        return False
    name, _, number = device.partition(":")
    if name == "cuda" and (kind, index) == (_CUDA, int(number or 0)):
        return True
    found = f"cuda:{index}" if kind == _CUDA else f"DLPack's device type {kind}"
    wanted = f" or on {name}:{number or 0}" if name == "cuda" else ""
    raise DeviceError(f"{what}: found a tensor on {found}, expected one in host memory{wanted}")


def device_name(device):
    """`device` as text: "cuda:1"; also of a torch.device."""
    if not isinstance(device, str):
        if type(device).__module__ != "torch" or type(device).__name__ != "device":
            raise InvalidArgument(f'device: found {device!r}, expected "cpu", "cuda" or "cuda:1"')
        device = str(device)
    return device


def compute_dtype(weights, device, dtype):
    """What activations are in: float32 on the CPU, on a GPU `dtype` or most weights' own."""
    if device.partition(":")[0] != "cuda":
        return "float32"
    if dtype is not None or weights is None:
        return dtype or "float32"
    counts = {n: c for n, c in weights.dtypes().items() if n in FLOATS}
    return max(counts, key=counts.get, default="float32")


# ---- folders -----------------------------------------------------------------------------------


def read_json(path):
    """The JSON object in a file; FileError or FormatError name it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise _core.FormatError(f"{path}: not UTF-8 at byte {error.start}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _core.FormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _core.FormatError(f"{path}: found {type(value).__name__}, expected an object")
    return value


def find_folder(folder, subfolders):
    """The folder itself when it has a config.json, else the first subfolder that has one."""
    folder = Path(folder)
    for candidate in [folder, *(folder / s for s in subfolders)]:
        if (candidate / "config.json").is_file():
            return candidate
    raise FileError(f"{folder}: found no config.json, neither there nor in "
                    f"{' or '.join(subfolders)}")


class Component:
    """A network with its weights.  Subclasses say what its inputs and outputs are.

    Parameters
    ----------
    config : dict
        The content of config.json; its "_class_name" or "architectures" choose the network.
    weights : dict of name to tensor
        Any DLPack producers or NumPy arrays of float dtypes, borrowed without a copy: they must not
        be changed while a call runs.  In host memory, or on the GPU that is `device`, to which
        those in host memory are copied once.
    device : str or torch.device
        "cpu", "cuda" or "cuda:1", or "null" to plan without running.
    dtype : str, optional
        "float32", "float16" or "bfloat16".  On a GPU, what is computed in; None: the dtype of most
        weights.  On the CPU everything is computed in float32, and this is the dtype of the
        results.  None, and on a GPU, they have that of the first input.

    Raises
    ------
    UnsupportedError
        For a class, config field or value that is not supported, by name.
    WeightsError
        With all unknown, missing and wrongly shaped weights in one message.
    DTypeError
        For a `dtype` or weights that are none of these three.
    DeviceError
        When there is no such device, saying what is missing, or for tensors on another one.
    InvalidArgument
        For a `device` that names none, and a config that is no dict.

    Calls raise DTypeError, ShapeError, DeviceError and InvalidArgument with the input by name;
    OutOfMemory with the plan's size and what is free, and nothing of the call stays allocated; and
    DeviceError when a GPU is lost, with the same message at every later call.
    """

    _classes = ()
    _subfolders = ()
    _stem = "diffusion_pytorch_model"

    def __init__(self, config, weights, *, device="cpu", dtype=None, passes_off=""):
        if not isinstance(config, Mapping):
            raise InvalidArgument(f"config: found {type(config).__name__}, expected a dict")
        self.config = dict(config)
        self.device = device = device_name(device)
        if not isinstance(weights, _core.Weights):
            weights = self._borrow(weights)
        dtype = dtype_name(dtype)
        self.compute = compute_dtype(weights, device, dtype)
        self.dtype = None if device.startswith("cuda") else dtype
        self._weights = weights
        self._check_class()
        self._model = _core.Model(json.dumps(self.config), weights, device, passes_off)
        missed(device)
        self._io_cache = {}

    @classmethod
    def from_pretrained(cls, folder, *, variant=None, subfolder=None, device="cpu", dtype=None,
                        passes_off=""):
        """Maps the safetensors in a folder of diffusers' or transformers' layout.

        `folder` is the component's own, or a whole pipeline's.  `variant="fp16"` picks
        `<name>.fp16.safetensors`.  Sharded files are found through their index; a folder with only
        pickled `.bin` files is refused, because reading one runs code from it.
        """
        folder = Path(folder) / subfolder if subfolder else Path(folder)
        folder = find_folder(folder, cls._subfolders)
        weights = _core.Weights()
        weights.add_folder(folder, cls._stem, variant)
        return cls(read_json(folder / "config.json"), weights, device=device, dtype=dtype,
                   passes_off=passes_off)

    def _borrow(self, tensors):
        if not isinstance(tensors, Mapping):
            raise InvalidArgument(f"weights: found {type(tensors).__name__}, expected a dict of "
                                  "names and tensors")
        weights = _core.Weights()
        for name, tensor in tensors.items():
            here = check_place(tensor, name, self.device)
            weights.set(name, _InOrder(tensor) if here else tensor)
        return weights

    def _check_class(self):
        named = self.config.get("architectures")
        name = self.config.get("_class_name") or (
            named[0] if isinstance(named, list | tuple) and named else named)
        if name not in self._classes:
            raise UnsupportedError(f"config: found class {name!r}, expected "
                                   f"{' or '.join(self._classes)} for {type(self).__name__}")

    @property
    def stats(self):
        """Runs, plans, execs, bytes of arena and of what execs keep, and plan_ms."""
        return self._model.stats()

    @property
    def derived(self):
        """The weights accel made of the given ones: key, bytes, sources, valid."""
        return self._weights.derived()

    def explain(self, *, json=False, passes=False, **args):
        """The plan for these sizes as text or JSON; see `_core.Model.explain` for the sizes."""
        return self._model.explain(self._sizes(args), json, passes)

    def profile(self, *, json=False, repeats=0, flops=0.0, bandwidth=0.0, **args):
        """Runs over random inputs of these sizes; see `accel.explain(profile=True)`."""
        return self._model.profile(self._sizes(args), json, repeats, flops, bandwidth)

    def _sizes(self, given):
        return {"compute": self.compute} | self.sizes(self.config, given)

    @staticmethod
    def sizes(config, given):
        """Build args: the given ones, the others as the config suggests."""
        raise NotImplementedError

    def _io_dtype(self, x, what):
        dtype = self.dtype or array_dtype(x)
        if dtype not in FLOATS:
            raise DTypeError(f"{what}: found {dtype or type(x).__name__}, expected one of "
                             f"{', '.join(FLOATS)}; or give dtype=")
        return dtype

    def _run(self, args, inputs, wanted=None, on_gpu=None):
        """Runs for these args into new arrays; returns {output name: array}.

        on_gpu : whether results stay on the GPU; None: as the first input is.
        """
        args = {"compute": self.compute} | args
        here = {name: check_place(x, name, self.device) for name, x in inputs.items()}
        if on_gpu is None:
            on_gpu = next(iter(here.values()))
        stream = None
        if on_gpu or any(here.values()):
            inputs = {n: _InOrder(x) if here[n] else _pageable(x) for n, x in inputs.items()}
            stream = 0  # the legacy default stream
        key = tuple(sorted(args.items()))
        io = self._io_cache.get(key)
        if io is None:
            if len(self._io_cache) > 64:
                self._io_cache.clear()
            io = self._io_cache[key] = self._model.io(args)
        place = self.device if on_gpu else "cpu"
        outputs = {name: empty(shape, dtype, place)
                   for name, shape, dtype, is_output in io if is_output}
        self._model.run(args, inputs, outputs, stream=stream)
        return outputs if wanted is None else outputs[wanted]


class UNet(Component):
    """UNet2DConditionModel as SD 1.x, 2.x and SDXL use it."""

    _classes = ("UNet2DConditionModel",)
    _subfolders = ("unet",)

    def __call__(self, sample, timestep, encoder_hidden_states, *, text_embeds=None, time_ids=None,
                 encoder_attention_mask=None):
        """Predicts noise, x0 or v for noisy latents.

        Parameters
        ----------
        sample : [b, c, h, w] float
        timestep : a number, or an array of 1 or b of them; one on a GPU is waited for
        encoder_hidden_states : [b, tokens, d] float
        text_embeds : [b, d], time_ids : [b, 6 or 5], for SDXL; ids on a GPU that are not float32
            are waited for
        encoder_attention_mask : [b, tokens] of 1 (see) and 0 (hide), optional

        Returns
        -------
        array [b, c_out, h, w] of the sample's dtype, on the GPU where the sample is there
        """
        for what, x in (("timestep", timestep), ("encoder_attention_mask", encoder_attention_mask)):
            check_place(x, what, self.device)
        batch, _, height, width = tensor_shape(sample, "sample", 4)
        tokens = tensor_shape(encoder_hidden_states, "encoder_hidden_states", 3)[1]
        dtype = self._io_dtype(sample, "sample")
        times = self._times(timestep, batch)
        args = {"entry": "forward", "batch": batch, "height": height, "width": width,
                "tokens": tokens, "timesteps": len(times), "io_dtype": dtype}
        inputs = {"sample": cast(sample, dtype), "timestep": times,
                  "encoder_hidden_states": dense(encoder_hidden_states, dtype)}
        if text_embeds is not None:
            inputs["text_embeds"] = dense(text_embeds, dtype)
        if time_ids is not None:
            args["time_ids"] = tensor_shape(time_ids, "time_ids", 2)[1]
            inputs["time_ids"] = _in_float32(time_ids)
        if encoder_attention_mask is not None:
            args["masked"] = True
            seen = to_numpy(encoder_attention_mask).astype(np.float32)
            inputs["encoder_attention_mask"] = np.ascontiguousarray((1 - seen) * -10000.0)
        return self._run(args, inputs, "sample")

    @staticmethod
    def _times(timestep, batch):
        try:
            times = np.array(to_numpy(timestep), dtype=np.float32).reshape(-1)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"timestep: expected numbers: {error}") from error
        if len(times) not in (1, batch) or not np.isfinite(times).all():
            raise InvalidArgument(f"timestep: found {times.tolist()}, expected one finite number, "
                                  f"or one for each of {batch} samples")
        return times

    @staticmethod
    def sizes(config, given):
        height, width = sample_size(config)
        return {"batch": 2, "height": height, "width": width, "tokens": 77, "timesteps": 1} | given


def sample_size(config, default=64):
    """Height and width that a config names: one number, two, or none."""
    size = config.get("sample_size")
    size = default if size is None else size
    pair = size if isinstance(size, list | tuple) else [size, size]
    if len(pair) != 2 or not all(type(n) is int and 0 < n < 2**20 for n in pair):
        raise InvalidArgument(f"sample_size: found {size!r:.100}, expected a number or two")
    return tuple(pair)


class Posterior:
    """A diagonal Gaussian over latents, as `VAE.encode` returns it; float32 [b, c, h, w].

    `moments` [b, 2c, h, w] is what the network gave, where it gave it; the rest is NumPy, and waits
    for a GPU when it is first asked for.
    """

    def __init__(self, moments):
        self.moments = moments

    @functools.cached_property
    def _parts(self):
        return np.split(np.asarray(self.moments, np.float32), 2, axis=1)

    @property
    def mean(self):
        return self._parts[0]

    @functools.cached_property
    def logvar(self):
        return np.clip(self._parts[1], -30.0, 20.0)

    @property
    def std(self):
        return np.exp(0.5 * self.logvar)

    def mode(self):
        return self.mean

    def sample(self, generator):
        """mean + std * normals of an `accel.Generator`, as diffusers draws them."""
        noise = np.frombuffer(generator.normal(self.mean.size), np.float32)
        return self.mean + self.std * noise.reshape(self.mean.shape)


class VAE(Component):
    """AutoencoderKL: images to latents and back."""

    _classes = ("AutoencoderKL",)
    _subfolders = ("vae",)

    def encode(self, image):
        """image [b, 3, h, w] in -1 .. 1 -> Posterior over latents (not scaled)."""
        batch, _, height, width = tensor_shape(image, "image", 4)
        dtype = self._io_dtype(image, "image")
        args = {"entry": "encode", "batch": batch, "height": height, "width": width,
                "io_dtype": dtype}
        return Posterior(self._run(args, {"sample": cast(image, dtype)}, "moments"))

    def decode(self, latents):
        """latents [b, c, h, w] (not scaled) -> image [b, 3, 8h, 8w], about -1 .. 1, where they
        are."""
        batch, _, height, width = tensor_shape(latents, "latents", 4)
        dtype = self._io_dtype(latents, "latents")
        args = {"entry": "decode", "batch": batch, "height": height, "width": width,
                "io_dtype": dtype}
        return self._run(args, {"latents": cast(latents, dtype)}, "sample")

    @property
    def scale_factor(self):
        """Pixels along an axis for one latent pixel."""
        return vae_scale_factor(self.config)

    @staticmethod
    def sizes(config, given):
        size = sample_size(config, 512)[0]
        if given.get("entry", "decode") == "decode":
            size = -(-size // vae_scale_factor(config))
        return {"entry": "decode", "batch": 1, "height": size, "width": size} | given


def vae_scale_factor(config):
    """Pixels along an axis for one latent pixel of this AutoencoderKL."""
    return 2 ** (len(config.get("block_out_channels", (0,))) - 1)


@dataclass
class TextOutput:
    """What a text encoder returns.

    `pooled` is CLIPTextModel's pooler_output or CLIPTextModelWithProjection's text_embeds, [b, d];
    `hidden_states` the layers' inputs and the last one's output when asked for; `clip_skip` the
    final layer norm of the layer that clip_skip names.
    """

    last_hidden_state: object = None
    pooled: object = None
    hidden_states: tuple | None = None
    clip_skip: object = None


class TextEncoder(Component):
    """CLIPTextModel or CLIPTextModelWithProjection."""

    _classes = ("CLIPTextModel", "CLIPTextModelWithProjection")
    _subfolders = ("text_encoder", "text_encoder_2")
    _stem = "model"

    def __call__(self, input_ids, attention_mask=None, *, hidden_states=False, clip_skip=0):
        """Encodes token ids [b, tokens] of any integer dtype; returns a TextOutput, its tensors
        where the ids are.  Ids on a GPU are waited for.

        attention_mask : [b, tokens] of 1 (see) and 0 (hide), optional
        clip_skip : k > 0 adds the final layer norm of hidden_states[-(k + 1)]
        """
        batch, tokens = tensor_shape(input_ids, "input_ids", 2)
        on_gpu = check_place(input_ids, "input_ids", self.device)
        check_place(attention_mask, "attention_mask", self.device)
        ids = to_numpy(input_ids)
        if ids.dtype.kind not in "iu":
            raise DTypeError(f"input_ids: found {ids.dtype}, expected integers")
        words = self.config.get("vocab_size", 49408)
        wrong = ids[(ids < 0) | (ids >= words)]
        if wrong.size:
            raise InvalidArgument(f"input_ids: found {wrong[0]}, expected 0 to {words - 1}")
        args = {"entry": "forward", "batch": batch, "tokens": tokens,
                "io_dtype": self.dtype or "float32", "hidden_states": bool(hidden_states),
                "clip_skip": clip_skip}
        inputs = {"input_ids": np.ascontiguousarray(ids, np.int64)}
        if attention_mask is not None:
            args["masked"] = True
            seen = to_numpy(attention_mask) != 0
            inputs["attention_mask"] = np.where(seen, 0.0, np.finfo(np.float32).min).astype(
                np.float32)
        out = self._run(args, inputs, on_gpu=on_gpu)
        states = [out[f"hidden_states.{i}"] for i in range(len(out))
                  if f"hidden_states.{i}" in out]
        return TextOutput(out.get("last_hidden_state"),
                          out.get("text_embeds", out.get("pooler_output")),
                          tuple(states) or None, out.get("clip_skip"))

    @staticmethod
    def sizes(config, given):
        return {"batch": 1, "tokens": config.get("max_position_embeddings", 77)} | given

"""Text to image from a diffusers model folder, without PyTorch.

    prompts -> tokenizer -> text encoder(s) -> [loop: UNet, guidance, scheduler] -> VAE -> images
"""

import math
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import _core, images, schedules
from ._core import (
    DTypeError,
    FormatError,
    InvalidArgument,
    NumericError,
    ShapeError,
    UnsupportedError,
)
from .arguments import integer, is_given, number, texts
from .components import (
    FLOATS,
    VAE,
    TextEncoder,
    UNet,
    array_dtype,
    device_name,
    dtype_name,
    read_json,
    sample_size,
    tensor_shape,
    to_numpy,
)
from .tokenizer import Tokenizer

_SD = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline",
       "StableDiffusionInpaintPipeline")
_SDXL = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline",
         "StableDiffusionXLInpaintPipeline")
MAX_SIZE = 16384  # pixels along an axis


@dataclass
class PipelineOutput:
    """`images`: a list of PIL images, or an array; `seeds`: what was drawn from, None for a
    generator of the caller."""

    images: object
    seeds: object = None


@dataclass
class Conditions:
    """What the prompt becomes: positive and negative states, each [n, tokens, d]; SDXL also pooled
    [n, d]."""

    states: np.ndarray
    negative_states: np.ndarray | None = None
    pooled: np.ndarray | None = None
    negative_pooled: np.ndarray | None = None


class Pipeline:
    """Stable Diffusion 1.x, 2.x or XL.

    Make one with `from_pretrained`.  `unet`, `vae`, `text_encoders`, `tokenizers` and
    `scheduler_config` may be replaced.  Any number of threads may call one pipeline.

        >>> pipe = accel.Pipeline.from_pretrained(accel.demo_model())
        >>> pipe("a red house by a lake at night", seed=1).images[0].save("house.png")
    """

    def __init__(self, *, unet, vae, text_encoders, tokenizers, scheduler_config, config=None):
        if len(text_encoders) != len(tokenizers) or not text_encoders:
            raise InvalidArgument(f"text_encoders: found {len(text_encoders)} with "
                                  f"{len(tokenizers)} tokenizers, expected as many")
        self.unet = unet
        self.vae = vae
        self.text_encoders = list(text_encoders)
        self.tokenizers = list(tokenizers)
        self.scheduler_config = dict(scheduler_config)
        self.config = dict(config or {})
        self.is_xl = unet.config.get("addition_embed_type") == "text_time"
        self._check()

    @classmethod
    def from_pretrained(cls, folder, *, device="cpu", dtype=None, variant=None, passes_off=""):
        """Loads a folder of the StableDiffusionPipeline or StableDiffusionXLPipeline layout.

        Parameters
        ----------
        folder : path
            With model_index.json.  Weights are safetensors, sharded or not; they are mapped, not
            read.
        device : str or torch.device
            "cpu", or "cuda" or "cuda:1" for a GPU.
        dtype : str, optional
            What a GPU computes in: "float32", "float16" or "bfloat16"; None: the dtype of the
            files, each network its own.  The CPU computes in float32 whatever the files hold.
        variant : str, optional
            "fp16" reads `<name>.fp16.safetensors`.

        Raises
        ------
        FileError, FormatError, WeightsError, UnsupportedError
            With the file, the weight or the config field by name.
        DTypeError
            For a `dtype` that is none of these three.
        DeviceError
            When there is no such device, saying what is missing.
        InvalidArgument
            For a `device` that names none.
        """
        folder = Path(folder)
        if folder.is_file():
            raise UnsupportedError(f"{folder}: found a file, expected a folder with "
                                   "model_index.json; diffusers converts single-file checkpoints: "
                                   "StableDiffusionPipeline.from_single_file(...).save_pretrained")
        index = read_json(folder / "model_index.json")
        name = index.get("_class_name")
        if name not in _SD + _SDXL:
            raise UnsupportedError(f"{folder}: found class {name!r}, expected {_SD[0]} or "
                                   f"{_SDXL[0]}")
        device = device_name(device)
        options = {"device": device, "variant": variant, "passes_off": passes_off}
        if dtype_name(dtype) is not None and device.startswith("cuda"):
            options["dtype"] = dtype
        encoders, tokenizers = [], []
        for suffix in ("", "_2"):
            if _is_listed(index, f"text_encoder{suffix}", folder):
                encoders.append(TextEncoder.from_pretrained(folder / f"text_encoder{suffix}",
                                                            **options))
                tokenizers.append(Tokenizer(folder / f"tokenizer{suffix}"))
        return cls(unet=UNet.from_pretrained(folder / "unet", **options),
                   vae=VAE.from_pretrained(folder / "vae", **options),
                   text_encoders=encoders, tokenizers=tokenizers, config=index,
                   scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"))

    def _check(self):
        inputs = self.unet.config.get("in_channels", 4)
        latents = self.vae.config.get("latent_channels", 4)
        if inputs != latents:
            raise UnsupportedError(f"unet: found {inputs} input channels with {latents} latent "
                                   "channels; text to image needs as many, inpainting models have "
                                   "more")
        if self.is_xl and self.config.get("requires_aesthetics_score"):
            raise UnsupportedError("this is the SDXL refiner, which starts from an image; text to "
                                   "image needs the base model")
        _latent_scale(self.vae.config)

    # ---- the call --------------------------------------------------------------------------------

    def __call__(self, prompt, *, negative_prompt=None, prompt_2=None, negative_prompt_2=None,
                 num_inference_steps=50, guidance_scale=None, guidance_rescale=0.0, seed=None,
                 generator=None, num_images_per_prompt=1, height=None, width=None, scheduler=None,
                 eta=0.0, clip_skip=None, latents=None, callback=None, callback_on_step_end=None,
                 cancel=None, output_type="pil", progress_bar=True, original_size=None,
                 crops_coords_top_left=None, target_size=None):
        """Makes images from a prompt or a list of them.

        Parameters
        ----------
        prompt, negative_prompt : str or list of str
            A list gives num_images_per_prompt images for each.
        prompt_2, negative_prompt_2 : str or list of str
            For SDXL's second encoder, instead of the first one's.
        num_inference_steps : int
        guidance_scale : float
            7.5 unless told, 5.0 for SDXL.  At most 1 means no guidance.
        guidance_rescale : float
            0 .. 1; 0.7 for models with a terminal SNR of 0.
        seed : int or list of int
            One for the batch, or one for each image; the same latents as
            torch.Generator("cpu").manual_seed(seed) gives diffusers.
        generator : accel.Generator or list of them
            Instead of a seed, to go on with.
        height, width : int
            Pixels, multiples of 8.  The model's own size unless told.
        scheduler : str or dict
            "ddim", "pndm", "euler", "euler_a", "dpm++", "dpm++_sde", with "_karras" behind where
            it applies; a diffusers class name; or a whole scheduler_config.
        eta : float
            DDIM's share of noise.
        clip_skip : int
            Layers of the text encoder to leave out.
        latents : [n, c, h/8, w/8] float, optional
            Instead of drawn ones; multiplied by the scheduler's first sigma, as in diffusers.
        callback : callable(step, timestep, latents)
            After each row; may change `latents` (float32 NumPy) in place; True stops the run.
        callback_on_step_end : callable(pipe, step, timestep, {"latents": ...})
            As in diffusers; the dict it returns may hold new latents.
        cancel : accel.Cancel
            Its cancel() ends the run from another thread with `Cancelled`.
        output_type : "pil", "np" (float32 [n, h, w, 3] in 0 .. 1) or "latent"
        progress_bar : bool
        original_size, crops_coords_top_left, target_size : (height, width)
            SDXL's size conditioning: the picture's size, (0, 0) and its size unless told.

        Returns
        -------
        PipelineOutput

        Raises
        ------
        InvalidArgument, DTypeError, ShapeError, DeviceError, UnsupportedError
            Naming the argument; DeviceError also when a GPU is lost, at every later call.
        OutOfMemory
            With the plan's size and what is free; nothing of the call stays allocated.
        Cancelled
            By `cancel`.
        NumericError
            The model gives NaN or infinity: which network, and at which step.
        """
        if not self.is_xl:
            _refuse(prompt_2=prompt_2, negative_prompt_2=negative_prompt_2,
                    original_size=original_size, crops_coords_top_left=crops_coords_top_left,
                    target_size=target_size)
        prompts = texts(prompt, "prompt")
        guidance = self._guidance(guidance_scale)
        if not isinstance(output_type, str) or output_type not in ("pil", "np", "latent"):
            raise InvalidArgument(f"output_type: found {output_type!r}, expected 'pil', 'np' or "
                                  "'latent'")
        if cancel is not None and not isinstance(cancel, _core.Cancel):
            raise InvalidArgument(f"cancel: found {type(cancel).__name__}, expected an "
                                  "accel.Cancel")
        height, width = self._size(height, "height", 0), self._size(width, "width", 1)
        count = len(prompts) * integer(num_images_per_prompt, "num_images_per_prompt", 1, 1024)
        schedule = schedules.make(self._scheduler(scheduler), num_inference_steps, eta)
        generators, seeds = _generators(seed, generator, count)

        conditions = self._encode(prompts, negative_prompt, prompt_2, negative_prompt_2,
                                  guidance > 1, clip_skip)
        inputs = self._inputs(conditions, count // len(prompts), guidance > 1)
        if self.is_xl:
            size = (height, width)
            sizes = [size if original_size is None else original_size,
                     (0, 0) if crops_coords_top_left is None else crops_coords_top_left,
                     size if target_size is None else target_size]
            inputs["time_ids"] = _time_ids(sizes, len(inputs["text_embeds"]))
        latents = self._latents(latents, count, height, width, generators, schedule)
        with _Progress(self, schedule, latents, progress_bar, callback,
                       callback_on_step_end) as progress:
            _core.denoise(self.unet._model, schedule, latents, inputs, generators,
                          guidance_scale=guidance,
                          guidance_rescale=number(guidance_rescale, "guidance_rescale"),
                          cancel=cancel, compute=self.unet.compute, check_finite=True,
                          **progress.listener())
        return PipelineOutput(self._finish(latents, output_type), seeds)

    def _guidance(self, scale):
        if scale is None:
            return 5.0 if self.is_xl else 7.5
        return number(scale, "guidance_scale")

    def _size(self, size, what, axis):
        factor = self.vae.scale_factor
        if size is None:
            size = sample_size(self.unet.config)[axis]
            if not self.is_xl and size < 64 and _is_before_0_9(self.unet.config):
                size = 64  # the first published configs say 32 and mean 64
            return size * factor
        size = integer(size, what, factor, MAX_SIZE)
        if size % factor:
            raise InvalidArgument(f"{what}: found {size}, expected a multiple of {factor}")
        return size

    def _scheduler(self, scheduler):
        # StableDiffusionPipeline mends these two in old folders, the XL one does not.
        mends = {} if self.is_xl else {"steps_offset": 1, "clip_sample": False}
        return schedules.resolve(self.scheduler_config, scheduler, mends=mends)

    # ---- prompts ---------------------------------------------------------------------------------

    def _encode(self, prompts, negative, prompt_2, negative_2, guided, clip_skip):
        """Conditions for n prompts."""
        skip = 0 if clip_skip is None else integer(clip_skip, "clip_skip", 0, 256)
        n = len(prompts)
        second = texts(prompt_2, "prompt_2", n) if is_given(prompt_2) else prompts
        states, pooled = self._run_encoders([prompts, second], skip)
        conditions = Conditions(states, pooled=pooled)
        if not guided:
            return conditions
        if self.is_xl and negative is None and self.config.get("force_zeros_for_empty_prompt",
                                                               True):
            if negative_2 is not None:
                raise InvalidArgument(
                    "negative_prompt_2: found it without a negative_prompt, expected both: this "
                    "folder's force_zeros_for_empty_prompt leaves both encoders out")
            conditions.negative_states = np.zeros_like(states)
            conditions.negative_pooled = np.zeros_like(pooled)
            return conditions
        negatives = texts("" if negative is None else negative, "negative_prompt", n)
        second = (texts(negative_2, "negative_prompt_2", n) if is_given(negative_2)
                  else negatives)
        # as diffusers does, the negative prompt is never skipped
        conditions.negative_states, conditions.negative_pooled = self._run_encoders(
            [negatives, second], 0)
        return conditions

    def _run_encoders(self, prompt_lists, skip):
        """States [n, tokens, sum of d] and, for SDXL, the projecting encoder's pooled [n, d]."""
        all_states, pooled = [], None
        lists = prompt_lists[:len(self.tokenizers)]
        for tokenizer, encoder, prompts in zip(self.tokenizers, self.text_encoders, lists,
                                               strict=True):
            ids = tokenizer(prompts)
            if self.is_xl:
                out = encoder(ids, hidden_states=True)
                wanted = -(skip + 2)
                if -wanted > len(out.hidden_states):
                    raise InvalidArgument(f"clip_skip: found {skip}, expected at most "
                                          f"{len(out.hidden_states) - 2}")
                all_states.append(out.hidden_states[wanted])
                if encoder.config.get("architectures") == ["CLIPTextModelWithProjection"]:
                    pooled = out.pooled
            else:
                out = encoder(ids, clip_skip=skip)
                all_states.append(out.clip_skip if skip else out.last_hidden_state)
        if self.is_xl and pooled is None:
            raise UnsupportedError("text_encoder: found no CLIPTextModelWithProjection, which SDXL "
                                   "takes its pooled states from")
        tokens = [s.shape[1] for s in all_states]
        if len(set(tokens)) > 1:
            raise ShapeError(f"tokenizers: found {tokens} tokens a text, expected as many from "
                             "each (model_max_length)")
        states = np.concatenate([to_numpy(s) for s in all_states], axis=-1)
        _check_finite(states, "text_encoder", "its states")
        if pooled is not None:
            _check_finite(pooled, "text_encoder", "its pooled states")
        return states, pooled

    def _inputs(self, c, repeat, guided):
        """What the UNet gets by name: negative ones first, each prompt's images in a row."""

        def batch(negative, positive):
            parts = [negative, positive] if guided else [positive]
            return np.ascontiguousarray(
                np.concatenate([np.repeat(p, repeat, axis=0) for p in parts]), np.float32)

        inputs = {"encoder_hidden_states": batch(c.negative_states, c.states)}
        if self.is_xl:
            inputs["text_embeds"] = batch(c.negative_pooled, c.pooled)
        return inputs

    # ---- latents ---------------------------------------------------------------------------------

    def _latents(self, given, count, height, width, generators, schedule):
        factor = self.vae.scale_factor
        shape = (count, self.unet.config.get("in_channels", 4), height // factor, width // factor)
        if given is not None:
            if tensor_shape(given, "latents", 4) != shape:
                raise ShapeError(f"latents: found {list(given.shape)}, expected {list(shape)}")
            if array_dtype(given) not in (*FLOATS, "float64"):
                raise DTypeError(f"latents: found {array_dtype(given)}, expected float32")
            x = to_numpy(given).astype(np.float32)
            if not np.isfinite(x).all():
                raise InvalidArgument("latents: found NaN or infinity, expected finite numbers")
        elif len(generators) == 1:
            x = _normals(generators[0], shape)
        else:
            x = np.concatenate([_normals(g, (1, *shape[1:])) for g in generators])
        return np.ascontiguousarray(x * np.float32(schedule.init_noise_sigma))

    def _finish(self, latents, output_type):
        if output_type == "latent":
            return latents
        scaling, mean, std = _latent_scale(self.vae.config)
        if self.is_xl and mean is not None and std is not None:
            latents = latents * std / scaling + mean
        else:
            latents = latents / np.float32(scaling)
        # one by one: the VAE's activations are the largest of all
        floats = np.concatenate([self._decode(latents, i) for i in range(len(latents))])
        return images.to_pil(floats) if output_type == "pil" else floats


    def _decode(self, latents, index):
        decoded = to_numpy(self.vae.decode(latents[index:index + 1]))
        _check_finite(decoded, "vae", f"image {index}")
        return images.to_float(decoded)


class _Progress:
    """The bar and the callbacks of one run."""

    def __init__(self, pipe, schedule, latents, bar, callback, on_step_end):
        for what, function in (("callback", callback), ("callback_on_step_end", on_step_end)):
            if function is not None and not callable(function):
                raise InvalidArgument(f"{what}: found {type(function).__name__}, expected a "
                                      "callable")
        if not isinstance(bar, bool | int | np.bool_ | None):
            raise InvalidArgument(f"progress_bar: found {bar!r:.100}, expected True or False")
        self.pipe, self.latents = pipe, latents
        self.callback, self.on_step_end = callback, on_step_end
        self.counts = [row["counts"] for row in schedule.rows]
        self.bar = None
        if bar:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=sum(self.counts))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()

    def listener(self):
        """Who wants the latents makes a GPU wait for the host after each row; the bar does not."""
        wanted = self.callback is not None or self.on_step_end is not None
        return {"callback": self._step} if wanted else {"progress": self._advance}

    def _step(self, index, timestep):
        """Called by the engine after row `index`; True stops."""
        stop = False
        if self.callback is not None:
            stop = bool(self.callback(index, timestep, self.latents))
            self._check_changes("callback", index)
        if self.on_step_end is not None:
            said = self.on_step_end(self.pipe, index, timestep, {"latents": self.latents})
            self._take(said)
            self._check_changes("callback_on_step_end", index)
        self._advance(index, timestep)
        return stop

    def _advance(self, index, timestep):
        if self.bar is not None and self.counts[index]:
            self.bar.update()

    def _check_changes(self, what, index):
        if not np.isfinite(self.latents).all():
            raise InvalidArgument(f"{what}: found NaN or infinity in the latents it left after "
                                  f"step {index + 1}, expected finite numbers")

    def _take(self, said):
        """The latents in what callback_on_step_end returned."""
        if said is None:
            return
        if not isinstance(said, dict):
            raise InvalidArgument(f"callback_on_step_end: returned {type(said).__name__}, expected "
                                  "a dict or None")
        new = said.get("latents", self.latents)
        if new is self.latents:
            return
        what = "callback_on_step_end's latents"
        if tensor_shape(new, what, 4) != self.latents.shape:
            raise ShapeError(f"{what}: found {list(new.shape)}, expected "
                             f"{list(self.latents.shape)}")
        if array_dtype(new) not in (*FLOATS, "float64"):
            raise DTypeError(f"{what}: found {array_dtype(new)}, expected float32")
        self.latents[...] = to_numpy(new)


# ---- arguments -----------------------------------------------------------------------------------


def _refuse(**arguments):
    """What only SDXL takes, given to another model: nothing is silently ignored."""
    for name, value in arguments.items():
        if value is not None:
            raise InvalidArgument(f"{name}: found {value!r:.100}, expected None: only SDXL takes "
                                  "it, and this folder is of another model")


def _generators(seed, generator, count):
    """Generators for `count` images, one or as many, and the seeds they were made of."""
    if seed is not None and generator is not None:
        raise InvalidArgument("seed: found a generator as well, expected one of the two")
    what = "seed" if generator is None else "generator"
    if generator is not None:
        generators = list(generator) if isinstance(generator, list | tuple) else [generator]
        for g in generators:
            if not isinstance(g, _core.Rng):
                raise InvalidArgument(f"generator: found {type(g).__name__}, expected "
                                      "accel.Generator; of a PyTorch one, take "
                                      "accel.Generator.from_torch_state(g.get_state().numpy())")
        seeds = None
    else:
        seeds = secrets.randbits(32) if seed is None else seed
        each = list(seeds) if isinstance(seeds, list | tuple) else [seeds]
        generators = [_core.Rng(integer(s, "seed", -2**63, 2**64 - 1)) for s in each]
    if len(generators) not in (1, count):
        raise InvalidArgument(f"{what}: found {len(generators)}, expected one, or one for each of "
                              f"{count} images")
    return generators, seeds


def _check_finite(array, network, what):
    """Every picture is finite or an error: NaN would come out as black."""
    if not np.isfinite(array).all():
        raise NumericError(f"{network}: found NaN or infinity in {what}, expected finite numbers; "
                           "see its weights, or the range of its dtype")


def _normals(generator, shape):
    return np.frombuffer(generator.normal(math.prod(shape)), np.float32).reshape(shape)


def _time_ids(sizes, batch):
    """SDXL's six numbers a row: original size, crop, target size."""
    row = []
    for size in sizes:
        if not isinstance(size, list | tuple) or len(size) != 2:
            raise InvalidArgument(f"original_size, crops_coords_top_left, target_size: found "
                                  f"{size!r:.100}, expected two numbers")
        row += [number(v, "original_size, crops_coords_top_left, target_size") for v in size]
    return np.tile(np.array(row, np.float32), (batch, 1))


def _is_before_0_9(config):
    version = str(config.get("_diffusers_version", "1")).split(".")
    try:
        return (int(version[0]), int(version[1])) < (0, 9)
    except (ValueError, IndexError):
        return False


# ---- what a folder says --------------------------------------------------------------------------


def _is_listed(index, name, folder):
    """Whether model_index.json has this part: [library, class], or [null, null] for none."""
    part = index.get(name)
    if part is None:
        return False
    if not isinstance(part, list) or len(part) != 2:
        raise FormatError(f"{folder / 'model_index.json'}: {name}: found {part!r:.100}, expected "
                          "its library and class")
    return part[0] is not None


def _latent_scale(config):
    """scaling_factor, and latents_mean and latents_std as float32 [1, c, 1, 1] or None."""
    scaling = number(config.get("scaling_factor", 0.18215), "vae: scaling_factor")
    if scaling == 0:
        raise InvalidArgument("vae: scaling_factor: found 0, which nothing can be divided by")
    channels = config.get("latent_channels", 4)
    each = []
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        if values is None:
            each.append(None)
            continue
        if not isinstance(values, list | tuple) or len(values) != channels:
            raise InvalidArgument(f"vae: {name}: found {values!r:.100}, expected {channels} "
                                  "numbers, one a latent channel")
        values = [number(v, f"vae: {name}") for v in values]
        each.append(np.array(values, np.float32).reshape(1, -1, 1, 1))
    return scaling, *each

"""What compile() makes of a diffusers pipeline: text to image with Stable Diffusion and SDXL runs
its denoise loop natively.

Python looks `__call__` up on the class, so the pipe's class becomes a subclass of the same name.
Its `__call__` asks diffusers' own helpers for everything around the loop (checks, prompts, first
latents, decoding) and leaves the loop to torch_loop. What this does not do runs the stock loop over
the compiled components, with one FallbackWarning, and is counted by report().
"""

import functools
import inspect
import sys
import threading
import warnings
from collections import Counter

import torch

from .compile_ import PIPES
from .torch_loop import Draws, Loop, check_scheduler, native_unet
from .torch_native import FallbackWarning
from .torch_upcast import KEY
from .torch_watch import Fallback, check_autocast, check_state, is_capturing

# Arguments of __call__ that the native loop honours; another one that is not at its default runs
# the stock loop.
COMMON = {"prompt", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt",
          "num_images_per_prompt", "eta", "generator", "latents", "prompt_embeds",
          "negative_prompt_embeds", "output_type", "return_dict", "guidance_rescale", "clip_skip",
          "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback",
          "callback_steps"}


# ---- the class -----------------------------------------------------------------------------------


class PipeState:
    """What compile() knows of one pipeline."""

    def __init__(self):
        self.left = {}         # component -> why it was left alone
        self.native_loops = 0
        self.stock_loops = Counter()  # reason -> calls
        self.lock = threading.Lock()

    def report(self):
        with self.lock:
            return {"native": self.native_loops, "stock": dict(self.stock_loops)}


@functools.cache
def _native_class(cls):
    """A subclass of `cls` that passes for it, and whose copies and pickles are of `cls`."""
    stock = cls.__call__

    @functools.wraps(stock)
    def __call__(self, *args, **kwargs):
        return call(self, stock, args, kwargs)

    def __reduce_ex__(self, protocol):
        return (object.__new__, (cls,), *cls.__reduce_ex__(self, protocol)[2:])

    return type(cls)(cls.__name__, (cls,), {
        "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
        "__call__": __call__, "__reduce_ex__": __reduce_ex__, "_accel_stock": cls})


def install(pipe):
    """Gives the pipe the native loop."""
    if "_accel_stock" not in type(pipe).__dict__:
        object.__setattr__(pipe, "__class__", _native_class(type(pipe)))


def remove(pipe):
    """Gives the pipe its own class back."""
    stock = type(pipe).__dict__.get("_accel_stock")
    if stock is not None:
        object.__setattr__(pipe, "__class__", stock)


def call(pipe, stock, args, kwargs):
    """The native loop where it can, else the stock one."""
    state = PIPES.setdefault(pipe, PipeState())
    try:
        with torch.no_grad():
            result = _task(pipe, stock, args, kwargs).run()
    except Fallback as reason:
        why = str(reason)
    else:
        with state.lock:
            state.native_loops += 1
        return result
    with state.lock:
        state.stock_loops[why] += 1
        first = state.stock_loops[why] == 1
    if first:
        warnings.warn(f"accel: {type(pipe).__name__} runs its stock loop: {why}", FallbackWarning,
                      stacklevel=3)
    return stock(pipe, *args, **kwargs)


def _task(pipe, stock, args, kwargs):
    """What to do natively for this call; raises Fallback."""
    module = sys.modules[stock.__module__]
    for name, kind in TASKS.items():
        known = getattr(module, name, None)
        if known is not None and stock is known.__call__:
            return kind(pipe, module, _arguments(kind, pipe, stock, args, kwargs))
    raise Fallback(f"no native loop for {type(pipe).__name__}")


def _arguments(kind, pipe, stock, args, kwargs):
    """Arguments by name, defaults filled in."""
    signature = inspect.signature(stock)
    try:
        bound = signature.bind(pipe, *args, **kwargs)
    except TypeError as error:
        raise Fallback(str(error)) from None
    bound.apply_defaults()
    given = dict(list(bound.arguments.items())[1:])
    given |= {"callback": None, "callback_steps": None} | given.pop("kwargs", {})
    for name, value in given.items():
        if name in kind.arguments or value is None or isinstance(value, dict) and not value:
            continue
        if name not in signature.parameters or value is not signature.parameters[name].default:
            raise Fallback(f"argument {name}")
    return given


def _with(function, values):
    """Calls a helper of diffusers with those of `values` that this version's takes."""
    names = inspect.signature(function).parameters
    return function(**{n: v for n, v in values.items() if n in names})


# ---- one call ------------------------------------------------------------------------------------


class StableDiffusion:
    """A call of StableDiffusionPipeline."""

    arguments = COMMON
    tensors = ("latents", "prompt_embeds", "negative_prompt_embeds")  # that a callback may want

    def __init__(self, pipe, module, arguments):
        self.pipe, self.module, self.a = pipe, module, arguments
        self._check()

    def _check(self):
        """Raises Fallback before anything is computed or drawn."""
        pipe, a = self.pipe, self.a
        native = native_unet(pipe)
        check_state(())
        if is_capturing():  # before a module is moved, which frees memory
            raise Fallback("CUDA graph capture")
        check_autocast(pipe._execution_device)
        if "_hf_hook" not in pipe.unet.__dict__:  # else it may have to move first
            native.examine(pipe.unet)
        for name in ("guidance_scale", "guidance_rescale", "eta"):
            if not isinstance(a[name], int | float):
                raise Fallback(f"{name} is a {type(a[name]).__name__}")
        if getattr(pipe.unet.config, "time_cond_proj_dim", None) is not None:
            raise Fallback("guidance embedded in the UNet (time_cond_proj_dim)")
        check_scheduler(pipe.scheduler)
        unknown = set(pipe._callback_tensor_inputs) - set(self.tensors)
        if a["callback_on_step_end"] is not None and unknown:
            raise Fallback(f"callback tensors {sorted(unknown)}")
        self._check_more()

    def _check_more(self):
        pass

    # ---- before the loop -------------------------------------------------------------------------

    def _start(self):
        """The part of the call before its prompts: messages, sizes, checks, the pipe's state."""
        pipe, a = self.pipe, self.a
        for name in ("callback", "callback_steps"):
            if a[name] is not None:
                self.module.deprecate(name, "1.0.0", f"Passing `{name}` as an input argument to "
                                      "`__call__` is deprecated, consider using "
                                      "`callback_on_step_end`")
        if hasattr(a["callback_on_step_end"], "tensor_inputs"):  # PipelineCallback
            a["callback_on_step_end_tensor_inputs"] = a["callback_on_step_end"].tensor_inputs
        self._default_sizes()
        _with(pipe.check_inputs, a)
        pipe._guidance_scale = a["guidance_scale"]
        pipe._guidance_rescale = a["guidance_rescale"]
        pipe._clip_skip = a["clip_skip"]
        pipe._cross_attention_kwargs = a.get("cross_attention_kwargs")
        pipe._interrupt = False
        prompt = a["prompt"]
        self.batch = (1 if isinstance(prompt, str) else len(prompt) if prompt is not None
                      else a["prompt_embeds"].shape[0])
        self.device = pipe._execution_device

    def _default_sizes(self):
        a, factor = self.a, self.pipe.vae_scale_factor
        if not a["height"] or not a["width"]:
            size = self.pipe.unet.config.sample_size
            height, width = (size, size) if isinstance(size, int) else size
            a["height"], a["width"] = height * factor, width * factor

    def _encode(self):
        """Tensors by the names that callbacks know, latents not among them."""
        guided = self.pipe.do_classifier_free_guidance
        positive, negative = _with(self.pipe.encode_prompt, self.a | {
            "device": self.device, "do_classifier_free_guidance": guided, "lora_scale": None})
        return {"prompt_embeds": torch.cat([negative, positive]) if guided else positive,
                "negative_prompt_embeds": negative}

    @staticmethod
    def conditions(values):
        """What the UNet gets by its own names."""
        return {"encoder_hidden_states": values["prompt_embeds"]}

    @staticmethod
    def added(values):
        """added_cond_kwargs of a call of the UNet itself."""

    def _latents(self, dtype):
        pipe, a = self.pipe, self.a
        return pipe.prepare_latents(
            self.batch * a["num_images_per_prompt"], pipe.unet.config.in_channels, a["height"],
            a["width"], dtype, self.device, a["generator"], a["latents"])

    def run(self):
        pipe, a = self.pipe, self.a
        self._start()
        drawn = Draws(a["generator"], self.device)
        values = self._encode()
        pipe.scheduler.set_timesteps(a["num_inference_steps"], device=self.device)
        values["latents"] = self._latents(values["prompt_embeds"].dtype)
        try:
            latents = Loop(self, values).run()
        except Fallback:
            drawn.undo()
            raise
        images = self._finish(latents, values["prompt_embeds"].dtype)
        pipe.maybe_free_model_hooks()
        return images

    def rows(self):
        """How many timesteps to run, and what the progress bar counts to."""
        return len(self.pipe.scheduler.timesteps), self.a["num_inference_steps"]

    # ---- after the loop --------------------------------------------------------------------------

    def _finish(self, latents, dtype):
        pipe, a = self.pipe, self.a
        image, unsafe = latents, None
        if a["output_type"] != "latent":
            image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False,
                                    generator=a["generator"])[0]
            image, unsafe = pipe.run_safety_checker(image, self.device, dtype)
        denormalize = [True] * image.shape[0] if unsafe is None else [not u for u in unsafe]
        image = pipe.image_processor.postprocess(image, output_type=a["output_type"],
                                                 do_denormalize=denormalize)
        if not a["return_dict"]:
            return image, unsafe
        return self.module.StableDiffusionPipelineOutput(images=image,
                                                         nsfw_content_detected=unsafe)


class StableDiffusionXL(StableDiffusion):
    """A call of StableDiffusionXLPipeline."""

    arguments = COMMON | {"prompt_2", "negative_prompt_2", "pooled_prompt_embeds",
                          "negative_pooled_prompt_embeds", "original_size",
                          "crops_coords_top_left", "target_size", "negative_original_size",
                          "negative_crops_coords_top_left", "negative_target_size",
                          "denoising_end"}
    tensors = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")

    def _start(self):
        super()._start()
        self.pipe._denoising_end = self.a["denoising_end"]

    def _default_sizes(self):
        a, size = self.a, self.pipe.default_sample_size * self.pipe.vae_scale_factor
        for name in ("height", "width"):
            a[name] = a[name] or size
        for name in ("original_size", "target_size"):
            a[name] = a[name] or (a["height"], a["width"])

    def _encode(self):
        a, pipe = self.a, self.pipe
        guided = pipe.do_classifier_free_guidance
        states, negative, pooled, negative_pooled = _with(pipe.encode_prompt, a | {
            "device": self.device, "do_classifier_free_guidance": guided, "lora_scale": None})
        encoder = pipe.text_encoder_2
        width = int(pooled.shape[-1]) if encoder is None else encoder.config.projection_dim
        ids = self._time_ids("", states.dtype, width)
        negative_ids = ids
        if a["negative_original_size"] is not None and a["negative_target_size"] is not None:
            negative_ids = self._time_ids("negative_", states.dtype, width)
        if guided:
            states, pooled = torch.cat([negative, states]), torch.cat([negative_pooled, pooled])
            ids = torch.cat([negative_ids, ids])
        repeat = self.batch * a["num_images_per_prompt"]
        return {"prompt_embeds": states.to(self.device), "add_text_embeds": pooled.to(self.device),
                "add_time_ids": ids.to(self.device).repeat(repeat, 1)}

    def _time_ids(self, prefix, dtype, width):
        return self.pipe._get_add_time_ids(
            self.a[f"{prefix}original_size"], self.a[f"{prefix}crops_coords_top_left"],
            self.a[f"{prefix}target_size"], dtype=dtype, text_encoder_projection_dim=width)

    @staticmethod
    def conditions(values):
        return {"encoder_hidden_states": values["prompt_embeds"],
                "text_embeds": values["add_text_embeds"], "time_ids": values["add_time_ids"]}

    @staticmethod
    def added(values):
        return {"text_embeds": values["add_text_embeds"], "time_ids": values["add_time_ids"]}

    def rows(self):
        count, total = super().rows()
        end = self.a["denoising_end"]
        if isinstance(end, float) and 0 < end < 1:
            train = self.pipe.scheduler.config.num_train_timesteps
            times = self.pipe.scheduler.timesteps.tolist()
            count = total = sum(t >= int(round(train - end * train)) for t in times)
        return count, total

    def _finish(self, latents, dtype):
        pipe, a = self.pipe, self.a
        image = latents
        if a["output_type"] != "latent":
            image = self._decode(latents)
            if pipe.watermark is not None:
                image = pipe.watermark.apply_watermark(image)
            image = pipe.image_processor.postprocess(image, output_type=a["output_type"])
        if not a["return_dict"]:
            return (image,)
        return self.module.StableDiffusionXLPipelineOutput(images=image)

    def _decode(self, latents):
        vae = self.pipe.vae
        config = vae.config
        upcast = vae.dtype == torch.float16 and config.force_upcast
        if upcast:
            self.pipe.upcast_vae()
            latents = latents.to(next(iter(vae.post_quant_conv.parameters())).dtype)
        mean, std = (getattr(config, n, None) for n in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:
            mean, std = (torch.tensor(v).view(1, 4, 1, 1).to(latents.device, latents.dtype)
                         for v in (mean, std))
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        where = getattr(self.module, "get_module_execution_device", None)
        if where is not None:
            latents = latents.to(where(vae))
        image = vae.decode(latents, return_dict=False)[0]
        if upcast:
            vae.to(dtype=torch.float16)
        # a compiled one needs no upcast; the picture has the dtype that it would have had
        return image.float() if config.get(KEY) and vae.dtype == torch.float16 else image


TASKS = {"StableDiffusionPipeline": StableDiffusion,
         "StableDiffusionXLPipeline": StableDiffusionXL}

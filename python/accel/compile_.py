"""accel.compile: diffusers' and transformers' modules on accel's engine, in place.

The module stays the same object of the same class: an attribute of the instance stands in front of
the class's `forward` (the VAE's `_encode` and `_decode`), asks whether the engine computes exactly
what the module would now, runs it, and otherwise calls the original. Weights are borrowed from the
module's parameters, never copied where dtype and layout fit, never changed. On a GPU those that the
engine reads joined or in another order are laid out so in place (torch_layout): the parameters
become views of that memory, until decompile().
"""

import functools
import inspect
import json
import sys
import weakref

from . import _core
from ._core import InvalidArgument, UnsupportedError
from .torch_native import FallbackWarning as FallbackWarning
from .torch_native import Native, config_text, give_back

MARK = "_accel"  # instance attribute that holds the Native of a compiled module
COPIES = ("__getstate__", "_replicate_for_data_parallel")
PIPES = weakref.WeakKeyDictionary()  # pipeline -> torch_pipeline.PipeState
# Methods that bring adapters, merge them into weights or take them away, or load other weights.
# Merging moves no pointer and no version, and after the adapters went nothing else tells; inference
# tensors have no versions.
VERBS = ("add_adapter", "delete_adapter", "delete_adapters", "disable_adapters", "disable_lora",
         "enable_adapters", "enable_lora", "fuse_lora", "load_adapter", "load_attn_procs",
         "load_lora_adapter", "load_state_dict", "set_adapter", "set_adapters", "unfuse_lora",
         "unload_lora")


# ---- putting it on and off -----------------------------------------------------------------------


_hidden = []  # Native.call as torch.compile must take it; one entry, when first needed


def _untraced():
    """Native.call, hidden from torch.compile where somebody has loaded that."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return Native.call
    if not _hidden:
        _hidden.append(dynamo.disable(Native.call))
    return _hidden[0]


def _method(native, name, original):
    """What stands in front of the class's method; keeps its signature, not its module alive."""

    def method(*args, **kwargs):
        return _untraced()(native, name, args, kwargs)

    functools.update_wrapper(method, original)
    del method.__wrapped__
    method.__signature__ = native.signatures[name]
    method._accel = native
    return method


def _verb(native, original):
    """What stands in front of one of VERBS: the module is examined anew after it."""

    def verb(*args, **kwargs):
        try:
            return original(native.module(), *args, **kwargs)
        finally:
            native.stale = True

    functools.update_wrapper(verb, original)
    del verb.__wrapped__
    signature = inspect.signature(original)
    verb.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
    verb._accel = native
    return verb


def _verbs_of(native, state):
    """Those of VERBS in a module's __dict__, or in a copy of that, that are ours."""
    return [name for name in VERBS if getattr(state.get(name), "_accel", None) is native]


def _apply_of(native, cls):
    """Module._apply moves parameters: let go of them first, unless nothing will move."""

    def _apply(fn, *args, **kwargs):
        module = native.module()
        if _moves(module, fn):
            native.release()
            native.captured = False
        return cls._apply(module, fn, *args, **kwargs)

    return _apply


def _moves(module, fn):
    """Whether `fn` gives back another tensor for such tensors as the module's parameters.

    What it does in place (share_memory_) is noticed at the next call.
    """
    import torch

    kinds = {(p.dtype, p.device) for p in module.parameters()}
    for dtype, device in kinds:
        probe = torch.zeros((2, 2, 2, 2), dtype=dtype, device=device)
        try:
            if fn(probe) is not probe:
                return True
        except Exception:  # whatever it raises, the real call raises it where it belongs
            return True
    return False


def _make_plain(native, state):
    """Takes what compile() put there out of a copy of the module's __dict__."""
    from .torch_upcast import restore

    for key in (MARK, *COPIES, "_apply", *_verbs_of(native, state), *native.calls.methods):
        if key != "forward" or getattr(state.get(key), "_accel", None) is native:
            state.pop(key, None)
    restore(state)


def _copies_of(native, cls):
    """COPIES of an instance: copies, pickles and DataParallel's replicas of a compiled module are
    plain ones."""

    def __getstate__():
        state = dict(native.module().__dict__)
        _make_plain(native, state)
        return state

    def _replicate_for_data_parallel():
        replica = cls._replicate_for_data_parallel(native.module())
        _make_plain(native, replica.__dict__)
        return replica

    return dict(zip(COPIES, (__getstate__, _replicate_for_data_parallel), strict=True))


def _slot(module, method):
    """Where the method of the instance goes: under accelerate's offload hook, its `_old_forward`,
    so that removing the hook leaves ours in place."""
    if method == "forward" and "_old_forward" in module.__dict__ and hasattr(module, "_hf_hook"):
        return "_old_forward"
    return method


def is_in_front(module, method):
    """Whether a call of the method comes to the engine first, but for accelerate's hook."""
    return getattr(module.__dict__.get(_slot(module, method)), "_accel", None) is native_of(module)


def _check_free(module, method):
    if _slot(module, method) == method and method in module.__dict__:
        raise UnsupportedError(f"compile: the {method} of this {type(module).__name__} is already "
                               f"replaced, by {module.__dict__[method]!r:.100}")


def _attach(module, passes_off):
    from .torch_calls import CALLS
    from .torch_upcast import hide

    calls = CALLS[type(module).__name__]()
    for method in calls.methods:
        if not hasattr(type(module), method):
            raise UnsupportedError(f"compile: this version's {type(module).__name__} has no "
                                   f"{method}")
        _check_free(module, method)
    # raises for a class, a field or a value of the config that is not supported
    _core.Model(config_text(module), None, "null", passes_off)
    native = Native(module, calls, passes_off)
    for method in calls.methods:
        module.__dict__[_slot(module, method)] = _method(native, method, native.originals[method])
    for name in VERBS:
        if hasattr(type(module), name) and name not in module.__dict__:
            module.__dict__[name] = _verb(native, getattr(type(module), name))
    module.__dict__["_apply"] = _apply_of(native, type(module))
    module.__dict__.update(_copies_of(native, type(module)))
    module.__dict__[MARK] = native
    hide(module)


def _detach(module):
    from .torch_upcast import restore

    native = module.__dict__.pop(MARK)
    restore(module.__dict__)
    for key in _verbs_of(native, module.__dict__):
        del module.__dict__[key]
    for key in [*native.calls.methods, "_old_forward"]:
        if getattr(module.__dict__.get(key), "_accel", None) is not native:
            continue
        if key == "_old_forward":
            module.__dict__[key] = native.originals["forward"].__get__(module)
        else:
            del module.__dict__[key]
    for key in ("_apply", *COPIES):
        del module.__dict__[key]
    native.release()
    give_back(native, module)


def native_of(x):
    """The Native of a compiled module, or None."""
    return x.__dict__.get(MARK) if hasattr(x, "__dict__") else None


def _is_module(x):
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.nn.Module)


def _is_pipeline(x):
    return any(c.__name__ == "DiffusionPipeline" and c.__module__.startswith("diffusers.")
               for c in type(x).__mro__)


def _is_supported(x):
    from .torch_calls import CALLS

    cls = type(x)
    return cls.__name__ in CALLS and cls.__module__.split(".")[0] in ("diffusers", "transformers")


def compile(x, *, passes_off=""):  # the name is the point
    """Puts a module, or every module of a diffusers pipeline that can be, on accel's engine.

    Parameters
    ----------
    x : UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, or a
        diffusers pipeline
        With parameters of one dtype, float32, float16 or bfloat16, on the CPU or one NVIDIA GPU,
        in eval mode. The CPU computes in float32; a GPU in the parameters' dtype, in the current
        stream, and nothing waits for it, but first calls and a text encoder's attention_mask that
        was not given before (in inference mode: any). In float32 on a GPU, PyTorch's switches for
        TF32 are read at each call: `torch.backends.cuda.matmul` for linear layers and attention,
        `torch.backends.cudnn` for convolutions; without effect below compute capability 8.0, which
        has no TF32.
    passes_off : str
        Names of graph passes to leave out, for finding faults.

    Returns
    -------
    x itself; isinstance, type, state_dict, save_pretrained and `.to` go on as before. On a GPU
    some parameters share storage or have channels_last strides after the first call, which
    `safetensors.torch.save_file` and `p.view(-1)` refuse: save_pretrained, or decompile first.

    What the engine does not do (adapters, foreign attention processors, FreeU, hooks on inner
    modules, ControlNet residuals, gradients, autocast, a CUDA graph that the caller records ...)
    is noticed at the call: it runs the original, with one FallbackWarning. `accel.report(x)`
    counts both.

    Of StableDiffusionPipeline and StableDiffusionXLPipeline the denoise loop runs natively too,
    with the same arguments, outputs, callbacks and seeds (a callback may change latents, but not
    their shape: ShapeError); the pipe's class becomes a subclass that passes for the original one.
    Arguments and schedulers that this loop does not do, and other pipelines, run diffusers' own
    loop over the compiled components; report() says which and why.

    Moving a module (`.to`, offloading) frees all that the engine holds for it; the next call binds
    it anew. On a GPU parameters are laid out in place as the engine reads them, so that there is no
    second copy, and changes are noticed by address and version, merged adapters by the module's
    own methods (`fuse_lora`, `unload_lora` ...): after `p.data.mul_(...)`, or the same to a
    prompt's states, which leave all that as it was, call `accel.refresh(x)`. Parameters made in
    `torch.inference_mode()` cannot be laid out and have no version: what is read joined is copied,
    and only `load_state_dict` and adapters are noticed. What the engine keeps there beside comes
    from PyTorch's allocator (PyTorch 2.10 and later), so its counters and limits hold for that too.

    Raises
    ------
    UnsupportedError
        For a class that is not supported, or a field or value of its config, by name.

    Calls raise what the original does for arguments that it refuses too; OutOfMemory, when PyTorch
    has given back what it keeps for later and the plan still does not fit, with its size and what
    is free; DeviceError when the GPU is lost, with the same message at every later call.
    """
    if _is_module(x):
        if not _is_supported(x):
            from .torch_calls import CALLS

            name = type(x).__name__
            if name in CALLS:
                name = f"{type(x).__module__}.{name}"  # not of the library it is named like
            raise UnsupportedError(f"compile: found {name}, expected one of {', '.join(CALLS)} of "
                                   "diffusers or transformers, whole, or a diffusers pipeline")
        if native_of(x) is None:
            _attach(x, passes_off)
        return x
    if _is_pipeline(x):
        from .torch_pipeline import PipeState, install

        state = PIPES[x] = PipeState()
        for name, component in x.components.items():
            if not _is_module(component):
                continue
            try:
                compile(component, passes_off=passes_off)
            except (UnsupportedError, InvalidArgument) as error:
                state.left[name] = str(error)
        install(x)
        return x
    raise UnsupportedError(f"compile: found {type(x).__name__}, expected a module of diffusers or "
                           "transformers, or a diffusers pipeline")


def _each(x, what):
    """The compiled modules of x by name."""
    if _is_pipeline(x):
        return {n: c for n, c in x.components.items() if _is_module(c) and native_of(c)}
    if _is_module(x) and native_of(x):
        return {"": x}
    raise InvalidArgument(f"{what}: found {type(x).__name__}, expected something that "
                          "accel.compile returned")


def decompile(x):
    """Undoes compile; returns x, a plain module or pipeline with its own parameters.

    Raises InvalidArgument for what accel.compile did not return.
    """
    if _is_module(x) and native_of(x) is None:
        return x
    for module in _each(x, "decompile").values():
        _detach(module)
    if PIPES.pop(x, None) is not None:
        from .torch_pipeline import remove

        remove(x)
    return x


def refresh(x):
    """Makes everything anew at the next call: for changes that no check can see. Returns x.

    Raises InvalidArgument for what accel.compile did not return.
    """
    for module in _each(x, "refresh").values():
        native_of(module).release()
    return x


# ---- for reporting.py ----------------------------------------------------------------------------


def _entry(native):
    from .reporting import entry_of

    with native.lock:
        entry = entry_of(native.class_name, native.model, native.weights, device=native.device,
                         native_runs=native.native_runs, fallbacks=native.fallbacks)
        entry["copied_bytes"] = sum(c.nbytes for _, c, _ in native.copies.values())
    return entry


def report_compiled(x):
    """The dict that report() wraps."""
    modules = _each(x, "report")
    if "" in modules:
        return _entry(native_of(x))
    entries = {name: _entry(native_of(m)) for name, m in modules.items()}
    state = PIPES.get(x)
    if state is None:
        return {"components": entries, "loop": {"native": 0, "stock": {}}}
    for name, reason in state.left.items():
        entries[name] = {"class": type(x.components[name]).__name__, "skipped": reason}
    return {"components": entries, "loop": state.report()}


def _sizes(native, module, given):
    """Args of a plan: the given ones, else the last call's, else what the config suggests; computed
    as the module is now, where that is known."""
    from .components import VAE, TextEncoder, UNet
    from .torch_calls import NAMES

    kind = {"UNet2DConditionModel": UNet, "AutoencoderKL": VAE}.get(native.class_name, TextEncoder)
    known = {**(native.last_args or {}), **given}
    if native.watch is not None and native.watch.reason is None:
        known |= {"io_dtype": NAMES[native.watch.dtype], **native.precision, **given}
    elif native.model is None:  # the plan is one for the CPU then
        known = {n: v for n, v in known.items() if n not in ("compute", "tf32")} | given
    return kind.sizes(json.loads(config_text(module)), known)


def explain_compiled(x, *, as_json=False, passes=False, profile=None, **args):
    """The plan for the last call's sizes, or the given ones; `profile`: repeats and peaks."""
    from .torch_watch import Fallback

    if _is_pipeline(x):
        x = x.unet
    native = native_of(x)
    if native is None:
        raise InvalidArgument(f"explain: found {type(x).__name__}, expected something that "
                              "accel.compile returned")
    with native.lock:
        try:
            native._follow(x)
        except Fallback as reason:
            if profile is not None:
                raise UnsupportedError(f"explain: the engine does not run this "
                                       f"{native.class_name} now: {reason}") from None
        args, model = _sizes(native, x, args), native.model
        native.active += 1  # its bindings cannot move meanwhile
    try:
        if profile is not None:
            return model.profile(args, as_json, **profile)
        model = model or _core.Model(config_text(x), None, "cpu", native.passes_off)
        return model.explain(args, as_json, passes)
    finally:
        with native.lock:
            native.active -= 1

"""accel.compile: diffusers' and transformers' modules on accel's engine, in place.

The module stays the same object of the same class: an attribute of the instance stands in front of
the class's `forward` (the VAE's `_encode` and `_decode`), asks whether the engine computes exactly
what the module would now, runs it, and otherwise calls the original. Weights are borrowed from the
module's parameters, never copied where dtype and layout fit, never changed.
"""

import contextlib
import functools
import inspect
import itertools
import json
import os
import sys
import threading
import warnings
import weakref
from collections import Counter

from . import _core, threads
from ._core import DTypeError, InvalidArgument, ShapeError, UnsupportedError, WeightsError

MARK = "_accel"  # instance attribute that holds the Native of a compiled module
PIPES = weakref.WeakKeyDictionary()  # pipeline -> torch_pipeline.PipeState
PROMPTS_KEPT = 4
# What the engine says to a call that the original may still take, or refuse in its own words.
REFUSALS = (InvalidArgument, ShapeError, DTypeError, UnsupportedError, WeightsError, BufferError)
_tokens = itertools.count(1)


class FallbackWarning(UserWarning):
    """A compiled module ran its original forward; given once for each module and reason."""


# ---- one compiled module -------------------------------------------------------------------------

_natives = weakref.WeakSet()


def _after_fork():
    """In the child: a thread that is not there may have held a lock, in the middle of a change."""
    for native in list(_natives):
        if native.lock.acquire(blocking=False):
            native.lock.release()
        else:
            native.lock = threading.RLock()
            native._forget()


os.register_at_fork(after_in_child=_after_fork)


class Native:
    """The engine's side of one module. All state changes under `lock`; runs do not hold it."""

    def __init__(self, module, calls, passes_off):
        self.module = weakref.ref(module)
        self.class_name = type(module).__name__
        self.calls = calls
        self.passes_off = passes_off
        self.lock = threading.RLock()
        _natives.add(self)
        self.native_runs = 0
        self.fallbacks = Counter()
        self.originals = {m: getattr(type(module), m) for m in calls.methods}
        self.signatures = {m: inspect.signature(getattr(module, m)) for m in calls.methods}
        self.active = 0        # runs without the lock
        self.last_args = None
        self._forget()

    def _forget(self):
        """Lets go of all of the module; it is examined and bound again at the next call."""
        self.watch = None
        self._unbind()

    def _unbind(self):
        """Lets go of parameters, plans and derived weights.  Runs that go on keep theirs."""
        self.model = self.weights = None
        self.copies = {}       # name -> (flat view of the parameter's memory, copy, checksum)
        self.raw = None        # Weights over those flat views
        self.prompts = []      # newest last: (tensors, token)
        self.unwatched = None  # see _prompt_weights
        self.prompt_checksum = None
        self.io = {}           # args -> outputs

    def release(self):
        with self.lock:
            self._forget()

    # ---- following the module --------------------------------------------------------------------

    def _follow(self, module):
        """Examines and binds what changed; raises Fallback."""
        from .torch_watch import Fallback, Watch, reference

        if self.watch is None or self.watch.changed(module):
            text = config_text(module)
            if self.watch is None or text != self.text:
                self._forget()
                self.text, self.reference = text, reference(module)
            watch = Watch(module, self.reference)
            if watch.reason is None and self.model is not None:
                self._keep_bindings(watch)
            self.watch = watch
        if self.watch.reason is not None:
            raise Fallback(self.watch.reason)
        if self.model is None:
            self._bind_all()
            return
        moved = self.watch.moved()
        if moved and self.active:
            self._unbind()
            self._bind_all()
        elif moved:
            for i in moved:
                self._bind(i)
            self.prompts.clear()
            self.io.clear()

    def _keep_bindings(self, watch):
        """After a new examination the engine still holds the old bindings: compare with those."""
        old = {}
        if self.watch.reason is None:
            old = {name: place for (name, _, _), place in
                   zip(self.watch.parameters, self.watch.bound, strict=True)}
        if set(old) == {name for name, _, _ in watch.parameters}:
            watch.bound = [old[name] for name, _, _ in watch.parameters]
        else:
            self._unbind()

    def _bind_all(self):
        self.weights = _core.Weights()
        self.copies, self.raw = {}, None
        for i in range(len(self.watch.parameters)):
            self._bind(i)
        self.model = _core.Model(self.text, self.weights, "cpu", self.passes_off)

    def _bind(self, i):
        name, d, key = self.watch.parameters[i]
        p = d[key].detach()
        name = _core.weight_name(self.class_name, name)
        self.copies.pop(name, None)
        if not p.is_contiguous():
            p = self._copy(name, p)
        self.weights.set(name, p)

    def _copy(self, name, p):
        """channels_last and other permuted parameters: a contiguous copy, with a checksum over the
        original's memory that tells when to copy again."""
        from .torch_watch import Fallback

        order = sorted(range(p.ndim), key=lambda d: p.stride(d), reverse=True)
        flat = p.permute(order)
        if not flat.is_contiguous():
            raise Fallback(f"{name} is a view with gaps")
        if self.raw is None:
            self.raw = _core.Weights()
        self.raw.set(name, flat)
        copy = p.contiguous()
        self.copies[name] = (p, copy, self.raw.checksum((name,)))
        return copy

    def _check_sources(self):
        """In-place changes, which move neither a pointer nor a version counter; how many."""
        changed = self.weights.check()
        for name, (p, copy, checksum) in self.copies.items():
            now = self.raw.checksum((name,))
            if now != checksum:
                copy.copy_(p)
                self.copies[name] = (p, copy, now)
                self.weights.invalidate(name)
                changed += 1
        if changed:
            self.prompts.clear()
        return changed

    # ---- for the loop of a pipeline --------------------------------------------------------------

    def examine(self, module):
        """Binds what can be; raises Fallback."""
        with self.lock:
            self._follow(module)

    @contextlib.contextmanager
    def running(self, module):
        """The engine's model, bound and checked, for as long as a loop runs; raises Fallback."""
        import torch

        with self.lock:
            self._follow(module)
            self._check_sources()
            self._prompt_weights_changed()
            model = self.model
            threads.follow(torch.get_num_threads())
            self.active += 1
        try:
            yield model
        finally:
            with self.lock:
                self.active -= 1

    def touched(self, module, model):
        """Whether somebody did something to the module since running() gave `model`."""
        with self.lock:
            return (self.model is not model or self.watch.changed(module)
                    or bool(self.watch.elsewhere()) or self._check_sources()
                    or self._prompt_weights_changed())

    def count(self, rows, args):
        """A loop ran this many rows."""
        with self.lock:
            self.native_runs += rows
            self.last_args = args

    # ---- the prompt section ----------------------------------------------------------------------

    def _token(self, tensors):
        """A number that is equal only for equal prompts and unchanged weights; 0: do not reuse.

        Compares values: exact for inference tensors and reused memory too, and next to nothing
        beside a run.
        """
        import torch

        if not tensors:
            return 0
        self._prompt_weights_changed()
        for kept, token in self.prompts:
            if len(kept) == len(tensors) and all(
                    a.dtype == b.dtype and torch.equal(a, b)
                    for a, b in zip(kept, tensors, strict=True)):
                return token
        token = next(_tokens)
        self.prompts.append((tuple(t.detach().clone() for t in tensors), token))
        del self.prompts[:-PROMPTS_KEPT]
        return token

    def _prompt_weights_changed(self):
        """Whether weights that the prompt section reads in place changed."""
        direct = self._prompt_weights()
        checksum = self.weights.checksum(direct) if direct else None
        if checksum == self.prompt_checksum:
            return False
        self.prompts.clear()
        self.prompt_checksum = checksum
        return True

    def _prompt_weights(self):
        """Weights of the prompt section that no derived weight watches over."""
        derived = self.weights.derived()
        if self.unwatched is None or self.unwatched[0] != len(derived):
            watched = {s for d in derived for s in d["sources"]}
            self.unwatched = len(derived), tuple(
                n for n in self.weights.names() if n not in watched and _is_prompt_weight(n))
            self.prompt_checksum = None
        return self.unwatched[1]

    # ---- calls -----------------------------------------------------------------------------------

    def call(self, method, args, kwargs):
        """The engine where it can, else the original."""
        from . import torch_upcast
        from .torch_watch import Fallback

        module = self.module()
        try:
            result = self._try(module, method, args, kwargs)
        except Fallback as reason:
            why = str(reason)
        except REFUSALS as error:
            why = f"{type(error).__name__}: {error}"
        else:
            return result
        with self.lock:
            self.fallbacks[why] += 1
            first = self.fallbacks[why] == 1
        if first:
            warnings.warn(f"accel: {self.class_name} runs its original {method}: {why}",
                          FallbackWarning, stacklevel=3)
        original = self.originals[method].__get__(module)
        if torch_upcast.is_needed(module):
            return torch_upcast.run(module, original, args, kwargs)
        return original(*args, **kwargs)

    def _try(self, module, method, args, kwargs):
        import torch

        from .torch_watch import Fallback, check_state

        signature = self.signatures[method]
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise Fallback(str(error)) from None
        check_state((args, kwargs))
        defaults = {n: p.default for n, p in signature.parameters.items()}
        with self.lock:
            self._follow(module)
            request = self.calls.request(method, module, self.watch.dtype, dict(bound.arguments),
                                         defaults)
            self._check_sources()
            token = self._token(request.prompt)
            model = self.model
            outputs = {name: torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
                       for name, shape, dtype in self._outputs(request.args)}
            self.last_args = request.args
            threads.follow(torch.get_num_threads())
            self.active += 1
        try:
            inputs = {n: t.detach() for n, t in request.inputs.items()}
            model.run(request.args, inputs, outputs, token)
        finally:
            with self.lock:
                self.active -= 1
        with self.lock:
            self.native_runs += 1
        return request.wrap(outputs)

    def _outputs(self, args):
        key = tuple(args.items())
        if key not in self.io:
            if len(self.io) > 64:
                self.io.clear()
            self.io[key] = [(name, shape, dtype) for name, shape, dtype, is_output
                            in self.model.io(args) if is_output]
        return self.io[key]


def _is_prompt_weight(name):
    return ".attn2.to_k." in name or ".attn2.to_v." in name or name.startswith("add_embedding.")


def config_text(module):
    """config.json of a module as it is now."""
    config = module.config
    if hasattr(config, "to_diff_dict"):  # transformers
        data = json.loads(config.to_json_string(use_diff=True))
        data["architectures"] = [type(module).__name__]
    else:
        data = json.loads(module.to_json_string())
    return json.dumps(data)


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


def _apply_of(native, cls):
    """Module._apply moves parameters: let go of them first, unless nothing will move."""

    def _apply(fn, *args, **kwargs):
        module = native.module()
        if _moves(module, fn):
            native.release()
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


def _getstate_of(native):
    """Copies and pickles of a compiled module are plain ones."""
    from .torch_upcast import restore

    def __getstate__():
        state = dict(native.module().__dict__)
        for key in (MARK, "_apply", "__getstate__", *native.calls.methods):
            if key != "forward" or getattr(state.get(key), "_accel", None) is native:
                state.pop(key, None)
        restore(state)
        return state

    return __getstate__


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

    calls = CALLS[type(module).__name__]
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
    module.__dict__["_apply"] = _apply_of(native, type(module))
    module.__dict__["__getstate__"] = _getstate_of(native)
    module.__dict__[MARK] = native
    hide(module)


def _detach(module):
    from .torch_upcast import restore

    native = module.__dict__.pop(MARK)
    restore(module.__dict__)
    for key in [*native.calls.methods, "_old_forward"]:
        if getattr(module.__dict__.get(key), "_accel", None) is not native:
            continue
        if key == "_old_forward":
            module.__dict__[key] = native.originals["forward"].__get__(module)
        else:
            del module.__dict__[key]
    del module.__dict__["_apply"], module.__dict__["__getstate__"]
    native.release()


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
        With CPU parameters of one dtype, float32, float16 or bfloat16, in eval mode.
    passes_off : str
        Names of graph passes to leave out, for finding faults.

    Returns
    -------
    x itself; isinstance, type, state_dict, save_pretrained and `.to` go on as before.

    What the engine does not do (adapters, foreign attention processors, FreeU, hooks on inner
    modules, ControlNet residuals, gradients, autocast ...) is noticed at the call: it runs the
    original, with one FallbackWarning. `accel.report(x)` counts both.

    Raises
    ------
    UnsupportedError
        For a class that is not supported, or a field or value of its config, by name.
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
            except UnsupportedError as error:
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
    """Undoes compile; returns x, a plain module or pipeline with its own parameters."""
    if _is_module(x) and native_of(x) is None:
        return x
    for module in _each(x, "decompile").values():
        _detach(module)
    if PIPES.pop(x, None) is not None:
        from .torch_pipeline import remove

        remove(x)
    return x


def refresh(x):
    """Makes everything anew at the next call: for changes that no check can see. Returns x."""
    for module in _each(x, "refresh").values():
        native_of(module).release()
    return x


# ---- for report.py -------------------------------------------------------------------------------


def _entry(native):
    from .report import entry_of

    with native.lock:
        entry = entry_of(native.class_name, native.model, native.weights,
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


def explain_compiled(x, *, json=False, passes=False, profile=None, **args):
    """The plan for the last call's sizes, or the given ones; `profile`: repeats and peaks."""
    if _is_pipeline(x):
        x = x.unet
    native = native_of(x)
    if native is None:
        raise InvalidArgument(f"explain: found {type(x).__name__}, expected something that "
                              "accel.compile returned")
    if native.last_args is None and not args:
        raise InvalidArgument("explain: no call yet to take the sizes from; give batch=, height=, "
                              "width=, tokens=")
    args = {**(native.last_args or {}), **args}
    if profile is not None:
        with native.lock:
            native._follow(x)
            model = native.model
        return model.profile(args, json, **profile)
    model = native.model or _core.Model(config_text(x), None, "cpu", native.passes_off)
    return model.explain(args, json, passes)

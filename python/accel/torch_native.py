"""One compiled module: its parameters bound to the engine, its calls run there.

Weights are borrowed from the module's parameters. On the CPU an in-place change of one is noticed
by checksums, which cost nothing beside a run there; on a GPU by PyTorch's version counters, because
nothing may wait for the GPU: what bypasses them (`p.data.add_(...)`) needs accel.refresh().
"""

import contextlib
import inspect
import itertools
import json
import os
import threading
import warnings
import weakref
from collections import Counter

from . import _core, threads
from ._core import (
    DeviceError,
    DTypeError,
    InvalidArgument,
    OutOfMemory,
    ShapeError,
    UnsupportedError,
    WeightsError,
)
from .devices import missed

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
        from .torch_watch import Seen

        self.module = weakref.ref(module)
        self.class_name = type(module).__name__
        self.calls = calls
        self.passes_off = passes_off
        self.lock = threading.RLock()
        self.prompts = Seen(PROMPTS_KEPT)  # tensors of a prompt -> token
        _natives.add(self)
        self.native_runs = 0
        self.fallbacks = Counter()
        self.originals = {m: getattr(type(module), m) for m in calls.methods}
        self.signatures = {m: inspect.signature(getattr(module, m)) for m in calls.methods}
        self.active = 0        # runs without the lock
        self.last_args = None
        self.text = None       # the config that `reference` was built from
        self.keys = {}         # config -> keys of the derived weights of a plan
        self.laid = set()      # the engine's names of parameters that torch_layout moved
        self.captured = False  # a caller's CUDA graph reads the parameters where they are
        self.stale = False     # an adapter's verb was called: weights may be others, see compile_
        self._forget()

    def _forget(self):
        """Lets go of all of the module; it is examined and bound again at the next call."""
        self.watch = None
        self._unbind()

    def _unbind(self):
        """Lets go of parameters, plans and derived weights.  Runs that go on keep theirs."""
        self.model = self.weights = None
        self.names = []        # of the engine, one a parameter
        self.versions = []     # on a GPU: of the parameters, when they were last looked at
        self.copies = {}       # name -> (parameter, contiguous copy, checksum or None)
        self.raw = None        # Weights over the copied parameters' memory, on the CPU
        self.laid_out = False
        self.shares = False    # the engine's memory is PyTorch's
        self.prompts.clear()
        self.unwatched = None  # see _prompt_weights
        self.prompt_checksum = None
        self.io = {}           # args -> outputs

    def release(self):
        """Frees all that the engine holds for the module, the room for its activations too."""
        with self.lock:
            device = self.device
            self._forget()
        if device.startswith("cuda"):
            with contextlib.suppress(DeviceError):
                _core.trim(device)

    @property
    def device(self):
        """The engine's name for where the parameters are; "cpu" when that is not known."""
        place = self.watch.device if self.watch is not None else None
        return "cpu" if place is None or place.type == "cpu" else f"cuda:{place.index}"

    @property
    def by_value(self):
        """Whether changes in place are found by comparing values; else by versions and verbs."""
        from .torch_watch import by_value

        return by_value(self.watch.device)

    @property
    def compute(self):
        """Dtype of activations: the module's on a GPU, float32 on the CPU."""
        name = str(self.watch.dtype).removeprefix("torch.")
        return "float32" if self.watch.device.type == "cpu" else name

    @property
    def precision(self):
        """The plan's arguments that say how it computes, as PyTorch is set now."""
        from . import torch_tf32

        compute = self.compute
        return {"compute": compute, "tf32": torch_tf32.of(self.watch.device, compute)}

    # ---- following the module --------------------------------------------------------------------

    def _follow(self, module):
        """Examines and binds what changed; raises Fallback."""
        from .torch_watch import Fallback

        if self.watch is None or self.stale or self.watch.changed(module):
            self.stale = False
            try:
                self._examine(module)
            except BaseException:  # Ctrl-C: what was changed is still to be seen
                self.stale = True
                raise
        if self.watch.reason is not None:
            raise Fallback(self.watch.reason)
        if self.model is None:
            self._bind_all()
            return
        device = self.watch.device
        try:
            moved = self.watch.moved()
        except Fallback:
            self._forget()  # the memory that parameters left is not the engine's to keep
            raise
        if self.watch.device != device:  # without a word: somebody assigned p.data
            self._unbind()
            self._bind_all()
            return
        if moved and self.active:
            self._unbind()
            self._bind_all()
        elif moved:
            self.laid_out = False
            try:
                for i in moved:
                    self._bind(i)
            except BaseException:
                self._unbind()  # the others would pass for bound at the next call
                raise
            self._settle()
            self.prompts.clear()
            self.io.clear()

    def _examine(self, module):
        from .torch_watch import Watch, reference

        text = config_text(module)
        if text != self.text:
            self._forget()
            self.text, self.reference = text, reference(module)
        watch = Watch(module, self.reference)
        known = watch.reason is None and self.model is not None
        if known:
            self._keep_bindings(watch)
        elif self.model is not None and self.watch.reason is None and self.watch.elsewhere():
            self._unbind()  # the memory that parameters left is not the engine's to keep
        self.watch = watch
        if known and self.weights is not None and not self.by_value:
            self._derive_again()  # merged adapters leave no other trace

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

    def _derive_again(self):
        for p, copy, _ in self.copies.values():
            copy.copy_(p)
        self._settle()
        self.weights.invalidate()
        self.prompts.clear()

    def _bind_all(self):
        from .torch_watch import Fallback

        self.weights = _core.Weights()
        self.names = [_core.weight_name(self.class_name, name)
                      for name, _, _ in self.watch.parameters]
        self.versions = [None] * len(self.names)
        for i in range(len(self.names)):
            self._bind(i)
        self._settle()
        try:
            self.model = _core.Model(self.text, self.weights, self.device, self.passes_off)
        except DeviceError as error:  # no such device for accel: the reason is in the message
            self._unbind()
            raise Fallback(f"{self.device}: {error}") from None
        missed(self.device)
        self.shares = self.device != "cpu" and share_memory(self.model)

    def _settle(self, moved=False):
        """What was copied is there for the other streams too, not only for this one; what is moved
        is not in any stream's work."""
        if not self.by_value and (moved or self.copies):
            wait(self.watch.device, self.model if moved else None)

    def _bind(self, i):
        from .torch_watch import Fallback

        _, d, key = self.watch.parameters[i]
        p, name = d[key].detach(), self.names[i]
        self.copies.pop(name, None)
        if p.is_neg():
            raise Fallback(f"{name} is a negative view")
        self.versions[i] = _version(d[key])
        if not p.is_contiguous() and not (p.is_cuda and is_channels_last(p)):
            p = self._copy(name, p)
        self.weights.set(name, p)

    def _copy(self, name, p):
        """channels_last and other permuted parameters: a contiguous copy, on the CPU with a
        checksum over the original's memory that tells when to copy again."""
        from .torch_layout import normal
        from .torch_watch import Fallback

        with normal():
            copy = p.contiguous()
        if p.is_cuda:
            self.copies[name] = (p, copy, None)
            return copy
        order = sorted(range(p.ndim), key=lambda d: p.stride(d), reverse=True)
        flat = p.permute(order)
        if not flat.is_contiguous():
            raise Fallback(f"{name} is a view with gaps")
        if self.raw is None:
            self.raw = _core.Weights()
        self.raw.set(name, flat)
        self.copies[name] = (p, copy, self.raw.checksum((name,)))
        return copy

    def _check_sources(self):
        """In-place changes, which move no pointer; how many."""
        if not self.by_value:
            return self._check_versions()
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

    def _check_versions(self):
        changed = 0
        for i, (_, d, key) in enumerate(self.watch.parameters):
            version = _version(d[key])
            if version == self.versions[i]:
                continue
            changed += 1
            name = self.names[i]
            if name in self.copies:
                p, copy, _ = self.copies[name]
                copy.copy_(p)
            self.weights.invalidate(name)
            self.versions[i] = version
        if changed:
            self._settle()
            self.prompts.clear()
        return changed

    def _lay_out(self, args):
        """On a GPU, before the first run: parameters where the plan for `args` wants them."""
        import torch

        from . import torch_layout

        if (self.laid_out or self.captured or self.active
                or not torch_layout.wanted(self.watch.device)):
            return
        if self.text not in self.keys:  # kept over offloading: the same joins at all sizes
            plan = json.loads(self.model.explain(args, True, False))
            self.keys = {self.text: [d["key"] for d in plan["derived"]]}
        parameters = {name: d[key] for name, (_, d, key) in
                      zip(self.names, self.watch.parameters, strict=True)}
        device = self.watch.device
        self._settle(moved=True)  # what others queued reads them where they are
        index = {name: i for i, name in enumerate(self.names)}

        def moved(name):
            self.laid.add(name)
            wait(device)  # whoever gets the old memory next may be on another stream
            self._bind(index[name])

        # Out of memory: what did not move is derived, and the next call tries again.
        with contextlib.suppress(torch.OutOfMemoryError):
            torch_layout.lay_out(self.keys[self.text], parameters, moved)
            self.laid_out = True
        self._settle(moved=True)
        self.watch.moved()  # they are bound where they are now
        self.prompts.clear()
        if device.type == "cuda":
            torch_layout.give_back()

    def _make_room(self, args):
        """PyTorch's allocator keeps what it gets back: memory for activations that is too small
        for this run goes to the GPU first, not to be kept beside the larger one."""
        from . import torch_layout

        if not self.shares:
            return
        with contextlib.suppress(*REFUSALS):  # the run will say it
            if self.model.make_room(args):
                torch_layout.give_back()

    # ---- for the loop of a pipeline --------------------------------------------------------------

    def examine(self, module):
        """Binds what can be; raises Fallback."""
        with self.lock:
            self._follow(module)

    @contextlib.contextmanager
    def running(self, module, args):
        """The engine's model, bound and checked, for as long as a loop of `args` runs; adds to them
        how it computes.  Raises Fallback."""
        import torch

        with self.lock:
            self._follow(module)
            args.update(self.precision)
            self._lay_out(args)
            self._make_room(args)
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
            return (self.model is not model or self.stale or self.watch.changed(module)
                    or bool(self.watch.elsewhere()) or self._check_sources()
                    or self._prompt_weights_changed())

    def count(self, rows, args):
        """A loop ran this many rows."""
        with self.lock:
            self.native_runs += rows
            self.last_args = args

    # ---- the prompt section ----------------------------------------------------------------------

    def _token(self, tensors):
        """A number that is equal only for equal prompts and unchanged weights; 0: no prompt."""
        if not tensors:
            return 0
        self._prompt_weights_changed()
        token = self.prompts.get(tensors)
        if token is None:
            token = next(_tokens)
            self.prompts.add(tensors, token)
        return token

    def _prompt_weights_changed(self):
        """Whether weights that the prompt section reads in place changed, on the CPU."""
        if not self.by_value:
            return False
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
        upcast = torch_upcast.is_needed(module)
        if first:
            hint = "" if upcast else torch_upcast.hint(module)
            warnings.warn(f"accel: {self.class_name} runs its original {method}: {why}{hint}",
                          FallbackWarning, stacklevel=3)
        original = self.originals[method].__get__(module)
        if upcast:
            return torch_upcast.run(module, original, args, kwargs)
        return original(*args, **kwargs)

    def _try(self, module, method, args, kwargs):
        import torch

        from .torch_watch import Fallback, check_autocast, check_state, is_capturing

        signature = self.signatures[method]
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise Fallback(str(error)) from None
        check_state((args, kwargs))
        if is_capturing():
            self.captured = True
            raise Fallback("CUDA graph capture")
        defaults = {n: p.default for n, p in signature.parameters.items()}
        with self.lock:
            self._follow(module)
            device, stream = self.watch.device, None
            check_autocast(device)
            request = self.calls.request(method, module, self.watch.dtype, device,
                                         dict(bound.arguments), defaults)
            if device.type == "cuda":
                request.args.update(self.precision)
                stream = torch.cuda.current_stream(device).cuda_stream
            self._lay_out(request.args)
            self._make_room(request.args)
            self._check_sources()
            token = self._token(request.prompt)
            model = self.model
            outputs = {name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                       for name, shape, dtype in self._outputs(request.args)}
            self.last_args = request.args
            threads.follow(torch.get_num_threads())
            self.active += 1
        try:
            inputs = {n: t.detach() for n, t in request.inputs.items()}
            with_room(model, device, lambda: model.run(request.args, inputs, outputs, token,
                                                       stream=stream))
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


def share_memory(model):
    """Lets the model's GPU take memory from PyTorch's allocator; whether it does. Versions before
    2.10 publish no C functions for that, which alone can be called without the GIL."""
    import torch

    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    return api is not None and model.use_memory(api)


def with_room(model, device, run, again=lambda: True):
    """run(), and if memory was short once more, without the model's other plans and what PyTorch
    keeps for later."""
    import torch

    try:
        return run()
    except OutOfMemory:
        if device.type != "cuda" or not again():
            raise
    model.drop_plans()
    torch.cuda.empty_cache()
    return run()


def wait(device, model=None):
    """For what the current stream has, or with a model for all that its GPU has: not with
    torch.cuda.synchronize, which fails while another thread's stream is recorded."""
    if model is not None:
        model.wait()
    elif device.type == "cuda":
        import torch

        torch.cuda.current_stream(device).synchronize()


def _version(p):
    """PyTorch's counter of in-place changes; inference tensors have none."""
    return None if p.is_inference() else p._version


def is_channels_last(p):
    """Whether a convolution's weight [o, i, h, w] lies in memory as [o, h, w, i]."""
    return p.ndim == 4 and p.permute(0, 2, 3, 1).is_contiguous()


def _is_prompt_weight(name):
    return ".attn2.to_k." in name or ".attn2.to_v." in name or name.startswith("add_embedding.")


def give_back(native, module):
    """Parameters that were laid out for the engine become contiguous ones of their own again."""
    from . import torch_layout

    torch_layout.separate(p for name, p in module.named_parameters()
                          if _core.weight_name(native.class_name, name) in native.laid)
    native.laid.clear()


def config_text(module):
    """config.json of a module as it is now."""
    config = module.config
    if hasattr(config, "to_diff_dict"):  # transformers
        data = json.loads(config.to_json_string(use_diff=True))
        data["architectures"] = [type(module).__name__]
    else:
        data = json.loads(module.to_json_string())
    return json.dumps(data)

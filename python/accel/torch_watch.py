"""Notices that a PyTorch module is no longer what accel took it for.

Two questions, asked at every call; both are loops over plain dicts, about 1 ms for SD 1.5:

    changed()   did any attribute, child, hook or class change since the module was examined?
    moved()     which parameters lie elsewhere, or are other objects, than when they were bound?

When something changed, examine() compares the module with one that its config builds anew on the
meta device: the same names, types, plain attributes and processors mean that the engine's graph is
what the module computes. Whatever differs (adapters, foreign attention processors, circular
padding, FreeU, hooks, replaced forwards) is a reason to run the module itself.

Seen keeps what was found out about a caller's tensors for as long as they come back unchanged.
"""

import inspect
import operator
import types
import weakref

import torch
from torch.nn.modules import module as torch_module

SCALARS = (int, float, str, bool, type(None))
# What callers set on the module itself and what does not change its results, or is looked at
# elsewhere: slicing and tiling by the VAE's calls, sample_size by pipelines only.
ROOT_FREE = {"name_or_path", "sample_size", "use_slicing", "use_tiling", "tile_sample_min_size",
             "tile_latent_min_size", "tile_overlap_factor", "gradient_checkpointing",
             "original_attn_processors", "warnings_issued", "model_tags"}
# Left behind by fuse_qkv_projections and unfuse; while fused the processor's type tells.
FUSED = ("to_qkv", "to_kv", "to_added_qkv")
PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor"}
_missing = object()


class Fallback(Exception):
    """Why a call takes the original forward."""


# ---- what the config builds ----------------------------------------------------------------------


def reference(module):
    """{name: (type, attributes)} of the module that the config builds."""
    cls = type(module)
    with torch.device("meta"):
        fresh = cls.from_config(module.config) if hasattr(module, "register_to_config") else cls(
            module.config)
    return {name: (type(m), _attributes(m)) for name, m in fresh.named_modules()}


def _attributes(module):
    return {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k != "training"}


# ---- comparing -----------------------------------------------------------------------------------


def _same(a, b):
    """Whether two attributes of a module say the same."""
    if isinstance(a, SCALARS) or isinstance(b, SCALARS):
        return type(a) is type(b) and a == b
    if isinstance(a, tuple | list) and type(a) is type(b):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, types.FunctionType | types.BuiltinFunctionType):
        return a is b
    return type(a) is type(b)


def _is_processor(value):
    cls = type(value)
    return cls.__name__ in PROCESSORS and cls.__module__ == "diffusers.models.attention_processor"


def _text(value):
    if isinstance(value, SCALARS):
        return repr(value)
    return type(value).__name__


def _check_attributes(name, module, expected, is_root):
    found = module.__dict__
    for key, value in expected.items():
        if is_root and key in ROOT_FREE or key == "fused_projections":
            continue
        now = found.get(key, _missing)
        if _same(now, value) or key == "processor" and _is_processor(now):
            continue
        if key == "processor":
            raise Fallback(f"attention processor {type(now).__name__} at {name}")
        raise Fallback(f"{name or 'module'}.{key} is {_text(now)}, the config says {_text(value)}")
    for key, value in found.items():
        if is_root or key in expected or value is None or key == "training":
            continue
        if not key.startswith("_") or callable(value) and not isinstance(value, type):
            raise Fallback(f"{name}.{key} was set by someone")


def _is_transformers_hook(hook):
    """transformers >= 5 leaves these in; they record outputs only while its own forward runs."""
    return (getattr(hook, "__module__", "").startswith("transformers.")
            and "capturing_hook" in getattr(hook, "__qualname__", ""))


def _check_hooks(name, module):
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    for hook in hooks:
        if not _is_transformers_hook(hook):
            raise Fallback(f"a forward hook on {name}")


def _package(thing):
    return (getattr(thing, "__module__", None) or "").split(".")[0]


def _check_class(name, cls, expected):
    if cls is not expected:
        adapter = _package(cls) == "peft"
        raise Fallback(f"adapter layers ({cls.__module__}.{cls.__name__} at {name})" if adapter
                       else f"{name} is a {cls.__name__}, the config says {expected.__name__}")
    forward = inspect.unwrap(cls.forward)
    if _package(forward) != _package(cls):
        raise Fallback(f"the forward of class {cls.__name__} was replaced")


def _ignored(name):
    return any(part in FUSED for part in name.split("."))


class Watch:
    """The state of one module at the time it was examined.

    Making one examines; it raises Fallback with the reason when the engine must not stand in.
    """

    def __init__(self, module, expected):
        self.reason = None
        self.parameters, self.bound, self.dtype, self.device = [], [], None, None
        self.volatile = False  # the reason may go without a change of structure
        self._record(module)
        try:
            self._examine(module, expected)
            self.volatile = True
            self._take_parameters(module)
            self.volatile = False
        except Fallback as reason:
            self.reason = str(reason)

    # ---- structure -------------------------------------------------------------------------------

    def _record(self, module):
        # not the module itself: it owns what owns this, and shall go when its user lets go
        self.root = (type(module), module.training, module.config)
        self.rows = []
        classes = set()
        for m in module.modules():
            classes.add(type(m))
            if m is not module:
                hooks = (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
                self.rows.append((m, type(m), m.__dict__, list(m.__dict__.values()), m._modules,
                                  list(m._modules.values()), m._forward_hooks,
                                  m._forward_pre_hooks, hooks))
        self.children = list(module._modules.values())
        self.classes = [(c, c.forward) for c in classes]

    def changed(self, module):
        """True when the module must be examined again."""
        cls, training, config = self.root
        if (self.volatile or type(module) is not cls or module.training is not training
                or module.config is not config or list(module._modules.values()) != self.children):
            return True
        if any(c.forward is not f for c, f in self.classes):
            return True
        same = operator.is_
        for m, cls, d, values, children, had, after, before, hooks in self.rows:
            if (m.__class__ is not cls or len(d) != len(values)
                    or not all(map(same, d.values(), values)) or len(children) != len(had)
                    or not all(map(same, children.values(), had))):
                return True
            if (after or before or hooks) and (*after.values(), *before.values()) != hooks:
                return True
        return False

    def _examine(self, module, expected):
        found = dict(module.named_modules())
        for name, m in found.items():
            if name not in expected:
                if _ignored(name):
                    continue
                _check_known(name, m)
            cls, attributes = expected[name]
            _check_class(name, type(m), cls)
            if m is not module:
                _check_hooks(name, m)
            if m.training:
                raise Fallback("training mode; call eval() first")
            _check_attributes(name, m, attributes, m is module)
        for name in expected:
            if name not in found:
                raise Fallback(f"{name} is missing")

    # ---- parameters ------------------------------------------------------------------------------

    def _take_parameters(self, module):
        for prefix, m in module.named_modules():
            if _ignored(prefix):
                continue
            for key, p in m._parameters.items():
                if p is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    self._check_parameter(name, p)
                    self.parameters.append((name, m._parameters, key))
        if self.dtype is None:
            raise Fallback("the module has no parameters")
        self.bound = [_place(d[k]) for _, d, k in self.parameters]

    def _check_parameter(self, name, p):
        if type(p) is not torch.nn.Parameter:
            raise Fallback(f"{name} is a {type(p).__name__}, not a plain parameter")
        if p.device.type not in ("cpu", "cuda"):
            raise Fallback(f"{name} is on {p.device}, only CPU and CUDA are supported")
        if self.device is not None and p.device != self.device:
            raise Fallback(f"parameters on several devices: {self.device}, {p.device} at {name}")
        if p.layout != torch.strided or p.dtype not in (torch.float32, torch.float16,
                                                        torch.bfloat16):
            raise Fallback(f"{name} is {p.dtype}, {p.layout}")
        if self.dtype is not None and p.dtype != self.dtype:
            raise Fallback(f"parameters of several dtypes: {self.dtype}, {p.dtype} at {name}")
        self.dtype, self.device = p.dtype, p.device

    def elsewhere(self):
        """Indices of parameters that are not where they were bound."""
        return [i for (i, (_, d, key)), place in zip(enumerate(self.parameters), self.bound,
                                                     strict=True)
                if not _is_at(d.get(key), place)]

    def moved(self):
        """Indices of parameters that are not where they were bound; updates what it compares with.

        Raises Fallback when one of them is no longer something the engine takes.
        """
        moved = self.elsewhere()
        for i in moved:
            name, d, key = self.parameters[i]
            if d.get(key) is None:
                raise Fallback(f"{name} is missing")
        if moved:
            before = self.dtype, self.device
            self.dtype = self.device = None
            try:
                for name, d, key in self.parameters:
                    self._check_parameter(name, d[key])
            except Fallback:
                self.dtype, self.device = before
                raise
            for i in moved:
                _, d, key = self.parameters[i]
                self.bound[i] = _place(d[key])
        return moved


def _place(p):
    return p, p.data_ptr(), p.dtype, p.shape, p.stride()


def _is_at(p, place):
    return (p is place[0] and p.data_ptr() == place[1] and p.dtype is place[2]
            and p.shape == place[3] and p.stride() == place[4] and not p.is_neg())


def _check_known(name, module):
    """A module that the config does not build: say what it is."""
    cls = type(module)
    if _package(cls) == "peft" or "lora" in name.lower():
        raise Fallback(f"adapter layers ({cls.__module__}.{cls.__name__} at {name})")
    raise Fallback(f"{name} ({cls.__name__}) is not in what the config builds")


# ---- what the caller's tensors hold --------------------------------------------------------------


def by_value(device):
    """Whether tensors there are told apart by their values; reading a GPU's would wait for it."""
    return device.type == "cpu"


class Seen:
    """What was found out about tensors, for as long as they come back unchanged.

    On the CPU the values are compared: exact for inference tensors and reused memory too, and next
    to nothing beside a run. On a GPU the same objects with the same versions; inference tensors
    have none, so that nothing is known of them.
    """

    def __init__(self, most):
        self.most = most
        self.entries = []  # newest last: (callable(tensors) -> are they these, what was found)

    def get(self, tensors):
        """What add() was given with these tensors; None: they are others, or changed since."""
        return next((found for same, found in self.entries if same(tensors)), None)

    def add(self, tensors, found):
        if by_value(tensors[0].device):
            same = _same_values(tensors)
        elif any(t.is_inference() for t in tensors):
            return
        else:
            same = _same_objects(tensors)
        self.entries.append((same, found))
        del self.entries[:-self.most]

    def clear(self):
        self.entries.clear()


def _same_values(tensors):
    kept = [t.detach().clone() for t in tensors]

    def same(others):
        return len(kept) == len(others) and all(
            a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
            for a, b in zip(kept, others, strict=True))

    return same


def _same_objects(tensors):
    kept = [(weakref.ref(t), t._version, t.data_ptr()) for t in tensors]

    def same(others):
        return len(kept) == len(others) and all(
            t is ref() and t._version == version and t.data_ptr() == at
            for t, (ref, version, at) in zip(others, kept, strict=True))

    return same


# ---- the state of PyTorch ------------------------------------------------------------------------


def is_capturing():
    """Whether the caller is recording a CUDA graph. The engine's memory is not PyTorch's: what it
    queued would be replayed after that memory was freed or moved."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_autocast(device):
    if torch.is_autocast_enabled(device.type):
        raise Fallback("autocast")


def check_state(values):
    """Raises Fallback when PyTorch wants more than numbers: gradients, tracing."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        raise Fallback("tracing")
    if torch_module._has_any_global_hook():
        raise Fallback("a global forward hook")
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        raise Fallback("a dispatch mode")
    if torch.is_grad_enabled() and _wants_grad(values):
        raise Fallback("gradients wanted for an input")


def _wants_grad(value):
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(map(_wants_grad, value.values()))
    return isinstance(value, list | tuple) and any(map(_wants_grad, value))


def check_tensor(value, what, rank, device):
    """`value` as a plain tensor on the device with that many dimensions, none of them empty."""
    if type(value) is not torch.Tensor:
        raise Fallback(f"{what} is a {type(value).__name__}")
    if value.device != device or value.layout != torch.strided:
        raise Fallback(f"{what} is on {value.device}, {value.layout}, the parameters on {device}")
    if value.ndim != rank or value.numel() == 0:
        raise Fallback(f"{what} has shape {list(value.shape)}")
    if value.is_conj() or value.is_neg() or _is_wrapped(value):
        raise Fallback(f"{what} is a lazy view")
    return value


def _is_wrapped(value):
    functorch = getattr(torch._C, "_functorch", None)
    return functorch is not None and functorch.is_functorch_wrapped_tensor(value)

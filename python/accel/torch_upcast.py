"""`vae.config.force_upcast` of a compiled VAE.

Where it says so, pipelines take SDXL's VAE to float32 for every picture and back, because float16
does not hold its activations. The engine keeps them in range (csrc/passes/rescale.c), so the
attribute reads False while the module is compiled. The entry of the dict stays: files, copies and
the decompiled module have the original. A call that falls back still needs float32, and gets it;
one that wants gradients, or that the caller records, does not, and its warning says so.
"""

import torch

from .torch_watch import is_capturing

KEY = "force_upcast"


def _is_hidden(config):
    return bool(config.get(KEY)) and not getattr(config, KEY)


def hide(module):
    """Makes the attribute read False, where the config says True."""
    config = module.__dict__.get("_internal_dict")
    if config is not None and config.get(KEY) and not _is_hidden(config):
        shown = type(config)(config)
        shown.__dict__[KEY] = False  # past FrozenDict's __setattr__
        module.__dict__["_internal_dict"] = shown


def restore(state):
    """Undoes hide() in a module's __dict__, or in a copy of that."""
    config = state.get("_internal_dict")
    if config is not None and _is_hidden(config):
        state["_internal_dict"] = type(config)(config)


def is_needed(module):
    """Whether the original forward would leave float16's range, as far as the config knows."""
    return (_is_at_risk(module) and not torch.is_grad_enabled()
            and not is_capturing())  # nothing runs then: the parameters would be lost


def hint(module):
    """What to say where the original runs in float16, though its config asked for float32."""
    return ("; in float16, which its activations may leave: module.to(torch.float32) first"
            if _is_at_risk(module) else "")


def _is_at_risk(module):
    config = module.__dict__.get("_internal_dict")
    return (config is not None and _is_hidden(config)
            and next(module.parameters()).dtype == torch.float16)


def run(module, original, args, kwargs):
    """The original in float32; results in float16, as they would have been."""
    module.to(dtype=torch.float32)
    try:
        result = original(*_cast(args, torch.float32), **_cast(kwargs, torch.float32))
    finally:
        module.to(dtype=torch.float16)
    return _cast(result, torch.float16)


def _cast(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)(**{k: _cast(v, dtype) for k, v in value.items()})
    return type(value)(_cast(v, dtype) for v in value) if isinstance(value, tuple) else value

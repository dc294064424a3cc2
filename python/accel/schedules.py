"""Schedulers by name, and the configs the engine makes their tables from."""

import json
from collections.abc import Mapping

from . import _core
from ._core import InvalidArgument, UnsupportedError
from .arguments import integer, number

# short name -> class and what it sets; other names for the same one follow
_SHORT = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}
_ALIASES = {
    "plms": "pndm",
    "euler_ancestral": "euler_a",
    "dpm": "dpm++",
    "dpmpp": "dpm++",
    "dpm++_2m": "dpm++",
    "dpm++_2m_sde": "dpm++_sde",
    "dpmpp_2m": "dpm++",
    "dpmpp_2m_sde": "dpm++_sde",
}
_KARRAS = "_karras"


def _by_name(name):
    """Class and options of a short name or a class name."""
    key = name.lower().replace("-", "_").replace(" ", "_")
    options = {}
    if key.endswith(_KARRAS):
        key = key.removesuffix(_KARRAS)
        options["use_karras_sigmas"] = True
    key = _ALIASES.get(key, key)
    if key in _SHORT:
        cls, more = _SHORT[key]
        if options and cls in ("DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"):
            raise UnsupportedError(f"scheduler: {cls} has no Karras sigmas")
        return cls, more | options
    classes = _core.scheduler_classes()
    for cls in classes:
        if name in (cls, cls.removesuffix("Scheduler")):
            return cls, {}
    raise UnsupportedError(f"scheduler: found {name!r}, expected one of {', '.join(_SHORT)} or of "
                           f"{', '.join(classes)}")


def resolve(config, scheduler, *, mends=None):
    """The config to use.

    Parameters
    ----------
    config : dict
        The model folder's scheduler_config.json.
    scheduler : None, str or dict
        None keeps it; a name keeps its fields under another class, as diffusers' from_config does;
        a dict is a whole config of its own.
    mends : dict, optional
        Fields the pipeline corrects in an old folder's config.  With another class only those the
        folder has itself are carried over; that, too, is how diffusers behaves.
    """
    mends = mends or {}
    if scheduler is None:
        return config | mends
    if isinstance(scheduler, Mapping):
        return dict(scheduler)
    if not isinstance(scheduler, str):
        raise InvalidArgument(f"scheduler: found {type(scheduler).__name__}, expected a name or a "
                              "config")
    cls, options = _by_name(scheduler)
    if cls == config.get("_class_name"):
        return config | mends | options
    kept = {k: mends.get(k, v) for k, v in config.items()}
    return kept | {"_class_name": cls} | options


def make(config, steps, eta=0.0):
    """The table for this many steps; a `_core.Schedule`."""
    steps = integer(steps, "num_inference_steps", 1, 2**31 - 1)
    eta = number(eta, "eta")
    try:
        text = json.dumps(config)  # Infinity too: diffusers writes lambda_min_clipped so
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"scheduler: its config is not JSON: {error}") from error
    return _core.Schedule(text, steps, eta)

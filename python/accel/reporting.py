"""What ran and how: report(x) counts, explain(x) shows plans."""

import json as _json
from pathlib import Path

from . import _core
from ._core import InvalidArgument
from .components import (
    VAE,
    Component,
    TextEncoder,
    UNet,
    compute_dtype,
    find_folder,
    read_json,
    vae_scale_factor,
)
from .devices import missed
from .pipeline import Pipeline


class Report(dict):
    """A dict that prints as a table."""

    def __str__(self):
        lines = []
        for name, entry in self.get("components", {"": self}).items():
            lines.append(_lines(name, entry))
        if "loop" in self:
            lines.append(_loop_lines(self["loop"]))
        return "\n".join(lines)


def _lines(name, entry):
    title = f"{name}: {entry['class']}" if name else entry["class"]
    if entry.get("skipped"):
        return f"{title}: left as it is: {entry['skipped']}"
    size = entry["derived_bytes"] / 1e6
    out = [f"{title}: {entry['native_runs']} native runs, {sum(entry['fallbacks'].values())} "
           f"fallbacks, {entry['plans']} plans, {len(entry['derived'])} derived weights "
           f"({size:.1f} MB)"]
    out += [f"  fell back {n} times: {reason}" for reason, n in entry["fallbacks"].items()]
    out += [f"  {line}" for line in entry["missed"]]
    if entry["unrecorded"]:
        out.append("  steps are launched one by one, which is slower: recording them failed: "
                   f"{entry['unrecorded']}")
    return "\n".join(out)


def _loop_lines(loop):
    if isinstance(loop, str):
        return f"loop: {loop}"
    out = [f"loop: {loop['native']} native, {sum(loop['stock'].values())} stock"]
    out += [f"  stock {n} times: {reason}" for reason, n in loop["stock"].items()]
    return "\n".join(out)


def entry_of(class_name, model, weights, *, device="cpu", native_runs=None, fallbacks=None):
    """The report of one network; `model` and `weights` may be None."""
    stats = model.stats() if model is not None else {"runs": 0, "plans": 0, "arena_bytes": 0,
                                                     "bound_bytes": 0, "keep_bytes": 0,
                                                     "unrecorded": ""}
    derived = weights.derived() if weights is not None else []
    return {
        "class": class_name,
        "native_runs": stats["runs"] if native_runs is None else native_runs,
        "fallbacks": dict(fallbacks or {}),
        "plans": stats["plans"],
        "arena_bytes": stats["arena_bytes"],
        "bound_bytes": stats["bound_bytes"],
        "keep_bytes": stats["keep_bytes"],
        "derived": derived,
        "derived_bytes": sum(d["bytes"] for d in derived),
        "missed": missed(device) if model is not None else [],
        "unrecorded": stats["unrecorded"],
    }


def report(x):
    """Counts of native runs and fallbacks (with reasons), plans and derived weights.

    Parameters
    ----------
    x : a compiled module or pipeline, an accel.Pipeline, or one of its components

    Returns
    -------
    Report
        A dict. For one network: class, native_runs, fallbacks {reason: count}, plans,
        arena_bytes, bound_bytes, keep_bytes, derived (list of dicts with key, bytes, sources),
        derived_bytes, missed (sentences: libraries that the device lacks), unrecorded (why a GPU
        gets every step from the host, "" where it does not). For a pipeline: "components" {name:
        such a dict} and "loop": "native" for an accel.Pipeline; for a compiled one {"native":
        loops, "stock": {reason: loops}}.

    Raises
    ------
    InvalidArgument
        For what accel.compile did not return.
    """
    if isinstance(x, Component):
        return Report(entry_of(type(x).__name__, x._model, x._weights, device=x.device))
    if isinstance(x, Pipeline):
        parts = {"unet": x.unet, "vae": x.vae}
        parts |= {f"text_encoder{'_2' if i else ''}": e for i, e in enumerate(x.text_encoders)}
        return Report(components={n: dict(report(p)) for n, p in parts.items()}, loop="native")
    from .compile_ import report_compiled

    return Report(report_compiled(x))


def explain(x, *, json=False, passes=False, profile=False, repeats=0, peaks=None, **args):
    """The plan of a network: kernels, shapes, arena offsets, FLOPs, bytes; or how long each takes.

    Parameters
    ----------
    x : a component of accel, a compiled module, or an accel.Pipeline (its UNet)
    json : bool
        JSON text instead of a table.
    passes : bool
        The graph as built and after each pass before it.  The JSON is {"passes": [{"pass", "why",
        "graph"}], "plan"} then; a graph is {"inputs", "weights", "nodes", "outputs"}, whose values
        have an "id" that nodes name in "input" (None: an absent operand) and "output".
    profile : bool
        Runs over random inputs and times every step: tables by section, class of op and kernel,
        and the steps that lose most against their bound, max(FLOPs / peak, bytes / bandwidth).
        On a GPU by events in a recorded graph; with loop=True, or after a pipeline's loop, the
        sampler's part of a row too. A GPU's peaks are measured ones for an H200 and those of its
        clocks for others; a CPU's are not known: times without fractions. UnsupportedError for a
        module whose calls run the original now.
    repeats : int
        Timed runs of the profile, the best of each step counts; 0: 10.
    peaks : tuple of float, optional
        FLOP/s and bytes/s that the device reaches, for the profile.
    args
        Sizes: batch, height, width (latent pixels; for the VAE's entry="encode" image pixels),
        tokens, timesteps, entry. What is not given comes from the last call, or from the config.

    Raises
    ------
    InvalidArgument
        For what accel.compile did not return, a size, `repeats` or `peaks` of no sense, by name,
        and for `passes` with `profile`.
    UnsupportedError
        When no kernel of the device can do a step, by its name.
    """
    if isinstance(x, Pipeline):
        x = x.unet
    if profile:
        if passes:
            raise InvalidArgument("passes: found True with profile=True, expected one of them")
        return _profile(x, json, *_profile_arguments(repeats, peaks), args)
    if isinstance(x, Component):
        return x.explain(json=json, passes=passes, **args)
    from .compile_ import explain_compiled

    return explain_compiled(x, as_json=json, passes=passes, **args)


def _profile_arguments(repeats, peaks):
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0:
        raise InvalidArgument(f"repeats: found {repeats!r}, expected a number of runs, or 0")
    if peaks is None:
        return repeats, 0.0, 0.0
    try:
        flops, bandwidth = (float(x) for x in peaks)
    except (TypeError, ValueError):
        flops = bandwidth = 0.0
    if not (0 < flops < float("inf") and 0 < bandwidth < float("inf")):
        raise InvalidArgument(f"peaks: found {peaks!r}, expected FLOP/s and bytes/s, both positive")
    return repeats, flops, bandwidth


def _profile(x, json, repeats, flops, bandwidth, args):
    how = {"repeats": repeats, "flops": flops, "bandwidth": bandwidth}
    if isinstance(x, Component):
        return x.profile(json=json, **how, **args)
    from .compile_ import explain_compiled

    return explain_compiled(x, as_json=json, profile=how, **args)


def explain_folder(folder, part, *, height, width, batch, tokens, device, variant, json, passes,
                   passes_off, profile=False):
    """The plan of one part of a model folder for a size in pixels; for the command line."""
    folder = Path(folder)
    cls = {"unet": UNet, "vae": VAE, "vae_encoder": VAE}.get(part, TextEncoder)
    where = find_folder(folder, ["vae" if part == "vae_encoder" else part])
    config = read_json(where / "config.json")
    try:
        weights = _core.Weights()
        weights.add_folder(where, cls._stem, variant)
    except _core.FileError:
        weights = None
    model = _core.Model(_json.dumps(config), weights, device, passes_off)
    given = {"batch": batch}
    if cls is not TextEncoder:
        factor = 1 if part == "vae_encoder" else _factor(folder, config)
        given |= {"height": height and -(-height // factor), "width": width and -(-width // factor)}
    if cls is not VAE:
        given["tokens"] = tokens
    if part == "vae_encoder":
        given["entry"] = "encode"
    given = {k: v for k, v in given.items() if v is not None}
    sizes = {"compute": compute_dtype(weights, device, None)} | cls.sizes(config, given)
    return model.profile(sizes, json) if profile else model.explain(sizes, json, passes)


def _factor(folder, config):
    """Pixels of a latent pixel: the VAE's, or 8 where there is none beside."""
    if config.get("_class_name") != "AutoencoderKL":
        try:
            config = read_json(folder / "vae" / "config.json")
        except _core.FileError:
            return 8
    return vae_scale_factor(config)

"""diffusers' samplers in float64, and accel's table run in float64 and by its C kernel.

`Reference` is diffusers' own class with its arithmetic promoted: while it works, its module sees
float64 wherever it names float32. The noise levels are the stock class's alphas_cumprod (what a
model was told), promoted. The timesteps are the stock class's too: they are what the UNet is told,
and some are roundings of float32 logarithms.
"""

import contextlib
import importlib
import inspect
import json
import warnings

import diffusers
import numpy as np
import torch

from accel import _core

diffusers.logging.set_verbosity_error()

NAMES = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
SHAPE = (2, 3, 4, 4)


class _Promoted:
    """A module with another float32."""

    def __init__(self, module, float64):
        self._module, self.float32 = module, float64

    def __getattr__(self, name):
        return getattr(self._module, name)


@contextlib.contextmanager
def _patched(cls, promote, draw):
    """diffusers' module of `cls` with float64 for float32, and `draw(shape)` for randn_tensor."""
    module = importlib.import_module(cls.__module__)
    saved = {k: getattr(module, k) for k in ("torch", "np", "randn_tensor") if hasattr(module, k)}
    default = torch.get_default_dtype()
    try:
        if "randn_tensor" in saved:
            module.randn_tensor = lambda shape, dtype, **_: draw(shape).to(dtype)
        if promote:
            module.torch = _Promoted(torch, torch.float64)
            module.np = _Promoted(np, np.float64)
            torch.set_default_dtype(torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(default)
        for key, value in saved.items():
            setattr(module, key, value)


class Noise:
    """Normals in draw order, float32 values, the same for every reader; counts what was read."""

    def __init__(self, seed=5):
        self.random, self.drawn = np.random.default_rng(seed), 0

    def __call__(self, shape=SHAPE):
        self.drawn += 1
        values = self.random.standard_normal(tuple(shape), dtype=np.float32)
        return torch.from_numpy(values).double()


class Model:
    """e = tanh(A x + b t + c): nonlinear, mixes channels, and knows the timestep."""

    def __init__(self, seed=3):
        random = np.random.default_rng(seed)
        self.mix = random.standard_normal((SHAPE[1], SHAPE[1])) * 0.4
        self.slope = random.standard_normal((SHAPE[1], 1, 1)) * 0.003
        self.shift = random.standard_normal(SHAPE[1:]) * 0.3

    def __call__(self, x, t):
        """x: float64 array [n, c, h, w]; t: float."""
        mixed = np.einsum("dc,nchw->ndhw", self.mix, x)
        return np.tanh(mixed + self.slope * t + self.shift)


MODEL = Model()


def first_latents(sigma=1.0):
    latents = np.random.default_rng(1).standard_normal(SHAPE, dtype=np.float32)
    return latents.astype(np.float64) * sigma


def _own(cls, config):
    known = inspect.signature(cls.__init__).parameters
    return {k: v for k, v in config.items() if k in known}


class Reference:
    """One run of diffusers. `states`: latents after each step; `draws`: noises at each step.

    levels, timesteps: taken instead of the stock class's (timesteps from `begin` on).
    """

    def __init__(
        self, name, config, steps, eta=0.0, begin=0, promote=True, levels=None, timesteps=None
    ):
        cls = getattr(diffusers, name)
        noise = Noise()
        with _patched(cls, False, noise):
            stock = cls(**_own(cls, config))
            stock.set_timesteps(steps)
        self.stock_timesteps = stock.timesteps[begin:].double().tolist()
        self.stock_levels = stock.alphas_cumprod.double().numpy()
        with _patched(cls, promote, noise):
            scheduler = stock
            if promote:
                scheduler = cls(**_own(cls, config))
                _take_levels(scheduler, self.stock_levels if levels is None else levels)
                scheduler.set_timesteps(steps)
                scheduler.timesteps = stock.timesteps
            if timesteps is not None:
                given = torch.tensor(timesteps, dtype=stock.timesteps.dtype)
                scheduler.timesteps = torch.cat([stock.timesteps[:begin], given])
            self.scheduler = scheduler
            self.init_noise_sigma = float(scheduler.init_noise_sigma)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            self._run(scheduler, noise, eta, begin, torch.float64 if promote else torch.float32)

    def _run(self, scheduler, noise, eta, begin, dtype):
        kwargs = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
        x = torch.from_numpy(first_latents(self.init_noise_sigma)).to(dtype)
        self.states, self.draws = [], []
        for t in scheduler.timesteps[begin:]:
            before = noise.drawn
            scaled = scheduler.scale_model_input(x, t)
            e = torch.from_numpy(MODEL(scaled.double().numpy(), float(t))).to(dtype)
            x = scheduler.step(e, t, x, **kwargs).prev_sample
            self.states.append(x.double().numpy())
            self.draws.append(noise.drawn - before)

    @property
    def finite(self):
        return bool(self.states) and all(np.isfinite(s).all() for s in self.states)


def _take_levels(scheduler, levels):
    scheduler.alphas_cumprod = levels = torch.tensor(levels, dtype=torch.float64)
    if hasattr(scheduler, "final_alpha_cumprod") and not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = levels[0]
    if hasattr(scheduler, "lambda_t"):
        scheduler.lambda_t = (levels.log() - (1 - levels).log()) / 2


def schedule(name, config, steps, eta=0.0, begin=0):
    return _core.Schedule(json.dumps({**config, "_class_name": name}), steps, eta, begin)


def _clip(row, m):
    if row["threshold"]:
        flat = np.abs(m.reshape(len(m), -1))
        s = np.clip(np.quantile(flat, row["threshold"], axis=1), 1, None)
        s = np.minimum(s, row["threshold_max"]).reshape(-1, 1, 1, 1)
        return np.clip(m, -s, s) / s
    return np.clip(m, -row["clip"], row["clip"]) if row["clip"] else m


def apply_row(row, x, e, drawn, registers):
    """One row in float64, as csrc/scheduler.h defines it: the next latents and registers."""
    m = _clip(row, row["m_x"] * x + row["m_e"] * e)
    basis = [x, e, m, drawn, *registers]
    after = list(registers)
    for to, weights in row["stores"]:
        after[to] = sum(c * b for c, b in zip(weights, basis, strict=True) if c)
    return sum(c * b for c, b in zip(row["x_next"], basis, strict=True) if c), after


def run_table(table):
    """The rows in float64. States after each row."""
    noise, x = Noise(), first_latents(table.init_noise_sigma)
    registers, states = [np.full(SHAPE, np.nan)] * 6, []  # reads before writes show
    for row in table.rows:
        e = MODEL(x * row["scale_in"], row["timestep"])
        drawn = noise().numpy() if row["draws_noise"] else None
        x, registers = apply_row(row, x, e, drawn, registers)
        states.append(x)
    return states


def run_kernel(table):
    """The rows by ac_sched_apply: float32 latents and registers. States after each row, and the
    largest error of a single row against its float64 arithmetic from the same state."""
    noise, x = Noise(), first_latents(table.init_noise_sigma).astype(np.float32)
    registers = [np.full(SHAPE, np.nan, np.float32) for _ in range(6)]
    states, worst = [], 0.0
    for i, row in enumerate(table.rows):
        e = MODEL(x.astype(np.float64) * row["scale_in"], row["timestep"]).astype(np.float32)
        drawn = noise().numpy().astype(np.float32) if row["draws_noise"] else None
        doubles = [None if a is None else a.astype(np.float64) for a in (x, e, drawn)]
        expected, kept = apply_row(row, *doubles, [r.astype(np.float64) for r in registers])
        table.apply(i, x, e, drawn, registers)
        worst = max(worst, error(x, expected))
        for to, _ in row["stores"]:
            worst = max(worst, error(registers[to], kept[to]))
        states.append(x.copy())
    return states, worst


def error(found, expected):
    """Largest difference, against the largest value of the expected state."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())

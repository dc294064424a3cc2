"""One training session: where files lie, how long each stage may take, what is logged.

Training is a list of stages, each with its seconds in a plan.  A session may be cut into pieces
of a few minutes: a stage that meets the deadline saves its state and raises `OutOfTime`; the
next call loads the state and goes on, with the seconds already spent counted.
"""

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import scene, tokenizer


class OutOfTime(Exception):
    """The piece of time given to this call is over; everything is saved."""


@dataclass(frozen=True)
class Plan:
    """Sizes and seconds of a training run; the defaults are the shipped model's."""

    scenes: int = 60_000
    flawed: int = 12_000
    validation: int = 2_000
    captions_each: int = 4
    render_batch: int = 256
    judge_batch: int = 128
    vae_batch: int = 96  # of 128 x 128 windows; a quarter of it for whole pictures
    unet_batch: int = 256
    seconds: dict = field(
        default_factory=lambda: {
            "judge": 50,
            "vae128": 120,
            "vae256": 170,
            "unet128": 150,
            "unet256": 1200,
        }
    )
    steps: int | None = None  # a dry run counts steps in place of seconds
    prompts: int = 100
    more_prompts: int = 1000
    watch_seconds: float = 150.0  # of training between looks at the model

    @classmethod
    def tiny(cls):
        """A few steps of everything, for a dry run on a CPU."""
        return cls(24, 24, 24, 2, 8, 4, 2, 4, cls().seconds, 3, 4, 4, 0.0)


class Pacer:
    """Counts the training seconds of one stage, over several calls and without pauses."""

    def __init__(self, plan, stage, deadline, spent=0.0, step=0):
        self.seconds, self.limit = plan.seconds[stage], plan.steps
        self.deadline, self.spent, self.step = deadline, spent, step
        self._mark = None

    def _count(self):
        if self._mark is not None:
            now = time.monotonic()
            self.spent, self._mark = self.spent + now - self._mark, now

    def running(self):
        """False at the end of the stage or of this call; time counts from the first True."""
        self._count()
        if self._mark is None:
            self._mark = time.monotonic()
        return not self.finished() and time.monotonic() < self.deadline

    def finished(self):
        return self.fraction() >= 1

    def fraction(self):
        """How much of the stage is done, 0..1."""
        part = self.step / self.limit if self.limit else self.spent / self.seconds
        return min(part, 1.0)

    @contextlib.contextmanager
    def paused(self):
        """What happens inside (an evaluation, a saved file) costs no training time."""
        self._count()
        yield
        self._mark = time.monotonic()


class Average:
    """Exponential moving average of parameters; `swapped` puts it in the model's place."""

    def __init__(self, parameters, decay):
        self.source, self.decay = list(parameters), decay
        self.values = [p.detach().clone() for p in self.source]

    @torch.no_grad()
    def update(self, decay=None):
        weight = 1 - (self.decay if decay is None else decay)
        torch._foreach_lerp_(self.values, [p.detach() for p in self.source], weight)

    @torch.no_grad()
    def copy_(self, values):
        for mine, other in zip(self.values, values):
            mine.copy_(other.detach())

    @torch.no_grad()
    def swap(self):
        for mine, other in zip(self.values, self.source):
            kept = mine.clone()
            mine.copy_(other.data)
            other.data.copy_(kept)

    @contextlib.contextmanager
    def swapped(self):
        self.swap()
        yield
        self.swap()


class Session:
    """Files, device, plan, log and data of a run; passed to every stage."""

    def __init__(self, folder, plan, minutes=None, compiled=True):
        self.folder, self.plan = Path(folder), plan
        (self.folder / "state").mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.gpu = self.device == "cuda"
        self.compiled = compiled and self.gpu
        self.started = time.monotonic()
        self.deadline = self.started + minutes * 60 if minutes else float("inf")
        self.tokenizer = tokenizer.load(self.folder / "tokenizer")
        self._sets = {}

    def log(self, *words):
        line = f"[{time.monotonic() - self.started:7.1f}] " + " ".join(str(w) for w in words)
        print(line, flush=True)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def compile(self, module):
        return torch.compile(module, dynamic=False) if self.compiled else module

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.gpu, cache_enabled=False)

    def synchronize(self):
        if self.gpu:
            torch.cuda.synchronize()

    def path(self, name):
        return self.folder / "state" / name

    def save(self, name, state):
        """Write whole or not at all: a call may be killed at any moment."""
        partial = self.path(name + ".partial")
        torch.save(state, partial)
        partial.replace(self.path(name))

    def load(self, name):
        """The saved state, on the device, or None."""
        if not self.path(name).exists():
            return None
        return torch.load(self.path(name), map_location=self.device)

    def end_of_stage(self, stage, pacer):
        """Log a finished stage; leave the call when it was the deadline that ended the loop."""
        self.synchronize()
        pace = 1000 * pacer.spent / max(1, pacer.step)
        self.log(f"{stage}: {pacer.step} steps, {pacer.spent:.0f} s, {pace:.1f} ms a step")
        if not pacer.finished():
            raise OutOfTime(stage)

    def pictures(self, name):
        """A rendered set: ({attribute: [N]}, flaws [N] or None, pictures [N, 3, 256, 256] uint8).

        name is "training", "flawed", "validation" or "flawed validation"; the validation sets
        hold reserved combinations only.
        """
        if name not in self._sets:
            self._sets[name] = _render(self, name)
        return self._sets[name]

    def forget_pictures(self):
        self._sets.clear()


def _render(session, name):
    plan, device = session.plan, session.device
    count, seed = {
        "training": (plan.scenes, 1),
        "flawed": (plan.flawed, 2),
        "validation": (plan.validation, 3),
        "flawed validation": (plan.validation // 2, 4),
    }[name]
    start = time.monotonic()
    scenes = scene.sample(count, seed, reserved="validation" in name)
    flaw = None
    if "flawed" in name:
        scenes, flaw = scene.spoil(scenes, seed)
    scenes = {key: value.to(device) for key, value in scenes.items()}
    generator = torch.Generator(device).manual_seed(seed)
    pictures = torch.empty(count, 3, 256, 256, dtype=torch.uint8, device=device)
    for i in range(0, count, plan.render_batch):
        some = slice(i, i + plan.render_batch)
        batch = {key: value[some] for key, value in scenes.items()}
        spoilt = None if flaw is None else flaw[some].to(device)
        painted = scene.render(batch, generator, 256, spoilt)
        pictures[some] = (painted * 255).round().byte()
    session.synchronize()
    session.log(f"rendered {count} {name} pictures in {time.monotonic() - start:.0f} s")
    return scenes, None if flaw is None else flaw.to(device), pictures


def to_float(pictures):
    """uint8 0..255 to float -1..1."""
    return pictures.float() / 127.5 - 1

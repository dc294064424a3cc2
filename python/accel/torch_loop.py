"""The denoise loop of a diffusers pipeline, natively.

    torch_pipeline: prompts, first latents -> [loop: _core.denoise, callbacks] -> latents

The engine runs the rows of its own table, which must be what the pipe's scheduler was set to. On a
GPU one recording serves all steps. Noise comes from PyTorch's generators, row by row, so the same
seed gives the same picture. The latents are float32 whatever the module's dtype; callbacks get them
in the dtype of the prompt.
"""

import types
import warnings

import torch

from . import _core
from ._core import ShapeError, UnsupportedError
from .compile_ import PIPES, is_in_front, native_of
from .torch_native import REFUSALS, FallbackWarning, with_room
from .torch_watch import Fallback

# ---- what the loop stands on ---------------------------------------------------------------------


def native_unet(pipe):
    """The Native of the pipe's UNet; raises Fallback where calling it would do more than run it."""
    unet = pipe.unet
    native = native_of(unet)
    if native is None:
        raise Fallback("the UNet is not compiled")
    if not is_in_front(unet, "forward"):
        raise Fallback("the forward of the UNet was replaced")
    if unet._forward_hooks or unet._forward_pre_hooks:
        raise Fallback("a forward hook on the UNet")
    hook = unet.__dict__.get("_hf_hook")
    if hook is not None and type(hook).__name__ != "CpuOffload":
        raise Fallback(f"a {type(hook).__name__} on the UNet")
    return native


def check_scheduler(scheduler):
    """Only diffusers' own classes do what their config says, and only as they were written."""
    cls = type(scheduler)
    if cls.__name__ not in _core.scheduler_classes() or not _is_diffusers(cls):
        raise Fallback(f"scheduler {cls.__name__}")
    replaced = [n for n, value in vars(scheduler).items() if callable(value)]
    for base in filter(_is_diffusers, cls.__mro__):
        replaced += [n for n, value in vars(base).items()
                     if isinstance(value, types.FunctionType) and not _is_diffusers(value)]
    if replaced:
        raise Fallback(f"the scheduler's {replaced[0]} was replaced")
    config = scheduler.config
    for name, value in config.items():  # diffusers reads attributes, to_json_string writes items
        now = getattr(config, name, value)
        if now is not value and repr(now) != repr(value):
            raise Fallback(f"the scheduler's config.{name} was changed in place")


def _is_diffusers(thing):
    return thing.__module__.startswith("diffusers.")


def _check_levels(scheduler, table):
    """The noise levels that the scheduler steps by are those of its config."""
    expected = torch.tensor(table.alphas_cumprod, dtype=torch.float64, device="cpu")
    levels = scheduler.alphas_cumprod.cpu().double()
    if len(levels) != len(expected) or not torch.allclose(levels, expected, 1e-4, 2e-6):
        raise Fallback("the scheduler has other noise levels than its config gives")
    if hasattr(scheduler, "final_alpha_cumprod"):
        last = 1.0 if scheduler.config.set_alpha_to_one else float(levels[0])
        if not _near([float(scheduler.final_alpha_cumprod)], [last], 1e-5):
            raise Fallback("the scheduler has another final_alpha_cumprod than its config gives")


def _near(a, b, tolerance):
    return len(a) == len(b) and all(abs(x - y) <= tolerance * max(1, abs(y))
                                    for x, y in zip(a, b, strict=True))


def _table(scheduler, steps, eta):
    """The engine's table for what the scheduler was just set to; raises Fallback."""
    try:
        table = _core.Schedule(scheduler.to_json_string(), steps, eta)
    except (*REFUSALS, ValueError) as error:
        raise Fallback(f"scheduler: {error}") from None
    if not _near(table.timesteps, scheduler.timesteps.tolist(), 1e-5):
        raise Fallback("the scheduler has other timesteps than its config gives")
    if not _near([table.init_noise_sigma], [float(scheduler.init_noise_sigma)], 1e-5):
        raise Fallback("the scheduler has another init_noise_sigma than its config gives")
    _check_levels(scheduler, table)
    return table


# ---- the loop ------------------------------------------------------------------------------------


class Draws:
    """States of the generators that a call draws from, to undo its draws."""

    def __init__(self, generator, device):
        if generator is None:
            if device.type == "cpu":
                generator = torch.default_generator
            else:
                index = torch.cuda.current_device() if device.index is None else device.index
                generator = torch.cuda.default_generators[index]
        self.generators = generator if isinstance(generator, list | tuple) else [generator]
        self.states = [g.get_state() for g in self.generators]

    def undo(self):
        for g, state in zip(self.generators, self.states, strict=True):
            g.set_state(state)


class Loop:
    """Rows of the table, in as few runs of the engine as the callbacks leave.

    Without callbacks the noise of all rows is drawn before the first one, and the host stays two
    rows ahead of a GPU. A callback that changes prompts, guidance or weights ends the run after its
    row; another run goes on from there with the same latents and the sampler's registers.
    """

    def __init__(self, task, values):
        pipe, a = task.pipe, task.a
        self.task, self.pipe, self.values = task, pipe, values
        self.scheduler = pipe.scheduler
        self.times = pipe.scheduler.timesteps
        extra = pipe.prepare_extra_step_kwargs(a["generator"], a["eta"])
        self.generator = extra.get("generator")
        self.table = _table(pipe.scheduler, a["num_inference_steps"], extra.get("eta", 0.0))
        self.on_step_end = a["callback_on_step_end"]
        self.shown = a["callback_on_step_end_tensor_inputs"]
        self.callback, self.callback_steps = a["callback"], a["callback_steps"]
        self.rows, self.total = task.rows()
        # of the steps asked for, as diffusers has it: denoising_end cuts later
        self.warmup = max(len(self.times) - a["num_inference_steps"] * self.scheduler.order, 0)
        given = values.pop("latents")
        self.dtype = given.dtype
        if self.dtype != pipe.unet.dtype:  # diffusers raises where they reach the UNet
            raise Fallback(f"latents are {self.dtype}, the UNet {pipe.unet.dtype}")
        self.latents = given.detach().to(torch.float32, copy=True).contiguous()
        self.next = 0       # row to run next
        self.started = False
        self.ran = 0        # rows that ran
        self.ahead = []     # of rows drawn ahead: (row, Draws from before it)
        self.calls = self.on_step_end is not None or self.callback is not None
        self._make_memory()

    def _make_memory(self):
        noisy = any(row["draws_noise"] for row in self.table.rows)
        size = (*self.latents.shape,)
        like = self.latents
        self.noise = like.new_empty((len(self.table), *size)) if noisy else None
        self.registers = like.new_zeros((6, *size)) if self.calls else None

    def run(self):
        """The latents after the last row, in the dtype they came in."""
        pipe = self.pipe
        pipe._num_timesteps = self.rows
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        with pipe.progress_bar(total=self.total) as self.bar:
            try:
                self._draw_first()
                while self.next < self.rows:
                    self._segment()
            finally:
                self._undraw()
        return self.latents.to(self.dtype)

    def _segment(self):
        """Rows from `next` on, until one that changes what runs."""
        unet = self.pipe.unet
        try:
            native = native_unet(self.pipe)
            hook = unet.__dict__.get("_hf_hook")
            if hook is not None:
                hook.pre_forward(unet)
            self.guidance = self._guidance()
            conditions = self._conditions()
            args = self._args(conditions)
            with native.running(unet, args) as model:
                self._denoise(native, model, conditions, args)
        except Fallback as reason:
            if not self.started:
                raise
            self._rest_by_module(str(reason))

    def _args(self, conditions):
        """Sizes of the UNet's runs."""
        states = conditions["encoder_hidden_states"]
        batch, tokens, _ = states.shape
        ids = conditions.get("time_ids")
        return {"entry": "forward", "batch": batch, "height": self.latents.shape[2],
                "width": self.latents.shape[3], "tokens": tokens, "timesteps": len(self.table),
                "loop": True, "time_ids": 0 if ids is None else ids.shape[1],
                "io_dtype": str(states.dtype).removeprefix("torch.")}

    def _denoise(self, native, model, conditions, args):
        first = self.next
        self.seen = self._marks()
        options = {}
        if self.latents.is_cuda:
            options["stream"] = torch.cuda.current_stream(self.latents.device).cuda_stream
        # progress: called when a row is submitted, no latents are copied
        listener = "callback" if self.calls else "progress"

        def step(row, timestep):
            return self._step(row, native, model)

        def run():
            _core.denoise(model, self.table, self.latents, conditions, [_core.Rng(0)],
                          guidance_scale=self.guidance[0], guidance_rescale=self.guidance[1],
                          first_row=first, noise=self.noise,
                          registers=self.registers, compute=args["compute"],
                          tf32=args["tf32"], **options, **{listener: step})

        try:
            with_room(model, self.latents.device, run, lambda: self.next == first)
        except REFUSALS as error:
            if self.started:
                raise
            raise Fallback(f"{type(error).__name__}: {error}") from None
        finally:
            native.count(self.next - first, args)

    def _guidance(self):
        """Scale and rescale as the engine takes them, 1 for none."""
        pipe = self.pipe
        guided = pipe.do_classifier_free_guidance
        return (float(pipe.guidance_scale) if guided else 1.0,
                max(float(pipe.guidance_rescale), 0.0) if guided else 0.0)

    def _conditions(self):
        """Tensors for the engine: dense, float32 on the CPU, in the UNet's own dtype on a GPU;
        sizes always in float32."""
        wanted = self.pipe.unet.dtype if self.latents.is_cuda else torch.float32
        found = {n: t.detach().to(torch.float32 if n == "time_ids" else wanted).contiguous()
                 for n, t in self.task.conditions(self.values).items()}
        batch = len(self.latents) * (2 if self.guidance[0] > 1 else 1)
        for name, tensor in found.items():
            if len(tensor) != batch:
                message = f"{name}: found {len(tensor)} rows for {batch} samples"
                raise ShapeError(message) if self.started else Fallback(message)
        return found

    # ---- between the rows ------------------------------------------------------------------------

    def _draw(self, row):
        """The noise of a row, from PyTorch's generators, as the stock scheduler draws it."""
        if row >= self.rows or not self.table.rows[row]["draws_noise"]:
            return
        from diffusers.utils.torch_utils import randn_tensor

        dtype = torch.float32 if self.table.noise_f32 else self.dtype
        self.noise[row] = randn_tensor(self.latents.shape, generator=self.generator,
                                       device=self.latents.device, dtype=dtype)

    def _draw_first(self):
        if self.calls:
            self._draw(0)
            return
        for row in range(self.rows):
            if self.table.rows[row]["draws_noise"]:
                self.ahead.append((row, Draws(self.generator, self.latents.device)))
                self._draw(row)

    def _undraw(self):
        """A run that ended early leaves the generators where the rows that ran left them."""
        for row, draws in self.ahead:
            if row >= self.ran:
                draws.undo()
                break

    def _after(self, row):
        """Callbacks and the bar after a row; True when a callback was called."""
        self.started, self.next, self.ran = True, row + 1, row + 1
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = row + 1
        called = self.on_step_end is not None
        if called:
            self._call_on_step_end(row)
        order = self.scheduler.order
        if row == self.rows - 1 or (row + 1 > self.warmup and (row + 1) % order == 0):
            self.bar.update()
            if self.callback is not None and row % self.callback_steps == 0:
                shown = self._show()
                self.callback(row // order, self.times[row], shown)
                self._take(shown)
                called = True
        if self.pipe.interrupt:
            self.next = self.rows
        elif self.calls:
            self._draw(row + 1)
        return called

    def _step(self, row, native, model):
        """Called by the engine after row `row`; True ends the run."""
        called = self._after(row)
        if self.next >= self.rows:
            return True
        return called and self._changed(native, model)

    def _show(self):
        return self.latents.to(self.dtype, copy=True)

    def _take(self, new):
        """Latents that a callback had in its hands; those that are what it was shown keep what
        float32 has beyond that. Nothing waits for a GPU."""
        if new.shape != self.latents.shape:
            raise ShapeError(f"callback_on_step_end's latents: found {list(new.shape)}, expected "
                             f"{list(self.latents.shape)}")
        if new.dtype == self.dtype:
            new = new.to(self.latents.device)
            new = torch.where(new == self.latents.to(self.dtype), self.latents, new)
        self.latents.copy_(new)

    def _call_on_step_end(self, row):
        shown = self._show()
        all_values = self.values | {"latents": shown}
        said = self.on_step_end(self.pipe, row, self.times[row],
                                {name: all_values[name] for name in self.shown})
        self._take(said.pop("latents", shown))
        for name in self.values:
            self.values[name] = said.pop(name, self.values[name])

    def _marks(self):
        """Tells later whether a condition is another tensor or holds other values. Versions do not
        count what is done to `t.data`: callbacks that are given conditions have values compared,
        which waits for a GPU."""
        given = not self.values.keys().isdisjoint(self.shown)
        return [(t, t.clone() if given or t.is_inference() else t._version)
                for t in self.task.conditions(self.values).values()]

    def _changed(self, native, model):
        """Whether a callback changed what the engine's run was started with."""
        pipe = self.pipe
        if pipe.scheduler is not self.scheduler:
            raise UnsupportedError("callback_on_step_end: the scheduler was replaced in the middle "
                                   "of a run")
        if self._guidance() != self.guidance or native_of(pipe.unet) is not native:
            return True
        now = self.task.conditions(self.values).values()
        for (before, mark), tensor in zip(self.seen, now, strict=True):
            if tensor is not before or not (
                    torch.equal(tensor, mark) if isinstance(mark, torch.Tensor)
                    else tensor._version == mark):
                return True
        return native.touched(pipe.unet, model)

    # ---- when the engine may not go on -----------------------------------------------------------

    def _rest_by_module(self, why):
        """A callback made of the UNet what the engine does not run: its own forward does the rest,
        row by row, with the same table."""
        state = PIPES[self.pipe]
        why = f"from row {self.next} on: {why}"
        with state.lock:
            state.stock_loops[why] += 1
        warnings.warn(f"accel: {type(self.pipe).__name__} calls its UNet, {why}", FallbackWarning,
                      stacklevel=2)
        while self.next < self.rows:
            self._row_by_module(self.next)
            self._after(self.next)

    def _row_by_module(self, row):
        scale, rescale = self._guidance()
        x = self.latents * self.table.rows[row]["scale_in"]
        x = (torch.cat([x, x]) if scale > 1 else x).to(self.dtype)
        states = self.task.conditions(self.values)["encoder_hidden_states"]
        e = self.pipe.unet(x, self.times[row], encoder_hidden_states=states, return_dict=False,
                           added_cond_kwargs=self.task.added(self.values))[0].float()
        if scale > 1:
            negative, positive = e.chunk(2)
            e = negative + scale * (positive - negative)
            if rescale > 0:
                e = self.task.module.rescale_noise_cfg(e, positive, guidance_rescale=rescale)
        noise = None if self.noise is None else self.noise[row]
        x, e, noise, registers = (None if t is None else t.cpu().contiguous().numpy()
                                  for t in (self.latents, e, noise, self.registers))
        self.table.apply(row, x, e, noise, list(registers))
        self.latents.copy_(torch.from_numpy(x))
        self.registers.copy_(torch.from_numpy(registers))

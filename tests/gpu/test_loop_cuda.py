"""The denoise loop on a GPU does not stand in the way: nothing waits between rows, nobody copies
latents that nobody asked for; who wants to stop it can, and what is not finite is named."""

import os
import pathlib
import signal
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

for folder in ("torchfree", "drop_in"):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / folder))

import tiny  # noqa: E402
from _gpu import note  # noqa: E402
from dropin import draw, loop_ran, pipeline, use  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

import accel  # noqa: E402
from accel import _core, schedules  # noqa: E402

STEPS = 6
LARGE = {"height": 160, "width": 160, "output_type": "latent"}  # rows of some milliseconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("models") / "sd", "sd")


@pytest.fixture(scope="module")
def pipes(folder):
    """Stock and compiled."""
    return (pipeline(folder).to("cuda"), accel.compile(pipeline(folder).to("cuda")))


@pytest.fixture
def watched(monkeypatch):
    """PyTorch raises in the loop where it waits for the GPU."""
    denoise, count = _core.denoise, []

    def watch(*args, **options):
        count.append(options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return denoise(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(_core, "denoise", watch)
    return count


def cpu():
    return torch.Generator().manual_seed(3)


def gpu():
    return torch.Generator("cuda").manual_seed(3)


# ---- waiting and copies --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "ancestral", "sde"])
@pytest.mark.parametrize("make", [cpu, gpu, lambda: [cpu()]], ids=["cpu", "gpu", "list"])
def test_nothing_waits_between_rows(pipes, monkeypatch, watched, name, make):
    use(pipes, monkeypatch, name)
    options = {"num_inference_steps": STEPS, "eta": 0.5}
    pictures = []
    for pipe in pipes[::-1]:
        with loop_ran(pipe) if pipe is pipes[1] else torch.no_grad():
            pictures.append(draw(pipe, generator=make(), **options))
    assert len(watched) == 1 and watched[0]["progress"] and "callback" not in watched[0]
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-3


def test_nothing_waits_where_a_callback_changes_latents(pipes, monkeypatch, watched):
    use(pipes, monkeypatch, "ancestral")

    def change(pipe, i, t, kwargs):
        if i % 2:
            kwargs["latents"] = kwargs["latents"] * 0.9
        return kwargs

    def look(pipe, i, t, kwargs):
        kwargs["latents"].sum().item()

    options = {"num_inference_steps": STEPS, "callback_on_step_end": change}
    a, b = (draw(pipe, generator=gpu(), **options) for pipe in pipes[::-1])
    assert len(watched) == 1 and np.abs(a - b).max() < 1e-3
    with pytest.raises(RuntimeError, match="synchroni"):  # the watch works
        draw(pipes[1], num_inference_steps=STEPS, callback_on_step_end=look)


@pytest.mark.alone
def test_the_loop_returns_before_the_gpu_is_done(pipes):
    fast = pipes[1]
    options = LARGE | {"num_inference_steps": 16}
    for _ in range(2):
        draw(fast, **options)
    torch.cuda.synchronize()
    event = torch.cuda.Event()
    start = time.perf_counter()
    draw(fast, **options)
    event.record()
    done, returned = event.query(), time.perf_counter() - start
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    note("LOOP", "returns early", f"after {returned * 1e3:.1f} ms of {whole * 1e3:.1f}",
         returned_ms=returned * 1e3, whole_ms=whole * 1e3)
    assert not done
    assert whole - returned > 0.5 * whole / 16  # a row at least is still to be done


def activity(pipe, **options):
    """How often the calls and copies of CUDA are in one run, by name."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        draw(pipe, output_type="latent", **options)
    return Counter(e.name for e in profiled.events())


def test_copies_and_waits_do_not_grow_with_the_steps(pipes, monkeypatch):
    use(pipes, monkeypatch, "euler")
    fast, each = pipes[1], {}
    for what, options in {"none": {}, "callback": {"callback_on_step_end":
                                                   lambda p, i, t, k: k}}.items():
        counts = []
        for steps in (STEPS, STEPS, 2 * STEPS, 2 * STEPS):
            counts.append(activity(fast, num_inference_steps=steps, **options))
        each[what] = {n: (counts[3][n] - counts[1][n]) / STEPS for n in counts[3] | counts[1]}
    copies = {w: sum(v for n, v in e.items() if n.startswith("Memcpy")) for w, e in each.items()}
    waits = {n: v for n, v in each["none"].items() if "Synchronize" in n and v}
    note("LOOP", "a row", f"copies {copies}, waits {waits}", copies=copies, waits=waits)
    if not each["none"].get("cudaGraphLaunch"):
        pytest.skip("the profiler sees no calls of CUDA")
    assert set(waits) <= {"cudaEventSynchronize"}  # of the row before the last: it may be stopped
    assert copies["callback"] >= copies["none"] + 2
    assert copies["none"] == 0


# ---- stopping ------------------------------------------------------------------------------------


class Bar:
    def __init__(self):
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def update(self):
        self.count += 1


@pytest.mark.parametrize("how", ["interrupt", "signal"])
def test_a_run_is_stopped_from_outside(pipes, monkeypatch, how):
    fast, bar = pipes[1], Bar()
    monkeypatch.setattr(fast, "progress_bar", lambda total: bar)
    expected = draw(fast, **LARGE)
    bar.count = 0

    def stop():
        while bar.count < 5:
            time.sleep(0.001)
        if how == "signal":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            fast._interrupt = True

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        draw(fast, num_inference_steps=999, **LARGE)
        assert how == "interrupt"
    except KeyboardInterrupt:
        assert how == "signal"
    thread.join()
    assert 5 <= bar.count < 900
    bar.count = 0
    assert torch.equal(draw(fast, **LARGE), expected) and bar.count == 4


def test_own_pipeline_is_stopped_by_a_signal(folder):
    pipe = accel.Pipeline.from_pretrained(folder, device="cuda")
    options = LARGE | {"progress_bar": False}
    pipe("a", num_inference_steps=2, **options)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    start = time.perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pipe("a", num_inference_steps=999, **options)
    assert time.perf_counter() - start < 1.2
    pipe("a", num_inference_steps=2, **options)


# ---- what is not finite --------------------------------------------------------------------------


def normals(seed, *shape):
    drawn = _core.Rng(seed).normal(int(np.prod(shape)))
    return np.frombuffer(drawn, np.float32).reshape(shape).copy()


@pytest.mark.parametrize("where", ["host", "gpu"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_row_is_named(folder, where, value):
    unet = accel.UNet.from_pretrained(folder, device="cuda")
    table = schedules.make(schedules.resolve({}, "euler_a"), 5)
    noise, states = normals(4, 5, 2, 4, 8, 8), normals(0, 4, 7, 24)
    noise[2, 1, 3, 7, 7] = value

    def run(**options):
        latents, drawn = normals(1, 2, 4, 8, 8), noise
        if where == "gpu":
            latents, drawn = torch.tensor(latents).cuda(), torch.tensor(drawn).cuda()
            options["stream"] = torch.cuda.current_stream().cuda_stream
        _core.denoise(unet._model, table, latents, {"encoder_hidden_states": states},
                      [_core.Rng(0)], guidance_scale=3.0, noise=drawn, **options)
        return latents if where == "host" else latents.cpu().numpy()

    for options in ({}, {"progress": lambda i, t: None}, {"callback": lambda i, t: None}):
        with pytest.raises(accel.NumericError, match="^unet: .* after step 3 of 5, timestep "):
            run(check_finite=True, **options)
        assert not np.isfinite(run(**options)).all()


def test_no_black_picture(folder, tmp_path):
    """accel.Pipeline says so; a compiled pipeline gives what the stock one gives."""
    broken = tiny.write_model(tmp_path / "m", "sd")
    stem = broken / "unet" / f"{tiny.STEMS['unet']}.safetensors"
    weights = load_file(stem)
    weights["conv_out.bias"][0] = np.nan
    save_file(weights, stem)
    pipe = accel.Pipeline.from_pretrained(broken, device="cuda")
    options = {"num_inference_steps": 3, "progress_bar": False}
    for more in ({}, {"callback": lambda i, t, x: None}):
        with pytest.raises(accel.NumericError, match="^unet: found NaN or infinity in the latents "
                                                     "after step 1 of 3, timestep 667"):
            pipe("a", **options, **more)
    fast = accel.compile(pipeline(broken).to("cuda"))
    with loop_ran(fast):
        assert draw(fast, output_type="latent").isnan().all(dim=0).any()

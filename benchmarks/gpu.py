"""Time accel against PyTorch on a GPU, and print README's tables.

    python benchmarks/gpu.py                           # everything but torch.compile
    python benchmarks/gpu.py models --torch-compile 150 --only sd15,sdxl,vae512,vae1024
    python benchmarks/gpu.py pipelines memory --record benchmarks/records

    models      one call of a network: accel's compiled module, PyTorch eager (channels_last), and
                torch.compile (reduce-overhead, channels_last, fused QKV) where it is ready within
                the given seconds; and the first call of accel's, with no cache of measured
                choices and, in another process, with the one that this left
    pipelines   prompt to tensor, stock against accel.compile(pipe)
    memory      the fall of the GPU's free memory while a fresh process compiles and draws, its
                context and libraries included, one for each competitor

Competitors take turns in one process, every other round in the opposite order; a round is some
calls of each between two CUDA events, and what counts is the median over the rounds.  Weights and
data are random (chips that are limited by power are faster on zeros).  Each timed module is checked
in the same run: all errors against float32 are printed, and report() must say that the engine ran,
and never fell back.  The record is written after each row, so that what is stopped leaves some.
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gpu_networks
from gpu_networks import cases, device, free, make, sync
from gpu_tables import memory_table, models_table, pipelines_table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]


def itself(*arguments):
    """This script in another process."""
    command = [sys.executable, __file__, *arguments] + ["--tiny"] * gpu_networks.TINY
    return subprocess.run(command, capture_output=True, text=True)


# ---- timing --------------------------------------------------------------------------------------


def round_ms(call, calls):
    """Milliseconds of one call, over some of them."""
    import torch

    if gpu_networks.TINY:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) * 1e3 / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def alternate(competitors, calls, rounds):
    """{name: median ms} of competitors that take turns."""
    times = {name: [] for name in competitors}
    for call in competitors.values():
        for _ in range(3):
            call()
    sync()
    for i in range(rounds):
        for name in list(competitors)[:: -1 if i % 2 else 1]:
            times[name].append(round_ms(competitors[name], calls))
    return {name: {"ms": statistics.median(t), "least": min(t), "most": max(t)}
            for name, t in times.items()}


@contextlib.contextmanager
def limit(seconds):
    """Raises TimeoutError in the main thread when the time is over; again and again, since what
    runs there may swallow one."""

    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def error(found, truth):
    found, truth = found.float(), truth.float()
    return float((found - truth).square().mean().sqrt() / truth.square().mean().sqrt())


# ---- one network ---------------------------------------------------------------------------------


def torch_compiled(module, call, seconds):
    """(callable or None, what to say, seconds to its third call or None): torch.compile's."""
    import torch

    with contextlib.suppress(ValueError, AttributeError):  # a VAE of other attention has none
        module.fuse_qkv_projections()
    if hasattr(module, "decode"):  # what a user compiles of a VAE
        module.decode = torch.compile(module.decode, mode="reduce-overhead")
        compiled = module
    else:
        compiled = torch.compile(module, mode="reduce-overhead")
    run = call(compiled, torch.float16)

    def step():
        torch.compiler.cudagraph_mark_step_begin()
        return run()

    start = time.perf_counter()
    try:
        with limit(seconds):
            for _ in range(3):  # compiles, records, replays
                step()
            sync()
    except Exception as failure:  # whatever it raises is its result
        if time.perf_counter() - start >= seconds:
            return None, f"not ready after {seconds} s", None
        return None, " ".join(f"{type(failure).__name__}: {failure}".split())[:300], None
    took = time.perf_counter() - start
    return step, f"ready after {took:.0f} s", took


def plan_of(module):
    """The engine's own figures: the recorded graph in one go, FLOPs, bound."""
    import accel

    profile = json.loads(accel.explain(module, profile=True, json=True))
    last = profile["sections"][-1]
    return {"graph_ms": last["whole_ms"], "gflop": last["flops"] / 1e9,
            "bound_ms": last["bound_ms"], "section": last["section"],
            "classes": [{k: c[k] for k in ("rate", "class", "ms", "bound_ms", "steps")}
                        for c in profile["classes"]]}


def first_call(call):
    """Milliseconds of a call, the wait for its result included."""
    start = time.perf_counter()
    call()
    sync()
    return (time.perf_counter() - start) * 1e3


def compiled_and_called(module, call):
    """(accel's module, its call, ms of compile, of the first call, of the second)."""
    import torch

    import accel

    start = time.perf_counter()
    fast = accel.compile(module)
    took = [(time.perf_counter() - start) * 1e3]
    run = call(fast, torch.float16)
    return fast, run, {n: round(t, 1) for n, t in zip(
        ("compile_ms", "first_call_ms", "second_call_ms"),
        took + [first_call(run) for _ in range(2)], strict=True)}


def measure(title, config, call, calls, rounds, compile_seconds):
    """One row of the table of networks."""
    import torch

    import accel

    print(f"# {title}", flush=True)
    layout = torch.channels_last if "clip" not in config else torch.contiguous_format
    plain = make(config, torch.float16)
    wide = copy.deepcopy(plain).float()
    truth = call(wide, torch.float32)()
    del wide
    free()
    fast, ours, cold = compiled_and_called(copy.deepcopy(plain), call)
    eager = copy.deepcopy(plain).to(memory_format=layout)
    competitors = {"accel": ours, "eager": call(eager, torch.float16)}
    row = {"title": title, "cold": cold,
           "error": {n: error(c(), truth) for n, c in competitors.items()}}
    if compile_seconds:
        step, row["torch_compile"], row["torch_compile_s"] = torch_compiled(
            plain.to(memory_format=layout), call, compile_seconds)
        if step:
            competitors["torch.compile"] = step
            row["error"]["torch.compile"] = error(step(), truth)
    for name, e in row["error"].items():
        assert e < 0.05, f"{title}: {name} is off by {e}"
    row["times"] = alternate(competitors, calls, rounds)
    report = accel.report(fast)
    assert report["native_runs"] > 0 and not report["fallbacks"], report
    row["plan"] = plan_of(fast)
    print(json.dumps({k: v for k, v in row.items() if k != "plan"}), flush=True)
    return row


def warm_calls(names):
    """{name: ms of compile and of the first two calls}: for a fresh process."""
    import torch

    found = {}
    for name in names:
        _, config, call, _ = cases()[name]
        found[name] = compiled_and_called(make(config, torch.float16), call)[2]
        free()
    return found


def warm(rows):
    """Adds to each row what its first call takes in another process, the choices remembered."""
    names = [r["name"] for r in rows if "failed" not in r]
    result = itself("--warm-calls", ",".join(names))
    if result.returncode:
        print(f"FAILED warm calls: {result.stderr[-500:]}", flush=True)
        return
    found = json.loads(result.stdout.strip().splitlines()[-1])
    for row in rows:
        if row["name"] in found:
            row["warm"] = found[row["name"]]
    print(json.dumps({"warm": found}), flush=True)


def models(names, rounds, compile_seconds, save):
    """All rows; `save(rows)` after each."""
    import torch

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("ACCEL_CACHE")
        os.environ["ACCEL_CACHE"] = folder  # empty: the first calls measure
        for name, (title, config, call, calls) in cases().items():
            if names and name not in names:
                continue
            try:
                row = measure(title, config, call, calls, rounds, compile_seconds)
            except Exception as failure:  # the other rows are worth having
                print(f"FAILED {title}: {type(failure).__name__}: {failure}"[:2000], flush=True)
                row = {"title": title, "failed": f"{type(failure).__name__}: {failure}"[:500]}
            rows.append({"name": name} | row)
            save(rows)
            free()
            if compile_seconds:
                torch._dynamo.reset()
                free()
        warm(rows)
        save(rows)
        if before is None:
            del os.environ["ACCEL_CACHE"]
        else:
            os.environ["ACCEL_CACHE"] = before
    return rows


# ---- pipelines -----------------------------------------------------------------------------------


def pipe_of(kind, fast):
    """A stock pipeline over random networks, its copy of them compiled when `fast`."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    import accel

    half = torch.float16
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    tokenizer = CLIPTokenizer.from_pretrained(accel.demo_model() / "tokenizer")
    parts = {"scheduler": scheduler, "tokenizer": tokenizer, "text_encoder": make("clip_l", half)}
    if kind == "sdxl":
        vae = make("sdxl_vae", half)
        vae.register_to_config(force_upcast=False)  # or stock would decode in float32
        pipe = StableDiffusionXLPipeline(
            **parts, vae=vae, text_encoder_2=make("clip_bigg", half), tokenizer_2=tokenizer,
            unet=make("sdxl_base_unet", half), add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **parts, vae=make("sd_vae", half), unet=make("sd15_unet", half), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return accel.compile(pipe) if fast else pipe


PIPELINES = {"sd15": ("SD 1.5, 50 steps, 512x512", 50, 512),
             "sdxl": ("SDXL, 30 steps, 1024x1024", 30, 1024)}


def draw(pipe, steps, size, seed=1):
    import torch

    size, steps = (64, 2) if gpu_networks.TINY else (size, steps)
    images = pipe("a red house by a lake at sunset", num_inference_steps=steps, height=size,
                  width=size, guidance_scale=5.0, output_type="pt",
                  generator=torch.Generator(device()).manual_seed(seed)).images
    sync()
    return images


def pipelines(names, runs):
    """Prompt to tensor; the two take turns."""
    import accel

    rows = []
    for name, (title, steps, size) in PIPELINES.items():
        if names and name not in names:
            continue
        print(f"# {title}", flush=True)
        pipes = {"accel": pipe_of(name, True), "stock": pipe_of(name, False)}
        first, times = {}, {n: [] for n in pipes}
        for n, pipe in pipes.items():
            draw(pipe, steps, size)
            first[n] = draw(pipe, steps, size)
        for _ in range(runs):
            for n, pipe in pipes.items():
                start = time.perf_counter()
                draw(pipe, steps, size)
                times[n].append(time.perf_counter() - start)
        report = accel.report(pipes["accel"])
        rows.append({"title": title, "loop": report["loop"],
                     "fallbacks": {n: c["fallbacks"] for n, c in report["components"].items()
                                   if c.get("fallbacks")},
                     "times": {n: statistics.median(t) for n, t in times.items()},
                     "all": times, "picture_error": error(first["accel"], first["stock"])})
        print(json.dumps(rows[-1]), flush=True)
        del pipes, first
        free()
    return rows


# ---- memory --------------------------------------------------------------------------------------


def memory_life(kind, who):
    """The life of a pipeline: a line for memory_of after each part, and a wait for the answer."""
    import diffusers
    import torch
    import transformers

    import accel

    def reached(state, **figures):
        print(json.dumps({"state": state} | figures), flush=True)
        input()

    reached("imported", versions=[m.__version__ for m in (diffusers, transformers, accel)])
    if not gpu_networks.TINY:
        torch.cuda.mem_get_info()
    reached("opened")
    pipe = pipe_of(kind, False)
    weights = sum(p.nbytes for m in pipe.components.values() if isinstance(m, torch.nn.Module)
                  for p in m.parameters())
    free()
    reached("built", weights=weights)
    if who == "accel":
        pipe = accel.compile(pipe)
    _, steps, size = PIPELINES[kind]
    for _ in range(2):
        draw(pipe, min(steps, 6), size)
    if who == "accel":
        assert accel.report(pipe)["loop"]["native"] == 2, accel.report(pipe)
    reached("drawn")
    del pipe
    free()
    sync()
    reached("deleted")


def memory_of(kind, who):
    """The largest fall of the free memory in a process that compiles and draws, seen from here: its
    context and its libraries are in it, and what making the random weights took is not."""

    def available():
        import torch  # while the other process does, too

        return 0 if gpu_networks.TINY else torch.cuda.mem_get_info()[0]

    def go_on(state):
        """Lets it go on until it is there; what it says then."""
        if state != "imported":
            with contextlib.suppress(BrokenPipeError):  # it ended: said below
                life.stdin.write("\n")
                life.stdin.flush()
        for line in life.stdout:
            if line.startswith('{"state"') and json.loads(line)["state"] == state:
                return json.loads(line)
        errors.seek(0)
        raise RuntimeError(f"{who} ended before it was {state}: {errors.read()[-1500:]}")

    def watch():
        while not done.is_set():
            least[0] = min(least[0], available())
            time.sleep(0.001)

    command = [sys.executable, __file__, "--memory-life", kind, who]
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
            command + ["--tiny"] * gpu_networks.TINY, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors, text=True) as life:
        available()  # opens this process' own context
        go_on("imported")
        at_start = available()
        go_on("opened")
        found = {"context": at_start - available()}
        found["weights"] = go_on("built")["weights"]
        least, done = [available()], threading.Event()
        thread = threading.Thread(target=watch)
        thread.start()
        try:
            go_on("drawn")
        finally:
            done.set()
            thread.join()
        least[0] = min(least[0], available())
        go_on("deleted")
        return {"fall": at_start - least[0], "after_del": at_start - available()} | found


def memory(names):
    rows = []
    for kind, (title, _, _) in PIPELINES.items():
        if names and kind not in names:
            continue
        row = {"title": title}
        for who in ("accel", "stock"):
            result = itself("--memory-of", kind, who)
            lines = result.stdout.strip().splitlines()
            row[who] = json.loads(lines[-1]) if result.returncode == 0 else {
                "failed": result.stderr[-500:]}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


# ---- all of it -----------------------------------------------------------------------------------


def versions():
    import diffusers
    import torch
    import transformers

    import accel

    found = {"accel": accel.__version__, "python": platform.python_version(),
             "torch": torch.__version__, "diffusers": diffusers.__version__,
             "transformers": transformers.__version__, "cuda": torch.version.cuda,
             "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")}
    if not gpu_networks.TINY:
        found |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        with contextlib.suppress(OSError, AttributeError):  # the one that PyTorch has loaded
            torch.ones(16, 16, device="cuda").matmul(torch.ones(16, 16, device="cuda"))
            names = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()
                     if "libcublasLt.so" in line]
            found["cublaslt"] = ctypes.CDLL(names[0]).cublasLtGetVersion() if names else None
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True)
        found["driver"] = driver.stdout.strip().splitlines()[0] if driver.stdout else ""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                            text=True, cwd=ROOT)
    return found | {"commit": commit.stdout.strip()}


def write_record(folder, result):
    """Adds this run's parts to the record of the day and the GPU."""
    name = result["versions"].get("gpu", "cpu").replace("NVIDIA ", "").split()[0].lower()
    path = Path(folder) / f"{result['versions']['date'][:10]}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | result, indent=1) + "\n")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", help="models, pipelines, memory (default: all)")
    parser.add_argument("--only", default="", help="names of rows, with commas between")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=3, help="of a pipeline")
    parser.add_argument("--torch-compile", type=int, default=0, metavar="SECONDS",
                        help="also torch.compile, given up after so many seconds a network")
    parser.add_argument("--record", metavar="FOLDER", help="write <date>-<gpu>.json there")
    parser.add_argument("--tiny", action="store_true", help="try this script on the CPU")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--memory-life", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--warm-calls", help=argparse.SUPPRESS)
    args = parser.parse_args()
    gpu_networks.TINY = args.tiny
    if args.memory_of:
        print(json.dumps(memory_of(*args.memory_of)))
        return
    import torch

    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False  # the truth is without
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.memory_life:
        memory_life(*args.memory_life)
        return
    if args.warm_calls is not None:
        print(json.dumps(warm_calls([n for n in args.warm_calls.split(",") if n])))
        return
    unknown = set(args.parts) - {"models", "pipelines", "memory"}
    if unknown:
        parser.error(f"found {sorted(unknown)}, expected models, pipelines, memory")
    names = set(filter(None, args.only.split(",")))
    parts = args.parts or ["models", "pipelines", "memory"]
    result, text = {"versions": versions()}, []

    def save(part, rows):
        result[part] = rows
        if args.record:
            write_record(args.record, result)

    if "memory" in parts:  # first: this process holds nothing yet
        save("memory", memory(names))
        text.append(memory_table(result["memory"]))
    if "models" in parts:
        models(names, args.rounds, args.torch_compile, lambda rows: save("models", rows))
        text.insert(0, models_table(result["models"]))
    if "pipelines" in parts:
        save("pipelines", pipelines(names, args.runs))
        text.append(pipelines_table(result["pipelines"]))
    print("\n" + "\n\n".join(text) + "\n\n" + json.dumps(result["versions"]))
    if args.record:
        print(f"record: {write_record(args.record, result)}")


if __name__ == "__main__":
    main()

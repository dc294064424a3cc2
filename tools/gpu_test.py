#!/usr/bin/env python3
"""Run everything of `make test-gpu` that was built, side by side, and write its record.

    python tools/gpu_test.py [--only REGEX] [--record FILE] [--seconds LIMIT] [--jobs N] [--list]

Parts are C tests under build/c/tests, files of tests/gpu, and compute-sanitizer over our own
kernels; most run beside each other, those that look at the memory of a whole GPU alone on one, at
the end.  Where there are several GPUs each part has another first one, and still sees them all.
Every part runs, whatever failed before; logs go to build/test-gpu.  The last lines say what failed,
and so does the exit status.

With ACCEL_FORCE_ARCH=75 all of it runs as on a card of compute capability 7.5, with the code that
is built for it; without, a few parts do, whose names end in _75.

The record (benchmarks/records/<date>-<gpu>-test.json, with --only build/test-gpu/record.json) has
versions, each part and test with its outcome and its seconds, kernel runs, and all figures that
the tests measured.

Installs nothing; where compute-sanitizer is missing, its parts fail.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "test-gpu"
CTESTS = ROOT / "build" / "c" / "tests"
CUDA_75 = ROOT / "build" / "arch75"  # python/accel there has the code of sm_75 alone
FORCED = os.environ.get("ACCEL_FORCE_ARCH", "")
PLACE = CUDA_75 if FORCED == "75" else ROOT  # python/accel there is what is tested
GOOD = ("passed", "skipped", "no tests")
NO_TESTS = 5  # pytest's status when a filter left none
RAN = "ran on cuda"
DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
# Measuring each of forty sizes takes minutes; the full sizes and the whole runs do measure.
FIXED = {"ACCEL_TUNE": "off"}
# Beside, alone on a GPU, with nobody else running at all.
BESIDE, ALONE, ONLY = range(3)
# A few of the full sizes as on sm_75, beside the card's own.
SOME_75 = "float16 and not bfloat16 and (sd15 or 512 or clip_l or shipped)"


@dataclass
class Part:
    """One command, its log, and what became of it."""

    name: str
    command: list
    limit: int = 240  # seconds
    place: int = BESIDE
    wants: str = ""  # text that its log must have
    environment: dict = field(default_factory=dict)
    folder: Path = PLACE
    outcome: str = "not reached"
    seconds: float = 0.0
    gpu: int = 0  # the one that it sees first
    process: subprocess.Popen = None
    began: float = 0.0

    @property
    def log(self):
        return OUT / f"{self.name}.log"

    @property
    def figures(self):
        return OUT / f"{self.name}.jsonl"

    def start(self, gpus, at):
        """With gpus[at] first, and the others after it."""
        self.began, self.gpu = time.monotonic(), at
        # A cache each: one that all write is read again and again.
        environment = {"ACCEL_CACHE": str(OUT / "cache" / self.name)} | os.environ
        environment |= self.environment | {"ACCEL_TEST_FIGURES": str(self.figures)}
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[at:] + gpus[:at])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(c) for c in self.command], cwd=self.folder, env=environment, stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)

    def stop(self):
        """Ends the process and its children."""
        for how in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(10)
                break
            except (ProcessLookupError, PermissionError):
                break
            except subprocess.TimeoutExpired:
                continue

    def over(self, deadline):
        """Whether it has ended, or was made to."""
        self.seconds = round(time.monotonic() - self.began, 1)
        status = self.process.poll()
        if status is None:
            if self.seconds < self.limit and time.monotonic() < deadline:
                return False
            self.stop()
            self.outcome = f"stopped after {self.seconds:.0f} s"
        elif status == NO_TESTS and "pytest" in self.command:
            self.outcome = "no tests"
        elif status:
            self.outcome = f"failed, status {status}"
        elif any("no GPU" in x["why"] for x in self.tests()):
            self.outcome = "failed, no GPU was found"
        elif self.wants not in self.log.read_text(errors="replace"):
            self.outcome = f"failed, its log lacks '{self.wants}'"
        elif self.tests() and all(x["outcome"] == "skipped" for x in self.tests()):
            self.outcome = "skipped"
        else:
            self.outcome = "passed"
        return True

    @property
    def good(self):
        return self.outcome in GOOD

    def lines(self):
        """What its tests wrote for the record."""
        if not self.figures.exists():
            return []
        return [json.loads(line) for line in self.figures.read_text().splitlines()]

    def tests(self):
        return [x for x in self.lines() if x["kind"] == "TEST"]


def search(*folders):
    """PYTHONPATH with these in front."""
    paths = (*folders, os.environ.get("PYTHONPATH"))
    return {"PYTHONPATH": os.pathsep.join(str(p) for p in paths if p)}


def on_75(**environment):
    """A Part's fields: what a card of compute capability 7.5 would choose, in the code that is
    built for it."""
    forced = {"ACCEL_FORCE_ARCH": "75"} | search(CUDA_75 / "python")
    return {"environment": forced | environment, "folder": CUDA_75}


# ---- the parts -----------------------------------------------------------------------------------


def c_parts():
    """C programs; what takes nearly all memory, or measures it, runs alone, the engine's with
    nobody else, since it opens a second GPU."""
    yield Part("c_seam", [CTESTS / "test_seam"], 60, wants=RAN)
    yield Part("c_own", [CTESTS / "cuda_own"], 60)
    places = {"test_cuda": ALONE, "test_cuda_engine": ONLY, "test_cuda_large": ALONE}
    for path in sorted((ROOT / "tests" / "c").glob("test_cuda*.c")):
        name = path.stem
        yield Part(f"c{name[4:]}", [CTESTS / name], 150, places.get(name, BESIDE),
                   "float16" if name == "test_cuda_models" else RAN,
                   FIXED if name == "test_cuda_loop" else {})
    cuda = {"ACCEL_TEST_DEVICE": "cuda"}
    yield Part("c_fused", [CTESTS / "test_fused"], 120, wants=RAN, environment=cuda)
    yield Part("c_fused_random", [CTESTS / "test_fused_random"], 180,
               environment=cuda | FIXED)
    yield Part("c_models_75", [CTESTS / "test_cuda_models"], 120, wants="float16",
               **on_75())
    # Of the engine what is not about memory.
    for name, *chosen in (("cuda_engine", "streams"), ("cuda_engine", "captures"),
                          ("cuda_engine", "replays"), ("cuda_engine", "threads"), ("cuda_loop",),
                          ("fused",)):
        yield Part("_".join(["c", name.removeprefix("cuda_"), *chosen, "75"]),
                   [CTESTS / f"test_{name}", *chosen], 120, wants=RAN,
                   **on_75(**cuda, **FIXED))


def kernel_parts():
    """Every kernel against the plain reference, all families, shapes of the models too."""
    kernels = [CTESTS / "test_kernels", "--backend", "cuda", "--keep-going", "--dtype"]
    for dtype in DTYPES:
        for op in ("conv2d", "attention", "-conv2d,attention"):
            name = f"kernels_{dtype}" + ("" if op[0] == "-" else f"_{op}")
            yield Part(name, [*kernels, dtype, "--all", "--op", op])
        some = [] if dtype == "f16" else ["--quick"]  # of the others 7.5 has plain kernels alone
        yield Part(f"kernels_{dtype}_75", [*kernels, dtype, *some], **on_75())


def sanitizer_parts():
    """Our own kernels at small shapes; a sanitizer is a hundred times slower."""
    beside_nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").parent
    tool = shutil.which("compute-sanitizer") or beside_nvcc / "compute-sanitizer"
    quick = [CTESTS / "test_kernels", "--backend", "cuda", "--keep-going", "--quick"]
    sampler = [CTESTS / "test_cuda_loop", "samplers"]
    large = (("linear.mma", "linear", "5e8"), ("conv2d.narrow", "conv2d", "3e8"),
             ("attention.flash", "attention", "3e7"))  # tiles that small shapes never take
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--print-limit", "20", "--error-exitcode", "9"]
        yield Part(f"{check}_sampler", [*command, *sampler], wants=RAN)
        yield Part(f"{check}_own", [*command, CTESTS / "cuda_own"])
        for kernel, op, flops in large:
            yield Part(f"{check}_f16_{kernel}", [*command, *quick, "--dtype", "f16", "--op", op,
                                                 "--kernel", kernel, "--flops", flops])
        yield Part(f"{check}_f16_75", [*command, *quick, "--dtype", "f16", "--flops", "1e6"],
                   **on_75())
        for dtype in DTYPES:
            one = [*command, *quick, "--dtype", dtype]
            if check == "memcheck":
                yield Part(f"{check}_{dtype}", one)
                continue
            slow = ("linear", "conv2d,up_conv2d", "attention")
            for op in (*slow, "-" + ",".join(slow)):
                name = op.split(",")[0] if op[0] != "-" else "others"
                yield Part(f"{check}_{dtype}_{name}", [*one, "--flops", "1e6", "--op", op])


def python_parts(gpus):
    """Files of tests/gpu, the long ones in pieces."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--tb=short",
              "-W", "ignore"]
    folder = ROOT / "tests" / "gpu"
    pieces = {"test_gpu_unet": {"sizes": "sizes", "batches": "batches or long or fused", "": None},
              "test_gpu_pictures": {"sdxl": "sdxl", "": None},
              "test_gpu_vae": {"sizes": "sizes", "": None}}
    long = ("test_processes.py", "test_gpu_unet.py", "test_gpu_pictures.py")
    for path in sorted(folder.glob("test_*.py"), key=lambda f: (f.name not in long, f.name)):
        if "pytestmark = pytest.mark.alone" in path.read_text():
            continue
        splits = pieces.get(path.stem, {"": None})
        for suffix, chosen in splits.items():
            others = [f"({c})" for c in splits.values() if c]
            chosen = chosen or (others and f"not ({' or '.join(others)})")
            yield Part("_".join(filter(None, (path.stem[5:], suffix))),
                       [*pytest, path, "-m", "not alone", *(["-k", chosen] if chosen else [])],
                       300, environment=FIXED if suffix in ("sizes", "batches") else {})
    yield Part("no_driver", [*pytest, "-p", "_figures",
                             ROOT / "tests" / "torchfree" / "test_cuda_errors.py"],
               environment=search(folder))
    yield from python_parts_75(pytest, folder)
    yield from alone_parts(pytest, folder, gpus)


def python_parts_75(pytest, folder):
    """Little beside a run on one GPU, and nothing measured."""
    yield Part("gpu_75", [*pytest, *(folder / f"test_gpu_{n}.py" for n in
                                     ("unet", "vae", "clip", "pictures")), "-k", SOME_75],
               **on_75(**FIXED))
    yield Part("loop_75", [*pytest, folder / "test_loop_cuda.py", "-m", "not alone"],
               **on_75(**FIXED))


def alone_parts(pytest, folder, gpus):
    """All in one process, or where there are several GPUs a file in each."""
    if len(gpus) < 2:
        yield Part("alone", [*pytest, folder, "-m", "alone"], 300, ALONE)
        return
    for path in sorted(folder.glob("test_*.py")):
        if "mark.alone" in path.read_text():
            yield Part(f"alone_{path.stem[5:]}", [*pytest, path, "-m", "alone"], 300,
                       ONLY if path.name == "test_two_gpus.py" else ALONE)


def all_parts(gpus):
    parts = [*python_parts(gpus), *kernel_parts(), *sanitizer_parts(), *c_parts()]
    if PLACE == ROOT:
        return parts
    # cuda_own is linked with the kernels of this card.
    return [p for p in parts if not p.name.endswith(("_75", "_own"))]


# ---- running them --------------------------------------------------------------------------------


def list_gpus():
    """What CUDA_VISIBLE_DEVICES may have, an entry for each GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [x.strip() for x in visible.split(",") if x.strip()]
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ["0"]
    count = sum(line.startswith("GPU ") for line in said.stdout.splitlines())
    return [str(i) for i in range(max(count, 1))]


def finish(part):
    outcomes = [t["outcome"] for t in part.tests()]
    counts = {o: outcomes.count(o) for o in ("passed", "failed", "skipped")}
    said = ", ".join(f"{n} {o}" for o, n in counts.items() if n)
    last = [x.strip() for x in part.log.read_text(errors="replace").splitlines() if x.strip()][-1:]
    said = said or "".join(last)[:90]
    print(f"{part.seconds:6.1f} s  {part.name:24} {part.outcome}: {said}", flush=True)


def has_room(part, running, jobs, gpus):
    if part.place == ONLY:
        return not running
    limit = len(gpus) if part.place == ALONE else jobs
    return len(running) < max(limit, 1) and all(p.place == part.place for p in running)


def run(parts, jobs, gpus, deadline):
    """All parts, `jobs` at once, then one on each GPU, then one; none is begun past deadline."""
    running = []
    # Of those that are alone the short ones first, or where they share out GPUs the long ones.
    several = len(gpus) > 1
    waiting = sorted(parts, key=lambda p: (
        p.place if several else p.place != BESIDE, p.place and (-p.limit if several else p.limit)))
    try:
        while waiting or running:
            for part in [p for p in running if p.over(deadline)]:
                running.remove(part)
                finish(part)
            late = time.monotonic() >= deadline
            while waiting and not late and has_room(waiting[0], running, jobs, gpus):
                busy = [sum(p.gpu == i for p in running) for i in range(max(len(gpus), 1))]
                waiting[0].start(gpus, busy.index(min(busy)))
                running.append(waiting.pop(0))
            if late and not running:
                break
            time.sleep(0.1)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        for part in running:
            part.stop()
            part.outcome = "stopped"


# ---- the record ----------------------------------------------------------------------------------


def versions():
    """Those of benchmarks/gpu.py, from a process of its own."""
    code = "import gpu, json; print(json.dumps(gpu.versions()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", text=True,
                            capture_output=True)
    if result.returncode:
        return {"date": time.strftime("%Y-%m-%dT%H:%M+00:00", time.gmtime()),
                "failed": result.stderr[-300:]}
    return json.loads(result.stdout.strip().splitlines()[-1])


def kernel_runs(parts):
    """{part: how many kernel runs were compared}."""
    found = {}
    for part in parts:
        if part.name.startswith(("kernels_", "memcheck_", "racecheck_")) and part.log.exists():
            counts = re.findall(r"(\d+) kernel runs checked", part.log.read_text(errors="replace"))
            if counts:
                found[part.name] = int(counts[-1])
    return found


def record_of(parts, gpus, seconds):
    lines = [line | {"part": part.name} for part in parts for line in part.lines()]
    tests = [x for x in lines if x["kind"] == "TEST"]
    runs = kernel_runs(parts)
    record = {"versions": versions(), "gpus": len(gpus), "ACCEL_FORCE_ARCH": FORCED,
              "passed": all(p.good for p in parts),
              "seconds": seconds,
              "outcomes": {o: sum(p.outcome == o for p in parts)
                           for o in sorted({p.outcome for p in parts})},
              "parts": [{"name": p.name, "outcome": p.outcome, "seconds": p.seconds, "gpu": p.gpu}
                        for p in parts],
              "kernel_runs": {
                  "against the reference": sum(n for k, n in runs.items() if k[0] == "k"),
                  "under memcheck": sum(n for k, n in runs.items() if k[0] == "m"),
                  "under racecheck": sum(n for k, n in runs.items() if k[0] == "r")} | runs,
              "tests": {o: sum(t["outcome"] == o for t in tests)
                        for o in ("passed", "failed", "skipped")}}
    for test in tests:  # some run twice
        test["what"] += " (75)" * test["part"].endswith("_75")
    for outcome in ("failed", "skipped"):
        record[outcome] = {t["what"]: t["why"] for t in tests if t["outcome"] == outcome}
    for kind in ("PARITY", "PICTURES", "MEMORY", "REBIND"):
        record[kind.lower()] = [{k: v for k, v in x.items() if k != "kind"}
                                for x in lines if x["kind"] == kind]
    others = {"TEST", "PARITY", "PICTURES", "MEMORY", "REBIND"}
    record["other figures"] = [x for x in lines if x["kind"] not in others]
    record["test_seconds"] = {t["what"]: t["seconds"] for t in tests}
    return record


def summary(parts, record):
    """Prints what failed, with the end of its log."""
    for part in parts:
        if part.good:
            continue
        print(f"\n== {part.name}: {part.outcome}; {part.log.relative_to(ROOT)}")
        if part.log.exists():
            text = part.log.read_text(errors="replace").splitlines()
            bad = [i for i, x in enumerate(text) if "FAILED" in x or x.startswith("E  ")]
            for i in bad[:12]:
                print("  " + "\n  ".join(x[:200] for x in text[i : i + 2]))
            if not bad:
                print("  " + "\n  ".join(x[:200] for x in text[-6:]))
    skipped = sorted(set(record["skipped"].values()))
    whole = [p.name for p in parts if p.outcome == "skipped"]
    failed = [p.name for p in parts if not p.good]
    print(f"\n{record['tests']['passed']} tests passed, {record['tests']['failed']} failed, "
          f"{record['tests']['skipped']} skipped{f' ({skipped})' if skipped else ''}; "
          f"{record['kernel_runs']['against the reference']} kernel runs compared; "
          f"{record['seconds']:.0f} s")
    if whole:
        print(f"nothing of it ran, all was skipped: {', '.join(whole)}")
    print(f"failed: {', '.join(failed)}" if failed else
          f"test-gpu: {sum(p.outcome == 'passed' for p in parts)} parts passed on "
          f"{record['gpus']} GPU{'s' * (record['gpus'] != 1)}, {len(whole)} skipped")


def path_of(record, only):
    if only:
        return OUT / "record.json"
    gpu = record["versions"].get("gpu", "none").replace("NVIDIA ", "").split()[0].lower()
    name = f"{record['versions']['date'][:10]}-{gpu}-test{FORCED and '-' + FORCED}.json"
    return ROOT / "benchmarks" / "records" / name


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="parts whose name this regex finds")
    parser.add_argument("--record", type=Path, help="where to write it")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop what runs longer")
    parser.add_argument("--jobs", type=int, help="at once; 10 a GPU, if there are 16 CPUs for them")
    parser.add_argument("--list", action="store_true", help="print the parts")
    args = parser.parse_args()
    if FORCED not in ("", "75"):
        parser.error(f"ACCEL_FORCE_ARCH: found {FORCED}, expected 75 or none: no other is built")
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | search(PLACE / "python")
    gpus = list_gpus()
    parts = [p for p in all_parts(gpus) if re.search(args.only, p.name)]
    if args.list:
        for part in parts:
            print(part.name, ("", "(alone)", "(nobody else)")[part.place], *part.command)
        return 0
    if not parts:
        parser.error(f"found no part for '{args.only}'; --list prints them")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    os.environ.setdefault("OMP_NUM_THREADS", "4")  # several processes share the cores
    start = time.monotonic()
    jobs = args.jobs or max(2, min(10 * max(len(gpus), 1), (os.cpu_count() or 2) * 5 // 8))
    run(parts, jobs, gpus, start + args.seconds)
    record = record_of(parts, gpus, round(time.monotonic() - start, 1))
    path = args.record or path_of(record, args.only)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    summary(parts, record)
    print(f"record: {path}")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""README's tables of what gpu.py measured, and the figures of make test-gpu, from records.

    python benchmarks/gpu_tables.py benchmarks/records/2026-11-21-h200*.json
"""

import json
import sys
from pathlib import Path


def table(rows):
    """Markdown of rows of cells; the first is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def ms(value):
    """Three digits, or nothing."""
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def seconds(row, part):
    """Of accel's first call; `part` is cold or warm."""
    return f"{row[part]['first_call_ms'] / 1e3:.2f} s" if part in row else ""


def models_table(rows):
    """Times, then errors and what comes before the first result."""
    times = [["one call, fp16, ms", "accel", "its graph alone", "eager, channels_last",
              "torch.compile", "bound of the chip"]]
    others = [["one call, fp16", "error: accel", "eager", "torch.compile",
               "torch.compile is ready after", "accel: first call", "with a cache"]]
    for r in rows:
        if "failed" in r:
            times.append([r["title"], f"failed: {r['failed'][:80]}", "", "", "", ""])
            continue
        t = {n: v["ms"] for n, v in r["times"].items()}
        e, took = r["error"], r.get("torch_compile_s")
        times.append([
            r["title"], ms(t["accel"]), ms(r["plan"]["graph_ms"]), ms(t["eager"]),
            ms(t.get("torch.compile")) or r.get("torch_compile", "")[:80],
            ms(r["plan"]["bound_ms"])])
        others.append([
            r["title"], *(f"{e[n]:.2e}" if n in e else ""
                          for n in ("accel", "eager", "torch.compile")),
            f"{took:.0f} s" if took else "", seconds(r, "cold"), seconds(r, "warm")])
    return table(times) + "\n\n" + table(others)


def pipelines_table(rows):
    out = [["prompt to tensor, fp16", "accel", "stock", "stock / accel"]]
    for r in rows:
        t = r["times"]
        out.append([r["title"], f"{t['accel']:.3f} s", f"{t['stock']:.3f} s",
                    f"{t['stock'] / t['accel']:.2f}"])
    return table(out)


def memory_table(rows):
    """Everything is in a fall; of it the weights and the CUDA context are the same for both."""
    out = [["fall of free memory, MB", "accel", "stock", "of it weights", "CUDA context",
            "after `del pipe`: accel", "stock"]]
    for r in rows:
        columns = [(who, "fall") for who in ("accel", "stock")]
        columns += [("accel", "weights"), ("accel", "context")]
        columns += [(who, "after_del") for who in ("accel", "stock")]
        out.append([r["title"], *(
            "failed" if "failed" in r[who] else f"{r[who][key] / 1e6:.0f}" if key in r[who] else ""
            for who, key in columns)])
    return table(out)


def test_lines(record):
    """What make test-gpu says, a line each."""
    tests, runs = record["tests"], record["kernel_runs"]
    yield (f"make test-gpu: {'passed' if record['passed'] else 'FAILED'} in "
           f"{record['seconds']:.0f} s on {record.get('gpus', 1)} GPU; {tests['passed']} Python "
           f"tests passed, {tests['failed']} failed, {tests['skipped']} skipped; "
           f"{runs['against the reference']} kernel runs against the reference, "
           f"{runs['under memcheck']} under memcheck, {runs['under racecheck']} under racecheck")
    cases = [p for p in record["parity"] if p["seeds"] >= 4 and "trap" not in p["what"]]
    if cases:
        ratios = [p["ratio"] for p in cases]
        again = sum(p["part"].endswith("_75") for p in cases)
        yield (f"errors: {min(ratios):.2f} to {max(ratios):.2f} of PyTorch's own in "
               f"{len(cases) - again} cases of four seeds, {again} of them again as on compute "
               f"capability 7.5")
    for kind in ("parity", "pictures", "memory", "rebind"):
        for line in record[kind]:
            if kind != "parity" or line not in cases:
                yield f"{kind}: {json.dumps({k: v for k, v in line.items() if k != 'part'})}"


def main():
    for path in sys.argv[1:]:
        record = json.loads(Path(path).read_text())
        print(f"{path}: {json.dumps(record.get('versions', {}))}\n")
        if "kernel_runs" in record:
            print("\n".join(test_lines(record)) + "\n")
            continue
        for part, show in (("models", models_table), ("pipelines", pipelines_table),
                           ("memory", memory_table)):
            if record.get(part):
                print(show(record[part]) + "\n")


if __name__ == "__main__":
    main()

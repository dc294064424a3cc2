"""README's tables of what gpu.py measured, from the rows of its record."""


def number(value, digits=2):
    return "" if value is None else f"{value:.{digits}f}"


def models_table(rows):
    header = ["one call, fp16, ms", "accel", "its graph alone", "eager, channels_last",
              "torch.compile", "bound", "error: accel", "eager", "torch.compile",
              "torch.compile: ready after", "accel: first call, measuring", "with a cache"]
    out = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for r in rows:
        if "failed" in r:
            out.append(f"| {r['title']} | failed: {r['failed'][:80]} |" + " |" * (len(header) - 2))
            continue
        t = {n: v["ms"] for n, v in r["times"].items()}
        e, took = r["error"], r.get("torch_compile_s")
        out.append("| " + " | ".join([
            r["title"], number(t["accel"]), number(r["plan"]["graph_ms"]), number(t["eager"]),
            number(t.get("torch.compile")) or r.get("torch_compile", "")[:80],
            number(r["plan"]["bound_ms"]),
            *(f"{e[n]:.2e}" if n in e else "" for n in ("accel", "eager", "torch.compile")),
            f"{took:.0f} s" if took else "", f"{r['cold']['first_call_ms'] / 1e3:.1f} s",
            f"{r['warm']['first_call_ms'] / 1e3:.2f} s" if "warm" in r else ""]) + " |")
    return "\n".join(out)


def pipelines_table(rows):
    out = ["| prompt to tensor, fp16, s | accel | stock | |", "|---|---|---|---|"]
    for r in rows:
        t = r["times"]
        out.append(f"| {r['title']} | {t['accel']:.3f} | {t['stock']:.3f} | "
                   f"{t['stock'] / t['accel']:.2f} times as fast |")
    return "\n".join(out)


def memory_table(rows):
    out = ["| fall of free memory, MB | accel | stock | after `del pipe`: accel | stock |",
           "|---|---|---|---|---|"]
    for r in rows:
        cells = [r[who].get(key) for key in ("fall", "after_del") for who in ("accel", "stock")]
        out.append(f"| {r['title']} | " + " | ".join(
            "failed" if c is None else f"{c / 1e6:.0f}" for c in cells) + " |")
    return "\n".join(out)

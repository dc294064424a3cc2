"""Our CPU kernels against PyTorch's, shape by shape, in paired alternating runs.

    python benchmarks/bench_kernels.py [linear conv attention norm] [--threads 2] [--isa 2]

Each line: shape, milliseconds of PyTorch and of ours (medians of alternating calls), GFLOP/s, the
ratio ours / PyTorch (below 1: we are faster), and the largest difference over the largest value.
"""
import argparse
import ctypes
import pathlib
import struct
import subprocess
import time

import numpy as np
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPS = {"linear": 0, "conv2d": 1, "up_conv2d": 2, "group_norm": 3, "layer_norm": 4, "attention": 5,
       "activation": 6, "gate": 7}
ACT = {"none": 0, "silu": 1, "gelu": 2}

LINEAR = [(8192, 320, 320), (8192, 960, 320), (8192, 2560, 320), (8192, 320, 1280),
          (2048, 640, 640), (2048, 1920, 640), (2048, 5120, 640), (2048, 640, 2560),
          (512, 1280, 1280), (512, 3840, 1280), (512, 10240, 1280), (512, 1280, 5120),
          (128, 1280, 1280), (2048, 1280, 1280), (4096, 512, 512), (154, 768, 768),
          (154, 2304, 768), (154, 3072, 768), (154, 768, 3072), (154, 320, 768), (2, 1280, 1280)]
CONV = [(2, 64, 320, 320, 3, 1), (2, 64, 640, 320, 3, 1), (2, 32, 640, 640, 3, 1),
        (2, 32, 1280, 640, 3, 1), (2, 16, 1280, 1280, 3, 1), (2, 16, 2560, 1280, 3, 1),
        (2, 8, 1280, 1280, 3, 1), (2, 8, 2560, 1280, 3, 1), (2, 64, 320, 320, 3, 2),
        (2, 64, 4, 320, 3, 1), (2, 64, 320, 4, 3, 1), (1, 64, 512, 512, 3, 1),
        (1, 128, 512, 512, 3, 1), (1, 256, 256, 256, 3, 1), (1, 256, 512, 256, 3, 1),
        (1, 512, 128, 128, 3, 1), (1, 512, 128, 3, 3, 1)]
ATTENTION = [(2, 4096, 4096, 8, 40), (2, 1024, 1024, 8, 80), (2, 256, 256, 8, 160),
             (2, 64, 64, 8, 160), (2, 4096, 77, 8, 40), (2, 1024, 77, 8, 80), (2, 77, 77, 12, 64),
             (1, 4096, 4096, 1, 512), (1, 4096, 4096, 10, 64)]


def build():
    """The library from today's sources; returns it with bench_kernel declared."""
    out = ROOT / "build" / "bench_kernels.so"
    out.parent.mkdir(exist_ok=True)
    sources = [str(p) for pattern in ("csrc/base.c", "csrc/tensor.c", "csrc/ops.c",
                                      "csrc/sampler.c", "kernels/cpu/*.c")
               for p in sorted(ROOT.glob(pattern))]
    subprocess.run(["gcc", "-std=c11", "-O2", "-D_GNU_SOURCE", "-shared", "-fPIC",
                    str(ROOT / "benchmarks/bench_kernels.c"), *sources, "-lm", "-lpthread",
                    "-o", str(out)], check=True)
    library = ctypes.CDLL(str(out))
    library.bench_kernel.restype = ctypes.c_double
    return library


def dims(shape):
    """Rank and five dimensions, as bench_kernel reads them."""
    return [-1] + [0] * 5 if shape is None else [len(shape), *shape] + [0] * (5 - len(shape))


class Bench:
    """Runs both sides in turns."""

    def __init__(self, library, threads, isa, rounds):
        self.library, self.threads, self.isa, self.rounds = library, threads, isa, rounds

    def ours(self, op, attr, inputs, out):
        """Seconds of one launch."""
        flat = [v for x in inputs for v in dims(None if x is None else x.shape)]
        pointers = [x.ctypes.data if x is not None else None for x in inputs]
        seconds = self.library.bench_kernel(
            OPS[op], attr, len(attr), len(inputs), (ctypes.c_int64 * len(flat))(*flat),
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_int64 * 6)(*dims(out.shape)), out.ctypes.data_as(ctypes.c_void_p),
            self.threads, self.isa)
        assert seconds >= 0, f"{op} failed"
        return seconds

    def pair(self, name, flops, op, attr, inputs, out, theirs, layout=lambda t: t):
        """One line of the table; `layout` brings PyTorch's result to our order."""
        result = layout(theirs()).numpy()
        self.ours(op, attr, inputs, out)
        error = np.abs(result - out).max() / np.abs(result).max()
        times = [[], []]
        for _ in range(self.rounds):
            start = time.perf_counter()
            theirs()
            times[0].append(time.perf_counter() - start)
            times[1].append(self.ours(op, attr, inputs, out))
        a, b = (float(np.median(t)) for t in times)
        print(f"{name:34s} torch {a * 1e3:9.3f} ms {flops / a * 1e-9:7.1f}   ours {b * 1e3:9.3f} ms"
              f" {flops / b * 1e-9:7.1f} GFLOP/s  ratio {b / a:5.2f}  error {error:.1e}",
              flush=True)
        return a, b


def bench_linear(bench):
    for m, n, k in LINEAR:
        x, w, b = torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n)
        out = np.empty((m, n), np.float32)
        bench.pair(f"linear {m} {n} {k}", 2.0 * m * n * k, "linear", struct.pack("i?", 0, False),
                   [x.numpy(), w.numpy(), b.numpy()], out, lambda: F.linear(x, w, b))


def bench_conv(bench):
    for n, size, c_in, c_out, kernel, stride in CONV:
        x = torch.randn(n, c_in, size, size)
        w, b = torch.randn(c_out, c_in, kernel, kernel) / (c_in * 9)**0.5, torch.randn(c_out)
        pad, after = kernel // 2, (size - 1) // stride + 1
        nhwc = np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
        out = np.empty((n, after, after, c_out), np.float32)
        bench.pair(f"conv {n}x{size}x{size} {c_in}->{c_out} k{kernel}s{stride}",
                   2.0 * out.size * c_in * kernel * kernel, "conv2d",
                   struct.pack("iiiiii", stride, pad, pad, pad, pad, 0),
                   [nhwc, w.numpy(), b.numpy()], out,
                   lambda: F.conv2d(x, w, b, stride=stride, padding=pad),
                   lambda t: t.permute(0, 2, 3, 1))


def bench_attention(bench):
    for n, tq, tk, heads, d in ATTENTION:
        q, k, v = (torch.randn(n, t, heads * d) for t in (tq, tk, tk))
        out = np.empty((n, tq, heads * d), np.float32)

        def split(x):
            return x.view(n, -1, heads, d).transpose(1, 2)

        bench.pair(f"attention {n}x{heads} {tq}x{tk} d{d}", 4.0 * n * heads * tq * tk * d,
                   "attention", struct.pack("if?", heads, d**-0.5, False),
                   [q.numpy(), k.numpy(), v.numpy()], out,
                   lambda: F.scaled_dot_product_attention(split(q), split(k), split(v)),
                   lambda t: t.transpose(1, 2).reshape(n, tq, heads * d))


def bench_norm(bench):
    for n, size, c in [(2, 64, 320), (2, 32, 640), (2, 16, 1280), (1, 256, 256), (1, 512, 128)]:
        x, g, b = torch.randn(n, c, size, size), torch.randn(c), torch.randn(c)
        nhwc = np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
        out = np.empty_like(nhwc)
        bench.pair(f"group_norm+silu {n}x{size}x{size}x{c}", 8.0 * out.size, "group_norm",
                   struct.pack("ifi", 32, 1e-5, ACT["silu"]), [nhwc, g.numpy(), b.numpy()], out,
                   lambda: F.silu(F.group_norm(x, 32, g, b)), lambda t: t.permute(0, 2, 3, 1))
    for m, c in [(8192, 320), (2048, 640), (512, 1280), (154, 768)]:
        x, g, b = torch.randn(m, c), torch.randn(c), torch.randn(c)
        out = np.empty((m, c), np.float32)
        bench.pair(f"layer_norm {m} {c}", 8.0 * out.size, "layer_norm", struct.pack("f", 1e-5),
                   [x.numpy(), g.numpy(), b.numpy()], out, lambda: F.layer_norm(x, (c,), g, b))
    for m, c in [(8192, 2560), (512, 10240)]:
        x = torch.randn(m, c)
        out = np.empty((m, c // 2), np.float32)
        bench.pair(f"geglu {m} {c}", 4.0 * out.size, "gate", struct.pack("i", ACT["gelu"]),
                   [x.numpy()], out, lambda: x[:, :c // 2] * F.gelu(x[:, c // 2:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["linear", "conv", "attention", "norm"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", type=int, default=2, help="0 base, 1 AVX2, 2 AVX-512")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bench = Bench(build(), args.threads, args.isa, args.rounds)
    with torch.no_grad():
        for what in args.what:
            globals()[f"bench_{what}"](bench)


if __name__ == "__main__":
    main()

"""Under PyTorch the engine's memory is PyTorch's: its counters show it, its limits hold, it comes
back, and no block is in two hands, whatever streams do."""

import gc
import pathlib
import sys
import threading

import pytest
import torch

for folder in ("torchfree", "drop_in"):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / folder))

from _gpu import error, free, note  # noqa: E402
from dropin import inputs, module, ran  # noqa: E402

import accel  # noqa: E402

MB = 1 << 20

pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
                                reason="this PyTorch lends no memory")


def unet(dtype=torch.float16):
    return accel.compile(module("unet", dtype=dtype).to("cuda"))


def given(size=64, batch=2, seed=0, dtype=torch.float16):
    args, _ = inputs("unet", "sd", dtype, size=size, batch=batch, seed=seed)
    return tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in args)


def allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def outside():
    """Bytes that are taken beside PyTorch's."""
    torch.cuda.synchronize()
    available, total = torch.cuda.mem_get_info()
    return total - available - torch.cuda.memory_reserved()


@pytest.mark.alone
def test_pytorchs_counters_show_it():
    free()
    unet()(*given(8))  # libraries have what they want
    free()
    fast, args = unet(), given(128, 16)
    before, others = allocated(), outside()
    with ran(fast, native=2):
        for _ in range(2):
            fast(*args)
    report = accel.report(fast)
    held = report["arena_bytes"] + report["derived_bytes"]
    grown = allocated() - before
    note("ALLOCATOR", "unet", f"the engine holds {held / MB:.1f} MB, PyTorch counts "
         f"{grown / MB:.1f} MB more, {(outside() - others) / MB:.1f} MB are beside it",
         held=held, counted=grown, beside=outside() - others)
    assert held > 50 * MB and held <= grown < 1.3 * held + 32 * MB
    assert outside() - others < 16 * MB  # what CUDA keeps of a recording
    accel.decompile(fast)
    assert allocated() - before < MB
    del fast
    free()
    assert outside() - others < 16 * MB


@pytest.mark.alone
def test_a_larger_plan_replaces_the_smaller_ones_memory():
    fast = unet()
    fast(*given(128, 16))
    most = accel.report(fast)["arena_bytes"]
    accel.decompile(fast)
    free()
    start = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    fast = unet()
    with ran(fast, native=5):
        for size in (8, 64, 96, 112, 128):
            fast(*given(size, 16))
    peak = torch.cuda.max_memory_reserved() - start
    note("ALLOCATOR", "growth", f"largest {most / MB:.1f} MB, peak {peak / MB:.1f} MB", peak=peak,
         largest=most)
    assert peak < 1.25 * most + 64 * MB


def test_pytorchs_limit_holds_and_the_next_call_works():
    free()
    fast, small = unet(), given(8)
    expected = fast(*small).sample
    large = given(128, 48)
    total = torch.cuda.mem_get_info()[1]
    kept = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 48 * MB) / total)
    try:
        for _ in range(2):
            with pytest.raises(accel.OutOfMemory, match="out of memory: .* bytes were asked for"):
                fast(*large)
        assert torch.equal(fast(*small).sample, expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    with ran(fast, native=1):
        fast(*large)
    accel.decompile(fast)
    assert allocated() - kept < 64 * MB


@pytest.mark.alone
def test_what_pytorch_keeps_is_used_or_given_back():
    """Nearly all memory is in PyTorch's cache, in pieces that are too small."""
    free()
    fast, args = unet(), given(128, 48)
    pieces = []
    try:
        while torch.cuda.mem_get_info()[0] > 600 * MB:
            pieces.append(torch.empty(256 * MB, dtype=torch.uint8, device="cuda"))
    finally:
        pieces.clear()
    with ran(fast, native=1):
        found = fast(*args).sample
    assert found.isfinite().all()
    free()


def test_no_block_is_in_two_hands():
    """Sizes alternate, so memory comes and goes; PyTorch's work on other streams is still to come
    when its tensors are deleted."""
    fast, plain = unet(torch.float32), module("unet").to("cuda")
    cases = [given(size, seed=size, dtype=torch.float32) for size in (8, 96, 24, 128, 16)]
    expected = [plain(*c).sample for c in cases]
    side = torch.cuda.Stream()
    marks = []
    for turn in range(30):
        with torch.cuda.stream(side if turn % 3 == 1 else torch.cuda.default_stream()):
            torch.cuda._sleep(2_000_000)
            late = torch.empty(8 * MB, device="cuda").fill_(turn)
            marks.append((late[:4].clone(), turn))
            del late
        with torch.cuda.stream(side if turn % 2 else torch.cuda.default_stream()):
            if turn % 2:
                side.wait_stream(torch.cuda.default_stream())
            found = fast(*cases[turn % 5]).sample
            found.record_stream(side)
        if turn % 7 == 6:
            accel.refresh(fast)  # all memory goes and comes
        torch.cuda.synchronize()
        assert error(found, expected[turn % 5]) < 1e-4
    assert all((mark == turn).all() for mark, turn in marks)


def test_threads_with_memory_that_comes_and_goes():
    """Locks of the engine and the GIL: allocating needs none of the latter."""
    fast = unet(torch.float32)
    plain = module("unet").to("cuda")
    cases = [given(size, seed=size, dtype=torch.float32) for size in (8, 40, 24, 64)]
    expected = [plain(*c).sample for c in cases]
    wrong = []

    def work(i):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(8):
                found = fast(*cases[(i + turn) % 4]).sample
                accel.report(fast)
                accel.explain(fast)
                torch.cuda.current_stream().synchronize()
                if error(found, expected[(i + turn) % 4]) > 1e-4:
                    wrong.append((i, turn))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not wrong


def test_a_recorded_history_sees_it():
    fast = unet()
    torch.cuda.memory._record_memory_history(max_entries=1000)
    try:
        with ran(fast, native=1):
            fast(*given(96))
        trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    arena = accel.report(fast)["arena_bytes"]
    assert any(e["action"] == "alloc" and e["size"] >= arena for e in trace)

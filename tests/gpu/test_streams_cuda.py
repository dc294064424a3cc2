"""A compiled module between the streams of its caller: CUDA graphs that the caller records himself,
a second stream that comes right after the first call of all, and calls that wait for no stream."""

import contextlib
import pathlib
import sys
import threading
import time

import pytest
import torch

for folder in ("torchfree", "drop_in"):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / folder))

from _gpu import error  # noqa: E402
from dropin import SIZES, inputs, module, ran  # noqa: E402

import accel  # noqa: E402

SLEEP = 300_000_000  # cycles, 0.15 s or more


def pair():
    return module("unet").cuda(), accel.compile(module("unet").cuda())


def given(seed=0):
    """Tensors alone: a number would be copied to the GPU, which a capture forbids."""
    sample, _, states = inputs("unet", size=16, seed=seed)[0]
    return sample.cuda(), torch.tensor(500, device="cuda"), states.cuda()


def near(a, b, tolerance=1e-4):
    return a.shape == b.shape and error(a, b) <= tolerance


def warm_up(m, args):
    """As PyTorch says: some calls in a side stream before the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            m(*args)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


@pytest.mark.parametrize("called", [False, True])
def test_a_caller_who_records_a_graph(called):
    """Recorded is the original, whether or not the engine ran before; its calls before and after,
    the end of another compiled module too, leave the graph right."""
    plain, fast = pair()
    other = accel.compile(module("unet").cuda())
    args, more = given(), given(seed=1)
    warm_up(plain, args)
    if called:
        with ran(fast, native=3), ran(other, native=3):
            warm_up(fast, args)
            warm_up(other, args)
    before = {n: p.data_ptr() for n, p in fast.named_parameters()}
    graph = torch.cuda.CUDAGraph()
    with ran(fast, native=0, fallbacks=1, reason="CUDA graph capture"), torch.cuda.graph(graph):
        out = fast(*args).sample
    for source in (args, more):
        for mine, new in zip(args, source, strict=True):
            mine.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert near(out, plain(*args).sample)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        for stream in (torch.cuda.current_stream(), side):
            with torch.cuda.stream(stream), ran(fast, native=3):
                for _ in range(3):
                    found = fast(*args).sample
            stream.synchronize()
            assert near(found, plain(*args).sample)
    assert before == {n: p.data_ptr() for n, p in fast.named_parameters()}
    other.to("cpu")
    torch.cuda.empty_cache()
    taken = torch.full((64 << 20,), float("nan"), device="cuda")  # what was freed, if anything was
    graph.replay()
    torch.cuda.synchronize()
    assert near(out, plain(*args).sample)
    del taken


def test_the_second_stream_of_all():
    """The first call moves parameters; the next one, in a stream of its own, reads them there."""
    for _ in range(3):
        plain, fast = pair()
        args = given()
        expected = plain(*args).sample
        found, wrong = [], []

        def second(fast=fast, args=args, found=found, wrong=wrong):
            side = torch.cuda.Stream()
            try:
                with torch.no_grad(), torch.cuda.stream(side):
                    while not fast._accel.laid_out:
                        time.sleep(1e-4)
                    found.append(fast(*args).sample)
                side.synchronize()
            except Exception as problem:  # else the thread would lose it
                wrong.append(problem)

        torch.cuda.synchronize()
        thread = threading.Thread(target=second)
        thread.start()
        first = torch.cuda.Stream()
        with ran(fast, native=2):
            with torch.cuda.stream(first):
                torch.cuda._sleep(SLEEP)
                found.append(fast(*args).sample)
            thread.join(60)
        torch.cuda.synchronize()
        assert not wrong, wrong
        assert len(found) == 2 and all(near(f, expected) for f in found)


# ---- nothing waits -------------------------------------------------------------------------------


@contextlib.contextmanager
def watched():
    """PyTorch raises where it waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def without_waiting(run, count=3):
    """The results of some calls; they return while the GPU is still at what came before them."""
    torch.cuda.synchronize()
    slept = torch.cuda.Event()
    with watched():
        torch.cuda._sleep(SLEEP)
        slept.record()
        found = [run() for _ in range(count)]
        early = not slept.query()
    torch.cuda.synchronize()
    assert early
    return found


def test_sizes_of_another_dtype_make_nobody_wait():
    """SDXL's float32 time_ids for a float16 UNet: a loop's calls with the same objects, and calls
    with new ones; the sinusoids are those of the sizes as given."""
    half = torch.float16
    plain = module("unet", "sdxl", half).cuda()
    fast = accel.compile(module("unet", "sdxl", half).cuda())
    (sample, t, states), named = inputs("unet", "sdxl", half, size=16)
    pooled = named["added_cond_kwargs"]["text_embeds"].cuda()
    sample, states = sample.cuda(), states.cuda()
    ids = torch.tensor(SIZES, device="cuda")
    others = [ids + 8 * i for i in range(3)]

    def run(m, ids):
        added = {"text_embeds": pooled, "time_ids": ids}
        return m(sample, t, states, added_cond_kwargs=added).sample

    with ran(fast, native=9):
        for _ in range(3):
            first = run(fast, ids)
        same = without_waiting(lambda: run(fast, ids))
        left = iter(others)
        new = without_waiting(lambda: run(fast, next(left)))
    assert all(torch.equal(x, first) for x in same) and torch.equal(new[0], first)
    for x, given in zip(new, others, strict=True):
        assert near(x, run(plain, given), 0.01)
    assert not near(first, run(plain, ids.to(half)), 0.01)


def test_a_mask_makes_nobody_wait_twice():
    plain, fast = (module("text_encoder").cuda() for _ in range(2))
    accel.compile(fast)
    ids = inputs("text_encoder")[0][0].cuda()
    hiding, whole, fresh = (torch.tensor([[1] * n + [0] * (9 - n)] * 2, device="cuda")
                            for n in (4, 9, 7))

    def run(m, mask):
        return m(ids, mask).last_hidden_state

    found = {}
    with ran(fast, native=15):
        for mask in (hiding, whole):
            for _ in range(3):
                run(fast, mask)
            found[mask] = without_waiting(lambda mask=mask: run(fast, mask))
        hiding[:, 3:] = 0
        found[hiding] += [run(fast, hiding)]
        found[hiding] += without_waiting(lambda: run(fast, hiding), 2)
    with pytest.raises(RuntimeError, match="synchroni"), watched():  # a new one is read: it works
        run(fast, fresh)
    after = run(plain, hiding)
    assert all(near(x, after) for x in found[hiding][3:])
    assert not any(near(x, after, 0.01) for x in found[hiding][:3])
    hiding[:, 3] = 1
    assert all(near(x, run(plain, mask)) for mask in (hiding, whole) for x in found[mask][:3])

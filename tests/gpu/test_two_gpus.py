"""Two GPUs in one process: models on the one that is not current, on both at once, and tensors of
the wrong one.  Skipped where there is one GPU."""

import pathlib
import sys
import threading

import numpy as np
import pytest
import torch

for folder in ("torchfree", "drop_in"):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / folder))

import tiny  # noqa: E402
from _gpu import error, fill, make, note, randn  # noqa: E402
from dropin import call, draw, inputs, loop_ran, module, pipeline, ran  # noqa: E402

import accel  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
KINDS = [("unet", "sd"), ("unet", "sdxl"), ("vae", "sd"), ("text_encoder", "sd")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _the_current_device_stays():
    with torch.cuda.device(0):
        yield
        assert torch.cuda.current_device() == 0


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    return tuple(moved(v, device) for v in value) if isinstance(value, tuple) else value


def given(kind, which, dtype, device, seed=0, **options):
    args, named = inputs(kind, which, dtype, seed=seed, **options)
    return moved(args, device), moved(named, device)


def taken(device):
    """Bytes of a device's memory that are taken, PyTorch's cache included."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("kind", "which"), KINDS)
def test_a_module_on_the_second_gpu(kind, which, dtype):
    """The same bits as on the first, while that is the current one; replayed too."""
    results = []
    for device in (FIRST, SECOND):
        plain = module(kind, which, dtype).to(device)
        fast = accel.compile(module(kind, which, dtype).to(device))
        for seed in (0, 1, 0):
            args, named = given(kind, which, dtype, device, seed)
            with ran(fast, native=3):
                found = [call(fast, kind, args, named) for _ in range(3)]
            assert all(x.device == device and torch.equal(x, found[0]) for x in found)
            bound = 1e-4 if dtype == torch.float32 else 0.05
            assert error(found[0], call(plain, kind, args, named)) < bound
            results.append(found[0].to(FIRST))
    assert all(torch.equal(a, b) for a, b in zip(results[:3], results[3:], strict=True))
    assert error(results[1], results[0]) > 0.05


@pytest.mark.alone
def test_nothing_is_allocated_on_the_other_one():
    for device, other in ((SECOND, FIRST), (FIRST, SECOND)):
        torch.zeros(1, device=other)
        fast = fill(make("sd15_unet", torch.float16), 0).to(device)
        torch.cuda.empty_cache()
        args = [x.to(device) for x in (randn(2, 4, 64, 64, seed=1, dtype=torch.float16),
                                       randn(2, 77, 768, seed=2, dtype=torch.float16))]
        torch.cuda.empty_cache()
        before = taken(other), taken(device)
        accel.compile(fast)
        with ran(fast, native=3):
            for _ in range(3):
                fast(args[0], 500, args[1])
        torch.cuda.synchronize(device)
        there, here = taken(other) - before[0], taken(device) - before[1]
        note("MEMORY", f"sd15_unet on {device}", f"there {here / 1e6:.0f} MB more, on {other} "
             f"{there / 1e6:.0f} MB", here=here, there=there)
        assert there < 4 << 20 < here
        del fast


def test_the_other_current_device_and_streams():
    """The second is current for a while, and the work comes from streams of either."""
    fast = accel.compile(module("unet").to(SECOND))
    args, _ = given("unet", "sd", torch.float32, SECOND, size=16)
    expected = module("unet").to(SECOND)(*args).sample
    for current in (0, 1, 0):
        with torch.cuda.device(current), ran(fast, native=2):
            assert error(fast(*args).sample, expected) < 1e-4
            stream = torch.cuda.Stream(SECOND)
            stream.wait_stream(torch.cuda.current_stream(SECOND))
            with torch.cuda.stream(stream):
                found = fast(*args).sample
            stream.synchronize()
            assert error(found, expected) < 1e-4
            assert torch.cuda.current_device() == current


def test_both_at_once():
    """Each on its GPU, from threads of their own, many times."""
    wrong = []

    def work(device, seed):
        plain = module("unet").to(device)
        fast = accel.compile(module("unet").to(device))
        args, _ = given("unet", "sd", torch.float32, device, seed, size=16)
        with torch.no_grad():
            expected = plain(*args).sample
            first = fast(*args).sample
            for _ in range(40):
                found = fast(*args).sample
                if not torch.equal(found, first) or error(found, expected) > 1e-4:
                    wrong.append((device, seed))
        report = accel.report(fast)
        if report["native_runs"] != 41 or report["fallbacks"]:
            wrong.append(report)

    threads = [threading.Thread(target=work, args=(d, s))
               for s, d in enumerate((FIRST, SECOND, FIRST, SECOND))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def test_mixed_devices_are_refused():
    fast = accel.compile(module("unet").to(SECOND))
    (sample, t, states), _ = given("unet", "sd", torch.float32, SECOND)
    for args in ((sample.to(FIRST), t, states), (sample, t, states.to(FIRST)),
                 (sample.cpu(), t, states)):
        with ran(fast, native=0, fallbacks=1), pytest.raises(RuntimeError):
            fast(*args)
    with ran(fast, native=1):
        fast(sample, t, states)
    fast.conv_in.to(FIRST)
    with ran(fast, native=0, fallbacks=1, reason="several devices"), pytest.raises(RuntimeError):
        fast(sample, t, states)
    fast.to(FIRST)
    with ran(fast, native=1):
        assert fast(sample.to(FIRST), t, states.to(FIRST)).sample.device == FIRST


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {which: tiny.write_model(root / which, which) for which in ("sd", "sdxl")}


@pytest.mark.parametrize("which", ["sd", "sdxl"])
def test_a_compiled_pipeline(folders, which):
    """On the second GPU, then moved to the first."""
    plain = draw(pipeline(folders[which]).to(SECOND), num_inference_steps=6)
    fast = accel.compile(pipeline(folders[which]).to(SECOND))
    with loop_ran(fast):
        found = draw(fast, num_inference_steps=6)
    assert np.abs(found - plain).max() < 1e-3
    fast.to(FIRST)
    with loop_ran(fast):
        assert np.abs(draw(fast, num_inference_steps=6) - plain).max() < 1e-3
    components = accel.report(fast)["components"]
    assert not any(c.get("fallbacks") for c in components.values()), components


def test_pipelines_without_pytorch(folders):
    """One on each GPU, drawn from two threads at once, as the CPU draws them; each measures its
    algorithms, so the two may differ in the last bits."""
    options = {"seed": 1, "num_inference_steps": 6, "output_type": "np", "progress_bar": False}
    expected = accel.Pipeline.from_pretrained(folders["sd"])("a red house", **options).images
    found = {}

    def work(device):
        pipe = accel.Pipeline.from_pretrained(folders["sd"], device=device)
        found[device] = [pipe("a red house", **options).images for _ in range(5)]
        report = accel.report(pipe)["components"]
        assert all(report[n]["native_runs"] for n in ("unet", "text_encoder", "vae")), report

    threads = [threading.Thread(target=work, args=(f"cuda:{i}",)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["cuda:0", "cuda:1"]
    for images in found.values():
        assert all(np.array_equal(x, images[0]) for x in images)
        assert np.abs(images[0] - expected).max() < 1e-3


def test_components_without_pytorch(folders):
    unet = accel.Pipeline.from_pretrained(folders["sd"], device="cuda:1").unet
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    expected = unet(sample.numpy(), 500, states.numpy())
    assert np.array_equal(unet(sample.to(SECOND), 500, states.to(SECOND)), expected)
    for args in ((sample.to(FIRST), 500, states), (sample, 500, states.to(FIRST))):
        with pytest.raises(accel.DeviceError, match="found a tensor on cuda:0, expected one in "
                                                    "host memory or on cuda:1"):
            unet(*args)

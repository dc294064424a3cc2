"""accel.compile on modules that lie on a GPU: small ones with random weights, and SD 1.5's UNet for
what depends on size.  What is asserted of numbers is asserted of report() too."""

import copy
import gc
import pathlib
import sys
import threading
import time
from collections import Counter

import pytest
import torch

for folder in ("torchfree", "drop_in"):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / folder))

from _gpu import error, fill, free, make, note, randn  # noqa: E402
from dropin import call, inputs, loop_ran, module, ran  # noqa: E402

import accel  # noqa: E402

DEVICE = "cuda"
KINDS = [("unet", "sd"), ("unet", "sdxl"), ("vae", "sd"), ("text_encoder", "sd"),
         ("text_encoder_2", "sdxl")]
MB = 1 << 20


def on_gpu(value, device=DEVICE):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: on_gpu(v, device) for k, v in value.items()}
    return tuple(on_gpu(v, device) for v in value) if isinstance(value, tuple) else value


def given(kind="unet", which="sd", dtype=torch.float32, device=DEVICE, **options):
    args, named = inputs(kind, which, dtype, **options)
    return on_gpu(args, device), on_gpu(named, device)


def pair(kind="unet", which="sd", dtype=torch.float32, device=DEVICE):
    return (module(kind, which, dtype).to(device),
            accel.compile(module(kind, which, dtype).to(device)))


def near(a, b, tolerance=1e-4):
    assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return error(a, b) <= tolerance


def used():
    """Bytes of the device's memory that are taken, PyTorch's cache given back."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    available, total = torch.cuda.mem_get_info()
    return total - available


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "which"), KINDS)
def test_float32(kind, which):
    plain, fast = pair(kind, which)
    for seed in (0, 1):
        args, named = given(kind, which, seed=seed)
        with ran(fast, native=2):
            a, again = (call(fast, kind, args, named) for _ in range(2))
        assert torch.equal(a, again)
        assert near(a, call(plain, kind, args, named))
    assert not near(a, call(fast, kind, *given(kind, which, seed=0)), 0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "which"), KINDS)
def test_half_precision(kind, which, dtype):
    """No further from float32 than PyTorch in the same dtype; small modules are noisy."""
    plain, fast = pair(kind, which, dtype)
    truth = module(kind, which, dtype).float().to(DEVICE)
    ours, theirs = [], []
    for seed in range(4):
        args, named = given(kind, which, dtype, seed=seed)
        full = on_float(args), on_float(named)
        exact = call(truth, kind, *full)
        with ran(fast, native=1):
            ours.append(error(call(fast, kind, args, named), exact))
        theirs.append(error(call(plain, kind, args, named), exact))
    assert sum(ours) <= 1.5 * sum(theirs), (ours, theirs)


def on_float(value):
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: on_float(v) for k, v in value.items()}
    return tuple(on_float(v) for v in value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes_strides_and_timesteps(dtype):
    plain, fast = pair(dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    for batch, size, tokens in ((1, 8, 5), (3, 16, 77), (2, 12, 93), (1, 8, 5)):
        (sample, _, states), _ = given(dtype=dtype, batch=batch, size=size, tokens=tokens)
        strided = sample.to(memory_format=torch.channels_last)
        for t in (500, torch.tensor(500), torch.tensor([500.0], device=DEVICE),
                  torch.full((batch,), 500, device=DEVICE), 499.5):
            with ran(fast, native=2):
                a = fast(sample, t, states).sample
                assert torch.equal(a, fast(strided, t, states).sample)
            assert near(a, plain(sample, t, states).sample, tolerance)


def test_other_stream():
    """Inputs made on a side stream just before, results read there just after; nothing waits."""
    plain, fast = pair()
    (sample, t, states), _ = given(size=32)
    expected = plain(sample * 1.5, t, states).sample + 1
    fast(sample, t, states)
    side = torch.cuda.Stream()
    for _ in range(3):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), ran(fast, native=1):
            busy = torch.randn(2048, 2048, device=DEVICE)
            for _ in range(20):
                busy = busy @ busy * 1e-3
            late = sample * 1.5 + busy[0, 0].nan_to_num() * 0
            out = fast(late, t, states).sample + 1
        torch.cuda.current_stream().wait_stream(side)
        assert near(out, expected)


def test_threads_on_streams_of_their_own():
    plain, fast = pair()
    cases = [given(seed=s, size=8 + 8 * (s % 2)) for s in range(4)]
    expected = [plain(*args).sample for args, _ in cases]
    wrong = []

    def work(i):
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(10):
                out = fast(*cases[i][0]).sample
                stream.synchronize()
                if not near(out, expected[i]):
                    wrong.append(i)

    torch.cuda.synchronize()
    with ran(fast, native=40):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    before = torch.cuda.current_device()
    plain, fast = pair(device="cuda:1")
    args, _ = given(device="cuda:1")
    with ran(fast, native=1):
        a = fast(*args).sample
    assert a.device == torch.device("cuda:1") and near(a, plain(*args).sample)
    assert torch.cuda.current_device() == before
    fast.to("cuda:0")
    with ran(fast, native=1):
        b = fast(*given()[0]).sample
    assert near(b, a.to("cuda:0"))


# ---- what is noticed -----------------------------------------------------------------------------


def test_changes_in_place():
    plain, fast = pair()
    args, _ = given()
    last = fast(*args).sample

    def check(native=1):
        nonlocal last
        with ran(fast, native=native):
            now = fast(*args).sample
        assert near(now, plain(*args).sample)
        assert not near(now, last, 1e-3)
        last = now

    def both(change):
        for m in (plain, fast):
            change(m)

    def block(m):
        return m.mid_block.attentions[0].transformer_blocks[0]

    both(lambda m: m.conv_in.weight.mul_(1.1))              # used as it lies
    check()
    both(lambda m: block(m).attn1.to_v.weight.mul_(-4))    # joined
    check()
    both(lambda m: block(m).attn2.to_v.weight.mul_(-4))      # of the prompt
    check()
    both(lambda m: m.up_blocks[0].upsamplers[0].conv.weight.mul_(1.5))  # phases
    check()
    both(lambda m: m.mid_block.resnets[0].time_emb_proj.bias.mul_(-3))
    check()
    state = {n: t * 1.2 for n, t in plain.state_dict().items()}
    both(lambda m: m.load_state_dict(state))
    check()
    both(lambda m: m.load_state_dict({n: t * 1.1 for n, t in state.items()}, assign=True))
    check()
    both(lambda m: setattr(m.conv_out, "bias", torch.nn.Parameter(m.conv_out.bias + 2)))
    check()
    for m in (plain, fast):
        m.conv_out.bias.data.add_(1)  # past the version counter
    accel.refresh(fast)
    check()


def test_prompts():
    plain, fast = pair()
    (sample, t, states), _ = given()
    with ran(fast, native=6):
        for other in (states, states, states * 2, states.clone(), states, states[:, :4]):
            assert near(fast(sample, t, other).sample, plain(sample, t, other).sample)
    states.mul_(-1)
    with ran(fast, native=1):
        assert near(fast(sample, t, states).sample, plain(sample, t, states).sample)
    with torch.inference_mode():
        made = states * 3
        first = fast(sample, t, made).sample
        made.mul_(0.5)
        assert not near(fast(sample, t, made).sample, first, 1e-3)
        assert near(fast(sample, t, made).sample, plain(sample, t, made).sample)


@pytest.mark.parametrize(("change", "reason"), [
    (lambda m: m.conv_in.to("cpu"), "several devices"),
    (lambda m: m.to(torch.float64), "float64"),
    (lambda m: m.train(), "training"),
    (lambda m: m.conv_in.half(), "several dtypes"),
])
def test_modules_that_are_left_to_pytorch(change, reason):
    fast = accel.compile(module("unet").to(DEVICE))
    change(fast)
    dtype = next(fast.parameters()).dtype
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    args, _ = given(dtype=dtype)
    with ran(fast, native=0, fallbacks=1, reason=reason):
        try:
            fast(*args)
        except RuntimeError:  # PyTorch's own word on mixed devices and dtypes
            assert reason.startswith("several")


def test_inputs_elsewhere():
    fast = accel.compile(module("unet").to(DEVICE))
    (sample, t, states), _ = given()
    for args in ((sample.cpu(), t, states), (sample, t, states.cpu()),
                 (sample.double(), t, states)):
        with ran(fast, native=0, fallbacks=1), pytest.raises(RuntimeError):
            fast(*args)
    with ran(fast, native=1):
        fast(sample, t, states)
    with torch.autocast("cuda", torch.float16), ran(fast, native=0, fallbacks=1, reason="autocast"):
        fast(sample, t, states)


# ---- what PyTorch sees of the parameters ---------------------------------------------------------


def test_parameters_stay_what_they_were(tmp_path):
    import diffusers

    plain, fast = pair()
    args, _ = given()
    with ran(fast, native=1):
        fast(*args)
    for name, p in fast.named_parameters():
        assert type(p) is torch.nn.Parameter and torch.equal(p, plain.get_parameter(name)), name
    fast.save_pretrained(tmp_path)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(p.to(DEVICE), plain.get_parameter(n))
               for n, p in loaded.named_parameters())
    other = copy.deepcopy(fast)
    assert near(other(*args).sample, plain(*args).sample) and "_accel" not in other.__dict__
    accel.decompile(fast)
    for name, p in fast.named_parameters():
        assert p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes, name
        assert torch.equal(p, plain.get_parameter(name)), name


@pytest.mark.parametrize("between", [True, False])
def test_lora(between):
    """Merged adapters, with a call while they were there, and without: then only their verbs tell
    (on a GPU joined weights are the parameters; what else would stay are keys of a prompt and the
    phases of a convolution)."""
    peft = pytest.importorskip("peft")
    plain, fast = pair()
    args, _ = given()
    before = fast(*args).sample
    for m in (plain, fast):
        torch.manual_seed(0)
        m.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "conv"],
                                      init_lora_weights=False))
    if between:
        with ran(fast, native=0, fallbacks=1, reason="adapter"):
            assert near(fast(*args).sample, plain(*args).sample)
    for m in (plain, fast):
        m.fuse_lora()  # moves neither a pointer nor a version
        m.unload_lora()
    for _ in range(3):  # the third replays
        with ran(fast, native=1):
            after = fast(*args).sample
        assert near(after, plain(*args).sample) and not near(after, before, 1e-3)


# ---- memory --------------------------------------------------------------------------------------


def big():
    """SD 1.5's UNet in float16: 1.7 GB, and a call for it."""
    m = fill(make("sd15_unet", torch.float16), 0)
    args = (randn(2, 4, 64, 64, seed=1, dtype=torch.float16), 500,
            randn(2, 77, 768, seed=2, dtype=torch.float16))
    return m, args


@pytest.mark.alone
def test_weights_are_not_doubled():
    fast, args = big()
    size = sum(p.nbytes for p in fast.parameters())
    plain = fast(*args).sample
    accel.compile(fast)
    with ran(fast, native=3):
        for _ in range(3):
            out = fast(*args).sample
    assert near(out, plain, 0.02)
    report = accel.report(fast)
    parts = {"parameters": size} | {n: report[f"{n}_bytes"] for n in ("derived", "copied", "arena")}
    note("MEMORY", "sd15_unet, float16",
         ", ".join(f"{n} {b / 1e6:.0f} MB" for n, b in parts.items()), **parts)
    assert report["copied_bytes"] == 0
    assert report["derived_bytes"] < 0.1 * size, report["derived"]


@pytest.mark.alone
def test_offload_frees_the_gpu_and_comes_back():
    fast, args = big()
    fast.to("cpu")
    free()
    empty = used()
    fast.to(DEVICE)
    accel.compile(fast)
    first = fast(*args).sample
    for _ in range(2):
        fast.to("cpu")
        left = used() - empty
        assert left < 64 * MB, f"{left / MB:.0f} MB stay after .to('cpu')"
        fast.to(DEVICE)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with ran(fast, native=1):
            again = fast(*args).sample
        torch.cuda.synchronize()
        took = time.perf_counter() - start
        start = time.perf_counter()
        fast(*args)
        torch.cuda.synchronize()
        after = time.perf_counter() - start
        note("REBIND", "sd15_unet, float16",
             f"first call {took * 1e3:.0f} ms, next {after * 1e3:.0f} ms",
             first_ms=round(took * 1e3, 1), next_ms=round(after * 1e3, 1))
        assert torch.equal(again, first)


@pytest.mark.alone
def test_model_offload_of_a_pipeline_frees_the_gpu():
    """enable_model_cpu_offload: the UNet is on the GPU while its loop runs, and gone afterwards."""
    pytest.importorskip("accelerate")
    import diffusers

    unet = fill(make("sd15_unet", torch.float16), 0).to("cpu")
    size = sum(p.nbytes for p in unet.parameters())
    pipe = diffusers.StableDiffusionPipeline(
        vae=module("vae", dtype=torch.float16), unet=unet, text_encoder=None, tokenizer=None,
        scheduler=diffusers.DDIMScheduler(clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload()
    accel.compile(pipe)
    prompts = [randn(1, 77, 768, seed=s, dtype=torch.float16) for s in (1, 2)]
    pixels = 64 * pipe.vae_scale_factor

    def draw():
        """Latents, and how long it took."""
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with loop_ran(pipe):
            out = pipe(prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1], height=pixels,
                       width=pixels, num_inference_steps=2, output_type="latent",
                       generator=torch.Generator().manual_seed(1)).images.clone()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() > size  # it was there
        assert next(pipe.unet.parameters()).device.type == "cpu"
        return out, round((time.perf_counter() - start) * 1e3)

    before, left, took, first = used(), [], [], None
    for _ in range(3):
        out, ms = draw()
        first = out if first is None else first
        assert torch.equal(out, first) and out.isfinite().all() and out.std() > 0.1
        took.append(ms)
        left.append(used() - before)
    report = accel.report(pipe)["components"]["unet"]
    assert report["native_runs"] == 6 and not report["fallbacks"], report
    note("REBIND", "sd15_unet, float16, model offload", f"calls of 2 steps with copies there and "
         f"back {took} ms, {[round(x / MB) for x in left]} MB stay", took_ms=took, left=left)
    assert left[0] < 400 * MB  # libraries' own; the weights are four times that
    assert left[2] - left[0] < 16 * MB


@pytest.mark.alone
def test_deleting_it_frees_everything():
    free()
    start = None
    for _ in range(3):
        fast, args = big()
        accel.compile(fast)
        with ran(fast, native=2):
            fast(*args)
            fast(*args)
        del fast, args
        now = used()
        if start is None:
            start = now  # libraries' own memory stays
        assert now - start < 16 * MB, f"{(now - start) / MB:.0f} MB more"


@pytest.mark.alone
def test_memory_is_flat_over_sizes():
    fast = accel.compile(module("unet", dtype=torch.float16).to(DEVICE))
    sizes = [(1 + i % 3, 8 + 8 * (i % 5), 5 + i) for i in range(20)]
    cases = [given(dtype=torch.float16, batch=b, size=s, tokens=t)[0] for b, s, t in sizes]
    marks = []
    with ran(fast, native=200):
        for i in range(200):
            fast(*cases[i % 20])
            if i in (19, 59, 199):
                marks.append(used())
    planned, recorded, last = marks
    note("MEMORY", "20 alternating sizes",
         f"20 recordings {(recorded - planned) / MB:.0f} MB, then {(last - recorded) / MB:.0f}",
         recordings_bytes=recorded - planned, later_bytes=last - recorded)
    assert last - recorded < 8 * MB, marks
    assert recorded - planned < 160 * MB, marks
    assert accel.report(fast)["plans"] == 20  # each planned once, and replayed


def test_alternating_sizes_are_replayed():
    """Round and round over 20 sizes: once the arena is as large as it gets, all are replayed."""
    from torch.profiler import ProfilerActivity, profile

    fast = accel.compile(module("unet", dtype=torch.float16).to(DEVICE))
    sizes = [(1 + i % 3, 8 + 8 * (i % 5), 5 + i) for i in range(20)]
    cases = [given(dtype=torch.float16, batch=b, size=s, tokens=t)[0] for b, s, t in sizes]
    for _ in range(3):
        for args in cases:
            fast(*args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        with ran(fast, native=20):
            for args in cases:
                fast(*args)
        torch.cuda.synchronize()
    calls = Counter(e.name for e in profiled.events() if e.name.startswith("cuda"))
    if not calls:
        pytest.skip("the profiler sees no calls of CUDA")
    assert calls["cudaGraphLaunch"] == 20, calls

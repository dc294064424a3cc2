"""Pipelines on a GPU: compiled ones of diffusers against stock ones, and accel.Pipeline against
itself on the CPU; small models with random weights."""

import gc
import pathlib
import sys

import numpy as np
import pytest
import torch

for folder in ("torchfree", "drop_in"):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / folder))

import diffusers  # noqa: E402
import tiny  # noqa: E402
from _gpu import error, free  # noqa: E402
from dropin import draw, loop_ran, pipeline, use  # noqa: E402

import accel  # noqa: E402

DEVICE = "cuda"
TOLERANCE = 1e-3  # of 1.0, float32: some steps on other convolution algorithms
SCHEDULERS = ("ddim", "pndm", "euler", "ancestral", "dpm karras", "sde")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {which: tiny.write_model(root / which, which) for which in ("sd", "sdxl")}


def pair(folder, dtype=torch.float32):
    return (pipeline(folder).to(DEVICE, dtype),
            accel.compile(pipeline(folder).to(DEVICE, dtype)))


@pytest.fixture(scope="module")
def sd(folders):
    return pair(folders["sd"])


@pytest.fixture(scope="module")
def xl(folders):
    return pair(folders["sdxl"])


def difference(a, b):
    a, b = (np.asarray(x.float().cpu() if isinstance(x, torch.Tensor) else x) for x in (a, b))
    assert a.shape == b.shape
    return np.abs(a - b).max() / max(1, np.abs(b).max())


def no_fallbacks(pipe):
    components = accel.report(pipe)["components"]
    assert not any(c.get("fallbacks") for c in components.values()), components
    return {n: c["native_runs"] for n, c in components.items() if "native_runs" in c}


def same(pipes, stock=None, **options):
    plain, fast = pipes
    before = no_fallbacks(fast)
    with loop_ran(fast, stock):
        a = draw(fast, **options)
    after = no_fallbacks(fast)
    assert after["unet"] > before["unet"]
    b = draw(plain, **options)
    assert difference(a, b) <= TOLERANCE, difference(a, b)
    return a


def other(a, b):
    return difference(a, b) > 20 * TOLERANCE


# ---- compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_and_generators(sd, monkeypatch, name):
    use(sd, monkeypatch, name)
    a = same(sd, num_inference_steps=7)
    assert other(a, same(sd, num_inference_steps=7, seed=2))
    same(sd, num_inference_steps=7, guidance_scale=1.0)
    plain, fast = sd
    options = {"num_inference_steps": 5, "output_type": "np", "guidance_scale": 3.0, "eta": 0.5}
    for make in (lambda: torch.Generator(DEVICE).manual_seed(5),
                 lambda: [torch.Generator(DEVICE).manual_seed(s) for s in (3, 4)],
                 lambda: [torch.Generator().manual_seed(s) for s in (3, 4)],
                 lambda: torch.cuda.manual_seed(9)):
        with loop_ran(fast):
            x = fast(["a", "b"], generator=make(), **options).images
        y = plain(["a", "b"], generator=make(), **options).images
        assert difference(x, y) <= TOLERANCE


def test_two_runs_are_identical(sd, xl):
    for _, fast in (sd, xl):
        runs = [draw(fast, num_inference_steps=6) for _ in range(3)]
        assert all(np.array_equal(runs[0], r) for r in runs[1:])


def test_sdxl(xl):
    a = same(xl)
    for options in ({"original_size": (300, 200)}, {"prompt_2": "a dog"}, {"clip_skip": 1},
                    {"guidance_rescale": 0.7}, {"negative_prompt": "x"}):
        assert difference(a, same(xl, **options)) > TOLERANCE, options
    same(xl, prompt=["a", "b"], num_images_per_prompt=2)
    same(xl, height=24, width=40)
    same(xl, num_inference_steps=8, denoising_end=0.6, output_type="latent")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", ["sd", "sdxl"])
def test_half_precision(folders, which, dtype):
    """Latents no further from float32 than the stock pipeline's in the same dtype."""
    plain, fast = pair(folders[which], dtype)
    truth = pipeline(folders[which]).to(DEVICE, dtype).to(torch.float32)
    ours, theirs = [], []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        latents = torch.randn((1, 4, 16, 16), generator=g).to(dtype).to(DEVICE)
        options = {"output_type": "latent", "height": 32, "width": 32, "num_inference_steps": 6,
                   "latents": latents, "seed": seed}
        exact = draw(truth, **(options | {"latents": latents.float()}))
        with loop_ran(fast):
            a = draw(fast, **options)
        b = draw(plain, **options)
        assert a.dtype == b.dtype == dtype and a.device == b.device
        ours.append(error(a, exact))
        theirs.append(error(b, exact))
    no_fallbacks(fast)
    assert sum(ours) <= 1.5 * sum(theirs), (ours, theirs)


def test_callbacks(sd, monkeypatch):
    use(sd, monkeypatch, "dpm karras")
    seen = []

    def change(pipe, i, t, kwargs):
        assert kwargs["latents"].is_cuda and kwargs["prompt_embeds"].is_cuda
        seen.append(kwargs["latents"].clone())
        if i == 1:
            kwargs["latents"] = kwargs["latents"] * 0.8
        if i == 2:
            kwargs["latents"] += 0.1
        if i == 3:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"] * -1
        if i == 4:
            pipe._guidance_scale = 1.7
        if i == 5:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"][-1:]
        if i == 6:
            pipe._interrupt = True
        return kwargs

    options = {"callback_on_step_end": change, "num_inference_steps": 9,
               "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    a = same(sd, **options)
    assert len(seen) == 14
    for x, y in zip(seen[:7], seen[7:], strict=True):
        assert difference(x, y) <= TOLERANCE
    assert other(a, same(sd, num_inference_steps=9))


def test_a_callback_that_changes_weights(folders):
    pipes = pair(folders["sd"])

    def change(pipe, i, t, kwargs):
        if i == 1:
            with torch.no_grad():
                block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
                block.attn2.to_v.weight.mul_(-3)
                pipe.unet.conv_in.weight.mul_(2)
        return kwargs

    kept = same(pipes, num_inference_steps=5)
    assert other(same(pipes, num_inference_steps=5, callback_on_step_end=change), kept)


def test_another_stream(sd):
    plain, fast = sd
    expected = draw(plain, num_inference_steps=5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), loop_ran(fast):
        a = draw(fast, num_inference_steps=5)
    assert difference(a, expected) <= TOLERANCE


def test_stock_loop_over_compiled_components(sd):
    plain, fast = sd
    for pipe in sd:
        pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    same(sd, "scheduler HeunDiscreteScheduler")
    for pipe in sd:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)


@pytest.mark.alone
@pytest.mark.parametrize("order", ["compile first", "offload first"])
def test_model_offload(folders, order):
    pytest.importorskip("accelerate")
    plain = pipeline(folders["sd"]).to(DEVICE)
    fast = pipeline(folders["sd"])
    if order == "compile first":
        accel.compile(fast.to(DEVICE))
    fast.enable_model_cpu_offload()
    accel.compile(fast)
    expected = draw(plain)
    for _ in range(2):
        with loop_ran(fast):
            a = draw(fast)
        assert difference(a, expected) <= TOLERANCE
        no_fallbacks(fast)
        assert {next(m.parameters()).device.type
                for m in (fast.unet, fast.text_encoder)} == {"cpu"}


def test_dtype_changes_and_decompile(folders):
    plain, fast = pair(folders["sd"])
    first = same((plain, fast))
    fast.to(torch.float16)
    with loop_ran(fast):
        draw(fast)
    plain.to(torch.float16).to(torch.float32)
    fast.to(torch.float32)
    same((plain, fast))
    accel.decompile(fast)
    assert type(fast) is diffusers.StableDiffusionPipeline
    assert np.array_equal(draw(fast), draw(plain))
    assert first.shape == draw(fast).shape


@pytest.mark.alone
def test_deleting_a_pipeline(folders):
    marks = []
    for _ in range(3):
        fast = accel.compile(pipeline(folders["sdxl"]).to(DEVICE, torch.float16))
        with loop_ran(fast):
            draw(fast, output_type="latent")
        del fast
        free()
        marks.append(torch.cuda.mem_get_info()[0])
    assert marks[0] - marks[-1] < 8 << 20, marks


# ---- without PyTorch -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(folders):
    return {which: (accel.Pipeline.from_pretrained(folder),
                    accel.Pipeline.from_pretrained(folder, device="cuda"))
            for which, folder in folders.items()}


def picture(pipe, **options):
    before = accel.report(pipe)["components"]
    options = {"seed": 1, "num_inference_steps": 6, "output_type": "np", "progress_bar": False,
               "guidance_scale": 3.0, **options}
    images = pipe(options.pop("prompt", "the red house"), **options).images
    after = accel.report(pipe)["components"]
    assert all(after[n]["native_runs"] > before[n]["native_runs"] for n in ("unet", "text_encoder"))
    return images


@pytest.mark.parametrize("which", ["sd", "sdxl"])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler", "euler_a", "dpm++", "dpm++_sde"])
def test_own_pipeline(own, which, scheduler):
    cpu, gpu = own[which]
    a, b = (picture(p, scheduler=scheduler) for p in (gpu, cpu))
    assert difference(a, b) <= TOLERANCE, difference(a, b)
    assert np.array_equal(a, picture(gpu, scheduler=scheduler))
    assert other(a, picture(gpu, scheduler=scheduler, seed=2))


def test_own_pipeline_in_half_precision(own, folders):
    cpu = picture(own["sd"][0])
    for dtype in ("float16", "bfloat16"):
        pipe = accel.Pipeline.from_pretrained(folders["sd"], device="cuda:0", dtype=dtype)
        assert pipe.unet.compute == pipe.vae.compute == dtype
        found = np.abs(picture(pipe) - cpu).mean()
        assert 0 < found < 0.05, found


def test_own_callbacks(own):
    cpu, gpu = own["sd"]

    def change(i, t, latents):
        if i == 2:
            latents *= 0.7
        return i == 4

    def on_end(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"] + 0.1} if i == 1 else kwargs

    a, b = (picture(p, callback=change, callback_on_step_end=on_end, num_inference_steps=8)
            for p in (gpu, cpu))
    assert difference(a, b) <= TOLERANCE
    assert other(a, picture(gpu, num_inference_steps=8))
    same_size = [picture(gpu, height=h, width=w).shape for h, w in ((24, 40), (16, 16))]
    assert same_size == [(1, 24, 40, 3), (1, 16, 16, 3)]


def test_components_take_tensors_of_their_gpu(own):
    cpu, gpu = own["sd"]
    g = torch.Generator().manual_seed(0)
    sample, states = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 24, generator=g)
    expected = cpu.unet(sample.numpy(), 500, states.numpy())
    for x, c in ((sample.cuda(), states.cuda()), (sample.numpy(), states.cuda()),
                 (sample.cuda(), states.numpy())):
        found = np.asarray(gpu.unet(x, 500, c))
        assert difference(found, expected) <= TOLERANCE
    weights = {n: t.cuda() for n, t in _state(cpu).items()}
    made = accel.UNet(cpu.unet.config, weights, device="cuda")
    found = np.asarray(made(sample.cuda(), 500, states.cuda()))
    assert difference(found, expected) <= TOLERANCE


def _state(pipe):
    part = tiny.PARTS["sd"]["unet"]
    return {n: torch.from_numpy(w) for n, w in tiny.weights(part["shapes"]).items()}


def test_wrong_devices_and_dtypes(own, folders):
    cpu, gpu = own["sd"]
    sample, states = torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 24)
    with pytest.raises(accel.DeviceError, match="sample: found a tensor on cuda:0, expected one in "
                                                "host memory"):
        cpu.unet(sample.cuda(), 1, states)
    with pytest.raises(accel.DeviceError, match="cuda:0"):
        accel.UNet(cpu.unet.config, {n: t.cuda() for n, t in _state(cpu).items()})
    with pytest.raises(accel.DTypeError, match="float64"):
        accel.Pipeline.from_pretrained(folders["sd"], device="cuda", dtype="float64")
    with pytest.raises(accel.AccelError, match="cuda:77|device|ordinal"):
        accel.Pipeline.from_pretrained(folders["sd"], device="cuda:77")
    if torch.cuda.device_count() > 1:
        with pytest.raises(accel.DeviceError, match="sample: found a tensor on cuda:1, expected "
                                                    "one in host memory or on cuda:0"):
            gpu.unet(sample.to("cuda:1"), 1, states)
        second = accel.Pipeline.from_pretrained(folders["sd"], device="cuda:1")
        assert difference(picture(second), picture(cpu)) <= TOLERANCE


@pytest.mark.alone
def test_own_pipeline_is_freed(folders):
    marks = []
    for _ in range(3):
        picture(accel.Pipeline.from_pretrained(folders["sdxl"], device="cuda"))
        gc.collect()
        marks.append(torch.cuda.mem_get_info()[0])
    assert marks[0] - marks[-1] < 8 << 20, marks


def test_command_line(folders, tmp_path):
    from PIL import Image

    from accel import cli

    path = tmp_path / "x.png"
    assert cli.main(["generate", "a", "--model", str(folders["sd"]), "--device", "cuda", "--dtype",
                     "float16", "--steps", "2", "--seed", "1", "-q", "-o", str(path)]) == 0
    assert Image.open(path).size == (16, 16)
    assert cli.main(["generate", "a", "--model", str(folders["sd"]), "--device", "cuda:99", "-q",
                     "-o", str(path)]) == 1

"""The native loop of a compiled pipeline: everything a caller can ask of it, against the stock
loop over the stock components."""

import contextlib
import copy
import inspect
import pickle
import warnings

import diffusers
import numpy as np
import pytest
import torch
from dropin import PICTURE_TOLERANCE as TOLERANCE
from dropin import SCHEDULERS, draw, equal, loop_ran, pair, pipeline, same, use

import accel

# ---- samplers and seeds --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(sd, monkeypatch, name):
    use(sd, monkeypatch, name)
    a = same(sd, num_inference_steps=7)
    assert np.abs(a - same(sd, num_inference_steps=7, seed=2)).max() > 100 * TOLERANCE
    same(sd, num_inference_steps=7, guidance_scale=1.0)
    for what in ("timesteps", "num_inference_steps", "init_noise_sigma"):
        found, expected = (np.asarray(getattr(p.scheduler, what)) for p in sd[::-1])
        assert np.array_equal(found, expected), what
    assert getattr(sd[1].scheduler, "_step_index", 0) == getattr(sd[0].scheduler, "_step_index", 0)


@pytest.mark.parametrize("name", ["ancestral", "sde", "ddim"])
def test_noise_is_pytorchs(sd, monkeypatch, name):
    use(sd, monkeypatch, name)
    options = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 3.0, "eta": 0.7}

    def both(more):
        with loop_ran(sd[1]):
            a = sd[1](["a", "b"], **options, **more()).images
        state = torch.random.get_rng_state()
        assert equal(a, sd[0](["a", "b"], **options, **more()).images)
        assert torch.equal(state, torch.random.get_rng_state())
        return a

    def one():
        return {"generator": torch.Generator().manual_seed(5)}

    def several():
        return {"generator": [torch.Generator().manual_seed(s) for s in (3, 4)]}

    def default():
        torch.manual_seed(7)
        return {}

    first = both(one)
    assert not equal(first, both(several)) and not equal(first, both(default))


def test_a_generator_is_left_where_stock_leaves_it(sd, monkeypatch):
    use(sd, monkeypatch, "ancestral")

    def stop(pipe, i, t, kwargs):
        pipe._interrupt = i == 2
        return kwargs

    for options in ({}, {"callback_on_step_end": stop}):
        ends = []
        for pipe in sd:
            g = torch.Generator().manual_seed(1)
            draw(pipe, generator=g, num_inference_steps=6, **options)
            ends.append(g.get_state())
        assert torch.equal(*ends)


def test_half_precision_noise_is_drawn_as_pytorch_draws_it(sd_folder, monkeypatch):
    stock, fast = pipeline(sd_folder).to(torch.bfloat16), None
    fast = accel.compile(pipeline(sd_folder).to(torch.bfloat16))
    use((stock, fast), monkeypatch, "ancestral")
    with loop_ran(fast):
        a = draw(fast, output_type="latent", height=24, width=24)
    b = draw(stock, output_type="latent", height=24, width=24)
    assert a.dtype == b.dtype == torch.bfloat16
    other = draw(fast, output_type="latent", height=24, width=24, seed=2)
    error = (a.float() - b.float()).abs().mean()
    assert error < 0.1 * (a.float() - other.float()).abs().mean(), error


# ---- arguments -----------------------------------------------------------------------------------


def test_guidance_rescale_counts(sd):
    assert np.abs(same(sd) - same(sd, guidance_rescale=0.7)).max() > 100 * TOLERANCE
    assert np.array_equal(same(sd, guidance_scale=1.0, guidance_rescale=0.7),
                          same(sd, guidance_scale=1.0))


def test_batches(sd, xl):
    for pipes in (sd, xl):
        same(pipes, prompt=["a", "b"], negative_prompt=["c", "d"], num_images_per_prompt=2)
        same(pipes, prompt=["a", "b", "c"], guidance_scale=0.0)


def test_sizes_and_defaults(sd, xl):
    for pipes in (sd, xl):
        same(pipes, height=24, width=40)
        assert same(pipes).shape == draw(pipes[0]).shape


def test_pytorchs_defaults_are_the_callers(sd, monkeypatch):
    """Another default device or dtype is none of the loop's."""
    use(sd, monkeypatch, "ancestral")
    expected = same(sd)
    states = dict(zip(("prompt_embeds", "negative_prompt_embeds"),
                      sd[0].encode_prompt("the red house", "cpu", 1, True), strict=True))
    with torch.device("meta"), loop_ran(sd[1]):
        assert equal(draw(sd[1], None, **states), expected)
    torch.set_default_dtype(torch.float64)
    try:
        with loop_ran(sd[1]):
            assert equal(draw(sd[1]), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_latents_of_another_dtype(sd):
    """diffusers raises at the UNet's first layer, and so does the compiled pipeline."""
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float16)
    for pipe, watched in zip(sd, (contextlib.nullcontext(),
                                  loop_ran(sd[1], "latents are torch.float16")), strict=True):
        with pytest.raises(RuntimeError), watched:
            draw(pipe, latents=latents, height=16, width=16)


def test_latents_are_the_callers(sd):
    latents = torch.randn(1, 4, 8, 8)
    before = latents.clone()
    a = same(sd, latents=latents)
    assert torch.equal(latents, before)
    assert not equal(a, same(sd))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_outputs(sd, xl, output_type, return_dict):
    for pipes in (sd, xl):
        out = []
        for pipe in pipes:
            g = torch.Generator().manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out.append(pipe("a", num_inference_steps=3, output_type=output_type, generator=g,
                                return_dict=return_dict))
        plain, fast = out
        assert type(plain) is type(fast)
        if not return_dict:
            assert len(plain) == len(fast)
            images = plain[0], fast[0]
        else:
            assert plain.keys() == fast.keys()
            images = plain.images, fast.images
        assert type(images[0]) is type(images[1])
        pairs = zip(*images, strict=True)
        scale = 255 if output_type == "pil" else 1
        assert all(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()
                   <= (1 if scale == 255 else TOLERANCE * max(1, np.abs(np.asarray(a)).max()))
                   for a, b in pairs)


def test_prompt_embeds(sd, xl):
    g = torch.Generator().manual_seed(0)
    for pipes, width in ((sd, 24), (xl, 48)):
        embeds = {n: torch.randn(2, 5, width, generator=g)
                  for n in ("prompt_embeds", "negative_prompt_embeds")}
        if width == 48:
            embeds |= {n: torch.randn(2, 24, generator=g)
                       for n in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
        a = same(pipes, prompt=None, num_images_per_prompt=2, **embeds)
        changed = {n: t * 1.5 for n, t in embeds.items()}
        assert not equal(a, same(pipes, prompt=None, num_images_per_prompt=2, **changed))


def test_sizes_of_sdxl(xl):
    a = same(xl)
    for options in ({"original_size": (300, 200)}, {"target_size": (64, 640)},
                    {"crops_coords_top_left": (100, 50)}, {"prompt_2": "a dog"},
                    {"negative_prompt": "x", "negative_prompt_2": "y"},
                    {"negative_original_size": (9, 9), "negative_target_size": (64, 64),
                     "negative_crops_coords_top_left": (3, 1)}, {"clip_skip": 1}):
        assert np.abs(a - same(xl, **options)).max() > 10 * TOLERANCE, options


@pytest.mark.parametrize("name", ["euler", "ancestral", "pndm", "ddim"])
def test_denoising_end(xl, monkeypatch, name):
    use(xl, monkeypatch, name)
    latents = []
    for pipe in xl[::-1]:
        g = torch.Generator().manual_seed(1)
        latents.append(pipe("a", denoising_end=0.6, num_inference_steps=8, output_type="latent",
                            generator=g).images)
    whole = draw(xl[1], num_inference_steps=8, output_type="latent")
    assert equal(*latents) and not equal(latents[0], whole)
    assert accel.report(xl[1])["loop"]["native"] > 0
    same(xl, num_inference_steps=8, denoising_end=1.0)


def test_latents_mean_and_std(sdxl_folder):
    pipes = pair(sdxl_folder)
    before = same(pipes)
    for pipe in pipes:
        pipe.vae.register_to_config(latents_mean=[0.1, 0.2, -0.3, 0.0],
                                    latents_std=[1.5, 0.5, 1.0, 2.0])
    assert not equal(before, same(pipes))


@pytest.mark.parametrize(("options", "reason"), [
    ({"timesteps": [900, 500, 100]}, "argument timesteps"),
    ({"sigmas": [9.0, 3.0, 1.0]}, "argument sigmas"),
    ({"cross_attention_kwargs": {"scale": 0.5}}, "argument cross_attention_kwargs"),
    ({"guidance_scale": np.float32(3)}, "guidance_scale is a float32"),
])
def test_what_the_stock_loop_does(sd, monkeypatch, options, reason):
    use(sd, monkeypatch, "euler")
    plain, fast = sd
    with loop_ran(fast, reason):
        a = draw(fast, **options)
    assert equal(a, draw(plain, **options))


def test_a_stock_loop_is_loud_once(sd_folder):
    fast = accel.compile(pipeline(sd_folder))
    fast.scheduler = diffusers.LMSDiscreteScheduler.from_config(fast.scheduler.config)
    with pytest.warns(accel.FallbackWarning, match="stock loop: scheduler LMSDiscreteScheduler"):
        draw(fast)
    with warnings.catch_warnings():
        warnings.simplefilter("error", accel.FallbackWarning)
        draw(fast)
    assert accel.report(fast)["loop"] == {"native": 0,
                                          "stock": {"scheduler LMSDiscreteScheduler": 2}}
    assert "stock 2 times: scheduler LMS" in str(accel.report(fast))


def test_wrong_arguments_are_refused_in_diffusers_words(sd):
    for options in ({"height": 7}, {"prompt": None}, {"prompt": 3}, {"prompt_embeds": 4},
                    {"callback_on_step_end_tensor_inputs": ["nothing"]},
                    {"generator": [torch.Generator()] * 3}, {"latents": torch.zeros(1, 4, 9, 9)},
                    {"nonsense": 1}):
        said = []
        for pipe in sd:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    draw(pipe, **options)
                said.append(None)
            except Exception as error:
                said.append((type(error), str(error)))
        assert said[0] == said[1], options


# ---- what else is on the pipe --------------------------------------------------------------------


def test_foreign_schedulers_hooks_and_unets_run_stock(sd_folder, monkeypatch):
    pipes = pair(sd_folder)
    plain, fast = pipes
    same(pipes)

    class Mine(diffusers.DDIMScheduler):
        def step(self, *args, **kwargs):
            out = super().step(*args, **kwargs)
            return tuple(x * 0.5 for x in out)

    own = Mine.from_config(fast.scheduler.config)
    before = fast.scheduler
    for pipe in pipes:
        pipe.scheduler = copy.deepcopy(own)
    same(pipes, "scheduler Mine")
    for pipe in pipes:
        pipe.scheduler = copy.deepcopy(before)
        pipe.scheduler.step = pipe.scheduler.step.__get__(pipe.scheduler)
    same(pipes, "step was replaced")
    for pipe in pipes:
        pipe.scheduler = copy.deepcopy(before)
    handles = [p.unet.register_forward_hook(lambda m, a, out: (out[0] * 0.9,)) for p in pipes]
    same(pipes, "hook on the UNet")
    for handle in handles:
        handle.remove()
    same(pipes)
    fast.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    same(pipes)
    accel.decompile(fast.unet)
    with loop_ran(fast, "UNet is not compiled"):
        draw(fast)


def test_a_scheduler_that_was_tampered_with_runs_stock(sd, monkeypatch):
    use(sd, monkeypatch, "euler")
    for pipe in sd:
        real = type(pipe.scheduler).set_timesteps

        def shifted(self, *args, real=real, **kwargs):
            real(self, *args, **kwargs)
            self.timesteps = self.timesteps - 0.5

        cls = type(pipe.scheduler)
        shifted.__module__ = cls.__module__
        monkeypatch.setattr(cls, "set_timesteps", shifted)
        break
    with loop_ran(sd[1], "other timesteps"):
        a = draw(sd[1])
    assert equal(a, draw(sd[0]))  # the generator was put back


def test_state_that_callers_read(sd):
    seen = []

    def look(pipe, i, t, kwargs):
        seen.append((pipe.num_timesteps, pipe.guidance_scale, pipe.guidance_rescale,
                     pipe.clip_skip, pipe.interrupt, float(t), i))
        return kwargs

    for pipe in sd:
        draw(pipe, callback_on_step_end=look, guidance_rescale=0.1, num_inference_steps=3)
    assert seen[:len(seen) // 2] == seen[len(seen) // 2:]
    assert seen[-1][0] == len(sd[1].scheduler.timesteps)


def test_progress_bar(sd, capfd):
    said = []
    for pipe in sd:
        pipe.set_progress_bar_config(disable=False, desc="drawing", leave=True)
        draw(pipe, num_inference_steps=5)
        pipe.set_progress_bar_config(disable=True)
        said.append(capfd.readouterr().err)
    assert all("drawing: 100%" in s and "5/5" in s for s in said)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "dpm"])
@pytest.mark.parametrize(("end", "every"), [(0.5, 1), (0.8, 2), (None, 3)])
def test_steps_of_a_cut_run_are_counted_as_stock_counts_them(xl, monkeypatch, name, end, every):
    use(xl, monkeypatch, name)
    before = accel.report(xl[1])["loop"]["native"]
    seen = []
    for pipe in xl:
        calls, bars = [], []

        def bar(pipe=pipe, bars=bars, **options):
            made = type(pipe).progress_bar(pipe, **options)
            monkeypatch.setattr(made, "update", lambda n=1: bars.append(n))
            return made

        monkeypatch.setattr(pipe, "progress_bar", bar)
        draw(pipe, num_inference_steps=10, denoising_end=end, output_type="latent",
             callback=lambda i, t, latents, calls=calls: calls.append((i, int(t))),
             callback_steps=every)
        seen.append((calls, bars))
    assert seen[0] == seen[1] and len(seen[0][0]) > 1
    assert accel.report(xl[1])["loop"]["native"] == before + 1


# ---- the class -----------------------------------------------------------------------------------


def test_the_class_passes_for_the_stock_one(sd):
    plain, fast = sd
    a, b = type(plain), type(fast)
    assert b is not a and issubclass(b, a) and isinstance(fast, diffusers.StableDiffusionPipeline)
    assert (b.__name__, b.__qualname__, b.__module__) == (a.__name__, a.__qualname__, a.__module__)
    assert inspect.signature(fast.__call__) == inspect.signature(plain.__call__)
    assert fast.__call__.__doc__ == plain.__call__.__doc__
    assert fast.components.keys() == plain.components.keys()
    assert accel.compile(fast) is fast and type(fast) is b


def test_decompile_gives_the_class_back(sd_folder):
    plain, fast = pair(sd_folder)
    accel.decompile(fast)
    assert type(fast) is diffusers.StableDiffusionPipeline
    assert np.array_equal(draw(fast), draw(plain))
    accel.compile(fast)
    same((plain, fast))


def test_copies_and_pickles_are_plain(sd_folder):
    plain, fast = pair(sd_folder)
    same((plain, fast))
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(other) is diffusers.StableDiffusionPipeline
        assert "_accel" not in other.unet.__dict__
        assert np.array_equal(draw(other), draw(plain))


def test_saving(sd_folder, tmp_path):
    plain, fast = pair(sd_folder)
    same((plain, fast))
    fast.save_pretrained(tmp_path / "fast")
    plain.save_pretrained(tmp_path / "plain")
    assert ((tmp_path / "fast/model_index.json").read_text()
            == (tmp_path / "plain/model_index.json").read_text())


def test_from_pipe_in_both_directions(sd_folder):
    plain, fast = pair(sd_folder)
    before = same((plain, fast))
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(fast)
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline
    back = diffusers.StableDiffusionPipeline.from_pipe(other)
    assert type(back) is diffusers.StableDiffusionPipeline and back.unet is fast.unet
    auto = diffusers.AutoPipelineForText2Image.from_pipe(fast)
    assert auto.unet is fast.unet
    own = type(fast).from_pipe(fast)
    own.set_progress_bar_config(disable=True)
    with loop_ran_unknown(own):
        assert np.array_equal(draw(own), before)


class loop_ran_unknown:
    """As loop_ran, for a pipe that report() knows only after its first call."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __enter__(self):
        pass

    def __exit__(self, *exception):
        assert accel.report(self.pipe)["loop"]["native"] == 1


def test_other_pipelines_keep_their_loop(sd_folder):
    plain, _ = pair(sd_folder)
    other = accel.compile(diffusers.StableDiffusionImg2ImgPipeline(
        **pipeline(sd_folder).components, requires_safety_checker=False))
    image = torch.rand(1, 3, 16, 16)
    options = {"image": image, "num_inference_steps": 6, "strength": 0.6, "output_type": "np"}
    with loop_ran(other, "no native loop for StableDiffusionImg2ImgPipeline"):
        a = other("a", generator=torch.Generator().manual_seed(1), **options).images
    stock = diffusers.StableDiffusionImg2ImgPipeline(**plain.components,
                                                     requires_safety_checker=False)
    b = stock("a", generator=torch.Generator().manual_seed(1), **options).images
    assert equal(a, b)


def test_a_subclass_with_its_own_call_keeps_it(sd_folder):
    class Mine(diffusers.StableDiffusionPipeline):
        def __call__(self, prompt):
            return f"drew {prompt}"

    fast = accel.compile(Mine(**pipeline(sd_folder).components, requires_safety_checker=False))
    with loop_ran(fast, "no native loop for Mine"):
        assert fast("a") == "drew a"


def test_safety_checker_and_watermark_are_asked(sd, xl, monkeypatch):
    plain, fast = sd

    def check(image, device, dtype):
        return image, [True] * len(image)

    for pipe in sd:
        monkeypatch.setattr(pipe, "run_safety_checker", check)
    outs = [p("a", num_inference_steps=2, output_type="np",
              generator=torch.Generator().manual_seed(1)) for p in (fast, plain)]
    assert [o.nsfw_content_detected for o in outs] == [[True], [True]]
    assert equal(outs[0].images, outs[1].images)

    class Mark:
        @staticmethod
        def apply_watermark(image):
            return image * 0

    before = same(xl)
    for pipe in xl:
        monkeypatch.setattr(pipe, "watermark", Mark)
    assert not equal(before, same(xl))

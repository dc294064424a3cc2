"""accel.Pipeline on tiny random models: arguments do what they say, and the engine ran."""

import json
import shutil
import threading
import warnings

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import accel

PROMPT = "the red house"


@pytest.fixture(scope="module")
def pipe(sd_folder):
    return accel.Pipeline.from_pretrained(sd_folder)


@pytest.fixture(scope="module")
def xl(sdxl_folder):
    return accel.Pipeline.from_pretrained(sdxl_folder)


def make(pipe, prompt=PROMPT, **options):
    """Float pictures of a short run, which the engine made."""
    before = accel.report(pipe)["components"]["unet"]["native_runs"]
    options = {"seed": 1, "num_inference_steps": 3, "output_type": "np", "progress_bar": False,
               **options}
    images = pipe(prompt, **options).images
    assert accel.report(pipe)["components"]["unet"]["native_runs"] == before + 1
    assert np.isfinite(images).all() and images.std() > 0.01
    return images


def test_same_seed_same_picture(pipe):
    first = make(pipe)
    assert first.shape == (1, 16, 16, 3) and first.dtype == np.float32
    assert np.array_equal(first, make(pipe))
    assert not np.array_equal(first, make(pipe, seed=2))


@pytest.mark.parametrize("change", [
    {"prompt": "a dog"}, {"negative_prompt": "a dog"}, {"guidance_scale": 3.0},
    {"guidance_scale": 1.0}, {"guidance_rescale": 0.7}, {"scheduler": "euler_a"}, {"clip_skip": 1},
    {"num_inference_steps": 4}, {"eta": 0.5}, {"scheduler": "dpm++_karras"}])
def test_every_argument_counts(pipe, change):
    assert np.abs(make(pipe) - make(pipe, **change)).max() > 1e-3


def test_prompts_and_seeds_of_a_batch(pipe):
    prompts = ["the red house", "a dog"]
    both = make(pipe, prompts, seed=[5, 6])
    alone = np.concatenate([make(pipe, p, seed=s) for p, s in zip(prompts, (5, 6), strict=True)])
    assert np.abs(both - alone).max() < 1e-5
    twice = make(pipe, prompts, seed=[1, 2, 3, 4], num_images_per_prompt=2)
    assert np.abs(twice[1] - make(pipe, prompts[0], seed=2)[0]).max() < 1e-5
    assert np.abs(twice[2] - make(pipe, prompts[1], seed=3)[0]).max() < 1e-5


def test_a_generator_goes_on(pipe):
    generator = accel.Generator(1)
    first = make(pipe, seed=None, generator=generator)
    assert np.array_equal(first, make(pipe))
    assert not np.array_equal(first, make(pipe, seed=None, generator=generator))
    noisy = accel.Generator(1)
    make(pipe, seed=None, generator=noisy, scheduler="euler_a")
    fresh = accel.Generator(1)
    fresh.normal(4 * 64)
    assert noisy.next() != fresh.next()  # the sampler drew from it as well


def test_no_seed_reports_one(pipe):
    output = pipe(PROMPT, num_inference_steps=1, output_type="np", progress_bar=False)
    assert np.array_equal(output.images, make(pipe, seed=output.seeds, num_inference_steps=1))


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "euler_a", "dpm++", "dpm++_sde",
                                  "DDIMScheduler", "EulerDiscrete", "euler_karras"])
def test_schedulers_by_name(pipe, name):
    make(pipe, scheduler=name, num_inference_steps=5)


def test_scheduler_by_config(pipe):
    config = {**tiny.SCHEDULER, "_class_name": "EulerDiscreteScheduler"}
    assert np.array_equal(make(pipe, scheduler=config), make(pipe, scheduler="euler"))


def test_scheduler_config_with_infinity(pipe):
    """DPMSolverMultistepScheduler.save_pretrained writes "lambda_min_clipped": -Infinity."""
    config = {**tiny.SCHEDULER, "_class_name": "DPMSolverMultistepScheduler"}
    clipped = config | {"lambda_min_clipped": -np.inf}
    assert np.array_equal(make(pipe, scheduler=clipped), make(pipe, scheduler=config))


@pytest.mark.parametrize("size", [(16, 24), (10, 14), (2, 2), (34, 18)])
def test_any_size(pipe, size):
    assert make(pipe, height=size[0], width=size[1]).shape == (1, *size, 3)


def test_outputs(pipe):
    floats = make(pipe)
    image = pipe(PROMPT, seed=1, num_inference_steps=3, progress_bar=False).images[0]
    assert np.array_equal(np.asarray(image), (floats[0] * 255).round().astype(np.uint8))
    latents = pipe(PROMPT, seed=1, num_inference_steps=3, progress_bar=False,
                   output_type="latent").images
    assert latents.shape == (1, 4, 8, 8)


def test_own_latents(pipe):
    noise = np.frombuffer(accel.Generator(1).normal(4 * 64), np.float32).reshape(1, 4, 8, 8)
    assert np.array_equal(make(pipe), make(pipe, seed=None, latents=noise))


def test_callback_sees_every_step_and_may_stop(pipe):
    seen = []
    make(pipe, callback=lambda i, t, x: seen.append((i, t, x.shape)))
    assert [s[0] for s in seen] == [0, 1, 2] and seen[0][2] == (1, 4, 8, 8)
    assert [s[1] for s in seen] == sorted((s[1] for s in seen), reverse=True)
    stopped = []
    make(pipe, callback=lambda i, t, x: stopped.append(i) or i == 1)
    assert stopped == [0, 1]


def test_callback_changes_latents(pipe):
    def blank(index, timestep, latents):
        if index == 2:
            latents[...] = 0

    def replace(_, index, timestep, kwargs):
        return {"latents": np.zeros_like(kwargs["latents"])} if index == 2 else {}

    blanked = make(pipe, callback=blank)
    assert np.array_equal(blanked, make(pipe, callback_on_step_end=replace))
    assert not np.array_equal(blanked, make(pipe))


@pytest.mark.parametrize("how", ["callback", "callback_on_step_end"])
def test_an_exception_in_a_callback_ends_the_run(pipe, how):
    calls = []

    def boom(*args):
        calls.append(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipe(PROMPT, num_inference_steps=5, progress_bar=False, **{how: boom})
    assert len(calls) == 1
    make(pipe)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("how", ["callback", "callback_on_step_end", "returned"])
def test_a_callback_that_breaks_the_latents_is_named(pipe, how, value):
    def spoil(*args):
        latents = args[-1]["latents"] if isinstance(args[-1], dict) else args[-1]
        new = latents.copy() if how == "returned" else latents
        if args[-3] == 1:
            new[0, 1, 2, 3] = value
        return {"latents": new} if isinstance(args[-1], dict) else None

    name = "callback_on_step_end" if how == "returned" else how
    with pytest.raises(accel.InvalidArgument, match=f"^{name}: found NaN or infinity .* step 2"):
        pipe(PROMPT, num_inference_steps=5, progress_bar=False, **{name: spoil})
    make(pipe)


@pytest.mark.parametrize(("part", "words"), [
    ("unet", "^unet: found NaN or infinity in the latents after step 1 of 3, timestep 667"),
    ("text_encoder", "^text_encoder: found NaN or infinity in its states"),
    ("vae", "^vae: found NaN or infinity in image 0")])
def test_no_black_picture(tmp_path, part, words):
    folder = tiny.write_model(tmp_path / "m", "sd")
    stem = folder / part / f"{tiny.STEMS[part]}.safetensors"
    weights = load_file(stem)
    name = next(n for n in weights if n.endswith("bias") and "encoder.conv" not in n)
    weights[{"unet": "conv_out.bias", "vae": "decoder.conv_out.bias"}.get(part, name)][0] = np.nan
    save_file(weights, stem)
    with pytest.raises(accel.NumericError, match=words):
        accel.Pipeline.from_pretrained(folder)(PROMPT, num_inference_steps=3, progress_bar=False)


def test_cancel(pipe):
    cancel = accel.Cancel()
    started = threading.Event()

    def watch(index, timestep, latents):
        started.set()

    def stop():
        started.wait(60)
        cancel.cancel()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(accel.Cancelled):
        pipe(PROMPT, num_inference_steps=900, progress_bar=False, callback=watch, cancel=cancel)
    thread.join()
    assert cancel.cancelled
    with pytest.raises(accel.Cancelled):
        pipe(PROMPT, num_inference_steps=1, progress_bar=False, cancel=cancel)


def test_progress_bar(pipe, capsys):
    pipe(PROMPT, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    pipe(PROMPT, num_inference_steps=3, progress_bar=False)
    assert capsys.readouterr().err == ""


def test_a_long_prompt_says_what_it_cut(pipe):
    with pytest.warns(UserWarning, match="cut: .*'0'|cut: .*2 1 0") as caught:
        make(pipe, "9 8 7 6 5 4 3 2 1 0 9 8 7 6 5 4 3 2 1 0")
    assert "22 tokens" in str(caught[0].message) and "takes 16" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(pipe, "9 8 7 6 5 4 3 2 1 0 9 8 7 6")


# ---- SDXL ----------------------------------------------------------------------------------------


def test_xl(xl):
    assert xl.is_xl
    base = make(xl)
    assert np.array_equal(base, make(xl))
    for change in ({"prompt": "a dog"}, {"prompt_2": "a dog"}, {"negative_prompt": "a dog"},
                   {"negative_prompt": ""}, {"original_size": (512, 64)}, {"clip_skip": 1},
                   {"crops_coords_top_left": (0, 200)}, {"target_size": (8, 900)},
                   {"negative_prompt": "a", "negative_prompt_2": "dog"}):
        assert np.abs(base - make(xl, **change)).max() > 1e-4, change
    runs = accel.report(xl)["components"]
    assert runs["text_encoder"]["native_runs"] == runs["text_encoder_2"]["native_runs"] > 0


def test_xl_empty_negative_is_zero_only_where_the_folder_says_so(tmp_path):
    zero = tiny.write_model(tmp_path / "a", "sdxl", index={"force_zeros_for_empty_prompt": True})
    real = tiny.write_model(tmp_path / "b", "sdxl", index={"force_zeros_for_empty_prompt": False})
    zero, real = map(accel.Pipeline.from_pretrained, (zero, real))
    assert np.array_equal(make(zero, negative_prompt=""), make(real))
    assert not np.array_equal(make(zero), make(real))


def test_second_tokenizer_pads_with_its_own_sign(xl):
    ids = [t(PROMPT)[0] for t in xl.tokenizers]
    assert ids[0][-1] == 599 and ids[1][-1] == ids[1][-5] != 599
    assert list(ids[0][:5]) == list(ids[1][:5])


# ---- folders -------------------------------------------------------------------------------------


def test_shards_variants_and_half_precision_files(tmp_path, pipe):
    plain = make(pipe)
    for name, options in {"shards": {"shards": 3}, "variant": {"variant": "fp16"},
                          "both": {"shards": 2, "variant": "fp16"}}.items():
        folder = tiny.write_model(tmp_path / name, "sd", **options)
        other = accel.Pipeline.from_pretrained(folder, variant=options.get("variant"))
        assert np.array_equal(plain, make(other)), name
    half = tiny.write_model(tmp_path / "half", "sd", dtype=np.float16)
    difference = np.abs(plain - make(accel.Pipeline.from_pretrained(half))).max()
    assert 1e-5 < difference < 0.05


def test_v_prediction(tmp_path, pipe):
    folder = tiny.write_model(tmp_path / "v", "sd", scheduler={"prediction_type": "v_prediction"})
    assert np.abs(make(accel.Pipeline.from_pretrained(folder)) - make(pipe)).max() > 1e-3


def test_pickles_are_refused(tmp_path, sd_folder):
    folder = tmp_path / "bin"
    shutil.copytree(sd_folder, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(accel.AccelError, match=r"\.bin"):
        accel.Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("missing", [
    "model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors",
    "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json",
    "text_encoder/model.safetensors"])
def test_a_missing_file_is_named(tmp_path, sd_folder, missing):
    folder = tmp_path / "m"
    shutil.copytree(sd_folder, folder)
    (folder / missing).unlink()
    with pytest.raises(accel.FileError) as error:
        accel.Pipeline.from_pretrained(folder)
    name = missing.split("/")[-1].split(".")[0]
    assert name in str(error.value)
    assert isinstance(error.value, OSError)


def test_models_that_need_something_else_are_refused(tmp_path, sd_folder):
    def changed(name, file, **fields):
        folder = tmp_path / name
        shutil.copytree(sd_folder, folder)
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | fields))
        return folder

    for name, file, fields, words in (
            ("flux", "model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
            ("field", "unet/config.json", {"resnet_time_scale_shift": "scale_shift"},
             "resnet_time_scale_shift"),
            ("unknown", "unet/config.json", {"warp_drive": 9}, "warp_drive"),
            ("sampler", "scheduler/scheduler_config.json", {"_class_name": "TCDScheduler"},
             "TCDScheduler")):
        with pytest.raises(accel.UnsupportedError, match=words):
            pipe = accel.Pipeline.from_pretrained(changed(name, file, **fields))
            make(pipe)
    with pytest.raises(accel.UnsupportedError, match="expected a folder"):
        accel.Pipeline.from_pretrained(sd_folder / "model_index.json")


def test_demo_model():
    folder = accel.demo_model()
    if not (folder / "model_index.json").is_file():
        pytest.skip("the model that ships is not in this checkout")
    pipe = accel.Pipeline.from_pretrained(folder)
    images = make(pipe, "a red house by a lake at night", guidance_scale=3.0)
    assert images.shape[1] == images.shape[2]

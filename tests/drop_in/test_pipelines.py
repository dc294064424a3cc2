"""Compiled pipelines of diffusers: pictures equal the stock pipeline's, whatever is done to them.

The numbers in the names are those of the traps that people fell into with other accelerators.
"""

import copy
import json
import threading
import warnings

import diffusers
import dropin
import numpy as np
import pytest
import tiny
import torch
import transformers
from dropin import PICTURE_TOLERANCE as TOLERANCE
from dropin import call, draw, inputs, module, pair, pipeline, ran

import accel
from accel.compile_ import _sizes


def runs(pipe):
    components = accel.report(pipe)["components"]
    return {n: c["native_runs"] for n, c in components.items() if "native_runs" in c}


def fallbacks(pipe):
    return {n: c["fallbacks"] for n, c in accel.report(pipe)["components"].items()
            if c.get("fallbacks")}


def same(fast, stock, loop=None, **options):
    """Both draw the same; the UNet and the VAE ran natively for it and nothing fell back, nor did
    the loop, but for the reason that `loop` is a part of."""
    before = runs(fast)
    with dropin.loop_ran(fast, loop):
        a = draw(fast, **options)
    b = draw(stock, **options)
    after = runs(fast)
    assert after["unet"] > before["unet"] and after["vae"] > before["vae"]
    assert not fallbacks(fast)
    assert np.abs(a - b).max() <= TOLERANCE, np.abs(a - b).max()
    return a


def test_sd(sd):
    stock, fast = sd
    assert isinstance(fast, type(stock)) and type(fast).__name__ == type(stock).__name__
    first = same(fast, stock)
    assert np.abs(first - same(fast, stock, prompt="a dog")).max() > 100 * TOLERANCE
    same(fast, stock, prompt=["a", "b"], negative_prompt=["c", "d"], num_images_per_prompt=2)
    same(fast, stock, guidance_scale=1.0)
    same(fast, stock, guidance_rescale=0.7)
    same(fast, stock, height=24, width=40)
    text = str(accel.report(fast))
    assert "unet: UNet2DConditionModel" in text and "loop: 6 native, 0 stock" in text


def test_sdxl(xl):
    stock, fast = xl
    first = same(fast, stock)
    assert np.abs(first - same(fast, stock, prompt="a dog")).max() > 100 * TOLERANCE
    same(fast, stock, negative_prompt="a dog", original_size=(300, 200))
    same(fast, stock, clip_skip=1)
    assert {"text_encoder", "text_encoder_2"} <= {n for n, c in runs(fast).items() if c}


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete",
                                  "DPMSolverMultistep", "LMSDiscrete", "HeunDiscrete",
                                  "KDPM2Discrete", "UniPCMultistep", "DEISMultistep", "DDPM",
                                  "DPMSolverSinglestep", "LCM"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_14_27_schedulers_between_calls(sd, monkeypatch, name, guidance):
    """Some keep model outputs over steps, which at guidance 1 are the UNet's own results."""
    cls = getattr(diffusers, f"{name}Scheduler")
    for pipe in sd:
        monkeypatch.setattr(pipe, "scheduler", cls.from_config(pipe.scheduler.config))
    native = {"DDIM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep"}
    same(sd[1], sd[0], guidance_scale=guidance, num_inference_steps=6,
         loop=None if name in native else f"scheduler {name}Scheduler")


def test_1_from_pipe(sd_folder):
    stock, fast = pair(sd_folder)
    before = same(fast, stock)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(fast)
    assert other.unet is fast.unet and type(other.unet) is diffusers.UNet2DConditionModel
    assert np.array_equal(same(fast, stock), before)
    image = torch.rand(1, 3, 16, 16)
    plain = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(stock)
    count = accel.report(fast.unet)["native_runs"]
    a, b = (p("a", image=image, num_inference_steps=6, strength=0.6, output_type="np",
              generator=torch.Generator().manual_seed(1)).images for p in (other, plain))
    assert np.abs(a - b).max() <= TOLERANCE
    assert accel.report(fast.unet)["native_runs"] > count


def test_2_half_and_back(sd_folder):
    stock, fast = pair(sd_folder)
    before = same(fast, stock)
    fast.to(torch.bfloat16)
    draw(fast)
    fast.to(torch.float32)
    stock.to(torch.bfloat16).to(torch.float32)
    after = same(fast, stock)
    assert not np.array_equal(before, after)  # rounded weights


@pytest.mark.parametrize("order", ["compile first", "hook first"])
def test_3_offload_hooks(sd_folder, order):
    """enable_model_cpu_offload puts accelerate's hooks on; the end of each call takes them off and
    on again, which must not take our forward along."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    stock, fast = pipeline(sd_folder), pipeline(sd_folder)
    if order == "compile first":
        accel.compile(fast)
    for name in ("text_encoder", "unet", "vae"):
        cpu_offload_with_hook(getattr(fast, name), "cpu")
    if order == "hook first":
        accel.compile(fast)
    first = same(fast, stock)
    for _ in range(2):
        for name in ("text_encoder", "unet", "vae"):
            remove_hook_from_module(getattr(fast, name), recurse=True)
            cpu_offload_with_hook(getattr(fast, name), "cpu")
        assert np.array_equal(same(fast, stock), first)
    for name in ("text_encoder", "unet", "vae"):
        remove_hook_from_module(getattr(fast, name), recurse=True)
    assert np.array_equal(same(fast, stock), first)
    count = accel.report(fast.unet)["native_runs"]
    accel.decompile(fast)
    args, _ = inputs("unet")
    assert torch.equal(fast.unet(*args).sample, stock.unet(*args).sample)
    assert count > 0


def test_4_save_and_load(sd_folder, tmp_path):
    stock, fast = pair(sd_folder)
    before = same(fast, stock)
    fast.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(loaded), draw(stock))
    # and accel's own pipeline reads it as well
    own = accel.Pipeline.from_pretrained(tmp_path)
    image = own("the red house", seed=1, num_inference_steps=4, guidance_scale=3.0,
                output_type="np", progress_bar=False).images
    assert np.abs(image - before).max() <= TOLERANCE


def test_12_cfg_cutoff_in_the_middle(sd):
    from diffusers.callbacks import SDCFGCutoffCallback

    options = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)}
    same(sd[1], sd[0], num_inference_steps=6, **options)


def test_13_interrupt(sd):
    seen = {}

    def stop(pipe, i, t, kwargs):
        seen.setdefault(id(pipe), []).append(i)
        pipe._interrupt = i == 1
        return kwargs

    same(sd[1], sd[0], num_inference_steps=6, callback_on_step_end=stop)
    assert all(len(s) == 2 for s in seen.values()) and len(seen) == 2


def test_callback_replaces_prompts(sd):
    def change(pipe, i, t, kwargs):
        if i == 1:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"] * -2
        return kwargs

    options = {"callback_on_step_end": change,
               "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    a = same(sd[1], sd[0], **options)
    assert np.abs(a - same(sd[1], sd[0])).max() > 100 * TOLERANCE


def test_15_two_pipelines_share_a_unet(sd_folder):
    stock, fast = pair(sd_folder)
    other = diffusers.StableDiffusionPipeline(**fast.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    steps = []

    def nested(pipe, i, t, kwargs):
        if i == 1:
            steps.append(draw(other, prompt="a dog"))
        return kwargs

    alone = draw(fast)
    expected = draw(stock, prompt="a dog")
    # a scheduler is stateful: each pipeline needs its own
    other.scheduler = copy.deepcopy(fast.scheduler)
    inside = draw(fast, callback_on_step_end=nested)
    assert np.array_equal(inside, alone)
    assert np.abs(steps[0] - expected).max() <= TOLERANCE
    assert not fallbacks(fast)


@pytest.mark.parametrize("size", [(24, 40), (56, 8), (8, 8)])
def test_18_sizes(sd, size):
    same(sd[1], sd[0], height=size[0], width=size[1])


def test_19_26_prompt_embeds_alone_of_any_length(sd_folder):
    stock, fast = pair(sd_folder)
    for pipe in (stock, fast):
        pipe.text_encoder = pipe.tokenizer = None
    for tokens in (16, 23, 154):
        g = torch.Generator().manual_seed(tokens)
        embeds = {n: torch.randn(1, tokens, 24, generator=g)
                  for n in ("prompt_embeds", "negative_prompt_embeds")}
        same(fast, stock, prompt=None, **embeds)


def test_21_22_generators(sd):
    def generators():
        return [torch.Generator().manual_seed(s) for s in (3, 4)]

    stock, fast = sd
    options = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 3.0}
    a, b = (p(["a", "b"], generator=generators(), **options).images for p in (fast, stock))
    assert np.abs(a - b).max() <= TOLERANCE and not fallbacks(fast)


def test_23_textual_inversion(sd_folder):
    stock, fast = pair(sd_folder)
    same(fast, stock)
    vector = torch.randn(24)
    for pipe in (stock, fast):
        pipe.load_textual_inversion({"<thing>": vector.clone()}, token="<thing>")
    changed = same(fast, stock, prompt="the <thing> house")
    assert np.abs(changed - same(fast, stock, prompt="the red house")).max() > 100 * TOLERANCE


def test_24_clip_skip_of_the_own_pipeline(sd_folder):
    """Stock diffusers with transformers >= 5.6 fails on it, so the reference is its definition."""
    stock = pipeline(sd_folder)
    ids = stock.tokenizer("the red house", padding="max_length", max_length=16,
                          return_tensors="pt").input_ids
    states = stock.text_encoder(ids, output_hidden_states=True).hidden_states
    embeds = stock.text_encoder.final_layer_norm(states[-3])
    negative = stock.text_encoder(stock.tokenizer("", padding="max_length", max_length=16,
                                                  return_tensors="pt").input_ids)[0]
    expected = draw(stock, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    own = accel.Pipeline.from_pretrained(sd_folder)
    image = own("the red house", seed=1, num_inference_steps=4, guidance_scale=3.0, clip_skip=2,
                output_type="np", progress_bar=False).images
    assert np.abs(image - expected).max() <= TOLERANCE


def test_28_threads_with_their_own_schedulers(sd_folder):
    stock, fast = pair(sd_folder)
    pipes = []
    for _ in range(6):
        own = {"tokenizer": copy.deepcopy(fast.tokenizer)}  # a fast one refuses a second thread
        pipe = diffusers.StableDiffusionPipeline(**fast.components | own,
                                                 requires_safety_checker=False)
        pipe.scheduler = type(fast.scheduler).from_config(fast.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        pipes.append(pipe)
    results = [None] * 6

    def work(i):
        results[i] = draw(pipes[i], seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(6):
        assert np.abs(results[i] - draw(stock, seed=i)).max() <= TOLERANCE
    assert not fallbacks(fast)


def test_30_grad_mode_does_not_matter(sd):
    with torch.enable_grad():
        same(sd[1], sd[0])


def test_34_inference_mode(sd):
    with torch.inference_mode():
        same(sd[1], sd[0])
    same(sd[1], sd[0])


def test_lora_through_the_pipeline(sd_folder, tmp_path):
    """Adapters are not native yet: the UNet falls back, the picture is stock's, and unloading
    brings the engine back."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    donor = pipeline(sd_folder)
    torch.manual_seed(3)
    donor.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"],
                                      init_lora_weights=False))
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(donor.unet))
    stock, fast = pair(sd_folder)
    before = same(fast, stock)
    for pipe in (stock, fast):
        pipe.load_lora_weights(tmp_path)
    with pytest.warns(accel.FallbackWarning, match="adapter"):
        changed = draw(fast)
    assert np.abs(changed - draw(stock)).max() <= TOLERANCE
    assert np.abs(changed - before).max() > 100 * TOLERANCE
    assert list(fallbacks(fast)) == ["unet"]
    for pipe in (stock, fast):
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    count = runs(fast)["unet"]
    a, b = draw(fast), draw(stock)
    assert runs(fast)["unet"] > count
    assert np.abs(a - b).max() <= TOLERANCE and np.abs(a - before).max() > 100 * TOLERANCE


def test_components_that_are_left_alone_are_reported(sd_folder):
    fast = pipeline(sd_folder)
    fast.vae = diffusers.AutoencoderTiny().eval()
    accel.compile(fast)
    report = accel.report(fast)
    assert "AutoencoderTiny" in report["components"]["vae"]["skipped"]
    assert "left as it is" in str(report)
    before = runs(fast)["unet"]
    draw(fast)
    assert runs(fast)["unet"] > before


def test_decompile_a_pipeline(sd_folder):
    stock, fast = pair(sd_folder)
    same(fast, stock)
    assert accel.decompile(fast) is fast
    assert np.array_equal(draw(fast), draw(stock))
    for component in (fast.unet, fast.vae, fast.text_encoder):
        assert "_accel" not in component.__dict__


def test_deepcopy_of_a_pipeline_is_plain(sd_folder):
    stock, fast = pair(sd_folder)
    same(fast, stock)
    other = copy.deepcopy(fast)
    count = runs(fast)
    assert np.array_equal(draw(other), draw(stock))
    assert runs(fast) == count


def test_explain(sd):
    fast = sd[1]
    draw(fast)
    text = accel.explain(fast)
    assert "conv_in" in text and "arena" in text
    assert "[2, 4, 8, 8]" in text
    assert "[1, 4, 12, 8]" in accel.explain(fast.unet, batch=1, height=12)
    assert accel.explain(fast.vae, json=True).startswith("{")
    assert "take longest" in accel.explain(fast.unet, profile=True, repeats=1)
    fresh = accel.compile(pipeline_module(sd[0]))
    assert "[2, 4, 8, 8]" in accel.explain(fresh)  # as the config suggests
    assert "arena" in accel.explain(fresh, batch=1, height=8, width=8, tokens=4, timesteps=1)
    sizes = {"batch": 1, "height": 8, "width": 8, "tokens": 4, "timesteps": 1}
    assert "take longest" in accel.explain(fresh, profile=True, repeats=1, **sizes)


@pytest.mark.parametrize(("kind", "which"), [
    ("unet", "sd"), ("unet", "sdxl"), ("vae", "sd"), ("text_encoder", "sd"),
    ("text_encoder_2", "sdxl")])
def test_explain_before_the_first_call(kind, which):
    """Sizes from the config, or some of them given; computed as the module is."""
    fresh = accel.compile(module(kind, which))
    plan = json.loads(accel.explain(fresh, json=True))
    assert plan["steps"] and plan["device"].startswith("cpu")
    given = {"batch": 3, "tokens": 5} if kind != "vae" else {"batch": 3, "height": 8}
    assert accel.explain(fresh, **given) != accel.explain(fresh)
    told = json.loads(accel.explain(fresh, profile=True, json=True, repeats=1, **given))
    assert told["device"].startswith("cpu") and told["steps"]
    args, named = inputs(kind, which)
    with ran(fresh, native=1):
        call(fresh, kind, args, named)
    told = accel.explain(fresh)
    again = {k: v for k, v in fresh._accel.last_args.items()
             if k in ("entry", "batch", "height", "width", "tokens", "hidden_states")}
    assert told == accel.explain(accel.compile(module(kind, which)), **again)


def test_explain_follows_the_module():
    """A module that became another dtype after its last call; the plan's inputs say it."""
    fast = accel.compile(module("unet"))
    call(fast, "unet", inputs("unet")[0])
    seen = []
    for dtype in (torch.float16, torch.float32):
        fast.to(dtype)
        seen.append(_sizes(fast._accel, fast, {})["io_dtype"])
        accel.explain(fast)
        assert _sizes(fast._accel, fast, {})["io_dtype"] == str(dtype)[6:]
        assert _sizes(fast._accel, fast, {"io_dtype": "bfloat16"})["io_dtype"] == "bfloat16"


def test_explain_where_the_original_runs(sd_folder):
    from peft import LoraConfig

    pipe = accel.compile(pipeline(sd_folder))
    draw(pipe)
    plan = accel.explain(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    for x in (pipe, pipe.unet):
        with pytest.raises(accel.UnsupportedError, match="explain: .*adapter layers"):
            accel.explain(x, profile=True)
        assert accel.explain(x) == plan  # what it would run
    fresh = accel.compile(module("unet").train())
    with pytest.raises(accel.UnsupportedError, match="training"):
        accel.explain(fresh, profile=True)
    assert "conv_in" in accel.explain(fresh)


def pipeline_module(pipe):
    return copy.deepcopy(pipe.unet)


def _tokenizer_folder(folder, which):
    if which == "added":  # as after loading and saving a textual inversion
        config = json.loads((folder / "tokenizer_config.json").read_text())
        plain = {"lstrip": False, "rstrip": False, "single_word": False, "special": False}
        config["added_tokens_decoder"] = {
            "598": plain | {"content": "<|startoftext|>", "normalized": True, "special": True},
            "599": plain | {"content": "<|endoftext|>", "normalized": True, "special": True},
            "600": plain | {"content": "<Cat>", "normalized": True},
            "601": plain | {"content": "<cat>_1", "normalized": False, "single_word": True}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("which", ["plain", "pad", "added"])
def test_tokenizers_agree(tmp_path, which):
    from hypothesis import given, settings
    from hypothesis import strategies as st

    tiny.write_tokenizer(tmp_path / "t", **({"pad": "!"} if which == "pad" else {}))
    folder = _tokenizer_folder(tmp_path / "t", which)
    ours, theirs = accel.Tokenizer(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    special = st.lists(st.sampled_from(
        ["!", "red", " ", "<cat>", "<Cat>", "<CAT>", "_1", "<|endoftext|>", "<|STARTOFTEXT|>",
         "the", ".", "\n"]), max_size=9).map("".join)

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=40) | special
           | st.text(alphabet="red house 27 THE'sS,.!\u00e9\t\n", max_size=40))
    def check(text):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs(text, padding="max_length", max_length=16, truncation=True,
                              return_tensors="np").input_ids
            assert np.array_equal(ours(text), expected), text

    check()

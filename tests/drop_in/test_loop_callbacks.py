"""Callbacks, interrupts and the progress bar of the native loop, against the stock loop."""

import warnings

import diffusers
import numpy as np
import pytest
import torch
from dropin import PICTURE_TOLERANCE as TOLERANCE
from dropin import draw, equal, pair, pipeline, same, use

import accel


def test_callback_gets_and_changes_latents(sd, xl):
    for pipes in (sd, xl):
        latents = {id(p): [] for p in pipes}

        def change(pipe, i, t, kwargs, latents=latents):
            latents[id(pipe)].append(kwargs["latents"].clone())
            if i == 1:
                kwargs["latents"] = kwargs["latents"] * 0.5
            if i == 2:
                kwargs["latents"] += 0.1  # in place
            return kwargs

        a = same(pipes, num_inference_steps=5, callback_on_step_end=change)
        for x, y in zip(*latents.values(), strict=True):
            assert x.dtype == y.dtype and (x - y).abs().max() <= 10 * TOLERANCE
        assert not equal(a, same(pipes, num_inference_steps=5))


def test_callback_keeps_what_it_was_given(sd):
    kept = []

    def keep(pipe, i, t, kwargs):
        kept.append(kwargs["latents"])
        return kwargs

    same(sd, callback_on_step_end=keep)
    fast, plain = kept[:len(kept) // 2], kept[len(kept) // 2:]
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(fast, plain, strict=True))
    assert (fast[0] - fast[1]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["another", "in place", "data"])
def test_callback_changes_conditions(xl, how):
    def change(pipe, i, t, kwargs):
        if i == 1:
            for name in ("prompt_embeds", "add_text_embeds"):
                if how == "in place":
                    kwargs[name] *= -1.5
                elif how == "data":  # past the version counter
                    kwargs[name].data.mul_(-1.5)
                else:
                    kwargs[name] = kwargs[name] * -1.5
            kwargs["add_time_ids"] = kwargs["add_time_ids"] + 8
        return kwargs

    options = {"callback_on_step_end": change, "num_inference_steps": 5,
               "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds",
                                                      "add_text_embeds", "add_time_ids"]}
    a = same(xl, **options)
    assert np.abs(a - same(xl, num_inference_steps=5)).max() > 10 * TOLERANCE


def test_callback_changes_a_prompt_alone(sd):
    """Nothing else tells: the same object, its version as before."""
    def change(pipe, i, t, kwargs):
        kwargs["prompt_embeds"].data.mul_(0.8)
        return kwargs

    options = {"callback_on_step_end": change, "num_inference_steps": 5,
               "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    a = same(sd, **options)
    assert np.abs(a - same(sd, num_inference_steps=5)).max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["pndm", "dpm", "sde", "dpm third"])
def test_callback_changes_guidance(sd, monkeypatch, name):
    """The sampler's memory goes on over the change."""
    use(sd, monkeypatch, name)

    def change(pipe, i, t, kwargs):
        if i == 2:
            pipe._guidance_scale = 1.8
        if i == 3:
            pipe._guidance_rescale = 0.5
        if i == 5:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"][-1:]
        return kwargs

    options = {"callback_on_step_end": change, "num_inference_steps": 8,
               "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    a = same(sd, **options)
    assert not equal(a, same(sd, num_inference_steps=8))


def test_cutoff_of_sdxl(xl):
    from diffusers.callbacks import SDXLCFGCutoffCallback

    same(xl, num_inference_steps=6,
         callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.5))


@pytest.mark.parametrize("name", ["euler", "pndm"])
def test_old_callbacks(sd, monkeypatch, name):
    use(sd, monkeypatch, name)
    seen = {}

    def old(step, t, latents):
        seen[current].append((step, float(t)))
        if step == 2:
            latents *= 0.9

    pictures = []
    for current in (1, 0):
        seen[current] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            pictures.append(draw(sd[current], callback=old, callback_steps=2,
                                 num_inference_steps=6))
    assert seen[0] == seen[1] and len(seen[0]) >= 3
    assert equal(*pictures) and not equal(pictures[0], draw(sd[0], num_inference_steps=6))


def test_interrupt_and_exceptions(sd):
    def fail(pipe, i, t, kwargs):
        if i == 1:
            raise KeyError("mine")
        return kwargs

    with pytest.raises(KeyError, match="mine"):
        draw(sd[1], callback_on_step_end=fail)
    same(sd)

    def wrong(pipe, i, t, kwargs):
        return {"latents": torch.zeros(1, 4, 2, 2)}

    with pytest.raises(accel.ShapeError, match="latents"):
        draw(sd[1], callback_on_step_end=wrong)


class StoppingBar:
    """A progress bar that interrupts its pipe after some steps, as another thread may."""

    def __init__(self, pipe, after):
        self.pipe, self.after, self.count = pipe, after, 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def update(self):
        self.count += 1
        self.pipe._interrupt = self.count == self.after


@pytest.mark.parametrize("name", ["ancestral", "sde", "dpm"])
def test_an_interrupt_without_a_callback(sd, monkeypatch, name):
    """Though noise was drawn for all rows, generators are left as the stock loop leaves them."""
    use(sd, monkeypatch, name)
    whole = draw(sd[1], num_inference_steps=6)
    ends = []
    for pipe in sd:
        bar = StoppingBar(pipe, 3)
        monkeypatch.setattr(pipe, "progress_bar", lambda total, bar=bar: bar)
        for make in (lambda: torch.Generator().manual_seed(1),
                     lambda: [torch.Generator().manual_seed(1)]):
            bar.count, g = 0, make()
            picture = draw(pipe, generator=g, num_inference_steps=6)
            assert bar.count == 3 and not equal(picture, whole)
            ends.append((picture, g[0].get_state() if isinstance(g, list) else g.get_state()))
    assert all(equal(ends[0][0], other) and torch.equal(ends[0][1], state)
               for other, state in ends[1:])


def test_a_bar_alone_asks_for_no_latents(sd, monkeypatch):
    asked, denoise = [], accel._core.denoise

    def watch(*args, **options):
        asked.append({n for n in ("callback", "progress") if options.get(n) is not None})
        return denoise(*args, **options)

    monkeypatch.setattr(accel._core, "denoise", watch)
    bar = StoppingBar(sd[1], 99)
    monkeypatch.setattr(sd[1], "progress_bar", lambda total: bar)
    draw(sd[1], num_inference_steps=6)
    assert asked == [{"progress"}] and bar.count == 6
    draw(sd[1], num_inference_steps=6, callback_on_step_end=lambda p, i, t, k: k)
    assert asked == [{"progress"}, {"callback"}] and bar.count == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_given_back_unchanged_stay_as_they_were(sd_folder, monkeypatch, dtype):
    """Also as a copy, and with some of them changed: the others keep their float32 digits."""
    fast = accel.compile(pipeline(sd_folder).to(dtype))
    options = {"num_inference_steps": 5, "output_type": "latent"}

    def copied(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"].clone()}

    def one(pipe, i, t, kwargs):
        if i == 4:
            kwargs["latents"][0, 0, 0, 0] = 7
        return kwargs

    plain = draw(fast, **options)
    assert torch.equal(plain, draw(fast, callback_on_step_end=copied, **options))
    touched = draw(fast, callback_on_step_end=one, **options)
    assert touched[0, 0, 0, 0] == 7
    assert torch.equal(touched.flatten()[1:], plain.flatten()[1:])


@pytest.mark.parametrize("what", ["weights", "layer", "to"])
def test_callback_changes_the_unet(sd_folder, what):
    pipes = pair(sd_folder)
    kept = same(pipes, num_inference_steps=5)

    def change(pipe, i, t, kwargs):
        if i == 1 and what == "weights":
            pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.data *= 2
            pipe.unet.conv_in.weight.data *= 1.1
        if i == 1 and what == "layer":
            pipe.unet.conv_in = torch.nn.Conv2d(4, pipe.unet.conv_in.out_channels, 3, padding=1)
            pipe.unet.conv_in.weight.data.fill_(0.01)
            pipe.unet.conv_in.bias.data.zero_()
            pipe.unet.conv_in.eval()
        if i == 1 and what == "to":
            pipe.unet.to(torch.float64).to(torch.float32)
            pipe.unet.conv_in.bias.data += 1
        return kwargs

    a = same(pipes, num_inference_steps=5, callback_on_step_end=change)
    assert not equal(a, kept)


def test_an_adapter_that_comes_in_the_middle(sd_folder):
    """What the engine does not run then is done by the UNet itself, with the same table."""
    from peft import LoraConfig

    pipes = pair(sd_folder)
    for pipe in pipes:
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="sde-dpmsolver++")

    def adapt(pipe, i, t, kwargs):
        if i == 2:
            torch.manual_seed(3)
            pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"],
                                             init_lora_weights=False))
        return kwargs

    options = {"num_inference_steps": 6, "callback_on_step_end": adapt, "guidance_rescale": 0.3}
    plain, fast = pipes
    with pytest.warns(accel.FallbackWarning, match="from row 3 on: adapter layers"):
        a = draw(fast, **options)
    assert equal(a, draw(plain, **options))
    assert any("from row 3 on" in r for r in accel.report(fast)["loop"]["stock"])

"""Small modules with random weights, and what asserts that the engine ran or did not."""

import contextlib
import copy
import warnings

import diffusers
import numpy as np
import tiny
import torch
import transformers

import accel

TOLERANCE = 2e-5  # of the largest value; float32 against PyTorch's float32
PICTURE_TOLERANCE = 3e-5  # of 1.0, after some steps: float32 differences grow with every step
# Two rows of time_ids that bfloat16, or both half precisions, cannot hold.
SIZES = [[1024, 1536, 0.7, 17, 4099, 2049.25], [1023.75, 771, 3, 0, 1027, 5001]]
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddim zero snr": ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing":
                                        "trailing", "prediction_type": "v_prediction"}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm third": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
}


def module(kind, which="sd", dtype=torch.float32):
    """A module of diffusers or transformers in eval mode, weights from tiny.py."""
    part = tiny.PARTS[which][kind]
    config = part["config"]
    name = config.get("_class_name") or config["architectures"][0]
    if "architectures" in config:
        made = getattr(transformers, name)(transformers.CLIPTextConfig(**config))
    else:
        made = getattr(diffusers, name).from_config(config)
    weights = {n: torch.from_numpy(w) for n, w in tiny.weights(part["shapes"]).items()}
    missing = made.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in k for k in missing.missing_keys)
    return made.to(dtype).eval()


def inputs(kind, which="sd", dtype=torch.float32, batch=2, tokens=5, size=8, seed=0):
    """Positional and keyword arguments of one call."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    if kind == "unet":
        width = 48 if which == "sdxl" else 24
        named = {}
        if which == "sdxl":
            ids = torch.tensor([[64, 48, 0, 0, 64, 48.0]] * batch).to(dtype)
            named["added_cond_kwargs"] = {"text_embeds": normal(batch, 24), "time_ids": ids}
        return (normal(batch, 4, size, size), 500, normal(batch, tokens, width)), named
    if kind == "vae":
        return (normal(batch, 4, size, size),), {}
    ids = torch.randint(0, 590, (batch, 9), generator=g)
    ids[:, 0], ids[:, 6:] = 598, 599
    return (ids,), {}


def call(m, kind, args, named=None):
    """The main result of one call, as a tensor."""
    named = named or {}
    if kind == "vae":
        return m.decode(*args, **named).sample
    out = m(*args, **named)
    return out.sample if kind == "unet" else out.last_hidden_state


def close(a, b, tolerance=TOLERANCE):
    """Largest difference within tolerance of the largest value; different shapes raise."""
    assert a.shape == b.shape and a.dtype == b.dtype
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())


@contextlib.contextmanager
def ran(m, native=None, fallbacks=0, reason=None):
    """Asserts how many calls inside the block the engine took (None: at least one), and how many
    the original took, for which reason."""
    before = accel.report(m)
    before_fallbacks = sum(before["fallbacks"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", accel.FallbackWarning)
        yield
    after = accel.report(m)
    count = after["native_runs"] - before["native_runs"]
    fell = {r: n - before["fallbacks"].get(r, 0) for r, n in after["fallbacks"].items()}
    fell = {r: n for r, n in fell.items() if n}
    assert sum(after["fallbacks"].values()) - before_fallbacks == fallbacks, fell
    assert count == native if native is not None else count > 0, (count, fell)
    if reason is not None:
        assert any(reason in r for r in fell), fell


@contextlib.contextmanager
def loop_ran(pipe, stock=None):
    """Asserts that one loop ran inside the block: natively, or as stock for a reason with that
    text in it."""
    before = accel.report(pipe)["loop"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", accel.FallbackWarning)
        yield
    after = accel.report(pipe)["loop"]
    fell = {r: n - before["stock"].get(r, 0) for r, n in after["stock"].items()}
    fell = {r: n for r, n in fell.items() if n}
    assert after["native"] - before["native"] == (stock is None), fell
    assert list(fell.values()) == ([] if stock is None else [1]), fell
    assert stock is None or stock in next(iter(fell)), fell


def plain_copy(m):
    return copy.deepcopy(m)


def pipeline(folder, **options):
    """A diffusers pipeline of the tiny folder, float32, quiet."""
    cls = (diffusers.StableDiffusionXLPipeline if (folder / "text_encoder_2").exists()
           else diffusers.StableDiffusionPipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = cls.from_pretrained(folder, dtype=torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt="the red house", seed=1, **options):
    """A float picture."""
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 3.0,
               "generator": generator, **options}
    return pipe(prompt, **options).images


def pair(folder):
    """The stock pipeline and a compiled one."""
    return pipeline(folder), accel.compile(pipeline(folder))


def use(pipes, monkeypatch, name):
    """Gives the pipes one of SCHEDULERS, until the test is over."""
    cls, options = SCHEDULERS[name]
    for pipe in pipes:
        made = getattr(diffusers, cls).from_config(pipe.scheduler.config, **options)
        monkeypatch.setattr(pipe, "scheduler", made)


def equal(a, b):
    """Whether two pictures or latents are within PICTURE_TOLERANCE."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    assert a.shape == b.shape
    return np.abs(a - b).max() <= PICTURE_TOLERANCE * max(1, np.abs(b).max())


def same(pipes, stock=None, **options):
    """Both draw the same; the fast one in its native loop, or in stock for that reason."""
    plain, fast = pipes
    with loop_ran(fast, stock):
        a = draw(fast, **options)
    assert equal(a, draw(plain, **options))
    return a

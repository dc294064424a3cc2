"""Make tests/reference/*.png with stock diffusers on the shipped model.

Run it where diffusers and PyTorch are installed:

    python tests/reference/make.py

Each picture's prompt, seed, scheduler and the versions that made it go into reference.json, which
tests/torchfree/test_reference.py reads.  The pictures are made in float32 on the CPU with a CPU
generator, so they can be compared with any other backend.
"""

import json
import platform
from pathlib import Path

import diffusers
import torch
import transformers

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "python" / "accel" / "demo_model"

PICTURES = [
    {
        "name": "ddim",
        "prompt": "a red house by a lake at sunset",
        "seed": 1,
        "scheduler": "DDIMScheduler",
    },
    {
        "name": "pndm",
        "prompt": "snowy mountains under a full moon, pine trees, night",
        "seed": 2,
        "scheduler": "PNDMScheduler",
        "options": {"skip_prk_steps": True},
    },
    {
        "name": "euler",
        "prompt": "a blue house, green trees, mountain peaks, a cloudy sky, midday",
        "seed": 3,
        "scheduler": "EulerDiscreteScheduler",
    },
    {
        "name": "euler_ancestral",
        "prompt": "rolling hills at dawn with clouds and leafy trees",
        "negative_prompt": "a house",
        "seed": 4,
        "scheduler": "EulerAncestralDiscreteScheduler",
    },
    {
        "name": "dpm_multistep_karras",
        "prompt": "a yellow cottage and autumn trees by a calm lake, day",
        "seed": 5,
        "scheduler": "DPMSolverMultistepScheduler",
        "options": {"use_karras_sigmas": True},
    },
    {
        "name": "sde_dpm_wide",
        "prompt": "a white cottage by a lake at night under a crescent moon",
        "seed": 6,
        "scheduler": "DPMSolverMultistepScheduler",
        "options": {"algorithm_type": "sde-dpmsolver++"},
        "width": 320,
        "height": 192,
        "guidance_rescale": 0.5,
    },
]


def generate(picture: dict) -> "object":
    """Return the PIL image that stock diffusers makes for one row of PICTURES."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    cls = getattr(diffusers, picture["scheduler"])
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **picture.get("options", {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        picture["prompt"],
        negative_prompt=picture.get("negative_prompt"),
        num_inference_steps=20,
        guidance_scale=3.0,
        guidance_rescale=picture.get("guidance_rescale", 0.0),
        height=picture.get("height", 256),
        width=picture.get("width", 256),
        generator=torch.Generator("cpu").manual_seed(picture["seed"]),
    ).images[0]


def main() -> None:
    """Write every picture and reference.json."""
    for picture in PICTURES:
        generate(picture).save(HERE / f"{picture['name']}.png", optimize=True)
        print(picture["name"])
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    record = {"versions": versions, "steps": 20, "guidance_scale": 3.0, "pictures": PICTURES}
    (HERE / "reference.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

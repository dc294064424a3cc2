"""Tiny model folders with random weights, made by NumPy and safetensors alone."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PARTS = json.loads(Path(__file__).with_name("tiny.json").read_text())
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
         "text_encoder": "model", "text_encoder_2": "model"}
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
             "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
             "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon"}


def weights(shapes, seed=0, dtype=np.float32):
    """Random weights, norms about 1, of a size that keeps activations about 1."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes.items():
        if "norm" in name and name.endswith("weight"):
            values = rng.normal(1, 0.1, shape)
        elif len(shape) == 1:
            values = rng.normal(0, 0.1, shape)
        else:
            values = rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)
        out[name] = values.astype(dtype)
    return out


def bytes_to_letters():
    """Byte-level BPE writes bytes that do not print as letters from 256 on (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable}
    for n, b in enumerate(b for b in range(256) if b not in letters):
        letters[b] = chr(256 + n)
    return [letters[b] for b in range(256)]


def write_tokenizer(folder, pad="<|endoftext|>", length=16):
    """vocab.json and merges.txt of 600 words: bytes, bytes that end a word, a few merges."""
    folder.mkdir(parents=True)
    letters = bytes_to_letters()
    merges = [("r", "e"), ("re", "d</w>"), ("h", "o"), ("u", "se</w>"), ("s", "e</w>"),
              ("ho", "use</w>"), ("t", "h"), ("th", "e</w>")]
    words = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    words += [f"unused{i}</w>" for i in range(598 - len(words))]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {w: i for i, w in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {"model_max_length": length, "pad_token": pad, "tokenizer_class": "CLIPTokenizer",
              "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
              "unk_token": "<|endoftext|>", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_component(folder, part, *, seed=0, dtype=np.float32, shards=1, variant=None):
    folder.mkdir(parents=True)
    stem = STEMS[folder.name]
    (folder / "config.json").write_text(json.dumps(part["config"]))
    tensors = weights(part["shapes"], seed, dtype)
    dotted = f".{variant}" if variant else ""
    if shards == 1:
        save_file(tensors, folder / f"{stem}{dotted}.safetensors")
        return
    names, where = list(tensors), {}
    for i in range(shards):
        file = f"{stem}{dotted}-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, folder / file)
        where |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{stem}.safetensors.index{dotted}.json").write_text(json.dumps(index))


def write_model(folder, kind="sd", *, scheduler=None, index=None, **options):
    """A whole pipeline folder; returns it."""
    parts = PARTS[kind]
    for seed, (name, part) in enumerate(parts.items()):
        write_component(folder / name, part, seed=seed, **options)
    write_tokenizer(folder / "tokenizer")
    if kind == "sdxl":
        write_tokenizer(folder / "tokenizer_2", pad="!")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**SCHEDULER, **(scheduler or {})}))
    cls = "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"
    library = {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
               "text_encoder": ("transformers", "CLIPTextModel"),
               "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
               "tokenizer": ("transformers", "CLIPTokenizer"),
               "tokenizer_2": ("transformers", "CLIPTokenizer"),
               "scheduler": ("diffusers", "DDIMScheduler")}
    entries = {p.name: list(library[p.name]) for p in folder.iterdir() if p.is_dir()}
    none = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), [None, None])
    entries = {"_class_name": cls, "_diffusers_version": "0.42.1", **entries}
    if kind == "sd":
        entries |= {**none, "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(entries | (index or {})))
    return folder

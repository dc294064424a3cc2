"""Write the trained networks as a standard diffusers folder, in fp16, and check it."""

import json
import math
import shutil

import torch

from . import diffusion, vae

LIMIT = 16_000_000  # bytes of all files together
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"
)  # fmt: skip


def networks(session, generator="generator.pt"):
    """(unet, text, vae) with the saved weights, in evaluation mode."""
    saved = session.load(generator)
    unet, text = diffusion.build_unet(), diffusion.build_text(session.tokenizer)
    decoder = vae.build()
    unet.load_state_dict(saved["unet"])
    text.load_state_dict(saved["text"])
    decoder.load_state_dict(session.load("vae.pt"))
    return tuple(m.to(session.device).eval() for m in (unet, text, decoder))


def save(session, folder, parts):
    """Write model_index.json and one folder for each part."""
    from diffusers import StableDiffusionPipeline

    unet, text, decoder = (part.to("cpu", torch.float16) for part in parts)
    for part in (unet, text, decoder):
        part.to(memory_format=torch.contiguous_format)
    pipeline = StableDiffusionPipeline(
        vae=decoder,
        text_encoder=text,
        tokenizer=session.tokenizer,
        unet=unet,
        scheduler=diffusion.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    _publish_text_names(folder / "text_encoder" / "model.safetensors")
    for name in TOKENIZER_FILES:
        shutil.copy(session.folder / "tokenizer" / name, folder / "tokenizer" / name)
    for path in folder.rglob("*.json"):
        _clean(path)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # newer safetensors leave them to their owner alone
    if size(folder) > LIMIT:
        raise ValueError(f"{folder} holds {size(folder)} bytes, more than {LIMIT}")


def size(folder):
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _publish_text_names(path):
    """Published folders name the encoder's weights "text_model.*"; transformers 5 drops that."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    named = {
        key if key.startswith("text_model.") else f"text_model.{key}": value
        for key, value in weights.items()
        if not key.endswith("position_ids")
    }
    save_file(named, path, metadata={"format": "pt"})


def _clean(path):
    """Drop what saving left behind: the folder a configuration was read from, a tokenizer's last
    truncation; and ask for fp32 where a type is named.

    transformers obeys "dtype" when the caller names none, diffusers then takes fp32: the encoder
    alone would be fp16 and the first picture fail.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return
    changed = content.pop("_name_or_path", None) is not None
    if content.get("truncation"):  # a tokenizer keeps how it was last called
        content["truncation"], changed = None, True
    if content.get("dtype") == "float16":
        content["dtype"], changed = "float32", True
    if changed:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(session, folder):
    """(unet, text, vae) as diffusers reads the folder, in fp32 on the session's device."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    return tuple(part.to(session.device).eval() for part in parts)


@torch.no_grad()
def largest(session, parts, prompts):
    """Largest magnitude that any layer puts out while prompts are painted in fp16.

    fp16 ends at 65504; anything near that would overflow on another machine.
    """
    unet, text, decoder = (part.half() for part in parts)
    peak = {}

    def watch(name):
        def note(_, __, output):
            tensor = output[0] if isinstance(output, tuple) else output
            if torch.is_tensor(tensor):
                value = tensor.abs().max().float().item()
                peak[name] = max(peak.get(name, 0.0), value if math.isfinite(value) else math.inf)

        return note

    hooks = [
        module.register_forward_hook(watch(name))
        for name, part in (("unet", unet), ("text_encoder", text), ("vae", decoder.decoder))
        for module in part.modules()
        if not list(module.children())
    ]
    from . import tokenizer

    ids = tokenizer.encode(session.tokenizer, prompts).to(session.device).long()
    context = diffusion.Denoise(unet, text).encode(ids)
    shape = (len(prompts), 4, 32, 32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(session.device).half()
    scheduler = diffusion.build_scheduler()
    scheduler.set_timesteps(10, device=session.device)
    for t in scheduler.timesteps:
        v = unet(x, t, context, return_dict=False)[0]
        x = scheduler.step(v.float(), t, x.float(), return_dict=False)[0].half()
    decoder.decoder(decoder.post_quant_conv(x / vae.SCALE))
    for hook in hooks:
        hook.remove()
    return {name: round(value, 2) for name, value in peak.items()}

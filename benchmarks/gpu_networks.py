"""The networks that benchmarks/gpu.py and tools/gpu_profile.py time: published configs, random
weights made on the GPU, and one call of each."""

import gc
import json
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "tests" / "configs"
TINY = False  # networks of a few channels on the CPU, to try the scripts


def device():
    return "cpu" if TINY else "cuda"


def sync():
    import torch

    if not TINY:
        torch.cuda.synchronize()


def free():
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def config_of(name):
    """Return a published config, or with --tiny a small one of that kind."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    if TINY and "block_out_channels" in config:
        n = len(config["block_out_channels"])
        config["block_out_channels"] = [32 * (i + 1) for i in range(n)]
        if "unet" in name:
            config |= {"norm_num_groups": 8, "attention_head_dim": [4 * (i + 1) for i in range(n)]}
            config["transformer_layers_per_block"] = 1
            config["cross_attention_dim"] = 128 if "sdxl" in name else 64
            if "projection_class_embeddings_input_dim" in config:
                config["projection_class_embeddings_input_dim"] = 6 * 256 + 64
    elif TINY:
        config |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
                   "num_attention_heads": 2, "projection_dim": 64}
    return config


def make(name, dtype):
    """The module of a published config with random weights, made on the GPU in that dtype: one in
    float32 first would leave PyTorch's cache full."""
    import torch

    config = config_of(name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = new(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device()).manual_seed(0)
    with torch.no_grad():
        for key, p in module.named_parameters():
            value = torch.randn(p.shape, generator=generator, device=device(), dtype=torch.float32)
            if p.ndim == 1:
                value = value.mul_(0.1).add_(1.0 if key.endswith("weight") else 0.0)
            elif "embedding" not in key or "linear" in key:
                value = value.mul_(p[0].numel() ** -0.5)
            p.copy_(value)
    return module.to(dtype).eval()


def new(config):
    """A module on the GPU in PyTorch's default dtype."""
    import torch

    with torch.device(device()):
        if "architectures" in config:
            import transformers

            cls = getattr(transformers, config["architectures"][0])
            fields = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
            module = cls(transformers.CLIPTextConfig(**fields, dtype=torch.get_default_dtype()))
        else:
            import diffusers

            cls = getattr(diffusers, config["_class_name"])
            module = cls(**{k: v for k, v in config.items() if not k.startswith("_")})
    return module


def randn(*shape, seed, dtype):
    import torch

    generator = torch.Generator(device()).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device()).to(dtype)


def unet_call(name, size):
    """call(module) of one guided step."""

    def call(module, dtype):
        import torch

        config = config_of(name)
        args = {"sample": randn(2, 4, size, size, seed=1, dtype=dtype), "timestep": 501,
                "encoder_hidden_states": randn(2, 77, config["cross_attention_dim"], seed=2,
                                               dtype=dtype)}
        if config.get("addition_embed_type") == "text_time":
            ids = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * 2, device=device(), dtype=dtype)
            pooled = randn(2, 64 if TINY else 1280, seed=3, dtype=dtype)
            args["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        return lambda: module(**args, return_dict=False)[0]

    return call


def decode_call(size):
    def call(module, dtype):
        z = randn(1, 4, size, size, seed=1, dtype=dtype)
        return lambda: module.decode(z, return_dict=False)[0]

    return call


def text_call(module, _dtype):
    import torch

    ids = torch.randint(0, 49000, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 49407
    ids = ids.to(device())
    return lambda: module(ids, return_dict=False)[0]


def cases():
    """name -> (title, config, call, calls of a round)"""
    small = 8 if TINY else 0
    return {
        "sd15": ("SD 1.5 UNet, 512x512, batch 2", "sd15_unet", unet_call("sd15_unet",
                                                                         small or 64), 20),
        "sdxl": ("SDXL UNet, 1024x1024, batch 2", "sdxl_base_unet",
                 unet_call("sdxl_base_unet", small or 128), 5),
        "vae512": ("VAE decode, 512x512", "sd_vae", decode_call(small or 64), 10),
        "vae1024": ("VAE decode, 1024x1024", "sdxl_vae", decode_call(small or 128), 5),
        "clip_l": ("CLIP-L, 2x77", "clip_l", text_call, 20),
        "clip_bigg": ("bigG, 2x77", "clip_bigg", text_call, 20),
    }

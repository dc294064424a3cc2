"""Writes tiny.json: configs of tiny SD and SDXL parts with the names and shapes of their weights.

Needs PyTorch, diffusers and transformers; the tests that read the file do not.

    python tests/torchfree/make_tiny.py
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4),
}
XL = {
    "cross_attention_dim": 48,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 1),
}
VAE = {
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}
TEXT = {
    "vocab_size": 600,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 24,
    "bos_token_id": 598,
    "eos_token_id": 599,
    "pad_token_id": 599,
}


def describe(module, architecture=None):
    if architecture:
        config = json.loads(module.config.to_json_string())
        config["architectures"] = [architecture]
    else:
        config = json.loads(module.to_json_string())
    return {"config": config, "shapes": {n: list(p.shape) for n, p in module.named_parameters()}}


def main():
    with torch.device("meta"):
        text = describe(CLIPTextModel(CLIPTextConfig(**TEXT)), "CLIPTextModel")
        text_2 = describe(
            CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, hidden_act="gelu")),
            "CLIPTextModelWithProjection",
        )
        vae = describe(AutoencoderKL(**VAE))
        parts = {
            "sd": {
                "unet": describe(UNet2DConditionModel(**UNET, cross_attention_dim=24)),
                "vae": vae,
                "text_encoder": text,
            },
            "sdxl": {
                "unet": describe(UNet2DConditionModel(**{**UNET, **XL})),
                "vae": vae,
                "text_encoder": text,
                "text_encoder_2": text_2,
            },
        }
    path = Path(__file__).with_name("tiny.json")
    lines = [
        f'"{name}": {{\n'
        + ",\n".join(f' "{part}": {json.dumps(d, sort_keys=True)}' for part, d in which.items())
        + "\n}"
        for name, which in parts.items()
    ]
    path.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()

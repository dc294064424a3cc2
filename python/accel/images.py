"""The VAE's output as pictures, as diffusers' VaeImageProcessor makes them."""

import numpy as np


def to_float(decoded):
    """[n, 3, h, w] about -1 .. 1 -> float32 [n, h, w, 3] in 0 .. 1."""
    x = np.asarray(decoded, np.float32)
    return np.clip(x * np.float32(0.5) + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1)


def to_pil(images):
    """float32 [n, h, w, 3] in 0 .. 1 -> list of PIL images."""
    from PIL import Image

    return [Image.fromarray(x) for x in (images * 255).round().astype(np.uint8)]

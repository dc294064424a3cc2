"""What PyTorch's switches say about TF32, asked at each call of a float32 module on a GPU."""

MATMUL, CONV = 1, 2  # the engine's AC_TF32_*


def allowed():
    """Which float32 products may round their factors to TF32: MATMUL | CONV, 0 for none.

    PyTorch 2.9 and later keep one setting for each, `fp32_precision`, which `allow_tf32` and
    `torch.set_float32_matmul_precision` write too; there, asking `allow_tf32` raises once the two
    forms were mixed.
    """
    from torch.backends import cuda, cudnn

    matmul = getattr(cuda.matmul, "fp32_precision", None)
    conv = getattr(getattr(cudnn, "conv", None), "fp32_precision", None)
    matmul = cuda.matmul.allow_tf32 if matmul is None else matmul == "tf32"
    conv = cudnn.allow_tf32 if conv is None else conv == "tf32"
    return (MATMUL if matmul else 0) | (CONV if conv else 0)


def of(device, compute):
    """The same for a run in `compute` on a torch.device: 0 where no float32 runs on a GPU."""
    return allowed() if device.type == "cuda" and compute == "float32" else 0

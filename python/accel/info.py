"""What is here: version, devices, libraries, kernels, and whether they work."""

import platform
import sys
from importlib import metadata

import numpy as np

import accel

from . import _core
from ._core import AccelError

LIBRARIES = ("numpy", "tokenizers", "safetensors", "pillow", "tqdm", "torch", "diffusers",
             "transformers", "peft")
ISA = ("baseline", "AVX2", "AVX-512")


def _devices():
    for name in ("cpu", "cuda"):
        try:
            found = _core.device(name)
        except AccelError as error:
            yield name, str(error), None
            continue
        if found["backend"] == "cpu":
            text = f"{ISA[found['isa']]}, {_core.get_num_threads()} threads"
        else:
            text = f"compute capability {found['isa']}, {found['workers']} multiprocessors"
        yield name, "; ".join([text, *found["description"]]), found["kernels"]


def _libraries():
    for name in LIBRARIES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"


def _tiny_encoder():
    """A text encoder of two layers with known weights."""
    config = {"architectures": ["CLIPTextModel"], "vocab_size": 50, "hidden_size": 32,
              "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "max_position_embeddings": 8, "hidden_act": "quick_gelu", "eos_token_id": 49}
    rng = np.random.default_rng(0)
    shapes = {"embeddings.token_embedding.weight": (50, 32),
              "embeddings.position_embedding.weight": (8, 32)}
    for i in range(2):
        layer = f"encoder.layers.{i}"
        for name, (n, k) in {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 32),
                             "self_attn.v_proj": (32, 32), "self_attn.out_proj": (32, 32),
                             "mlp.fc1": (64, 32), "mlp.fc2": (32, 64)}.items():
            shapes |= {f"{layer}.{name}.weight": (n, k), f"{layer}.{name}.bias": (n,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{name}.weight": (32,), f"{layer}.{name}.bias": (32,)}
    shapes |= {"final_layer_norm.weight": (32,), "final_layer_norm.bias": (32,)}
    weights = {f"text_model.{n}": rng.normal(0, 0.2, s).astype(np.float32)
               for n, s in shapes.items()}
    return accel.TextEncoder(config, weights)


def self_test():
    """Raises AccelError when the engine does not compute what it must."""
    drawn = np.frombuffer(_core.Rng(0).normal(4), np.float32)
    if not np.allclose(drawn, [1.5409961, -0.2934289, -2.1787894, 0.5684313], atol=1e-5):
        raise accel.InternalError(f"self-test: normals of seed 0: found {drawn.tolist()}")
    encoder = _tiny_encoder()
    ids = np.arange(8)[None] * 7
    before = _core.get_num_threads()
    try:
        results = []
        for threads in (1, max(before, 2)):
            _core.set_num_threads(threads)
            results.append(encoder(ids).last_hidden_state)
    finally:
        _core.set_num_threads(before)
    # the last layer is a norm with weights around 0: far from 0 and from infinity when it worked
    if not np.isfinite(results[0]).all() or not 0.01 < np.std(results[0]) < 1:
        raise accel.InternalError(f"self-test: text encoder: deviation {np.std(results[0])}")
    if not np.array_equal(*results):
        raise accel.InternalError("self-test: one thread and several give different results")


def print_info(kernels=False):
    """Prints it all; True when the self-test passed."""
    print(f"accel {_core.version}, Python {platform.python_version()}, {platform.platform()}")
    lists = {}
    for name, text, found in _devices():
        print(f"  {name:<12} {text}")
        if found is not None:
            lists[name] = found
    print("libraries")
    for name, version in _libraries():
        print(f"  {name:<12} {version}")
    for device, names in lists.items():
        ops = sorted({n.split(".")[1] for n in names})
        print(f"kernels on {device}: {len(names)} for {len(ops)} ops")
        for op in ops:
            parts = [n.split(".", 2) for n in names]
            forms = [p[2] if len(p) > 2 else "plain" for p in parts if p[1] == op]
            if kernels:
                print(f"  {op:<12} {', '.join(forms)}")
    print(f"models:     {', '.join(_core.model_classes())}")
    print(f"schedulers: {', '.join(_core.scheduler_classes())}")
    shipped = (accel.demo_model() / "model_index.json").is_file()
    print(f"demo model: {accel.demo_model() if shipped else 'not in this build'}")
    try:
        self_test()
    except AccelError as error:
        print(f"self-test:  FAILED: {error}", file=sys.stderr)
        return False
    print("self-test:  passed")
    return True

"""accel's networks, called with PyTorch tensors; each counts its calls and can prove they ran."""

import numpy as np

import accel


class _Native:
    """`assert_ran` compares the calls made here with what report() says ran natively."""

    _class = None

    def __init__(self, config: dict, weights: dict, **options):
        self._network = self._class(config, weights, **options)
        self._calls = 0

    def _call(self, function, *args, **kwargs):
        result = function(*args, **kwargs)
        self._calls += 1
        return result

    def assert_ran(self) -> None:
        report = accel.report(self._network)
        assert self._calls > 0
        assert report["native_runs"] == self._calls, report
        assert not report["fallbacks"], report

    def close(self) -> None:
        """Lets go of the weights."""
        self._network = None


class NativeUNet(_Native):
    _class = accel.UNet

    def __call__(self, sample, timestep, text, added=None, mask=None) -> np.ndarray:
        return self._call(
            self._network, sample, timestep, text, encoder_attention_mask=mask, **(added or {})
        )

    def loop(self, sample, times, step, text, added=None, mask=None) -> np.ndarray:
        """One step as our own loop runs it: the graph knows all times and selects one."""
        args = {
            "entry": "forward",
            "batch": sample.shape[0],
            "height": sample.shape[2],
            "width": sample.shape[3],
            "tokens": text.shape[1],
            "timesteps": len(times),
            "io_dtype": "float32",
            "loop": True,
        }
        inputs = {
            "sample": sample,
            "encoder_hidden_states": text,
            "timestep": np.array(times, np.float32),
            "step": np.array([step], np.int32),
            **(added or {}),
        }
        if added:
            args["time_ids"] = added["time_ids"].shape[1]
        if mask is not None:
            args["masked"] = True
            inputs["encoder_attention_mask"] = (1 - mask) * -10000.0
        return self._call(self._network._run, args, inputs, "sample")


class NativeVAE(_Native):
    _class = accel.VAE

    def encode(self, image) -> dict:
        """mean and logvar, [b, c, h, w] each"""
        posterior = self._call(self._network.encode, image)
        return {"mean": posterior.mean, "logvar": posterior.logvar}

    def decode(self, latents) -> np.ndarray:
        return self._call(self._network.decode, latents)


class NativeText(_Native):
    _class = accel.TextEncoder

    def __call__(self, ids, mask=None, hidden_states=False, clip_skip=0) -> dict:
        """Outputs by transformers' names, hidden states by their number."""
        out = self._call(
            self._network, ids, mask, hidden_states=hidden_states, clip_skip=clip_skip
        )
        projected = "WithProjection" in self._network.config["architectures"][0]
        found = {
            "last_hidden_state": out.last_hidden_state,
            "text_embeds" if projected else "pooler_output": out.pooled,
            "clip_skip": out.clip_skip,
        }
        found |= {f"hidden_states.{i}": x for i, x in enumerate(out.hidden_states or ())}
        return {name: x for name, x in found.items() if x is not None}

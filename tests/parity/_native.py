"""Adapters: the native models, called with PyTorch tensors (private until the extension is in)."""

import accel
import numpy as np


class _Native:
    model = None

    def assert_ran(self):
        assert self.model.runs > 0

    def close(self):
        self.model = None


class NativeUNet(_Native):
    def __init__(self, config, weights):
        self.model = accel.UNet(config, weights)

    def __call__(self, sample, timestep, text, added=None, mask=None):
        return np.array(self.model(sample, timestep, text, added, mask))

    def loop(self, sample, times, step, text, added=None, mask=None):
        return np.array(self.model(sample, 0, text, added, mask, loop_steps=times, step=step))


class NativeVAE(_Native):
    def __init__(self, config, weights):
        self.model = accel.VAE(config, weights)

    def encode(self, x):
        return np.array(self.model.encode(x))

    def decode(self, x):
        return np.array(self.model.decode(x))


class NativeText(_Native):
    def __init__(self, config, weights):
        self.model = accel.TextEncoder(config, weights)

    def __call__(self, ids, mask=None, hidden_states=False, clip_skip=0):
        return self.model(ids, mask, hidden_states, clip_skip)

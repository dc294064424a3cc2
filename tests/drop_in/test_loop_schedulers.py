"""A scheduler that somebody changed is not what its config says: the stock loop runs it."""

import diffusers
import numpy as np
import pytest
import torch
from dropin import draw, loop_ran, pipeline

import accel

CLASSES = {"ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "dpm": "DPMSolverMultistepScheduler"}


@pytest.fixture(scope="module")
def sd(sd_folder):
    return pipeline(sd_folder), accel.compile(pipeline(sd_folder))


def _levels(scheduler, monkeypatch):
    monkeypatch.setattr(scheduler, "alphas_cumprod", scheduler.alphas_cumprod * 0.98)


def _last_level(scheduler, monkeypatch):
    monkeypatch.setattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))


def _config_of_other_levels(scheduler, monkeypatch):
    scheduler.register_to_config(beta_end=0.02)


def _config_in_place(scheduler, monkeypatch):
    monkeypatch.setattr(scheduler.config, "prediction_type", "v_prediction")  # stock reads this


def _config_item(scheduler, monkeypatch):
    monkeypatch.setitem(scheduler.config, "prediction_type", "v_prediction")  # and not this


def _helper(scheduler, monkeypatch):
    name = {
        "DDIMScheduler": "_get_variance",
        "PNDMScheduler": "_get_prev_sample",
        "DPMSolverMultistepScheduler": "convert_model_output",
    }[type(scheduler).__name__]
    real = getattr(scheduler, name)
    monkeypatch.setattr(scheduler, name, lambda *a, **k: real(*a, **k) * 1.2)


def _helper_of_the_class(scheduler, monkeypatch):
    cls = type(scheduler)
    real = cls.set_timesteps
    monkeypatch.setattr(cls, "set_timesteps", lambda self, *a, **k: real(self, *a, **k))


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpm"])
@pytest.mark.parametrize(
    "tamper, reason",
    [(_levels, "other noise levels"), (_last_level, "final_alpha_cumprod"),
     (_config_of_other_levels, "other noise levels"), (_config_in_place, "prediction_type"),
     (_config_item, "prediction_type"), (_helper, "was replaced"),
     (_helper_of_the_class, "set_timesteps was replaced")],
)  # fmt: skip
def test_a_scheduler_that_is_not_what_its_config_says_runs_stock(
    sd, monkeypatch, name, tamper, reason
):
    if tamper is _last_level and name == "dpm":
        pytest.skip("it has none")
    for pipe in sd:
        made = getattr(diffusers, CLASSES[name]).from_config(
            pipe.scheduler.config, skip_prk_steps=True
        )
        monkeypatch.setattr(pipe, "scheduler", made)
    eta = 0.5 if tamper is _helper else 0.0
    plain = draw(sd[0], eta=eta)
    for pipe in sd[:1] if tamper is _helper_of_the_class else sd:
        tamper(pipe.scheduler, monkeypatch)
    with loop_ran(sd[1], reason):
        found = draw(sd[1], eta=eta)
    expected = draw(sd[0], eta=eta)
    assert np.abs(found - expected).max() < 3e-5
    if tamper not in (_config_item, _config_of_other_levels, _helper_of_the_class):
        assert np.abs(plain - expected).max() > 1e-4  # the change is one of the picture

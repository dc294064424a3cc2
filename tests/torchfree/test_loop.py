"""_core.denoise: what a PyTorch program's loop needs of it beside accel.Pipeline."""

import numpy as np
import pytest

import accel
from accel import _core, schedules


@pytest.fixture(scope="module")
def unet(sd_folder):
    return accel.UNet.from_pretrained(sd_folder)


def schedule(name="dpm++_sde", steps=5):
    return schedules.make(schedules.resolve({"beta_schedule": "scaled_linear"}, name), steps)


def normals(seed, *shape):
    drawn = _core.Rng(seed).normal(int(np.prod(shape)))
    return np.frombuffer(drawn, np.float32).reshape(shape).copy()


def denoise(unet, table, latents, seed=3, prompt=0, **options):
    before = unet.stats["runs"]
    states = normals(prompt, 4, 7, 24)
    _core.denoise(unet._model, table, latents, {"encoder_hidden_states": states},
                  [_core.Rng(seed)], **{"guidance_scale": 3.0, **options})
    assert unet.stats["runs"] == before + 1
    return latents


@pytest.mark.parametrize("name", ["dpm++_sde", "euler_a", "ddim", "pndm", "euler", "dpm++"])
def test_another_call_goes_on_where_one_stopped(unet, name):
    table = schedule(name)
    whole = denoise(unet, table, normals(1, 2, 4, 8, 8))
    noise, registers = normals(3, len(table), 2, 4, 8, 8), np.zeros((6, 2, 4, 8, 8), np.float32)
    rng = _core.Rng(3)
    for row, entry in enumerate(table.rows):
        if entry["draws_noise"]:
            noise[row] = np.frombuffer(rng.normal(512), np.float32).reshape(2, 4, 8, 8)
    x = normals(1, 2, 4, 8, 8)
    memory = {"noise": noise, "registers": registers}
    denoise(unet, table, x, seed=9, callback=lambda i, t: i == 1, **memory)
    halfway = x.copy()
    denoise(unet, table, x, seed=9, first_row=2, **memory)
    assert np.array_equal(x, whole) and not np.array_equal(halfway, whole)
    other = denoise(unet, table, halfway.copy(), first_row=2, prompt=5, guidance_scale=1.5,
                    noise=noise, registers=registers.copy())
    assert np.abs(other - whole).max() > 1e-3


def test_noise_is_read_when_its_row_runs(unet):
    table = schedule("euler_a")
    given = normals(4, len(table), 2, 4, 8, 8)
    expected = denoise(unet, table, normals(1, 2, 4, 8, 8), noise=given)
    filled = np.zeros_like(given)
    filled[0] = given[0]

    def next_row(i, t):
        filled[i + 1:i + 2] = given[i + 1:i + 2]

    got = denoise(unet, table, normals(1, 2, 4, 8, 8), noise=filled, callback=next_row)
    assert np.array_equal(got, expected)
    assert not np.array_equal(denoise(unet, table, normals(1, 2, 4, 8, 8)), expected)


def test_progress_is_told_of_rows_and_may_end_the_run(unet):
    table, seen = schedule(), []
    whole = denoise(unet, table, normals(1, 2, 4, 8, 8), progress=lambda i, t: seen.append((i, t)))
    assert seen == list(enumerate(table.timesteps))
    assert np.array_equal(whole, denoise(unet, table, normals(1, 2, 4, 8, 8)))
    stopped = denoise(unet, table, normals(1, 2, 4, 8, 8), progress=lambda i, t: i == 1)
    same = denoise(unet, table, normals(1, 2, 4, 8, 8), callback=lambda i, t: i == 1)
    assert np.array_equal(stopped, same) and not np.array_equal(stopped, whole)
    with pytest.raises(ZeroDivisionError):
        denoise(unet, table, normals(1, 2, 4, 8, 8), progress=lambda i, t: 1 / 0)
    for options in ({"progress": 3}, {"progress": print, "callback": print}):
        with pytest.raises(TypeError, match="progress"):
            denoise(unet, table, normals(1, 2, 4, 8, 8), **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite_are_named_where_that_is_asked_for(unet, value):
    table, noise = schedule("euler_a"), normals(4, 5, 2, 4, 8, 8)
    noise[2, 1, 3, 7, 7] = value
    latents = denoise(unet, table, normals(1, 2, 4, 8, 8), noise=noise)
    assert not np.isfinite(latents).all()
    rows = []
    with pytest.raises(accel.NumericError, match="^unet: .* after step 3 of 5, timestep 49"):
        denoise(unet, table, normals(1, 2, 4, 8, 8), noise=noise, check_finite=True,
                progress=lambda i, t: rows.append(i))
    assert rows == [0, 1]
    finite = denoise(unet, table, normals(1, 2, 4, 8, 8), check_finite=True)
    assert np.isfinite(finite).all()


@pytest.mark.parametrize("what", ["noise", "registers"])
def test_memory_of_another_shape_is_refused(unet, what):
    with pytest.raises(accel.ShapeError, match=what):
        denoise(unet, schedule(), normals(1, 2, 4, 8, 8),
                **{what: np.zeros((5, 2, 4, 8, 9), np.float32)})
    frozen = np.zeros((6, 2, 4, 8, 8), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(accel.InvalidArgument, match="read-only"):
        denoise(unet, schedule(), normals(1, 2, 4, 8, 8), registers=frozen)

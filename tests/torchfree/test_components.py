"""UNet, VAE and TextEncoder: any producer of tensors in, fresh arrays out, nothing kept or lost."""

import ctypes
import gc
import json
import weakref

import numpy as np
import pytest
import tiny

import accel
from accel import _core, reporting

UNET, VAE, TEXT = (tiny.PARTS["sd"][n] for n in ("unet", "vae", "text_encoder"))
TEXT_2 = tiny.PARTS["sdxl"]["text_encoder_2"]


def make(cls, part, **options):
    return cls(part["config"], tiny.weights(part["shapes"]), **options)


@pytest.fixture(scope="module")
def unet():
    return make(accel.UNet, UNET)


def unet_inputs(batch=2, size=8, tokens=5, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(batch, 4, size, size)).astype(dtype),
            rng.normal(size=(batch, tokens, 24)).astype(dtype))


class Producer:
    """A DLPack producer of another library: no array interface, no buffer."""

    def __init__(self, array, device=(1, 0), legacy=False):
        self.array, self.device, self.legacy = array, device, legacy
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if self.legacy and options:
            raise TypeError("unexpected keyword")
        return self.array.__dlpack__(**options)


# ---- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    Producer, lambda a: Producer(a, legacy=True), np.asfortranarray,
    lambda a: np.repeat(a, 2, axis=2)[:, :, ::2], lambda a: a[:, ::-1][:, ::-1].copy()[:, :],
    lambda a: np.flip(np.flip(a, 3).copy(), 3)])
def test_any_producer_and_any_strides(unet, wrap):
    sample, states = unet_inputs()
    expected = unet(sample, 10, states)
    assert np.array_equal(unet(wrap(sample), 10, states), expected)
    assert accel.report(unet)["native_runs"] >= 2


def test_read_only_arrays(unet):
    sample, states = unet_inputs()
    expected = unet(sample, 10, states)
    for array in (sample, states):
        array.flags.writeable = False
    assert np.array_equal(unet(sample, 10, states), expected)
    weights = tiny.weights(UNET["shapes"])
    for array in weights.values():
        array.flags.writeable = False
    assert np.array_equal(accel.UNet(UNET["config"], weights)(sample, 10, states), expected)


def test_half_and_bfloat16(unet):
    sample, states = unet_inputs()
    expected = unet(sample, 10, states)
    half = unet(sample.astype(np.float16), 10, states.astype(np.float16))
    assert half.dtype == np.float16
    assert 0 < np.abs(half - expected).max() < 0.02
    brain = make(accel.UNet, UNET, dtype="bfloat16")(sample, 10, states)
    assert isinstance(brain, accel.Tensor) and brain.dtype == "bfloat16"
    assert brain.shape == expected.shape
    assert 0 < np.abs(np.asarray(brain) - expected).max() < 0.1
    # a Tensor is a producer as well
    again = unet(brain, 10, states)
    assert again.dtype == "bfloat16" and np.isfinite(np.asarray(again)).all()


def test_half_precision_weights_are_computed_in_float32():
    sample, states = unet_inputs()
    half = {n: w.astype(np.float16) for n, w in tiny.weights(UNET["shapes"]).items()}
    full = {n: w.astype(np.float32) for n, w in half.items()}
    out = accel.UNet(UNET["config"], half)(sample, 10, states)
    assert np.array_equal(out, accel.UNet(UNET["config"], full)(sample, 10, states))


@pytest.mark.parametrize("time", [10, 10.0, np.float32(10), np.array(10), np.array([10, 10]),
                                  np.array([10.0], np.float64), [10, 10]])
def test_timesteps(unet, time):
    sample, states = unet_inputs()
    assert np.array_equal(unet(sample, time, states), unet(sample, 10, states))
    assert not np.array_equal(unet(sample, 11, states), unet(sample, 10, states))


def test_mask(unet):
    sample, states = unet_inputs()
    all_seen = unet(sample, 10, states, encoder_attention_mask=np.ones((2, 5), bool))
    assert np.abs(all_seen - unet(sample, 10, states)).max() < 1e-5
    mask = np.array([[1, 1, 1, 0, 0]] * 2)
    cut = unet(sample, 10, states[:, :3])
    assert np.abs(unet(sample, 10, states, encoder_attention_mask=mask) - cut).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sizes_in_half_precision(dtype):
    """SDXL's time_ids count as they are given, whatever the dtype of sample and results."""
    unet = make(accel.UNet, tiny.PARTS["sdxl"]["unet"], dtype=dtype)
    rng = np.random.default_rng(0)
    sample, states, pooled = (rng.normal(size=shape).astype(np.float16) for shape in (
        (2, 4, 8, 8), (2, 5, 48), (2, 24)))
    ids = np.array([[1024, 1536, 0, 17, 4099, 2049]] * 2)

    def run(ids):
        if dtype == "bfloat16":
            return np.asarray(unet(sample.astype(np.float32), 10, states, text_embeds=pooled,
                                   time_ids=ids))
        return unet(sample, 10, states, text_embeds=pooled, time_ids=ids)

    exact = run(ids.astype(np.float32))
    for given in (ids.astype(np.float64), ids, ids.astype(np.int32)):
        assert np.array_equal(run(given), exact)
    assert np.array_equal(run(ids.astype(np.float16)), run(ids.astype(np.float16).astype(float)))
    assert not np.array_equal(run(ids.astype(np.float16)), exact)


def test_text(sd_folder):
    encoder = accel.TextEncoder.from_pretrained(sd_folder)
    ids = np.array([[598, 5, 6, 599], [598, 7, 599, 599]])
    out = encoder(ids, hidden_states=True, clip_skip=1)
    assert out.last_hidden_state.shape == (2, 4, 24) and out.pooled.shape == (2, 24)
    assert len(out.hidden_states) == 4 and out.clip_skip.shape == (2, 4, 24)
    assert np.array_equal(out.pooled[1], out.last_hidden_state[1, 2])
    for dtype in (np.int32, np.int16, np.uint16):
        assert np.array_equal(encoder(ids.astype(dtype)).pooled, out.pooled)
    masked = encoder(ids, np.array([[1, 1, 1, 0]] * 2))
    assert np.abs(masked.last_hidden_state[:, :3] - out.last_hidden_state[:, :3]).max() < 1e-6
    with pytest.raises(accel.InvalidArgument, match="600|599"):
        encoder(ids + 500)
    with pytest.raises(accel.InvalidArgument):
        encoder(-ids)


def test_vae():
    vae = make(accel.VAE, VAE)
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 12, 16)).astype(np.float32)
    posterior = vae.encode(image)
    assert posterior.mean.shape == posterior.std.shape == (1, 4, 6, 8)
    assert vae.decode(posterior.mode()).shape == image.shape
    drawn = posterior.sample(accel.Generator(3))
    assert np.array_equal(drawn, posterior.sample(accel.Generator(3)))
    assert not np.array_equal(drawn, posterior.mean)


# ---- weights -------------------------------------------------------------------------------------


def test_weights_are_borrowed_and_let_go():
    class Array(np.ndarray):
        pass

    weights = {n: w.view(Array) for n, w in tiny.weights(TEXT["shapes"]).items()}
    alive = [weakref.ref(w) for w in weights.values()]
    encoder = accel.TextEncoder(TEXT["config"], weights)
    before = encoder(np.array([[1, 2]])).pooled
    del weights
    gc.collect()
    junk = [np.full(s, 9, np.float32) for s in TEXT["shapes"].values()]
    assert np.array_equal(encoder(np.array([[1, 2]])).pooled, before)
    del junk, encoder
    gc.collect()
    assert not any(w() is not None for w in alive)


def test_a_change_of_borrowed_weights_is_noticed_by_check():
    weights = tiny.weights(TEXT["shapes"])
    set_ = _core.Weights()
    for name, array in weights.items():
        set_.set(name, array)
    encoder = accel.TextEncoder(TEXT["config"], set_)
    ids = np.array([[1, 2, 3]])
    before = encoder(ids).pooled
    assert set_.check() == 0
    for array in weights.values():
        array *= 1.5
    set_.check()
    after = encoder(ids).pooled
    assert np.array_equal(after, accel.TextEncoder(TEXT["config"], weights)(ids).pooled)
    assert not np.array_equal(before, after)


def test_binding_a_weight_anew():
    weights = tiny.weights(TEXT["shapes"])
    set_ = _core.Weights()
    for name, array in weights.items():
        set_.set(_core.weight_name("CLIPTextModel", name), array)
    encoder = accel.TextEncoder(TEXT["config"], set_)
    ids = np.array([[1, 2, 3]])
    before, generation = encoder(ids).pooled, set_.generation
    for name in list(weights):
        weights[name] = (weights[name] * 1.5).astype(np.float16)
        set_.set(_core.weight_name("CLIPTextModel", name), weights[name])
    assert set_.generation > generation
    after = encoder(ids).pooled
    assert np.array_equal(after, accel.TextEncoder(TEXT["config"], weights)(ids).pooled)
    assert not np.array_equal(before, after)


def test_what_is_derived_is_listed_and_may_be_dropped():
    half = {n: w.astype(np.float16) for n, w in tiny.weights(TEXT["shapes"]).items()}
    encoder = accel.TextEncoder(TEXT["config"], half)
    ids = np.array([[1, 2, 3]])
    before = encoder(ids).pooled
    listed = accel.report(encoder)["derived"]
    assert listed and all(d["bytes"] > 0 and d["sources"] and d["valid"] for d in listed)
    encoder._weights.drop_derived()
    assert accel.report(encoder)["derived_bytes"] == 0
    assert np.array_equal(encoder(ids).pooled, before)


def test_all_wrong_weights_in_one_message():
    weights = tiny.weights(UNET["shapes"])
    names = list(weights)
    del weights[names[3]]
    weights[names[5]] = np.zeros((3, 3), np.float32)
    weights["stowaway.weight"] = np.zeros(3, np.float32)
    weights[names[7]] = weights[names[7]].astype(np.int32)
    with pytest.raises(accel.WeightsError) as error:
        accel.UNet(UNET["config"], weights)
    for name in (names[3], names[5], names[7], "stowaway.weight", "[3, 3]", "int32"):
        assert name in str(error.value)


# ---- results -------------------------------------------------------------------------------------


def test_results_are_fresh(unet):
    sample, states = unet_inputs()
    first = unet(sample, 10, states)
    kept = first.copy()
    second = unet(sample * 2, 10, states)
    assert np.array_equal(first, kept) and not np.shares_memory(first, second)


def test_tensor_object():
    tensor = accel.Tensor((2, 3), "bfloat16")
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor.fill(values)
    assert np.array_equal(np.asarray(tensor), values)
    assert np.asarray(tensor, dtype=np.float64).dtype == np.float64
    assert tensor.__dlpack_device__() == (1, 0)
    flipped = accel.Tensor((2, 3), "float32")
    flipped.fill(values[::-1, ::-1])
    assert np.array_equal(np.from_dlpack(flipped), values[::-1, ::-1])
    for version in (None, (1, 0), (0, 8)):
        capsule = flipped.__dlpack__(max_version=version)
        name = b"dltensor_versioned" if version == (1, 0) else b"dltensor"
        valid = ctypes.pythonapi.PyCapsule_IsValid
        valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
        assert valid(capsule, name)
    # an array made of it keeps the memory
    array = np.from_dlpack(flipped)
    del flipped, capsule
    gc.collect()
    assert np.array_equal(array, values[::-1, ::-1])


def test_the_prompt_section_is_reused_only_for_its_token():
    model = make(accel.UNet, UNET)._model
    sample, states = unet_inputs()
    args = {"entry": "forward", "batch": 2, "height": 8, "width": 8, "tokens": 5, "timesteps": 1}
    times = np.array([10], np.float32)

    def run(states, token):
        out = np.empty_like(sample)
        model.run(args, {"sample": sample, "timestep": times, "encoder_hidden_states": states},
                  {"sample": out}, token)
        return out

    other = states + 1
    plain, changed = run(states, 0), run(other, 0)
    assert not np.array_equal(plain, changed)
    assert np.array_equal(run(states, 7), plain)
    assert np.array_equal(run(other, 7), plain)  # the token says: nothing changed
    assert np.array_equal(run(other, 8), changed)
    assert np.array_equal(run(states, 0), plain)


def test_one_device_for_a_set_of_weights(sd_folder):
    weights = _core.Weights()
    weights.add_folder(sd_folder / "unet", "diffusion_pytorch_model")
    config = (sd_folder / "unet" / "config.json").read_text()
    planned = _core.Model(config, weights, "null")
    with pytest.raises(accel.InvalidArgument, match="another device"):
        _core.Model(config, weights)
    args = {"batch": 1, "height": 8, "width": 8, "tokens": 5, "timesteps": 1}
    with pytest.raises(accel.InvalidArgument, match="computes nothing"):
        planned.run(args, {}, {})
    del planned
    assert _core.Model(config, weights).io(args)


def test_a_recording_that_failed_is_reported(unet):
    """None does here: the CPU records nothing."""
    assert accel.report(unet)["unrecorded"] == ""

    class Model:
        def stats(self):
            return unet.stats | {"unrecorded": "cuda: why"}

    entry = reporting.entry_of("UNet", Model(), None)
    assert entry["unrecorded"] == "cuda: why"
    assert "one by one" in str(reporting.Report(entry)) and "cuda: why" in str(
        reporting.Report(entry))
    assert "one by one" not in str(accel.report(unet))


def planned(unet, sizes, results):
    """How often a round over sizes (batch, size, tokens) plans; plan_ms is the newest plan's own.
    The results of one size are the same each time."""
    count = 0
    for size in sizes:
        before = unet.stats["plan_ms"]
        sample, states = unet_inputs(*size)
        found = unet(sample, 10, states)
        assert np.array_equal(found, results.setdefault(size, found))
        count += unet.stats["plan_ms"] != before
    return count


def test_twenty_alternating_sizes_are_planned_once():
    unet, results = make(accel.UNet, UNET), {}
    sizes = [(1 + i % 3, 8 + 8 * (i % 5), 5 + i) for i in range(20)]
    assert [planned(unet, sizes, results) for _ in range(4)] == [20, 0, 0, 0]
    assert unet.stats["plans"] == unet.stats["execs"] == 20


def test_plans_are_not_kept_without_end():
    """The least recently used ones go."""
    unet, results = make(accel.UNet, UNET), {}
    sizes = [(1, 8, 1 + i) for i in range(40)]
    assert planned(unet, sizes, results) == 40
    stats = unet.stats
    assert stats["plans"] == stats["execs"] == 32 and stats["keep_bytes"] > 0
    assert planned(unet, sizes[8:], results) == 0
    assert planned(unet, sizes[:8], results) == 8 and planned(unet, sizes[16:], results) == 0


def test_plans_that_keep_much_are_few():
    """Here they keep K and V of 9 MB and more; eight of them whatever that is."""
    unet, results = make(accel.UNet, UNET), {}
    sizes = [(1, 8, 24000 + i) for i in range(9)]
    assert planned(unet, sizes, results) == 9
    stats = unet.stats
    assert stats["plans"] == 8 and stats["keep_bytes"] > 64 << 20
    small = [(1, 8, 1 + i) for i in range(20)]
    assert planned(unet, small, results) == 20  # the large ones go as they grow old
    assert planned(unet, small, results) == 0 and unet.stats["keep_bytes"] < 64 << 20


def test_plans_and_explain(unet):
    text = unet.explain(height=8, width=8, tokens=5)
    assert "conv_in" in text and "arena" in text
    data = json.loads(unet.explain(json=True, height=8, width=8, tokens=5))
    assert data
    dumped = unet.explain(passes=True, height=8, width=8, tokens=5)
    assert len(dumped) > len(text)
    both = json.loads(unet.explain(json=True, passes=True, height=8, width=8, tokens=5))
    assert both["plan"] == data and both["passes"][-1]["pass"] == "rescale"
    assert all("conv_in" in [n["node"] for n in p["graph"]["nodes"]] for p in both["passes"])
    stats = unet.stats
    assert stats["plans"] >= 1 and stats["arena_bytes"] >= stats["bound_bytes"] > 0

"""A compiled module returns what the original returns: values, types, dtypes, for every form of
call that the engine takes."""

import inspect

import pytest
import torch
from dropin import SIZES, call, close, inputs, module, ran

import accel

KINDS = [("unet", "sd"), ("unet", "sdxl"), ("vae", "sd"), ("text_encoder", "sd"),
         ("text_encoder_2", "sdxl")]


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request):
    return request.param


def pair(kind, dtype=torch.float32):
    """The same module twice, the second one compiled."""
    return module(*kind, dtype), accel.compile(module(*kind, dtype))


def test_values(kind):
    eager, fast = pair(kind)
    args, named = inputs(*kind)
    with ran(fast, 1):
        assert close(call(fast, kind[0], args, named), call(eager, kind[0], args, named))
    other, named = inputs(*kind, seed=1)
    with ran(fast, 1):
        changed = call(fast, kind[0], other, named)
    assert close(changed, call(eager, kind[0], other, named))
    assert not close(changed, call(fast, kind[0], *inputs(*kind)), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind, dtype):
    """Not further from the truth than PyTorch's own half precision is."""
    truth = module(*kind, dtype).float()
    eager, fast = pair(kind, dtype)
    errors = [0.0, 0.0]
    for seed in range(4):
        args, named = inputs(*kind, dtype=dtype, seed=seed)
        exact_args, exact_named = widen(args), widen(named)
        exact = call(truth, kind[0], exact_args, exact_named)
        with ran(fast, 1):
            ours = call(fast, kind[0], args, named)
        assert ours.dtype == dtype
        for i, out in enumerate((ours, call(eager, kind[0], args, named))):
            errors[i] += float((out.float() - exact).square().mean().sqrt())
    assert 0 < errors[0] <= 1.1 * errors[1], errors


def widen(value):
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: widen(v) for k, v in value.items()}
    return tuple(map(widen, value)) if isinstance(value, tuple) else value


def test_it_is_the_same_object():
    m = module("unet")
    before = type(m), m.config, list(m.state_dict()), repr(m), m.dtype, m.device
    assert accel.compile(m) is m
    assert (type(m), m.config, list(m.state_dict()), repr(m), m.dtype, m.device) == before
    assert accel.compile(m) is m  # twice is once
    args, _ = inputs("unet")
    with ran(m, 1):
        m(*args)


def test_weights_are_borrowed():
    m = module("unet")
    places = {n: (id(p), p.data_ptr()) for n, p in m.named_parameters()}
    values = {n: p.clone() for n, p in m.named_parameters()}
    accel.compile(m)
    with ran(m, 1):
        m(*inputs("unet")[0])
    assert {n: (id(p), p.data_ptr()) for n, p in m.named_parameters()} == places
    assert all(torch.equal(p, values[n]) for n, p in m.named_parameters())
    owned = sum(p.nbytes for p in m.parameters())
    report = accel.report(m)
    assert report["copied_bytes"] == 0 and report["derived_bytes"] < 6 * owned
    assert all(d["sources"] for d in report["derived"])


@pytest.mark.parametrize("method", ["forward", "decode", "encode", "_decode"])
def test_signatures_stay(method):
    kind = "unet" if method == "forward" else "vae"
    eager, fast = pair((kind, "sd"))
    assert inspect.signature(getattr(fast, method)) == inspect.signature(getattr(eager, method))
    assert inspect.signature(fast.forward) == inspect.signature(eager.forward)
    assert getattr(fast, method).__name__ == method


# ---- UNet ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", [
    3, 3.5, torch.tensor(3), torch.tensor(3.5), torch.tensor([3]), torch.tensor([3, 900]),
    torch.tensor([3.5, 2.5], dtype=torch.float64), torch.tensor(3, dtype=torch.int32)], ids=repr)
def test_timesteps(time):
    eager, fast = pair(("unet", "sd"))
    (sample, _, states), _ = inputs("unet")
    with ran(fast, 1):
        assert close(fast(sample, time, states).sample, eager(sample, time, states).sample)


@pytest.mark.parametrize("change", [
    lambda x: x.to(memory_format=torch.channels_last), lambda x: x.flip(3).flip(3),
    lambda x: torch.cat([x, x], 1)[:, :4], lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    lambda x: x.repeat(2, 1, 1, 1).chunk(2)[1]])
def test_strides_of_the_sample(change):
    eager, fast = pair(("unet", "sd"))
    (sample, t, states), _ = inputs("unet")
    with ran(fast, 1):
        assert close(fast(change(sample), t, states).sample, eager(sample, t, states).sample)


@pytest.mark.parametrize(("batch", "height", "width", "tokens"), [
    (1, 8, 8, 5), (3, 8, 12, 5), (2, 9, 7, 5), (2, 13, 16, 154), (1, 2, 2, 1), (2, 1, 5, 93)])
def test_any_size(batch, height, width, tokens):
    eager, fast = pair(("unet", "sd"))
    sample, states = torch.randn(batch, 4, height, width), torch.randn(batch, tokens, 24)
    with ran(fast, 1):
        assert close(fast(sample, 5, states).sample, eager(sample, 5, states).sample)


def test_returned_forms():
    eager, fast = pair(("unet", "sd"))
    args, _ = inputs("unet")
    a, b = fast(*args, return_dict=False), eager(*args, return_dict=False)
    assert type(a) is type(b) is tuple and len(a) == len(b) == 1
    a, b = fast(*args), eager(*args)
    assert type(a) is type(b) and torch.equal(a[0], a.sample) and a.keys() == b.keys()
    sample, t, states = args
    named = fast(sample=sample, timestep=t, encoder_hidden_states=states).sample
    assert torch.equal(named, a.sample)
    assert accel.report(fast)["native_runs"] == 3


def test_results_are_fresh():
    """Samplers keep model outputs over steps: PNDM, LMS, DPM++."""
    fast = accel.compile(module("unet"))
    (sample, t, states), _ = inputs("unet")
    first = fast(sample, t, states).sample
    kept = first.clone()
    second = fast(sample * 2, t, states).sample
    assert torch.equal(first, kept) and first.data_ptr() != second.data_ptr()
    assert not second.requires_grad
    second.add_(1)
    assert torch.equal(fast(sample, t, states).sample, kept)


def test_cross_attention_mask():
    eager, fast = pair(("unet", "sd"))
    args, _ = inputs("unet")
    for mask in (torch.tensor([[1, 1, 1, 0, 0]] * 2), torch.ones(2, 5, dtype=torch.bool)):
        with ran(fast, 1):
            out = fast(*args, encoder_attention_mask=mask).sample
        assert close(out, eager(*args, encoder_attention_mask=mask).sample)


def test_the_prompt_section_follows_its_inputs():
    """Reuse of K and V must notice: other values in the same tensor, a freed tensor's memory taken
    by another, SDXL's added conditions, inference tensors without a version counter."""
    for which in ("sd", "sdxl"):
        eager, fast = pair(("unet", which))
        args, named = inputs("unet", which)
        sample, t, states = args

        def same(states, fast=fast, eager=eager, sample=sample, t=t, named=named):
            return close(fast(sample, t, states, **named).sample,
                         eager(sample, t, states, **named).sample)

        with ran(fast):
            assert same(states) and same(states)
            states.mul_(2)
            assert same(states)
            states.data.mul_(0.5)  # moves no version counter
            assert same(states)
            for seed in range(4):
                g = torch.Generator().manual_seed(seed)
                assert same(torch.randn(states.shape, generator=g))
            if named:
                named["added_cond_kwargs"]["time_ids"][0, 0] = 900
                assert same(states)
                named["added_cond_kwargs"]["text_embeds"].add_(1)
                assert same(states)
            with torch.inference_mode():
                states = torch.randn(states.shape)
                assert same(states)
                states.mul_(2)
                assert same(states)


def test_the_prompt_section_is_reused(monkeypatch):
    fast = accel.compile(module("unet"))
    args, _ = inputs("unet")
    tokens = []
    native = fast._accel
    token = native._token
    monkeypatch.setattr(native, "_token", lambda t: tokens.append(token(t)) or tokens[-1])
    for _ in range(3):
        fast(*args)
    fast(args[0], args[1], args[2] + 1)
    fast(*args)
    assert tokens[0] == tokens[1] == tokens[2] == tokens[4] != tokens[3]
    assert 0 not in tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.int64, torch.float16])
def test_sizes_of_any_dtype(dtype, given):
    """Sinusoids of SDXL's sizes are computed from what was given, in float32, whatever the
    module's dtype: not from sizes rounded to that."""
    kind = ("unet", "sdxl")
    truth = module(*kind, dtype).float()
    eager, fast = pair(kind, dtype)
    args, named = inputs(*kind, dtype=dtype)
    added = named["added_cond_kwargs"]
    added["time_ids"] = torch.tensor(SIZES).to(given)
    with ran(fast, 1):
        ours = fast(*args, **named).sample
    theirs, exact = eager(*args, **named).sample, truth(*widen(args), **widen(named)).sample
    if dtype == torch.float32:
        assert close(ours, theirs)
        return
    mine, other = (float((x.float() - exact).square().mean().sqrt()) for x in (ours, theirs))
    assert 0 < mine <= 1.1 * other
    rounded = added | {"time_ids": torch.tensor(SIZES).to(given).to(dtype)}
    if not torch.equal(rounded["time_ids"].double(), added["time_ids"].double()):
        wrong = truth(*widen(args), added_cond_kwargs=widen(rounded)).sample
        assert float((wrong - exact).square().mean().sqrt()) > 5 * mine


# ---- nothing waits -------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """What asked for a tensor's values since the last clear(), in modules that look at them as
    they do on a GPU, where that waits."""
    from accel import torch_watch

    monkeypatch.setattr(torch_watch, "by_value", lambda device: False)
    found = []

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            found.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name in ("__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__",
                 "item", "tolist", "numpy", "cpu", "nonzero"):
        count(torch.Tensor, name)
    for name in ("equal", "allclose", "nonzero"):
        count(torch, name)
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", [torch.float16, torch.float32, torch.int64])
def test_no_value_of_a_unets_conditions_is_read(reads, given, masked):
    """And the prompt section is reused for the same objects, whatever their dtypes."""
    fast = accel.compile(module("unet", "sdxl", torch.float16))
    args, named = inputs("unet", "sdxl", dtype=torch.float16)
    added = named["added_cond_kwargs"]
    added["time_ids"] = torch.tensor(SIZES).to(given)
    added["text_embeds"] = added["text_embeds"].float()
    if masked:
        named["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    native, tokens = fast._accel, []
    token = native._token
    native._token = lambda t: tokens.append(token(t)) or tokens[-1]
    with ran(fast, 5):
        first = fast(*args, **named).sample
        again = [fast(*args, **named).sample for _ in range(2)]
        added["time_ids"].add_(100)
        after = fast(*args, **named).sample
        states = args[2]
        states.data = states * 2  # moves no version counter
        last = fast(*args, **named).sample
    assert reads == []
    assert tokens[0] == tokens[1] == tokens[2] and len(set(tokens[2:])) == 3 and 0 not in tokens
    assert all(torch.equal(x, first) for x in again)
    assert not close(after, first, 1e-2) and not close(last, after, 1e-2)


@pytest.mark.parametrize("kind", [("text_encoder", "sd"), ("text_encoder_2", "sdxl")])
def test_a_mask_is_read_once(kind, reads):
    eager, fast = pair(kind)
    (ids,), _ = inputs(kind[0])
    masks = [torch.tensor([[1] * n + [0] * (9 - n)] * 2) for n in (7, 9, 4)]

    def results(mask, count=3):
        reads.clear()
        with ran(fast, count):
            found = [fast(ids, mask).last_hidden_state for _ in range(count)]
        mine = reads.copy()
        expected = eager(ids, mask).last_hidden_state
        assert all(close(x, expected) for x in found)
        return mine, found[0]

    firsts = [results(mask) for mask in masks]
    assert all(len(read) == 1 for read, _ in firsts)
    assert all(results(mask)[0] == [] for mask in masks)
    masks[0][:, 3:] = 0  # in place
    read, found = results(masks[0])
    assert len(read) == 1 and not close(found, firsts[0][1], 1e-2)
    masks[2].data = torch.ones_like(masks[2])  # moves no version counter
    read, found = results(masks[2])
    assert len(read) == 1 and not close(found, firsts[2][1], 1e-2)
    hiding = torch.tensor([[1] * 9, [0] + [1] * 8])
    with ran(fast, 0, 2, "hides the first token"):
        assert close(fast(ids, hiding).last_hidden_state, eager(ids, hiding).last_hidden_state)
        found = fast._accel.calls.masks.get((hiding,))
        fast(ids, hiding)
    assert found == [True, True]
    with torch.inference_mode():
        mask = masks[0].clone()
        assert len(results(mask)[0]) == 3  # has no version: looked at each time


def test_what_was_seen_on_the_cpu_is_not_asked_of_another_device():
    """A text encoder keeps what it knows of masks when it moves."""
    from accel.torch_watch import Seen

    seen, here, there = Seen(2), torch.ones(2, 3), torch.ones(2, 3, device="meta")
    seen.add((here,), "here")
    assert seen.get((there,)) is None and seen.get((torch.ones(2, 3),)) == "here"
    assert seen.get((here, here)) is None and seen.get((here.int(),)) is None
    seen.add((there,), "there")
    assert seen.get((there,)) == "there" and seen.get((torch.ones_like(there),)) is None


def test_masks_that_are_gone_are_not_taken_for_others(reads):
    """A new tensor may get the identity and the memory of one that was freed."""
    eager, fast = pair(("text_encoder", "sd"))
    (ids,), _ = inputs("text_encoder")
    with ran(fast, 12):
        for n in (9, 7, 4) * 4:
            mask = torch.tensor([[1] * n + [0] * (9 - n)] * 2)
            assert close(fast(ids, mask).last_hidden_state, eager(ids, mask).last_hidden_state)
            del mask


# ---- VAE -----------------------------------------------------------------------------------------


def test_vae_methods():
    eager, fast = pair(("vae", "sd"))
    image = torch.randn(2, 3, 16, 20)
    with ran(fast, 1):
        a = fast.encode(image)
    b = eager.encode(image)
    assert type(a) is type(b) and type(a.latent_dist) is type(b.latent_dist)
    for name in ("mean", "logvar", "std", "var"):
        assert close(getattr(a.latent_dist, name), getattr(b.latent_dist, name))
    draws = [x.latent_dist.sample(torch.Generator().manual_seed(1)) for x in (a, b)]
    assert close(*draws)
    latents = b.latent_dist.mode()
    with ran(fast, 3):
        assert close(fast.decode(latents).sample, eager.decode(latents).sample)
        out = fast.decode(latents, return_dict=False, generator=None)
        assert type(out) is tuple
        assert close(fast.encode(image, return_dict=False)[0].mean, b.latent_dist.mean)
    with ran(fast, 2):  # forward is encode and decode
        assert close(fast(image).sample, eager(image).sample)


def test_vae_slicing_is_native_tiling_is_not():
    eager, fast = pair(("vae", "sd"))
    latents = torch.randn(3, 4, 8, 8)
    for m in (eager, fast):
        m.enable_slicing()
    with ran(fast, 3):
        assert close(fast.decode(latents).sample, eager.decode(latents).sample)
    for m in (eager, fast):
        m.disable_slicing()
        m.enable_tiling()
        m.tile_latent_min_size, m.tile_sample_min_size = 6, 12
    with ran(fast, 0, 1, "tiling"):
        assert torch.equal(fast.decode(latents).sample, eager.decode(latents).sample)
    with ran(fast, 0, 1, "tiling"):
        fast.encode(torch.randn(1, 3, 16, 16))
    with ran(fast, 1):
        fast.decode(latents[:, :, :5, :5])


def test_vae_parts_are_refused_by_name():
    vae = module("vae")
    for part in (vae.decoder, vae.encoder, vae.quant_conv):
        with pytest.raises(accel.UnsupportedError) as error:
            accel.compile(part)
        assert type(part).__name__ in str(error.value) and "AutoencoderKL" in str(error.value)


# ---- text encoders -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [("text_encoder", "sd"), ("text_encoder_2", "sdxl")])
@pytest.mark.parametrize("options", [
    {}, {"output_hidden_states": True}, {"return_dict": False},
    {"output_hidden_states": True, "return_dict": False}, {"output_hidden_states": False},
    {"attention_mask": None, "position_ids": None},
    {"attention_mask": torch.tensor([[1] * 7 + [0] * 2] * 2)},
    {"attention_mask": torch.ones(2, 9, dtype=torch.int64)}])
def test_text_forms(kind, options):
    eager, fast = pair(kind)
    (ids,), _ = inputs(kind[0])
    with ran(fast, 1):
        a = fast(ids, **options)
    b = eager(ids, **options)
    assert type(a) is type(b)
    if not isinstance(a, tuple):
        assert list(a.keys()) == list(b.keys())
    flat = [[t for x in tuple(out) for t in (x if isinstance(x, tuple) else (x,))] for out in (
        a if isinstance(a, tuple) else a.to_tuple(), b if isinstance(b, tuple) else b.to_tuple())]
    assert len(flat[0]) == len(flat[1]) and all(map(close, *flat))
    if options.get("output_hidden_states"):
        assert isinstance(tuple(a)[-1] if isinstance(a, tuple) else a[-1], tuple)


def test_text_hidden_states_by_config():
    eager, fast = pair(("text_encoder", "sd"))
    (ids,), _ = inputs("text_encoder")
    for m in (eager, fast):
        m.config.output_hidden_states = True
    with ran(fast, 1):
        assert len(fast(ids).hidden_states) == len(eager(ids).hidden_states) == 4


def test_text_ids_of_int32():
    eager, fast = pair(("text_encoder", "sd"))
    (ids,), _ = inputs("text_encoder")
    with ran(fast, 1):
        assert close(fast(ids.int()).last_hidden_state, eager(ids).last_hidden_state)


def test_eager_hooks_of_transformers_do_not_matter():
    """Asking the original for hidden states leaves hooks on its layers."""
    m = module("text_encoder")
    (ids,), _ = inputs("text_encoder")
    m(ids, output_hidden_states=True)
    accel.compile(m)
    with ran(m, 1):
        m(ids, output_hidden_states=True)


def test_threads_are_pytorchs_unless_chosen():
    fast = accel.compile(module("vae"))
    args, _ = inputs("vae")
    results = []
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(fast.decode(*args).sample)
            assert accel.get_num_threads() == n
        accel.set_num_threads(2)
        results.append(fast.decode(*args).sample)
        assert accel.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        accel.set_num_threads(0)
    assert all(torch.equal(results[0], r) for r in results)


# ---- memory --------------------------------------------------------------------------------------


def test_short_memory_is_tried_again_with_all_that_can_go(monkeypatch):
    """What a GPU does: the model's other plans go first, then what PyTorch keeps; no third try."""
    from accel.torch_native import with_room

    done = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("cache"))

    class Model:
        def drop_plans(self):
            done.append("plans")

    def run(failures):
        def attempt():
            done.append("run")
            if done.count("run") <= failures:
                raise accel.OutOfMemory("short")
            return 5

        return attempt

    cuda = torch.device("cuda", 0)
    assert with_room(Model(), cuda, run(0)) == 5 and done == ["run"]
    done.clear()
    assert with_room(Model(), cuda, run(1)) == 5 and done == ["run", "plans", "cache", "run"]
    for device, again, count in ((cuda, lambda: True, 2), (cuda, lambda: False, 1),
                                 (torch.device("cpu"), lambda: True, 1)):
        done.clear()
        with pytest.raises(accel.OutOfMemory):
            with_room(Model(), device, run(9), again)
        assert done.count("run") == count

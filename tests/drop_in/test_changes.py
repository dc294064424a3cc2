"""Weights and modules that change after compile: noticed at the next call, no wrong picture."""

import copy
import gc
import io
import pickle
import threading
import time
import weakref

import pytest
import torch
from dropin import call, close, inputs, module, ran
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

import accel

DTYPES = [torch.float32, torch.float16]


def agrees(fast, kind="unet", native=1, dtype=torch.float32):
    """The compiled module against a plain copy of itself as it is now."""
    plain = copy.deepcopy(fast)
    assert "_accel" not in plain.__dict__
    args, named = inputs(kind, dtype=dtype)
    with ran(fast, native):
        ours = call(fast, kind, args, named)
    assert close(ours, call(plain, kind, args, named), 2e-5 if dtype == torch.float32 else 2e-2)
    return ours


def every_parameter(m, change):
    for p in m.parameters():
        change(p)


IN_PLACE = {
    "mul_": lambda m: every_parameter(m, lambda p: p.mul_(1.1)),
    "data.mul_": lambda m: every_parameter(m, lambda p: p.data.mul_(1.1)),
    "set_": lambda m: every_parameter(m, lambda p: p.set_(p.detach() * 1.1)),
    "data =": lambda m: every_parameter(m, lambda p: setattr(p, "data", p.data * 1.1)),
    "load_state_dict": lambda m: m.load_state_dict({n: t * 1.1 for n, t in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({n: t * 1.1 for n, t in m.state_dict().items()},
                                          assign=True),
    "swap": lambda m: [setattr(s, k, torch.nn.Parameter(p * 1.1)) for s in m.modules()
                       for k, p in list(s._parameters.items()) if p is not None],
    "numpy": lambda m: every_parameter(m, lambda p: p.detach().numpy().__imul__(1.1)),
    "copy_": lambda m: every_parameter(m, lambda p: p.data.copy_(p.data * 1.1)),
}


@pytest.mark.parametrize("kind", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("how", IN_PLACE)
def test_changed_weights(kind, how):
    fast = accel.compile(module(kind))
    before = agrees(fast, kind)
    IN_PLACE[how](fast)
    after = agrees(fast, kind)
    assert not close(after, before, 1e-3)
    assert close(agrees(fast, kind), after, 0)


@pytest.mark.parametrize("how", ["data.mul_", "data =", "load_state_dict"])
def test_changed_half_precision_weights(how):
    """All of them are derived: float32 copies, made again when the source changes."""
    fast = accel.compile(module("unet", dtype=torch.float16))
    before = agrees(fast, dtype=torch.float16)
    IN_PLACE[how](fast)
    assert not close(agrees(fast, dtype=torch.float16), before, 1e-3)


def test_every_single_parameter_counts():
    """One weight at a time, changed behind everybody's back: each must show in the result."""
    fast = accel.compile(module("unet"))
    args, _ = inputs("unet")
    last = fast(*args).sample
    unseen = []
    with ran(fast):
        for name, p in fast.named_parameters():
            p.data.add_(0.05 * torch.randn(p.shape))
            now = fast(*args).sample
            if torch.equal(now, last):
                unseen.append(name)
            last = now
    # a key's bias would cancel in the softmax, but these attentions have none
    assert unseen == []
    assert close(last, copy.deepcopy(fast)(*args).sample)


def test_only_what_changed_is_made_again():
    fast = accel.compile(module("unet", dtype=torch.float16))
    agrees(fast, dtype=torch.float16)
    fast.conv_in.weight.data = fast.conv_in.weight.data * 2
    native = fast._accel
    made = {d["key"] for d in native.weights.derived() if d["valid"]}
    native._follow(fast)
    kept = {d["key"] for d in native.weights.derived() if d["valid"]}
    assert made - kept and len(kept) > 0.8 * len(made)
    assert all("conv_in" in key for key in made - kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_another_dtype_and_back(dtype):
    """What from_pipe does to a shared module, and SDXL's pipeline to its VAE."""
    fast = accel.compile(module("unet"))
    first = agrees(fast)
    assert fast.to(None, dtype) is fast
    assert fast.dtype == dtype
    args, _ = inputs("unet", dtype=dtype)
    with ran(fast, 0 if dtype == torch.float64 else 1, int(dtype == torch.float64)):
        out = fast(*args).sample
    assert out.dtype == dtype and close(out.float(), first, 0.05)
    fast.to(torch.float32)
    agrees(fast)
    fast.half().float()
    agrees(fast)


def test_a_move_that_moves_nothing_keeps_everything():
    fast = accel.compile(module("unet"))
    agrees(fast)
    native = fast._accel
    model = native.model
    for move in (lambda: fast.to("cpu"), lambda: fast.to(torch.float32), lambda: fast.float(),
                 lambda: fast.cpu(), lambda: fast.to(None, None), lambda: fast.eval(),
                 lambda: fast.requires_grad_(False)):
        move()
        agrees(fast)
    assert native.model is model


def test_to_lets_go_of_the_old_memory():
    fast = accel.compile(module("unet"))
    agrees(fast)
    old = [weakref.ref(p.untyped_storage()) for p in fast.parameters()]
    storages = [p.data for p in fast.parameters()]
    alive = weakref.ref(storages[0])
    del storages
    fast.half()
    gc.collect()
    assert fast._accel.weights is None and alive() is None and old


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last(dtype):
    fast = accel.compile(module("unet", dtype=dtype))
    agrees(fast, dtype=dtype)
    fast.to(memory_format=torch.channels_last)
    assert not fast.conv_in.weight.is_contiguous()
    before = agrees(fast, dtype=dtype)
    assert accel.report(fast)["copied_bytes"] > 0
    fast.conv_in.weight.data.mul_(1.5)
    assert not close(agrees(fast, dtype=dtype), before, 1e-3)
    fast.to(memory_format=torch.contiguous_format)
    agrees(fast, dtype=dtype)
    assert accel.report(fast)["copied_bytes"] == 0


def test_a_parameter_that_cannot_be_bound_is_not_taken_for_bound():
    """The original runs for as long as it is so; another one that moved with it is seen too."""
    fast = accel.compile(module("unet"))
    agrees(fast)
    kept = fast.conv_in.weight.data
    wide = torch.randn(*kept.shape[:-1], 2 * kept.shape[-1])
    fast.conv_in.weight.data = wide[..., ::2]
    fast.conv_out.weight.data = fast.conv_out.weight.data * 2
    args, named = inputs("unet")
    plain = copy.deepcopy(fast)
    with ran(fast, 0, 3, "conv_in.weight is a view with gaps"):
        for _ in range(3):
            assert close(call(fast, "unet", args, named), call(plain, "unet", args, named))
    fast.conv_in.weight.data = kept
    agrees(fast)


def test_parameters_that_move_while_a_profile_runs():
    fast = accel.compile(module("unet"))
    before = agrees(fast)
    thread = threading.Thread(target=lambda: accel.explain(fast, profile=True, repeats=1500))
    thread.start()
    while not fast._accel.active and thread.is_alive():
        time.sleep(0.01)
    fast.conv_in.weight.data = fast.conv_in.weight.data * 3
    after = agrees(fast)
    assert thread.is_alive() and not close(after, before, 1e-3)
    thread.join()
    assert close(agrees(fast), after, 0) and fast._accel.active == 0


def test_channels_last_first_called_in_inference_mode():
    fast = accel.compile(module("unet").to(memory_format=torch.channels_last))
    with torch.inference_mode():
        before = agrees(fast)
    assert accel.report(fast)["copied_bytes"] > 0
    fast.conv_in.weight.data.mul_(1.5)
    assert not close(agrees(fast), before, 1e-3)


def test_state_dict_and_save(tmp_path):
    fast = accel.compile(module("unet"))
    agrees(fast)
    plain = copy.deepcopy(fast)
    assert list(fast.state_dict()) == list(plain.state_dict())
    fast.save_pretrained(tmp_path)
    loaded = type(fast).from_pretrained(tmp_path)
    args, _ = inputs("unet")
    assert torch.equal(loaded(*args).sample, plain(*args).sample)
    assert loaded.config["block_out_channels"] == list(plain.config["block_out_channels"])


def test_decompile():
    fast = accel.compile(module("vae"))
    before = dict(module("vae").__dict__)
    agrees(fast, "vae")
    assert accel.decompile(fast) is fast
    assert set(fast.__dict__) == set(before)
    with pytest.raises(accel.InvalidArgument):
        accel.report(fast)
    assert accel.decompile(fast) is fast
    accel.compile(fast)
    agrees(fast, "vae")


def test_decompile_gives_back_plain_parameters(tmp_path):
    fast = accel.compile(module("unet"))
    agrees(fast)
    accel.decompile(fast)
    save_file(fast.state_dict(), tmp_path / "w.safetensors")
    saved = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(saved[n], p) for n, p in fast.named_parameters())


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save", "replica"])
def test_copies_are_plain(how):
    fast = accel.compile(module("vae"))
    agrees(fast, "vae")
    if how == "deepcopy":
        other = copy.deepcopy(fast)
    elif how == "copy":
        other = copy.copy(fast)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fast))
    elif how == "replica":  # of nn.DataParallel, which gives it tensors of another GPU
        other = fast._replicate_for_data_parallel()
        assert "forward" not in other.__dict__ and accel.compile_.native_of(other) is None
        assert not {"_encode", "_decode", "_apply", "load_state_dict"} & set(other.__dict__)
        return
    else:
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert set(other.__dict__) == set(module("vae").__dict__)
    args, _ = inputs("vae")
    runs = accel.report(fast)["native_runs"]
    assert close(other.decode(*args).sample, fast.decode(*args).sample)
    assert accel.report(fast)["native_runs"] == runs + 1
    if how != "copy":
        other.decoder.conv_in.weight.data.mul_(3)
        assert not close(other.decode(*args).sample, fast.decode(*args).sample, 1e-3)
    accel.compile(other)
    with ran(other, 1):
        other.decode(*args)


def test_parameters_that_left_are_let_go_of():
    """Layers that moved one by one, as layerwise casting does: the engine, which cannot run them,
    does not keep what was there before."""
    fast = accel.compile(module("unet"))
    agrees(fast)
    old = [StorageWeakRef(p.untyped_storage()) for p in fast.down_blocks.parameters()]
    assert not any(ref.expired() for ref in old)
    fast.down_blocks.to(torch.float16)
    with pytest.raises(RuntimeError, match="dtype|type"), ran(fast, 0, 1):
        fast(*inputs("unet")[0])
    assert all(ref.expired() for ref in old)
    fast.down_blocks.to(torch.float32)
    agrees(fast)


def test_memory_is_freed_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        fast = accel.compile(module("unet"))
        agrees(fast)
        gone = weakref.ref(fast), weakref.ref(fast.conv_in), weakref.ref(fast._accel)
        del fast
        assert [g() for g in gone] == [None] * 3
    finally:
        gc.enable()


def test_refresh():
    fast = accel.compile(module("unet"))
    before = agrees(fast)
    assert accel.refresh(fast) is fast
    assert accel.report(fast)["plans"] == 0
    assert close(agrees(fast), before, 0)


def test_new_embeddings_after_compile():
    """Textual inversion grows the vocabulary."""
    fast = accel.compile(module("text_encoder"))
    agrees(fast, "text_encoder")
    fast.resize_token_embeddings(610)
    fast.get_input_embeddings().weight.data[600:] = torch.randn(10, 24)
    agrees(fast, "text_encoder")
    ids = torch.tensor([[598, 605, 599]])
    with ran(fast, 1):
        out = fast(ids).last_hidden_state
    assert close(out, copy.deepcopy(fast)(ids).last_hidden_state)
    assert not close(out, fast(torch.tensor([[598, 606, 599]])).last_hidden_state, 1e-3)


def test_replaced_submodule_of_the_same_kind():
    fast = accel.compile(module("unet"))
    before = agrees(fast)
    other = torch.nn.Conv2d(4, 16, 3, padding=1)
    torch.nn.init.normal_(other.weight)
    fast.conv_in = other.eval()
    assert not close(agrees(fast), before, 1e-3)


def test_a_thread_each():
    fast = accel.compile(module("unet"))
    plain = copy.deepcopy(fast)
    cases = [inputs("unet", seed=i, size=8 + 2 * (i % 3))[0] for i in range(6)]
    expected = [plain(*a).sample for a in cases]
    results = [None] * 6

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                results[i] = fast(*cases[i]).sample

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    with ran(fast, 30):
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert all(close(r, e) for r, e in zip(results, expected, strict=True))


def test_fork_while_another_thread_examines_the_module():
    """A child runs it though the thread that held its lock is not there."""
    import os
    import signal

    fast = accel.compile(module("unet"))
    args = inputs("unet")[0]
    before = fast(*args).sample
    held, over = threading.Event(), threading.Event()

    def hold():
        with fast._accel.lock:
            held.set()
            over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        runs = fast._accel.native_runs
        right = torch.equal(before, fast(*args).sample)
        os._exit(0 if right and fast._accel.native_runs == runs + 1 else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    over.set()
    thread.join()


@pytest.mark.parametrize("which", ["sd", "sdxl"])
def test_the_prompt_section_watches_weights_that_are_used_in_place(which):
    """Without merging nothing is derived of keys and values: only a checksum sees them change."""
    fast = accel.compile(module("unet", which), passes_off="merge_linears")
    args, named = inputs("unet", which)
    before = fast(*args, **named).sample
    native = fast._accel
    assert len(native._prompt_weights()) >= 2
    for name, p in fast.named_parameters():
        if ".attn2.to_k." in name or ".attn2.to_v." in name or name.startswith("add_embedding"):
            p.data.mul_(1.3)
    with ran(fast, 1):
        after = fast(*args, **named).sample
    assert not close(after, before, 1e-3)
    assert close(after, copy.deepcopy(fast)(*args, **named).sample)


def test_negative_views_are_left_to_pytorch():
    """Their bytes are the other sign's: neither pointer, shape nor strides tell."""
    fast = accel.compile(module("unet"))
    agrees(fast)
    p = next(fast.parameters())
    p.data = torch._neg_view(p.data)
    plain = copy.deepcopy(fast)
    args, named = inputs("unet")
    with pytest.warns(accel.FallbackWarning, match="negative view"):
        ours = call(fast, "unet", args, named)
    assert torch.equal(ours, call(plain, "unet", args, named))
    assert accel.report(fast)["native_runs"] == 1

"""Parameters laid out for a GPU, on the CPU: there the engine copies all the same, but everything
that PyTorch sees is as it would be."""

import copy
import inspect

import diffusers
import pytest
import safetensors.torch
import torch
from dropin import call, close, draw, inputs, loop_ran, module, pipeline, ran, same
from torch.multiprocessing.reductions import StorageWeakRef

import accel
from accel import torch_layout, torch_native
from accel.torch_native import Native


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(torch_layout, "ON_CPU", [True])


def laid(kind="unet", which="sd"):
    """A plain module, and one that was laid out by a call."""
    plain, fast = module(kind, which), accel.compile(module(kind, which))
    args, named = inputs(kind, which)
    with ran(fast, native=1):
        a = call(fast, kind, args, named)
    assert close(a, call(plain, kind, args, named))
    return plain, fast


def joined(m):
    """Parameters that are views of a larger tensor, and those in channels_last."""
    ps = dict(m.named_parameters())
    return ({n for n, p in ps.items() if p.untyped_storage().nbytes() > p.nbytes},
            {n for n, p in ps.items() if not p.is_contiguous()})


def again(plain, fast, kind="unet", which="sd"):
    args, named = inputs(kind, which, seed=4)
    with ran(fast, native=1):
        a = call(fast, kind, args, named)
    assert close(a, call(plain, kind, args, named))
    return a


def test_what_moves():
    plain, fast = laid()
    views, permuted = joined(fast)
    block = "mid_block.attentions.0.transformer_blocks.0"
    assert {f"{block}.attn1.to_{x}.weight" for x in "qkv"} <= views
    assert {f"{block}.attn2.to_{x}.weight" for x in "kv"} <= views
    assert {"mid_block.resnets.0.time_emb_proj.weight",
            "mid_block.resnets.0.time_emb_proj.bias"} <= views
    assert "conv_in.weight" in permuted and "mid_block.resnets.0.conv1.weight" in permuted
    q, k, v = (fast.get_parameter(f"{block}.attn1.to_{x}.weight") for x in "qkv")
    assert k.data_ptr() == q.data_ptr() + q.nbytes and v.data_ptr() == k.data_ptr() + k.nbytes
    for name, p in fast.named_parameters():
        assert type(p) is torch.nn.Parameter and torch.equal(p, plain.get_parameter(name)), name
    # another size asks for nothing more
    before = {n: p.data_ptr() for n, p in fast.named_parameters()}
    args, _ = inputs("unet", batch=3, size=16, tokens=9)
    with ran(fast, native=1):
        a = call(fast, "unet", args)
    assert close(a, call(plain, "unet", args))
    assert before == {n: p.data_ptr() for n, p in fast.named_parameters()}


@pytest.mark.parametrize(("kind", "which"), [("vae", "sd"), ("text_encoder", "sd"),
                                             ("unet", "sdxl"), ("text_encoder_2", "sdxl")])
def test_every_kind(kind, which):
    plain, fast = laid(kind, which)
    assert any(joined(fast))
    again(plain, fast, kind, which)


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_old_memory_goes_while_parameters_move(kind, monkeypatch):
    """Not at the end: then a module would be there twice."""
    fast = accel.compile(module(kind))
    old = {p: StorageWeakRef(p.untyped_storage()) for p in fast.parameters()}
    kept = []

    def bind(self, i):
        real(self, i)
        kept.append(sum(old[p].cdata != p.untyped_storage()._cdata and not old[p].expired()
                        for p in old))

    real = Native._bind
    monkeypatch.setattr(Native, "_bind", bind)
    args, named = inputs(kind)
    with ran(fast, native=1):
        call(fast, kind, args, named)
    assert len(kept) > len(old) and max(kept) == 0


def test_decompile_gives_separate_contiguous_parameters():
    plain, fast = laid()
    ids = {n: id(p) for n, p in fast.named_parameters()}
    accel.decompile(fast)
    assert joined(fast) == (set(), set())
    assert ids == {n: id(p) for n, p in fast.named_parameters()}
    for name, p in fast.named_parameters():
        assert torch.equal(p, plain.get_parameter(name)), name


def test_what_was_channels_last_stays_so():
    fast = module("unet").to(memory_format=torch.channels_last)
    before = {n: (p.data_ptr(), p.stride()) for n, p in fast.named_parameters() if p.ndim == 4}
    accel.compile(fast)
    call(fast, "unet", inputs("unet")[0])
    accel.decompile(fast)
    assert before == {n: (p.data_ptr(), p.stride()) for n, p in fast.named_parameters()
                      if p.ndim == 4}


def test_state_dict_and_loading_in_place():
    plain, fast = laid()
    state = {n: t.clone() * 1.25 for n, t in fast.state_dict().items()}
    assert list(state) == list(plain.state_dict())
    before = {n: p.data_ptr() for n, p in fast.named_parameters()}
    a = again(plain, fast)
    for m in (plain, fast):
        m.load_state_dict(state)
    assert before == {n: p.data_ptr() for n, p in fast.named_parameters()}
    assert not close(again(plain, fast), a)
    with torch.no_grad():
        for m in (plain, fast):
            m.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.weight.mul_(3)
            m.conv_in.weight.add_(0.1)
    again(plain, fast)


def test_assigning_a_state_dict():
    plain, fast = laid()
    state = {n: t.clone() * 1.25 for n, t in plain.state_dict().items()}
    for m in (plain, fast):
        m.load_state_dict(copy.deepcopy(state), assign=True)
    again(plain, fast)
    assert all(joined(fast))


@pytest.mark.parametrize("shards", [None, "40KB"])
def test_saving(tmp_path, shards):
    plain, fast = laid()
    options = {} if shards is None else {"max_shard_size": shards}
    for m, name in ((plain, "plain"), (fast, "fast")):
        m.save_pretrained(tmp_path / name, **options)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "fast")
    for name, p in loaded.named_parameters():
        assert torch.equal(p, plain.get_parameter(name)) and p.is_contiguous(), name
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors"))
             for n in ("plain", "fast")]
    assert abs(sizes[0] - sizes[1]) < 0.1 * sizes[0]
    torch.save(fast.state_dict(), tmp_path / "state.pt")
    again_ = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in again_.items())
    accel.decompile(fast)
    safetensors.torch.save_file(fast.state_dict(), tmp_path / "x.safetensors")


def test_copies():
    plain, fast = laid()
    other = copy.deepcopy(fast)
    assert "_accel" not in other.__dict__
    args, _ = inputs("unet")
    assert close(call(other, "unet", args), call(plain, "unet", args), 1e-5)
    with torch.no_grad():
        other.conv_in.weight.zero_()
        other.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.zero_()
    again(plain, fast)


def test_moving():
    plain, fast = laid()
    fast.to(torch.float64).to(torch.float32)
    plain.to(torch.float64).to(torch.float32)
    again(plain, fast)
    fast.to(memory_format=torch.contiguous_format)
    again(plain, fast)
    for m in (plain, fast):
        m.to(torch.bfloat16)
    args, named = inputs("unet", dtype=torch.bfloat16)
    with ran(fast, native=1):
        a = call(fast, "unet", args, named)
    assert close(a, call(plain, "unet", args, named), 0.05)
    accel.decompile(fast)
    assert joined(fast) == (set(), set())


def test_training_goes_on_after_decompile():
    """Gradients and an optimizer's steps over parameters that had been laid out."""
    plain, fast = laid()
    accel.decompile(fast)
    losses = []
    with torch.enable_grad():
        for m in (plain, fast):
            optimizer = torch.optim.SGD(m.parameters(), lr=1e-3)
            for _ in range(2):
                optimizer.zero_grad()
                loss = call(m, "unet", inputs("unet")[0]).square().mean()
                loss.backward()
                optimizer.step()
            losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_gradients_while_compiled():
    plain, fast = laid()
    grads = []
    with torch.enable_grad():
        for m in (plain, fast):
            args = list(inputs("unet")[0])
            args[0] = args[0].requires_grad_()
            m(*args).sample.square().mean().backward()
            grads.append({n: p.grad for n, p in m.named_parameters()})
    for name, g in grads[0].items():
        assert close(grads[1][name], g, 1e-4), name


def test_a_first_call_that_is_refused_costs_no_layout():
    plain, fast = module("text_encoder"), accel.compile(module("text_encoder"))
    with pytest.raises((ValueError, RuntimeError, IndexError)), ran(fast, 0, 1):
        fast(torch.zeros(1, 99, dtype=torch.int64))
    again(plain, fast, "text_encoder")
    assert joined(fast)[0]


def test_no_memory_for_a_layout(monkeypatch):
    """The call goes on with what is where it was, and the next one tries again."""
    join, left = torch_layout._join, [3]

    def join_some(*args):
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("no")
        join(*args)

    monkeypatch.setattr(torch_layout, "_join", join_some)
    plain, fast = module("unet"), accel.compile(module("unet"))
    again(plain, fast)
    some = len(joined(fast)[0])
    again(plain, fast)
    monkeypatch.undo()
    monkeypatch.setattr(torch_layout, "ON_CPU", [True])
    other = laid()[1]
    assert 0 < some < len(joined(fast)[0]) == len(joined(other)[0])
    assert accel.report(fast)["derived_bytes"] == accel.report(other)["derived_bytes"]


@pytest.fixture
def _by_version(monkeypatch):
    """Changes in place are looked for as on a GPU; gives what was waited for."""
    waits = []
    monkeypatch.setattr(Native, "by_value", False)
    monkeypatch.setattr(torch_native, "wait", lambda *place: waits.append(place))
    return waits


def adapt(m, kind="unet", **options):
    from peft import LoraConfig

    names = {"unet": ["to_q", "to_k", "to_v", "conv", "conv1"],
             "text_encoder": ["q_proj", "v_proj", "fc1"]}[kind]
    torch.manual_seed(0)
    m.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False), **options)


def merge(m):
    m.fuse_lora()
    m.unload_lora()


@pytest.mark.usefixtures("_by_version")
@pytest.mark.parametrize("which", ["sd", "sdxl"])
def test_adapters_merged_and_gone_between_two_calls(which):
    """Objects, addresses and versions are as before; only the adapters' verbs were seen."""
    plain, fast = laid("unet", which)
    a = again(plain, fast, "unet", which)
    args, named = inputs("unet", which)
    last = a
    for step in (lambda m: (adapt(m), merge(m)), lambda m: (adapt(m, adapter_name="b"), merge(m))):
        for m in (plain, fast):
            step(m)
        for _ in range(2):
            with ran(fast, native=1):
                b = call(fast, "unet", args, named)
            assert close(b, call(plain, "unet", args, named))
        assert not close(b, last, 1e-2)
        last = b


@pytest.mark.usefixtures("_by_version")
@torch.inference_mode()
def test_weights_loaded_into_inference_tensors():
    """They have no versions and are not laid out: what is derived of them is made anew."""
    plain, fast = laid()
    assert next(fast.parameters()).is_inference()
    a = again(plain, fast)
    other = {n: p.flip(0) for n, p in plain.state_dict().items()}
    for m in (plain, fast):
        m.load_state_dict(other)
    assert not close(again(plain, fast), a, 1e-2)


@pytest.mark.usefixtures("_by_version")
def test_adapters_merged_before_an_interrupt(monkeypatch):
    """What was merged is still to be seen by the call after the one that Ctrl-C ended."""
    plain, fast = laid()
    a = again(plain, fast)
    for m in (plain, fast):
        adapt(m)
        merge(m)

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch_native, "config_text", interrupted)
        fast(*inputs("unet")[0])
    assert not close(again(plain, fast), a, 1e-2)


@pytest.mark.usefixtures("_by_version")
def test_adapters_merged_into_copied_parameters():
    plain, fast = module("unet"), module("unet")
    weight = fast.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight
    weight.data = weight.data.t().contiguous().t()
    accel.compile(fast)
    a = again(plain, fast)
    assert accel.report(fast)["copied_bytes"] > 0
    for m in (plain, fast):
        adapt(m)
        merge(m)
    assert not close(again(plain, fast), a, 1e-2)


@pytest.mark.usefixtures("_by_version")
def test_adapters_merged_and_gone_through_a_text_encoder():
    """diffusers merges those of a text encoder layer by layer, not by a verb of the module."""
    from diffusers.utils import recurse_remove_peft_layers

    plain, fast = laid("text_encoder")
    a = again(plain, fast, "text_encoder")
    for m in (plain, fast):
        adapt(m, "text_encoder")
        for layer in list(m.modules()):
            if hasattr(layer, "merge"):
                layer.merge()
        recurse_remove_peft_layers(m)
    assert not close(again(plain, fast, "text_encoder"), a, 1e-2)


@pytest.mark.usefixtures("_by_version")
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_adapters_of_a_pipeline_between_two_pictures(sd_folder, tmp_path, part):
    from peft.utils import get_peft_model_state_dict

    donor = pipeline(sd_folder)
    adapt(getattr(donor, part), part)
    type(donor).save_lora_weights(
        tmp_path, **{f"{part}_lora_layers": get_peft_model_state_dict(getattr(donor, part))})
    plain, fast = pipeline(sd_folder), accel.compile(pipeline(sd_folder))
    with loop_ran(fast):
        a = draw(fast)
    for pipe in (plain, fast):
        pipe.load_lora_weights(tmp_path)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    for _ in range(2):
        with loop_ran(fast):
            b = draw(fast)
        assert abs(b - draw(plain)).max() < 3e-5 < 1e-3 < abs(b - a).max()
    assert not accel.report(fast)["components"][part]["fallbacks"]


def test_what_is_moved_or_copied_is_there_for_all_streams(_by_version, monkeypatch):
    """Before and after parameters move, at each that moves, and after copies are made; no other
    call waits."""
    waits, lay_out = _by_version, torch_layout.lay_out

    def watched(*args):
        waits.append("lay out")
        return lay_out(*args)

    monkeypatch.setattr(torch_layout, "lay_out", watched)
    fast = accel.compile(module("unet"))
    args, _ = inputs("unet")
    device = torch.device("cpu")
    with ran(fast, native=1):
        fast(*args)
    model = fast._accel.model
    moved = len(fast._accel.laid)
    assert waits == [(device, model), "lay out", *[(device,)] * moved, (device, model)]
    waits.clear()
    with ran(fast, native=1):
        fast(*args)
    assert not waits
    weight = fast.mid_block.attentions[0].transformer_blocks[0].ff.net[2].weight
    weight.data = weight.data.t().contiguous().t()  # the engine reads a copy
    for change, least in ((None, 1), (lambda: weight.mul_(2), 1), (None, 0)):
        if change:
            change()
        waits.clear()
        with ran(fast, native=1):
            fast(*args)
        assert waits.count((device, None)) >= least if least else not waits, waits


def test_the_verbs_of_adapters_are_given_back():
    m = module("unet")
    before = set(m.__dict__)
    accel.compile(m)
    assert {"fuse_lora", "load_lora_adapter"} <= set(m.__dict__)
    assert inspect.signature(m.fuse_lora) == inspect.signature(module("unet").fuse_lora)
    assert set(copy.deepcopy(m).__dict__) == before
    accel.decompile(m)
    assert set(m.__dict__) == before


def test_lora():
    plain, fast = laid()
    a = again(plain, fast)
    for m in (plain, fast):
        adapt(m)
    args, _ = inputs("unet")
    with ran(fast, native=0, fallbacks=1, reason="adapter"):
        b = call(fast, "unet", args)
    assert close(b, call(plain, "unet", args), 1e-5)
    for m in (plain, fast):
        merge(m)
    assert not close(again(plain, fast), a)


def test_a_pipeline(sd_folder):
    plain, fast = pipeline(sd_folder), accel.compile(pipeline(sd_folder))
    with loop_ran(fast):
        a = draw(fast)
    assert abs(a - draw(plain)).max() < 3e-5
    # what it was laid out for is what ran
    assert accel.report(fast)["components"]["unet"]["plans"] == 1
    assert any(joined(fast.unet)) and any(joined(fast.vae))
    accel.decompile(fast)
    for name in ("unet", "vae", "text_encoder"):
        assert joined(getattr(fast, name)) == (set(), set())


def capture(patch):
    patch.setattr(torch.cuda, "is_initialized", lambda: True)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_a_caller_who_records_a_graph(monkeypatch):
    """The engine stays out of it, and then leaves the parameters where that graph reads them."""
    plain, fast = module("unet"), accel.compile(module("unet"))
    before = {n: p.data_ptr() for n, p in fast.named_parameters()}
    args, _ = inputs("unet")
    with monkeypatch.context() as patch:
        capture(patch)
        with ran(fast, native=0, fallbacks=1, reason="CUDA graph capture"):
            a = call(fast, "unet", args)
    assert torch.equal(a, call(plain, "unet", args))
    again(plain, fast)
    assert before == {n: p.data_ptr() for n, p in fast.named_parameters()}


def test_a_caller_who_records_a_vae(monkeypatch):
    """In a capture nothing is computed, so its parameters are not taken to float32 and back."""
    fast = accel.compile(module("vae", "sdxl", torch.float16))
    assert fast.config["force_upcast"]
    before = {n: p.data_ptr() for n, p in fast.named_parameters()}
    capture(monkeypatch)
    with ran(fast, native=0, fallbacks=1, reason="CUDA graph capture"):
        call(fast, "vae", *inputs("vae", dtype=torch.float16))
    assert before == {n: p.data_ptr() for n, p in fast.named_parameters()}


def test_a_caller_who_records_a_pipeline(sd_folder, monkeypatch):
    pipes = pipeline(sd_folder), accel.compile(pipeline(sd_folder))
    capture(monkeypatch)
    same(pipes, stock="CUDA graph capture")
    assert accel.report(pipes[1])["components"]["unet"]["native_runs"] == 0


@pytest.mark.usefixtures("_by_version")
@pytest.mark.parametrize("kind", ["unet", "vae", "text_encoder"])
def test_a_first_call_in_inference_mode(kind):
    """What moves then still counts its changes, and a later one is seen."""
    plain, fast = module(kind), accel.compile(module(kind))
    args, named = inputs(kind)
    with torch.inference_mode(), ran(fast, native=1):
        call(fast, kind, args, named)
    assert any(joined(fast)) and not any(p.is_inference() for p in fast.parameters())
    with torch.no_grad():
        for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
            p.mul_(1.1)
            q.mul_(1.1)
    again(plain, fast, kind)
    accel.decompile(fast)
    assert not any(joined(fast)) and not any(p.is_inference() for p in fast.parameters())


def test_tied_parameters_are_left_alone():
    plain, fast = module("unet"), accel.compile(module("unet"))
    for m in (plain, fast):
        attn = m.mid_block.attentions[0].transformer_blocks[0].attn1
        attn.to_k.weight = attn.to_q.weight
    args, _ = inputs("unet")
    with ran(fast, native=1):
        a = call(fast, "unet", args)
    assert close(a, call(plain, "unet", args))
    attn = fast.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attn.to_k.weight is attn.to_q.weight
    again(plain, fast)

"""What the engine does not do runs the original, exactly, with one warning, and is counted."""

import contextlib
import copy
import warnings

import pytest
import torch
from dropin import call, close, inputs, module, ran

import accel


def falls_back(fast, reason, plain=None, kind="unet", args=None, named=None, count=1):
    """The compiled module gives what a plain copy of it gives, bit for bit, by the original."""
    base_args, base_named = inputs(kind)
    args, named = args or base_args, {**base_named, **(named or {})}
    plain = plain if plain is not None else copy.deepcopy(fast)
    with ran(fast, 0, count, reason):
        ours = call(fast, kind, args, named)
    assert torch.equal(ours, call(plain, kind, args, named))
    return ours


def runs_natively(fast, kind="unet"):
    args, named = inputs(kind)
    with ran(fast, 1):
        ours = call(fast, kind, args, named)
    assert close(ours, call(copy.deepcopy(fast), kind, args, named))
    return ours


@pytest.fixture
def unet():
    return accel.compile(module("unet"))


# ---- arguments -----------------------------------------------------------------------------------


def residuals():
    g = torch.Generator().manual_seed(3)
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4)]
    return [torch.randn(2, c, s, s, generator=g) for c, s in shapes], torch.randn(2, 32, 4, 4)


def test_controlnet_residuals(unet):
    down, mid = residuals()
    named = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
    out = falls_back(unet, "down_block_additional_residuals", named=named)
    assert not close(out, runs_natively(unet), 1e-3)


def test_t2i_residuals_are_popped_as_eager_pops_them(unet):
    def given():
        g = torch.Generator().manual_seed(3)
        return [torch.randn(2, 16, 8, 8, generator=g), torch.randn(2, 32, 4, 4, generator=g)]

    lists = [given(), given()]
    plain = copy.deepcopy(unet)
    args, _ = inputs("unet")
    with ran(unet, 0, 1, "down_intrablock_additional_residuals"):
        ours = unet(*args, down_intrablock_additional_residuals=lists[0]).sample
    assert torch.equal(ours, plain(*args, down_intrablock_additional_residuals=lists[1]).sample)
    assert len(lists[0]) == len(lists[1])


@pytest.mark.parametrize(("name", "value"), [
    ("attention_mask", torch.ones(2, 64)), ("cross_attention_kwargs", {"scale": 0.5}),
    ("added_cond_kwargs", {"image_embeds": [torch.ones(2, 1, 4)]}),
    ("class_labels", torch.tensor([1, 2]))])
def test_arguments(unet, name, value):
    args, _ = inputs("unet")
    plain = copy.deepcopy(unet)
    results = []
    with ran(unet, 0, 1, name):
        for m in (unet, plain):
            try:
                results.append(m(*args, **{name: value}).sample)
            except Exception as error:  # both must fail alike
                results.append(type(error))
    assert type(results[0]) is type(results[1])
    assert results[0] is results[1] or torch.equal(*results)


@pytest.mark.parametrize("named", [
    {"cross_attention_kwargs": {}}, {"cross_attention_kwargs": None}, {"added_cond_kwargs": {}},
    {"class_labels": None, "timestep_cond": None}, {"down_block_additional_residuals": None}])
def test_empty_arguments_are_native(unet, named):
    args, _ = inputs("unet")
    with ran(unet, 1):
        unet(*args, **named)


@pytest.mark.parametrize("call_wrongly", [
    lambda m, s, t, e: m(s), lambda m, s, t, e: m(s, t, e, nonsense=1),
    lambda m, s, t, e: m(s, t, None), lambda m, s, t, e: m(s[:, :3], t, e),
    lambda m, s, t, e: m(s, t, e[:, :, :5]), lambda m, s, t, e: m(s[0], t, e),
    lambda m, s, t, e: m(s, t, e[:1].expand(3, -1, -1)), lambda m, s, t, e: m(s.double(), t, e),
    lambda m, s, t, e: m(s.half(), t, e), lambda m, s, t, e: m(s, "x", e),
    lambda m, s, t, e: m(s, torch.ones(3), e), lambda m, s, t, e: m(None, t, e)])
def test_wrong_calls_fail_as_eager_fails(unet, call_wrongly):
    plain = copy.deepcopy(unet)
    args, _ = inputs("unet")
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call_wrongly(plain, *args)
    with warnings.catch_warnings(), pytest.raises(type(expected.value)):
        warnings.simplefilter("ignore")
        call_wrongly(unet, *args)
    assert accel.report(unet)["native_runs"] == 0
    runs_natively(unet)


# ---- the state of PyTorch ------------------------------------------------------------------------


def test_gradients(unet):
    args, _ = inputs("unet")
    with torch.enable_grad():
        sample = args[0].clone().requires_grad_()
        with ran(unet, 0, 1, "gradients"):
            out = unet(sample, *args[1:]).sample
        out.sum().backward()
        assert sample.grad is not None and sample.grad.abs().sum() > 0
        # parameters want gradients by default; that alone is no wish for them
        assert next(unet.parameters()).requires_grad
        with ran(unet, 1):
            assert not unet(*args).sample.requires_grad
        states = args[2].clone().requires_grad_()
        with ran(unet, 0, 1, "gradients"):
            assert unet(args[0], args[1], states).sample.requires_grad
    with ran(unet, 1):
        unet(sample, *args[1:])


def test_training_mode(unet):
    unet.train()
    falls_back(unet, "training")
    unet.eval()
    runs_natively(unet)
    unet.mid_block.train()
    falls_back(unet, "training")
    unet.eval()
    runs_natively(unet)


def test_autocast(unet):
    args, _ = inputs("unet")
    with torch.autocast("cpu", dtype=torch.bfloat16), ran(unet, 0, 1, "autocast"):
        ours = unet(*args).sample
        assert torch.equal(ours, copy.deepcopy(unet)(*args).sample)
    runs_natively(unet)


def test_inference_mode():
    with torch.inference_mode():
        unet = accel.compile(module("unet"))
        first = runs_natively(unet)
        for p in unet.parameters():
            p.mul_(1.2)
        assert not close(runs_natively(unet), first, 1e-3)


def test_tracing_and_vmap(unet):
    args, _ = inputs("unet")

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, sample):
            return self.unet(sample, args[1], args[2]).sample

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Wrapper(), args[0], check_trace=False)
    assert "tracing" in str(accel.report(unet)["fallbacks"])
    other = inputs("unet", seed=4)[0][0]
    assert close(traced(other), copy.deepcopy(unet)(other, *args[1:]).sample)
    runs_natively(unet)


def test_subclassed_tensors(unet):
    class Mine(torch.Tensor):
        pass

    args, _ = inputs("unet")
    with ran(unet, 0, 1, "Mine"):
        unet(args[0].as_subclass(Mine), *args[1:])


def test_torch_compile_around_it(unet):
    args, _ = inputs("unet")
    compiled = torch.compile(unet, backend="eager")
    with ran(unet, 2):
        assert close(compiled(*args).sample, copy.deepcopy(unet)(*args).sample)
        compiled(*args)


# ---- structure -----------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x)


def first_attention(m):
    return m.down_blocks[0].attentions[0].transformer_blocks[0].attn1


class OwnProcessor:
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states * 0.5


def hooked(m):
    m.mid_block.register_forward_hook(lambda mod, a, out: out * 1.5)


def pre_hooked(m):
    m.conv_out.register_forward_pre_hook(lambda mod, a: (a[0] * 1.5,))


def circular(m):
    for s in m.modules():
        if isinstance(s, torch.nn.Conv2d):
            s.padding_mode = "circular"
            s._reversed_padding_repeated_twice = [1, 1, 1, 1]


def own_conv(m):
    conv = m.conv_in
    conv._conv_forward = lambda x, w, b: torch.nn.functional.conv2d(x * 2, w, b, padding=1)


def parametrized(m):
    torch.nn.utils.parametrize.register_parametrization(m.conv_in, "weight", Scaled())


def own_class(m):
    norm = m.conv_norm_out
    norm.__class__ = type("Mine", (torch.nn.GroupNorm,), {"forward": lambda self, x: x})


STRUCTURE = {
    "forward hook": (hooked, "hook"),
    "pre hook": (pre_hooked, "hook"),
    "hook set directly": (lambda m: m.conv_in._forward_hooks.__setitem__(
        99, lambda mod, a, out: out * 2), "hook"),
    "attention processor": (lambda m: setattr(first_attention(m), "processor", OwnProcessor()),
                            "OwnProcessor"),
    "set_attn_processor": (lambda m: m.set_attn_processor(OwnProcessor()), "OwnProcessor"),
    "freeu": (lambda m: m.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), "up_blocks"),
    "forward of a child": (lambda m: setattr(m.conv_in, "forward", lambda x: torch.ones(
        x.shape[0], 16, *x.shape[2:])), "forward"),
    "circular padding": (circular, "padding_mode"),
    "own convolution": (own_conv, "_conv_forward"),
    "another activation": (lambda m: setattr(m, "conv_act", torch.nn.ReLU()), "conv_act"),
    "another eps": (lambda m: setattr(m.conv_norm_out, "eps", 0.5), "eps"),
    "a layer less": (lambda m: setattr(m.mid_block, "attentions", torch.nn.ModuleList().eval()),
                     "mid_block"),
    "an extra layer": (lambda m: setattr(m.conv_in, "extra", torch.nn.ReLU()), "extra"),
    "class of a child": (own_class, "conv_norm_out"),
    "parametrization": (parametrized, "conv_in"),
    "one child in half": (lambda m: m.time_embedding.half(), "dtypes"),
    "fused projections": (lambda m: m.fuse_qkv_projections(), "Fused"),
    "layerwise casting": (lambda m: m.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32), "forward"),
    "group offload": (lambda m: m.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level"), "forward"),
}


@pytest.mark.parametrize("when", ["before", "after compile", "after a call"])
@pytest.mark.parametrize("what", STRUCTURE)
def test_structure(what, when):
    change, reason = STRUCTURE[what]
    m = module("unet")
    if when == "before":
        change(m)
        accel.compile(m)
    else:
        accel.compile(m)
        if when == "after a call":
            runs_natively(m)
        change(m)
    plain = module("unet")
    change(plain)
    args, _ = inputs("unet")
    results = []
    with ran(m, 0, 1, reason):
        for x in (m, plain):
            try:
                results.append(x(*args).sample)
            except Exception as error:  # a change that breaks eager breaks ours alike
                results.append(type(error))
    assert results[0] is results[1] or torch.equal(*results)


UNDONE = {
    "freeu": (lambda m: m.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
              lambda m: m.disable_freeu()),
    "fused projections": (lambda m: m.fuse_qkv_projections(), lambda m: m.unfuse_qkv_projections()),
    "processor": (lambda m: m.set_attn_processor(OwnProcessor()),
                  lambda m: m.set_attn_processor(type(
                      module("unet").attn_processors.popitem()[1])())),
    "training": (lambda m: m.train(), lambda m: m.eval()),
    "hook": (lambda m: m.__dict__.__setitem__("_h", m.mid_block.register_forward_hook(
        lambda mod, a, out: out * 2)), lambda m: m.__dict__.pop("_h").remove()),
}


@pytest.mark.parametrize("what", UNDONE)
def test_what_is_undone_is_native_again(unet, what):
    change, undo = UNDONE[what]
    first = runs_natively(unet)
    change(unet)
    with ran(unet, 0, 1):
        unet(*inputs("unet")[0])
    undo(unet)
    assert close(runs_natively(unet), first)


@pytest.mark.parametrize("change", [
    lambda m: m.set_attention_slice("max"), lambda m: m.set_default_attn_processor(),
    lambda m: m.set_attention_slice(1)])
def test_forms_of_the_same_attention_are_native(unet, change):
    first = runs_natively(unet)
    change(unet)
    assert close(runs_natively(unet), first)


def test_root_hooks_are_native(unet):
    """torch calls them around our forward."""
    unet.register_forward_hook(lambda m, a, out: type(out)(sample=out.sample * 2))
    args, _ = inputs("unet")
    with ran(unet, 1):
        assert close(unet(*args).sample, copy.deepcopy(unet)(*args).sample)


def test_a_patched_class(unet, monkeypatch):
    from diffusers.models.resnet import ResnetBlock2D

    runs_natively(unet)
    original = ResnetBlock2D.forward

    def patched(self, *args, **kwargs):
        return original(self, *args, **kwargs) * 0.5

    monkeypatch.setattr(ResnetBlock2D, "forward", patched)
    falls_back(unet, "ResnetBlock2D")
    monkeypatch.undo()
    runs_natively(unet)


def test_global_hooks(unet):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, out: None)
    falls_back(unet, "global")
    handle.remove()
    runs_natively(unet)


def test_subclassed_and_meta_parameters(unet):
    class Mine(torch.nn.Parameter):
        pass

    conv = unet.conv_in
    weight = conv.weight
    conv.weight = Mine(weight.detach().clone())
    falls_back(unet, "Mine")
    conv.weight = weight
    runs_natively(unet)
    conv.weight = torch.nn.Parameter(torch.empty(weight.shape, device="meta"))
    args, _ = inputs("unet")
    with ran(unet, 0, 1, "meta"), contextlib.suppress(RuntimeError):
        unet(*args)
    conv.weight = weight
    runs_natively(unet)


# ---- adapters ------------------------------------------------------------------------------------


def lora(m):
    from peft import LoraConfig

    torch.manual_seed(5)
    m.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))


def test_lora(unet):
    first = runs_natively(unet)
    lora(unet)
    plain = module("unet")
    lora(plain)
    args, _ = inputs("unet")
    with ran(unet, 0, 2, "adapter"):
        ours = unet(*args).sample
        assert close(ours, plain(*args).sample, 1e-6)
        assert not close(ours, first, 1e-3)
        unet.disable_adapters()
        assert close(unet(*args).sample, first)
    unet.enable_adapters()
    unet.unload_lora()
    assert close(runs_natively(unet), first)


def test_lora_at_compile_time():
    m = module("unet")
    lora(m)
    accel.compile(m)
    falls_back(m, "adapter", plain=adapted())


def adapted():
    m = module("unet")
    lora(m)
    return m


def test_lora_on_the_text_encoder():
    from peft import LoraConfig

    m = accel.compile(module("text_encoder"))
    first = runs_natively(m, "text_encoder")
    m.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    args, _ = inputs("text_encoder")
    with ran(m, 0, 1, "adapter"):
        assert not close(m(*args).last_hidden_state, first, 1e-3)


# ---- warnings and compile itself -----------------------------------------------------------------


def test_one_warning_for_each_reason(unet):
    args, _ = inputs("unet")
    down, mid = residuals()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            unet(*args, down_block_additional_residuals=down, mid_block_additional_residual=mid)
        for _ in range(2):
            unet(*args, cross_attention_kwargs={"scale": 1.0})
        unet(*args)
    ours = [str(w.message) for w in caught if issubclass(w.category, accel.FallbackWarning)]
    assert len(ours) == 2
    assert "UNet2DConditionModel" in ours[0] and "residual" in ours[0]
    report = accel.report(unet)
    assert report["native_runs"] == 1 and sum(report["fallbacks"].values()) == 5
    assert "residual" in str(report) and "1 native runs, 5 fallbacks" in str(report)


def test_classes_that_are_not_supported():
    from diffusers import AutoencoderTiny, UNet2DModel
    from transformers import CLIPVisionConfig, CLIPVisionModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1, "image_size": 32, "patch_size": 16}
    for m in (torch.nn.Linear(2, 2), AutoencoderTiny(), CLIPVisionModel(CLIPVisionConfig(**small)),
              UNet2DModel(sample_size=8, block_out_channels=(32, 64),
                          down_block_types=("DownBlock2D",) * 2,
                          up_block_types=("UpBlock2D",) * 2)):
        with pytest.raises(accel.UnsupportedError) as error:
            accel.compile(m)
        assert type(m).__name__ in str(error.value)
        assert "UNet2DConditionModel" in str(error.value)


def test_a_subclass_is_not_taken_for_its_base():
    base = type(module("unet"))

    class Changed(base):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    m = module("unet")
    m.__class__ = Changed
    with pytest.raises(accel.UnsupportedError, match="Changed"):
        accel.compile(m)


def test_a_class_of_the_same_name_from_elsewhere():
    elsewhere = type("UNet2DConditionModel", (torch.nn.Linear,), {"__module__": "mine.unets"})
    with pytest.raises(accel.UnsupportedError, match=r"found mine\.unets\.UNet2DConditionModel"):
        accel.compile(elsewhere(2, 2))


def test_a_config_that_is_not_supported_is_named():
    from diffusers import UNet2DConditionModel

    m = UNet2DConditionModel(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
                             down_block_types=("DownBlock2D",) * 2, class_embed_type="timestep",
                             up_block_types=("UpBlock2D",) * 2, cross_attention_dim=8)
    with pytest.raises(accel.UnsupportedError, match="class_embed_type"):
        accel.compile(m)
    assert "_accel" not in m.__dict__ and "forward" not in m.__dict__


def test_a_replaced_forward_is_not_covered_up():
    m = module("unet")
    m.forward = lambda *a, **k: 3
    with pytest.raises(accel.UnsupportedError, match="already replaced"):
        accel.compile(m)

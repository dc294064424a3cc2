"""Whatever is passed, the answer is an exception that names the argument, and nothing breaks.

Every case is tried against the public call; afterwards the same object still computes what it did.
"""

import json
import math

import numpy as np
import pytest
import tiny

import accel
from accel import _core

UNET, VAE, TEXT = (tiny.PARTS["sd"][n] for n in ("unet", "vae", "text_encoder"))
F = np.float32
NAN, INF = math.nan, math.inf


def zeros(*shape, dtype=F):
    return np.zeros(shape, dtype)


@pytest.fixture(scope="module")
def unet():
    return accel.UNet(UNET["config"], tiny.weights(UNET["shapes"]))


@pytest.fixture(scope="module")
def vae():
    return accel.VAE(VAE["config"], tiny.weights(VAE["shapes"]))


@pytest.fixture(scope="module")
def text():
    return accel.TextEncoder(TEXT["config"], tiny.weights(TEXT["shapes"]))


@pytest.fixture(scope="module")
def pipe(sd_folder):
    return accel.Pipeline.from_pretrained(sd_folder)


class Fake:
    """Claims to be a DLPack tensor."""

    dtype, shape = "float32", (2, 4, 8, 8)

    def __init__(self, device=(1, 0), capsule=None, error=None):
        self.device, self.capsule, self.error = device, capsule, error

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        if self.error:
            raise self.error
        return self.capsule


# ---- networks ------------------------------------------------------------------------------------

SAMPLE, STATES = zeros(2, 4, 8, 8), zeros(2, 5, 24)
UNET_CASES = {
    "no tensor": ((None, 1, STATES), "sample"),
    "a string": (("x", 1, STATES), "sample"),
    "a list": (([1, 2], 1, STATES), "sample"),
    "rank": ((zeros(4, 8, 8), 1, STATES), "sample"),
    "empty": ((zeros(0, 4, 8, 8), 1, zeros(0, 5, 24)), "sample"),
    "channels": ((zeros(2, 3, 8, 8), 1, STATES), "sample"),
    "one pixel too few for the blocks": ((zeros(2, 4, 0, 8), 1, STATES), "sample"),
    "float64": ((zeros(2, 4, 8, 8, dtype=np.float64), 1, STATES), "sample"),
    "integers": ((zeros(2, 4, 8, 8, dtype=np.int64), 1, STATES), "sample"),
    "complex": ((zeros(2, 4, 8, 8, dtype=np.complex64), 1, STATES), "sample"),
    "objects": ((np.full((2, 4, 8, 8), None), 1, STATES), "sample"),
    "dates": ((np.zeros((2, 4, 8, 8), "M8[s]"), 1, STATES), "sample"),
    "batch": ((SAMPLE, 1, zeros(1, 5, 24)), "encoder_hidden_states"),
    "width": ((SAMPLE, 1, zeros(2, 5, 23)), "encoder_hidden_states"),
    "no tokens": ((SAMPLE, 1, zeros(2, 0, 24)), "encoder_hidden_states"),
    "states none": ((SAMPLE, 1, None), "encoder_hidden_states"),
    "nan time": ((SAMPLE, NAN, STATES), "timestep"),
    "endless time": ((SAMPLE, INF, STATES), "timestep"),
    "no time": ((SAMPLE, None, STATES), "timestep"),
    "three times": ((SAMPLE, [1, 2, 3], STATES), "timestep"),
    "text time": ((SAMPLE, "now", STATES), "timestep"),
    "cuda": ((Fake(device=(2, 0)), 1, STATES), "cuda"),
    "no capsule": ((Fake(capsule=3), 1, STATES), "sample"),
    "swapped endianness": ((SAMPLE.astype(">f4"), 1, STATES), "sample|float32"),
    "seven dimensions": ((zeros(1, 1, 1, 1, 1, 1, 1), 1, STATES), "sample"),
}


@pytest.mark.parametrize("case", UNET_CASES)
def test_unet(unet, case):
    args, words = UNET_CASES[case]
    expected = unet(SAMPLE, 5, STATES)
    with pytest.raises((accel.AccelError, TypeError, ValueError, BufferError), match=words):
        unet(*args)
    assert np.array_equal(unet(SAMPLE, 5, STATES), expected)


def test_an_exporter_that_raises(unet):
    with pytest.raises(ZeroDivisionError, match="mine"):
        unet(Fake(error=ZeroDivisionError("mine")), 1, STATES)


@pytest.mark.parametrize("extra", [
    {"text_embeds": zeros(2, 24)}, {"time_ids": zeros(2, 6)},
    {"encoder_attention_mask": zeros(2, 4)}, {"encoder_attention_mask": "no"}])
def test_unet_extras(unet, extra):
    with pytest.raises((accel.AccelError, ValueError)):
        unet(SAMPLE, 1, STATES, **extra)


def test_sdxl_conditions_are_required():
    part = tiny.PARTS["sdxl"]["unet"]
    unet = accel.UNet(part["config"], tiny.weights(part["shapes"]))
    states, good = zeros(2, 5, 48), {"text_embeds": zeros(2, 24), "time_ids": zeros(2, 6)}
    assert np.isfinite(unet(SAMPLE, 1, states, **good)).all()
    for missing in good:
        with pytest.raises(accel.AccelError, match=missing):
            unet(SAMPLE, 1, states, **{k: v for k, v in good.items() if k != missing})
    for wrong in ({"text_embeds": zeros(2, 23)}, {"time_ids": zeros(2, 7)},
                  {"time_ids": zeros(1, 6)}, {"time_ids": zeros(6)}):
        with pytest.raises(accel.AccelError, match="text_embeds|time_ids"):
            unet(SAMPLE, 1, states, **{**good, **wrong})


@pytest.mark.parametrize(("call", "words"), [
    (lambda v: v.decode(zeros(1, 3, 8, 8)), "latents"),
    (lambda v: v.decode(None), "latents"),
    (lambda v: v.decode(zeros(1, 4, 8)), "latents"),
    (lambda v: v.encode(zeros(1, 4, 8, 8)), "sample|image"),
    (lambda v: v.encode(zeros(1, 3, 0, 8)), "image"),
    (lambda v: v.encode(zeros(1, 3, 1, 1)), "image|height|sample|shape|size"),
    (lambda v: v.encode(zeros(1, 3, 8, 8, dtype=np.uint8)), "image"),
])
def test_vae(vae, call, words):
    with pytest.raises(accel.AccelError, match=words):
        call(vae)


@pytest.mark.parametrize(("call", "words"), [
    (lambda t: t(zeros(1, 4)), "input_ids"),
    (lambda t: t(None), "input_ids"),
    (lambda t: t(np.array([1, 2])), "input_ids"),
    (lambda t: t(np.zeros((1, 17), int)), "tokens|position"),
    (lambda t: t(np.zeros((1, 0), int)), "input_ids"),
    (lambda t: t(np.array([[1, -1]])), "input_ids: found -1, expected 0 to 599"),
    (lambda t: t(np.array([[600, 1]])), "input_ids: found 600, expected 0 to 599"),
    (lambda t: t(np.array([[600]])), "600|599"),
    (lambda t: t(np.array([[2**40]])), "ids"),
    (lambda t: t(np.array([[1]]), clip_skip=9), "clip_skip"),
    (lambda t: t(np.array([[1]]), clip_skip=-1), "clip_skip"),
    (lambda t: t(np.array([[1]]), clip_skip=1.5), "clip_skip"),
    (lambda t: t(np.array([[1, 2]]), np.ones((1, 3))), "attention_mask"),
])
def test_text(text, call, words):
    with pytest.raises(accel.AccelError, match=words):
        call(text)


# ---- making networks -----------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "words"), [
    (None, "config"), ([], "config"), ("{}", "config"), ({}, "class"),
    ({"_class_name": 3}, "class"), ({"architectures": 3}, "class"),
    ({"architectures": {"a": 1}}, "class"), ({"architectures": []}, "class"),
    ({"_class_name": "CLIPTextModel"}, "CLIPTextModel"),
    ({**UNET["config"], "block_out_channels": []}, "block_out_channels"),
    ({**UNET["config"], "block_out_channels": "many"}, "block_out_channels"),
    ({**UNET["config"], "block_out_channels": [0, 0]}, "block_out_channels"),
    ({**UNET["config"], "block_out_channels": [2**40, 2**40]}, "block_out_channels"),
    ({**UNET["config"], "in_channels": -4}, "in_channels"),
    ({**UNET["config"], "in_channels": 1.5}, "in_channels"),
    ({**UNET["config"], "layers_per_block": 10**9}, "layers_per_block"),
    ({**UNET["config"], "norm_num_groups": 7}, "norm_num_groups|groups"),
    ({**UNET["config"], "norm_eps": "small"}, "norm_eps"),
    ({**UNET["config"], "act_fn": "cosine"}, "act_fn"),
    ({**UNET["config"], "attention_head_dim": 5}, "attentions.0"),
    ({**UNET["config"], "made_up": True}, "made_up"),
])
def test_configs(config, words):
    with pytest.raises(accel.AccelError, match=words):
        accel.UNet(config, tiny.weights(UNET["shapes"]))


@pytest.mark.parametrize("weights", [None, 3, [], {1: zeros(2)}, {"a": None}, {"a": "x"}, {}])
def test_weights(weights):
    with pytest.raises((accel.AccelError, TypeError)):
        accel.UNet(UNET["config"], weights)


def test_options():
    weights = tiny.weights(UNET["shapes"])
    for options, words in (({"device": "tpu"}, "tpu"), ({"device": ""}, "device"),
                           ({"dtype": "int8"}, "int8"), ({"dtype": 3}, "dtype"),
                           ({"passes_off": "nonsense"}, "nonsense")):
        with pytest.raises(accel.AccelError, match=words):
            accel.UNet(UNET["config"], weights, **options)


@pytest.mark.parametrize("content", [
    b"", b"x" * 7, b"\xff" * 64, (8).to_bytes(8, "little"), (2**63).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
    b"PK\x03\x04 a pickle in a zip"])
def test_files(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(UNET["config"]))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(accel.AccelError):
        accel.UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "nan", "[" * 100000, '{"a": 1e999}', "\x00",
                                  '{"_class_name": "UNet2DConditionModel", "_class_name": 1}'])
def test_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(accel.AccelError):
        accel.UNet.from_pretrained(tmp_path)
    with pytest.raises(accel.AccelError):
        _core.Model(text, None)
    with pytest.raises(accel.AccelError):
        _core.Schedule(text, 10)


# ---- the pipeline --------------------------------------------------------------------------------

PIPE_CASES = {
    "prompt": [None, 3, [], [None], ["a", 3], b"bytes", {"a": "b"}],
    "negative_prompt": [3, ["a", "b"], [None], 0, [], zeros(2), zeros(0)],
    "num_inference_steps": [0, -1, 1.5, "20", None, 10**9, True, NAN],
    "guidance_scale": [NAN, INF, "strong", [1], 10**400],
    "guidance_rescale": [NAN, INF, "x", None],
    "seed": ["x", 1.5, 2**70, [1, 2, 3], [], [None]],
    "generator": [3, "x", [3], [], [accel.Generator(1), accel.Generator(2)]],
    "num_images_per_prompt": [0, -1, 1.5, 10**9, None],
    "height": [0, -8, 9, 1.5, "512", 10**9, 2**70],
    "width": [0, 7, 10**9],
    "scheduler": ["nonsense", 3, {}, {"_class_name": "X"}, {"_class_name": "DDIMScheduler", "x": 1},
                  {**tiny.SCHEDULER, "beta_start": NAN}, {**tiny.SCHEDULER, "beta_end": "x"},
                  {**tiny.SCHEDULER, "num_train_timesteps": -1},
                  {**tiny.SCHEDULER, "trained_betas": [{}]}, {"_class_name": object()}],
    "eta": [NAN, INF, -1, "x", None],
    "clip_skip": [-1, 4, 99, 1.5, "x"],
    "latents": [zeros(1, 4, 8, 8) * NAN, zeros(1, 4, 8, 8) + INF, zeros(1, 4, 8, 9),
                zeros(3), "x", zeros(1, 4, 8, 8, dtype=complex)],
    "callback": [3], "callback_on_step_end": ["x"], "cancel": [3, "x"],
    "output_type": ["png", None, 3, zeros(2), ["pil"]], "progress_bar": [zeros(2), "off"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in PIPE_CASES.items() for v in vs],
                         ids=lambda v: repr(v)[:30])
def test_pipeline(pipe, name, value):
    options = {"prompt": "a", "num_inference_steps": 1, "progress_bar": False, name: value}
    prompt = options.pop("prompt")
    with pytest.raises(accel.AccelError) as error:
        pipe(prompt, **options)
    assert str(error.value).startswith(name) or name == "scheduler"


@pytest.mark.parametrize("value", [5, {"latents": None}, {"latents": "x"},
                                   {"latents": zeros(1, 1, 1, 1)},
                                   {"latents": zeros(1, 4, 8, 8, dtype=complex)}])
def test_what_a_callback_returns(pipe, value):
    with pytest.raises(accel.AccelError, match="callback_on_step_end"):
        pipe("a", num_inference_steps=1, progress_bar=False,
             callback_on_step_end=lambda *_: value)


def test_a_prompt_that_is_not_unicode(pipe):
    with pytest.raises(accel.InvalidArgument, match="prompt"):
        pipe("a\ud800", num_inference_steps=1, progress_bar=False)


@pytest.mark.parametrize("name", ["prompt_2", "negative_prompt_2"])
@pytest.mark.parametrize("value", [3, [], zeros(2), [None]])
def test_second_prompts(sdxl_folder, name, value):
    with pytest.raises(accel.InvalidArgument, match=name):
        accel.Pipeline.from_pretrained(sdxl_folder)("a", num_inference_steps=1, progress_bar=False,
                                                    **{name: value})


@pytest.mark.parametrize(("file", "change"), [
    ("model_index.json", {"text_encoder": 5}), ("model_index.json", {"text_encoder": {"a": 1}}),
    ("model_index.json", {"text_encoder_2": True}),
    ("text_encoder/config.json", {"architectures": 0.5}),
    ("vae/config.json", {"scaling_factor": 0}), ("vae/config.json", {"scaling_factor": {}}),
    ("vae/config.json", {"scaling_factor": NAN}), ("vae/config.json", {"latents_mean": [1, 2]}),
    ("vae/config.json", {"latents_std": {"a": 1}}),
    ("vae/config.json", {"latents_mean": [0, "x", 0, 0]})])
def test_folders_that_lie(tmp_path, file, change):
    folder = tiny.write_model(tmp_path / "m", "sdxl")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))
    with pytest.raises(accel.AccelError, match=f"{next(iter(change))}|class 0.5"):
        accel.Pipeline.from_pretrained(folder)


def test_tokenizers_of_two_lengths(tmp_path):
    folder = tiny.write_model(tmp_path / "m", "sdxl")
    file = folder / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 3}))
    with pytest.raises(accel.ShapeError, match="model_max_length"):
        accel.Pipeline.from_pretrained(folder)("a", num_inference_steps=1, progress_bar=False)


def test_pipeline_seed_and_generator(pipe):
    with pytest.raises(accel.InvalidArgument, match="generator"):
        pipe("a", seed=1, generator=accel.Generator(1))


@pytest.mark.parametrize("options", [{"original_size": 3}, {"target_size": (1, NAN)},
                                     {"crops_coords_top_left": (1, 2, 3)}])
def test_sdxl_sizes(sdxl_folder, options):
    with pytest.raises(accel.InvalidArgument, match=next(iter(options))):
        accel.Pipeline.from_pretrained(sdxl_folder)("a", num_inference_steps=1, **options)


@pytest.mark.parametrize("options", [
    {"prompt_2": "a"}, {"negative_prompt_2": ""}, {"original_size": (8, 8)},
    {"target_size": [8, 8]}, {"crops_coords_top_left": (0, 0)}])
def test_what_only_sdxl_takes(pipe, options):
    with pytest.raises(accel.InvalidArgument, match=f"^{next(iter(options))}: .*SDXL"):
        pipe("a", num_inference_steps=1, progress_bar=False, **options)


def test_a_second_negative_prompt_alone(sdxl_folder):
    xl = accel.Pipeline.from_pretrained(sdxl_folder)
    with pytest.raises(accel.InvalidArgument, match="^negative_prompt_2: .*without"):
        xl("a", num_inference_steps=1, progress_bar=False, negative_prompt_2="b")


@pytest.mark.parametrize("options", [{"original_size": 0}, {"target_size": ()},
                                     {"crops_coords_top_left": []}])
def test_an_empty_size_is_not_the_default(sdxl_folder, options):
    with pytest.raises(accel.InvalidArgument, match=next(iter(options))):
        accel.Pipeline.from_pretrained(sdxl_folder)("a", num_inference_steps=1, **options)


@pytest.mark.parametrize("field", ["beta_start", "beta_end", "clip_sample_range", "trained_betas"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_scheduler_number_that_is_not_finite(pipe, field, value):
    config = {**tiny.SCHEDULER, field: [0.1, value] if field == "trained_betas" else value}
    with pytest.raises(accel.AccelError, match=field):
        pipe("a", num_inference_steps=1, scheduler=config)


# ---- the boundary itself -------------------------------------------------------------------------


ARGS = {"entry": "forward", "batch": 2, "height": 8, "width": 8, "tokens": 5, "timesteps": 1}


@pytest.mark.parametrize("change", [
    {"batch": 0}, {"batch": -1}, {"batch": 2**40}, {"batch": "2"}, {"batch": 1.0}, {"batch": None},
    {"height": 2**20, "width": 2**20, "batch": 2**20}, {"entry": "backward"},
    {"entry": "encode"}, {"entry": 3}, {"io_dtype": "float64"}, {"io_dtype": "x"}, {"io_dtype": 1},
    {"timesteps": 3}, {"unknown": 1}, {3: 4}, {"height": 2**70}, {"time_ids": -1}])
def test_build_args(unet, change):
    for call in (unet._model.io, unet._model.explain):
        with pytest.raises((accel.AccelError, TypeError)):
            call({**ARGS, **change})
    with pytest.raises((accel.AccelError, TypeError)):
        unet._model.run({**ARGS, **change}, {}, {})


def test_run_wants_every_tensor_every_time(unet):
    model = unet._model
    inputs = {"sample": SAMPLE, "timestep": zeros(1), "encoder_hidden_states": STATES}
    out = np.empty_like(SAMPLE)
    model.run(ARGS, inputs, {"sample": out})
    for name in inputs:
        with pytest.raises(accel.InvalidArgument, match=name):
            model.run(ARGS, {k: v for k, v in inputs.items() if k != name}, {"sample": out})
    with pytest.raises(accel.InvalidArgument, match="sample"):
        model.run(ARGS, inputs, {})
    with pytest.raises(accel.InvalidArgument, match="stranger"):
        model.run(ARGS, {**inputs, "stranger": SAMPLE}, {"sample": out})
    for bad in (zeros(2, 4, 8, 9), zeros(2, 4, 8, 8, dtype=np.float16), np.empty_like(SAMPLE).T,
                zeros(2, 4, 8, 16)[..., ::2]):
        with pytest.raises(accel.AccelError, match="sample"):
            model.run(ARGS, inputs, {"sample": bad})
    locked = np.empty_like(SAMPLE)
    locked.flags.writeable = False
    with pytest.raises(accel.InvalidArgument, match="read-only"):
        model.run(ARGS, inputs, {"sample": locked})
    for bad in (None, [], {1: SAMPLE}, {"sample": None}):
        with pytest.raises((accel.AccelError, TypeError)):
            model.run(ARGS, bad, {"sample": out})


def test_denoise_arguments(unet):
    schedule = _core.Schedule(json.dumps(tiny.SCHEDULER), 2)
    good = [unet._model, schedule, zeros(1, 4, 8, 8), {"encoder_hidden_states": zeros(1, 5, 24)},
            [_core.Rng(1)]]
    _core.denoise(*good)
    locked = zeros(1, 4, 8, 8)
    locked.flags.writeable = False
    bad = {0: [None, 3], 1: [None, schedule.rows],
           2: [None, zeros(4, 8, 8), zeros(1, 4, 8, 8, dtype=np.float64), zeros(0, 4, 8, 8),
               zeros(1, 4, 8, 16)[..., ::2], locked, zeros(1, 3, 8, 8), zeros(2, 4, 8, 8)],
           3: [None, {}, {"encoder_hidden_states": zeros(1, 0, 24)},
               {"encoder_hidden_states": zeros(24)}, {"x": zeros(1, 5, 24)},
               {"encoder_hidden_states": zeros(1, 5, 24), "text_embeds": zeros(1, 3)}],
           4: [None, [], [3], [_core.Rng(1)] * 3]}
    for i, values in bad.items():
        for value in values:
            args = [*good[:i], value, *good[i + 1:]]
            with pytest.raises((accel.AccelError, TypeError)):
                _core.denoise(*args)
    for options in ({"guidance_scale": NAN}, {"guidance_rescale": INF}, {"first_row": 2},
                    {"first_row": -1}, {"callback": 3}, {"cancel": 3}, {"guidance_scale": "x"},
                    {"guidance_scale": 7.5}):
        with pytest.raises((accel.AccelError, TypeError)):
            _core.denoise(*good, **options)


def test_threads():
    before = accel.get_num_threads()
    for bad in (-1, 10**9, 2**70, 1.5, "2", None):
        with pytest.raises(accel.InvalidArgument, match="threads"):
            accel.set_num_threads(bad)
    assert accel.get_num_threads() == before


@pytest.mark.parametrize("call", [
    lambda: accel.report(3), lambda: accel.report(None), lambda: accel.explain("x"),
    lambda: accel.decompile(3), lambda: accel.refresh({}), lambda: accel.Tokenizer("/nowhere"),
    lambda: accel.UNet.from_pretrained("/nowhere"), lambda: accel.Tensor((-1,)),
    lambda: accel.Tensor((2**62, 2**62)), lambda: accel.Tensor((1,) * 9),
    lambda: accel.Tensor((2,), "int3"), lambda: accel.Tensor("x"), lambda: accel.Generator("x"),
    lambda: accel.Generator(2**70), lambda: accel.Generator(1).normal(-1),
    lambda: accel.Tensor((2,)).fill(zeros(3)), lambda: accel.Tensor((2,)).fill(None),
    lambda: _core.Weights().set("a", zeros(2, 4)[:, ::2]), lambda: _core.Weights().set("a", None),
    lambda: _core.Weights().checksum(("a",)), lambda: _core.weight_name("X", "y"),
    lambda: _core.Weights().add_file("/nowhere"), lambda: _core.Weights().add_file("a\0b"),
    lambda: _core.device("warp")])
def test_the_rest(call):
    with pytest.raises((accel.AccelError, TypeError, ValueError, OverflowError)):
        call()


def test_every_error_is_also_a_builtin():
    builtins = {accel.InvalidArgument: ValueError, accel.DTypeError: TypeError,
                accel.ShapeError: ValueError, accel.UnsupportedError: NotImplementedError,
                accel.FormatError: ValueError, accel.WeightsError: ValueError,
                accel.FileError: OSError, accel.OutOfMemory: MemoryError,
                accel.DeviceError: RuntimeError, accel.Cancelled: RuntimeError,
                accel.InternalError: RuntimeError, accel.NumericError: ArithmeticError}
    for ours, theirs in builtins.items():
        assert issubclass(ours, accel.AccelError) and issubclass(ours, theirs)

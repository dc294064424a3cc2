"""Networks without PyTorch, called with tensors of a GPU: results stay there, in the order of the
consumer's stream, and go with their last owner. PyTorch is the other library here."""

import gc
import pathlib
import sys

import numpy as np
import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "torchfree"))

import tiny  # noqa: E402

import accel  # noqa: E402

TOLERANCE = 1e-4
MB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("models") / "sd", "sd")


@pytest.fixture(scope="module")
def nets(folder):
    """(CPU, GPU) of each network."""
    return {name: tuple(cls.from_pretrained(folder, device=device) for device in ("cpu", "cuda"))
            for name, cls in (("unet", accel.UNet), ("vae", accel.VAE),
                              ("text_encoder", accel.TextEncoder))}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(found, expected, tolerance=TOLERANCE):
    found, expected = (torch.as_tensor(np.asarray(x)).float() for x in (found, expected))
    assert found.shape == expected.shape and expected.abs().max() > 0.01
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def is_here(tensor, dtype="float32"):
    return (isinstance(tensor, accel.Tensor) and tensor.device == "cuda:0"
            and tensor.__dlpack_device__() == (2, 0) and tensor.dtype == dtype)


def unet_inputs(size=8, seed=0):
    return randn(2, 4, size, size, seed=seed), randn(2, 5, 24, seed=seed + 1)


# ---- where results are ---------------------------------------------------------------------------


def test_results_are_where_the_first_input_is(nets):
    cpu, gpu = nets["unet"]
    sample, states = unet_inputs()
    expected = cpu(sample.numpy(), 500, states.numpy())
    assert near(gpu(sample.numpy(), 500, states.numpy()), expected)
    for x, c, here in ((sample.cuda(), states.cuda(), True), (sample.cuda(), states.numpy(), True),
                       (sample.numpy(), states.cuda(), False), (sample, states, False)):
        for _ in range(3):  # launched, recorded, replayed
            found = gpu(x, 500, c)
            assert is_here(found) if here else isinstance(found, np.ndarray)
            assert near(found, expected)
            assert near(torch.from_dlpack(found).cpu(), expected)
    assert not near(gpu((sample * 2).cuda(), 500, states.cuda()), expected, 100 * TOLERANCE)
    pinned = states.pin_memory()
    assert near(gpu(sample.cuda(), 500, pinned), expected)


def test_times_and_masks_on_the_gpu(nets):
    cpu, gpu = nets["unet"]
    sample, states = unet_inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    expected = cpu(sample.numpy(), 500, states.numpy(), encoder_attention_mask=mask.numpy())
    for time in (torch.tensor(500).cuda(), torch.tensor([500.0, 500.0]).cuda(),
                 torch.tensor([500], dtype=torch.int32).cuda()):
        for seen in (mask.cuda(), mask.cuda().bool(), mask.numpy()):
            found = gpu(sample.cuda(), time, states.cuda(), encoder_attention_mask=seen)
            assert is_here(found) and near(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sizes_on_the_gpu(dtype):
    """SDXL's time_ids, of any dtype and on either side."""
    part = tiny.PARTS["sdxl"]["unet"]
    cpu, gpu = (accel.UNet(part["config"], tiny.weights(part["shapes"]), device=device)
                for device in ("cpu", "cuda"))
    sample, states, pooled = randn(2, 4, 8, 8), randn(2, 5, 48), randn(2, 24)
    ids = torch.tensor([[1024, 1536, 0.75, 17, 1027, 771]] * 2).to(dtype)
    expected = cpu(sample, 500, states, text_embeds=pooled, time_ids=ids.float())
    for given in (ids.cuda(), ids.double().cuda(), ids, ids.float().numpy()):
        found = gpu(sample.cuda(), 500, states.cuda(), text_embeds=pooled.cuda(), time_ids=given)
        assert is_here(found) and near(found, expected)
    wrong = gpu(sample.cuda(), 500, states.cuda(), text_embeds=pooled, time_ids=ids.cuda() - 0.5)
    assert not near(wrong, expected, 10 * TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(nets, folder, dtype):
    name = str(dtype).removeprefix("torch.")
    gpu = accel.UNet.from_pretrained(folder, device="cuda", dtype=name)
    sample, states = (x.to(dtype) for x in unet_inputs())
    found = gpu(sample.cuda(), 500, states.cuda())
    assert is_here(found, name)
    assert torch.from_dlpack(found).dtype == dtype
    expected = nets["unet"][0](sample.float().numpy(), 500, states.float().numpy())
    assert near(found, expected, 0.05) and np.asarray(found).dtype == np.float32


def test_vae_and_text(nets):
    cpu, gpu = nets["vae"]
    latents = randn(1, 4, 8, 8)
    image = gpu.decode(latents.cuda())
    assert is_here(image) and near(image, cpu.decode(latents.numpy()))
    again = gpu.encode(image)  # a Tensor is a producer
    expected = cpu.encode(cpu.decode(latents.numpy()))
    assert is_here(again.moments)
    assert near(again.mean, expected.mean) and near(again.logvar, expected.logvar)
    cpu, gpu = nets["text_encoder"]
    ids = torch.tensor([[598, 5, 6, 599], [598, 7, 599, 599]])
    for given in (ids.cuda(), ids.int().cuda()):
        out, expected = gpu(given, hidden_states=True), cpu(ids.numpy(), hidden_states=True)
        assert is_here(out.last_hidden_state) and is_here(out.pooled)
        assert all(near(a, b) for a, b in zip(out.hidden_states, expected.hidden_states,
                                              strict=True))
    assert isinstance(gpu(ids.numpy()).pooled, np.ndarray)


# ---- DLPack --------------------------------------------------------------------------------------


def test_dlpack_out(nets):
    gpu = nets["unet"][1]
    sample, states = unet_inputs()
    found = gpu(sample.cuda(), 500, states.cuda())
    host = np.asarray(found)
    assert np.asarray(found, np.float64).dtype == np.float64
    for stream in (None, -1, 1, 2, torch.cuda.Stream().cuda_stream):
        for version in (None, (1, 0)):
            capsule = found.__dlpack__(stream=stream, max_version=version)
            assert ("versioned" in repr(capsule)) == (version is not None)
            tensor = torch.utils.dlpack.from_dlpack(capsule)
            torch.cuda.synchronize()
            assert np.array_equal(tensor.cpu().numpy(), host)
    assert torch.from_dlpack(found).data_ptr() == torch.from_dlpack(found).data_ptr()
    assert np.array_equal(np.from_dlpack(found, device="cpu"), host)
    with pytest.raises(accel.InvalidArgument, match="stream"):
        found.__dlpack__(stream=0)
    for options in ({"copy": True}, {"dl_device": (2, 9)}, {"dl_device": (1, 0), "copy": False}):
        with pytest.raises(BufferError):
            found.__dlpack__(**options)
    with pytest.raises(accel.DeviceError, match="host memory"):
        found.fill(host)


def test_consumers_streams_come_after(nets):
    """The producer is kept busy: a consumer that did not wait would read what was there before."""
    gpu = nets["unet"][1]
    sample, states = (x.cuda() for x in unet_inputs(32))
    expected = torch.from_dlpack(gpu(sample, 500, states)).clone()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(3):
        torch.cuda._sleep(50_000_000)  # on the default stream, before the run
        found = gpu(sample, 500, states)
        assert not torch.cuda.default_stream().query()  # nobody waited
        with torch.cuda.stream(side):
            copy = torch.from_dlpack(found) * 1
        side.synchronize()
        assert torch.equal(copy, expected)
        del found  # which waits


def test_inputs_of_other_streams_are_waited_for(nets):
    gpu = nets["unet"][1]
    sample, states = (x.cuda() for x in unet_inputs(32))
    expected = torch.from_dlpack(gpu(sample, 500, states)).clone()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = torch.zeros_like(sample)
        torch.cuda._sleep(50_000_000)
        late += sample
        found = torch.from_dlpack(gpu(late, 500, states))
        assert torch.equal(found * 1, expected)


# ---- memory --------------------------------------------------------------------------------------


def taken():
    gc.collect()
    torch.cuda.synchronize()
    available, total = torch.cuda.mem_get_info()
    return total - available


@pytest.mark.alone
def test_memory_goes_with_the_last_owner(nets):
    torch.zeros(1, device="cuda").zero_()  # PyTorch's own kernels come at their first use
    tensor = accel.Tensor((64, MB), "float32", "cuda")
    before = taken()
    view = torch.from_dlpack(tensor)[1:2]
    del tensor
    assert before - taken() < MB and view.shape == (1, MB)
    view.zero_()
    del view
    assert before - taken() > 250 * MB
    capsule = accel.Tensor((64, MB), "float32", "cuda").__dlpack__()
    assert abs(before - taken()) < MB
    del capsule
    assert before - taken() > 250 * MB
    gpu = nets["unet"][1]
    sample, states = (x.cuda() for x in unet_inputs())
    gpu(sample, 500, states)
    start = taken()
    for _ in range(300):
        gpu(sample, 500, states)
    assert taken() - start < 4 * MB


def test_out_of_memory_is_named():
    available = torch.cuda.mem_get_info()[0]
    with pytest.raises(accel.OutOfMemory, match="bytes were asked for"):
        accel.Tensor((available // MB + 1024, MB // 4), "float32", "cuda")
    with pytest.raises(accel.DeviceError, match="cuda"):
        accel.Tensor((1,), "float32", "cuda:99")


def test_another_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    tensor = accel.Tensor((3,), "float32", "cuda:1")
    assert tensor.device == "cuda:1" and tensor.__dlpack_device__() == (2, 1)
    assert torch.from_dlpack(tensor).device == torch.device("cuda:1")

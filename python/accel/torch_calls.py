"""What a call of a diffusers or transformers module asks for, and what it gives back.

One class for each kind of module, one object for each module. `request` reads the arguments;
anything the engine does not do raises Fallback. The returned Request says what to run and how to
wrap the results, which are what the original returns: the same class and dtype, fresh tensors.
"""

import sys
from dataclasses import dataclass, field

import torch

from .torch_watch import Fallback, Seen, check_tensor

MASKS_KEPT = 8
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass
class Request:
    """One run of the engine."""

    args: dict                 # sizes; see _core.Model.run
    inputs: dict               # name -> tensor
    wrap: object               # callable({name: tensor}) -> what the caller gets
    prompt: tuple = ()         # the caller's tensors that the prompt section depends on, as they
                               # came: copies are new ones each time; () to run it always
    dtypes: dict = field(default_factory=dict)


def _output_class(module, name):
    return getattr(sys.modules[type(module).__module__], name)


def _only(arguments, handled, defaults):
    """Arguments nobody gave are None or their default; the handled ones may be anything."""
    for name, value in arguments.items():
        if name in handled or value is None or value is defaults.get(name):
            continue
        if isinstance(value, dict | list | tuple) and not value:
            continue
        raise Fallback(f"argument {name}")


def _input(value, what, rank, dtype, device):
    """A tensor of the module's dtype; eager raises for another one, so that is left to it."""
    check_tensor(value, what, rank, device)
    if value.dtype != dtype:
        raise Fallback(f"{what} is {value.dtype}, the parameters are {dtype}")
    return value


class UNetCalls:
    """UNet2DConditionModel.forward."""

    methods = ("forward",)

    def request(self, method, module, dtype, device, a, defaults):
        _only(a, {"sample", "timestep", "encoder_hidden_states", "added_cond_kwargs",
                  "encoder_attention_mask", "return_dict"}, defaults)
        sample = _input(a["sample"], "sample", 4, dtype, device)
        states = _input(a["encoder_hidden_states"], "encoder_hidden_states", 3, dtype, device)
        batch, _, height, width = sample.shape
        times = self._times(a["timestep"], batch, device)
        args = {"entry": "forward", "batch": batch, "height": height, "width": width,
                "tokens": states.shape[1], "timesteps": len(times), "io_dtype": NAMES[dtype]}
        inputs = {"sample": sample, "timestep": times,
                  "encoder_hidden_states": states.contiguous()}
        added = self._added(a.get("added_cond_kwargs"), module, device)
        prompt = [states, *added.values()]
        if added:
            args["time_ids"] = added["time_ids"].shape[1]
            inputs["text_embeds"] = added["text_embeds"].to(dtype).contiguous()
            inputs["time_ids"] = added["time_ids"].to(torch.float32).contiguous()
        mask = a.get("encoder_attention_mask")
        if mask is not None:
            args["masked"] = True
            prompt.append(check_tensor(mask, "encoder_attention_mask", 2, device))
            inputs["encoder_attention_mask"] = ((1 - mask.to(dtype)) * -10000.0).float()
        return_dict = a.get("return_dict", True)
        output = _output_class(module, "UNet2DConditionOutput")

        def wrap(out):
            return output(sample=out["sample"]) if return_dict else (out["sample"],)

        return Request(args, inputs, wrap, tuple(prompt))

    @staticmethod
    def _times(timestep, batch, device):
        """The timestep as float32 [1] or [batch]: diffusers, too, computes its sinusoid there.
        On the CPU it may be whatever the device: a copy to a GPU waits for nothing."""
        if isinstance(timestep, torch.Tensor):
            if timestep.device not in (device, torch.device("cpu")) or timestep.ndim > 1:
                raise Fallback(f"timestep has shape {list(timestep.shape)} on {timestep.device}")
            times = timestep.detach().reshape(-1).to(torch.float32).contiguous()
        elif isinstance(timestep, int | float):
            times = torch.tensor([timestep], dtype=torch.float32)
        else:
            raise Fallback(f"timestep is a {type(timestep).__name__}")
        if len(times) not in (1, batch):
            raise Fallback(f"{len(times)} timesteps for {batch} samples")
        return times.to(device, non_blocking=True)

    @staticmethod
    def _added(added, module, device):
        """SDXL's pooled and size conditions, of any dtypes, as diffusers takes them: sinusoids of
        the sizes are computed in float32. The model takes nothing else of the dict."""
        if module.config.addition_embed_type is None:
            if added:
                raise Fallback(f"added_cond_kwargs {sorted(added)}")
            return {}
        added = added or {}
        if set(added) != {"text_embeds", "time_ids"}:
            raise Fallback(f"added_cond_kwargs {sorted(added)}")
        return {n: check_tensor(added[n], n, 2, device) for n in ("text_embeds", "time_ids")}


class VAECalls:
    """AutoencoderKL._encode and ._decode, which encode, decode and forward call.

    Slicing, hooks of offload and the posterior stay diffusers' own.
    """

    methods = ("_encode", "_decode")

    def request(self, method, module, dtype, device, a, defaults):
        return getattr(self, method)(module, dtype, device, a, defaults)

    @staticmethod
    def _sizes(entry, x, dtype):
        batch, _, height, width = x.shape
        return {"entry": entry, "batch": batch, "height": height, "width": width,
                "io_dtype": NAMES[dtype]}

    def _encode(self, module, dtype, device, a, defaults):
        _only(a, {"x"}, defaults)
        x = _input(a["x"], "x", 4, dtype, device)
        if module.use_tiling and max(x.shape[2:]) > module.tile_sample_min_size:
            raise Fallback("tiling")
        return Request(self._sizes("encode", x, dtype), {"sample": x}, lambda out: out["moments"])

    def _decode(self, module, dtype, device, a, defaults):
        _only(a, {"z", "return_dict"}, defaults)
        z = _input(a["z"], "z", 4, dtype, device)
        if module.use_tiling and max(z.shape[2:]) > module.tile_latent_min_size:
            raise Fallback("tiling")
        output = _output_class(module, "DecoderOutput")
        return_dict = a.get("return_dict", True)

        def wrap(out):
            return output(sample=out["sample"]) if return_dict else (out["sample"],)

        return Request(self._sizes("decode", z, dtype), {"latents": z}, wrap)


class TextCalls:
    """CLIPTextModel and CLIPTextModelWithProjection: forward."""

    methods = ("forward",)

    def __init__(self):
        self.masks = Seen(MASKS_KEPT)  # mask -> what _look found

    def request(self, method, module, dtype, device, a, defaults):
        more = a.pop("kwargs", {})
        a = {**a, **more}
        _only(a, {"input_ids", "attention_mask", "output_hidden_states", "return_dict"},
              {**defaults, "output_attentions": False})
        config = module.config
        states = a.get("output_hidden_states")
        states = bool(config.output_hidden_states) if states is None else states
        if not isinstance(states, bool) or config.output_attentions:
            raise Fallback("output_attentions or chosen hidden states")
        ids = check_tensor(a["input_ids"], "input_ids", 2, device)
        if ids.dtype not in (torch.int64, torch.int32):
            raise Fallback(f"input_ids are {ids.dtype}")
        args = {"entry": "forward", "batch": ids.shape[0], "tokens": ids.shape[1],
                "hidden_states": states, "io_dtype": NAMES[dtype]}
        inputs = {"input_ids": ids.to(torch.int64).contiguous()}
        mask = self._mask(a.get("attention_mask"), ids)
        if mask is not None:
            args["masked"] = True
            inputs["attention_mask"] = mask
        return_dict = a.get("return_dict")
        return_dict = config.return_dict if return_dict is None else return_dict

        def wrap(out):
            result = self._result(module, out)
            return result if return_dict else result.to_tuple()

        return Request(args, inputs, wrap)

    def _mask(self, mask, ids):
        """Added to the scores; None where every token is seen."""
        if mask is None:
            return None
        mask = check_tensor(mask, "attention_mask", 2, ids.device)
        if mask.shape != ids.shape or mask.dtype.is_floating_point:
            raise Fallback(f"attention_mask is {mask.dtype} {list(mask.shape)}")
        first, some = self._look(mask)
        if first:
            raise Fallback("attention_mask hides the first token")
        if not some:
            return None
        lowest = torch.finfo(torch.float32).min
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(mask == 0, lowest)

    def _look(self, mask):
        """Whether a mask hides some text's first token, and whether it hides any at all. On a GPU
        that waits, so each mask is looked at once."""
        found = self.masks.get((mask,))
        if found is None:
            hidden = mask == 0
            found = torch.stack((hidden[:, 0].any(), hidden.any())).tolist()
            self.masks.add((mask,), found)
        return found

    @staticmethod
    def _result(module, out):
        states = tuple(out[f"hidden_states.{i}"] for i in range(len(out))
                       if f"hidden_states.{i}" in out) or None
        if "text_embeds" in out:
            return _output_class(module, "CLIPTextModelOutput")(
                text_embeds=out["text_embeds"], last_hidden_state=out["last_hidden_state"],
                hidden_states=states)
        return _output_class(module, "BaseModelOutputWithPooling")(
            last_hidden_state=out["last_hidden_state"], pooler_output=out["pooler_output"],
            hidden_states=states)


# One of these for each compiled module.
CALLS = {
    "UNet2DConditionModel": UNetCalls,
    "AutoencoderKL": VAECalls,
    "CLIPTextModel": TextCalls,
    "CLIPTextModelWithProjection": TextCalls,
}

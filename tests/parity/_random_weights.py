"""Random weights for parity tests: every parameter, none of them tiny.

PyTorch's own initialisation leaves biases at zero, norms at one and some layers at zero altogether:
a model that drops them would still agree.  Here weights have variance 1/fan_in times a gain, biases
and norm parameters are far from zero and one, so that activations stay of order one and every
parameter shows in the output.
"""

import torch


@torch.no_grad()
def fill_random(module: torch.nn.Module, seed: int, gain: float = 1.0) -> torch.nn.Module:
    """Overwrites all parameters of `module` in place and returns it in eval mode.

    Parameters
    ----------
    module : any module with float32 parameters
    seed : the same seed gives the same weights
    gain : standard deviation of a layer's result for inputs of variance one
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.normal_(generator=generator)
        if parameter.ndim == 1:
            is_gain = name.endswith("weight")
            parameter.mul_(0.25).add_(1.0 if is_gain else 0.0)
        elif "embedding" not in name or "linear" in name:
            parameter.mul_(gain / parameter[0].numel() ** 0.5)
    return module.eval()


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters and buffers by name, detached and shared with the module."""
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}

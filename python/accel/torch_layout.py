"""Parameters laid out as the engine reads them, so that on a GPU there is no second copy.

The engine joins weights by row (Q, K and V; K and V of all cross-attentions; all time projections)
and its convolutions read [o, h, w, i]. Joined parameters become views, one behind the other, of one
tensor; a convolution's keeps its shape with the strides of channels_last. The engine then finds its
derived weight already there. Values, shapes and names stay; state_dict, load_state_dict, `.to` and
deepcopy go on as before.
"""

import contextlib
import re

import torch

# What the engine calls a join of whole weights; its sources are in order in the parentheses.
_JOIN = re.compile(r"concat\{axis=0\}:\w+\[[\d, ]*\]\(([^()]*)\)")
ON_CPU = [False]  # for tests: there the engine makes its own copies all the same


def wanted(device):
    return device.type == "cuda" or ON_CPU[0]


def joins(keys):
    """Lists of names that the plan joins, from the keys of its derived weights."""
    found = (_JOIN.fullmatch(key) for key in keys)
    return [match[1].split(",") for match in found if match]


@contextlib.contextmanager
def normal():
    """Tensors that are made here count their changes, also for a caller in inference mode, who may
    change parameters outside of it later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@normal()
def lay_out(keys, parameters, moved):
    """Moves what the plan with these derived weights wants elsewhere.

    keys : of the plan's derived weights
    parameters : {the engine's name: parameter}
    moved : called with each name whose parameter was moved, at once, so that whoever holds the old
        memory lets go of it before the next one is copied
    """
    if any(p.is_inference() for p in parameters.values()):
        return
    taken = set()
    for names in joins(keys):
        if taken.isdisjoint(names) and all(name in parameters for name in names):
            taken.update(names)
            _join(names, [parameters[name] for name in names], moved)
    for name, p in parameters.items():
        if name not in taken and p.ndim == 4 and p.shape[2] * p.shape[3] > 1:
            laid = p.data.contiguous(memory_format=torch.channels_last)
            if (laid.data_ptr(), laid.stride()) != (p.data_ptr(), p.stride()):
                p.data = laid
                moved(name)


def _join(names, parameters, moved):
    """One after the other goes into the new tensor: at most one parameter is there twice, beside
    the joined tensor itself."""
    first = parameters[0]
    if any(p.shape[1:] != first.shape[1:] or p.dtype != first.dtype for p in parameters):
        return
    if len({id(p) for p in parameters}) < len(parameters):  # tied
        return
    if _are_joined(parameters):
        return
    rows = sum(len(p) for p in parameters)
    joined = torch.empty((rows, *first.shape[1:]), dtype=first.dtype, device=first.device)
    at = 0
    for name, p in zip(names, parameters, strict=True):
        view = joined[at:at + len(p)]
        view.copy_(p.data)
        at += len(p)
        p.data = view
        moved(name)


def _are_joined(parameters):
    end = parameters[0].data_ptr()
    for p in parameters:
        if p.data_ptr() != end or not p.is_contiguous():
            return False
        end += p.nbytes
    return True


def give_back():
    """The memory that parameters were moved from, as far as nothing else lies between."""
    torch.cuda.empty_cache()


@normal()
def separate(parameters):
    """Gives every parameter contiguous memory of its own again."""
    for p in parameters:
        if not p.is_contiguous() or p.untyped_storage().nbytes() != p.nbytes:
            p.data = p.data.clone(memory_format=torch.contiguous_format)

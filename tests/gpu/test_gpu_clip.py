"""CLIP-L and bigG at full size."""

import pytest
import torch
from _gpu import HALVES, half_parity


def ids(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 49400, (2, 77), generator=generator)
    tokens[:, 0], tokens[0, 40:], tokens[1, 76:] = 49406, 49407, 49407
    return tokens.cuda()


def call(module, tokens):
    out = module(tokens, output_hidden_states=True)
    pooled = out["text_embeds"] if "text_embeds" in out else out["pooler_output"]
    return {"last": out["last_hidden_state"], "penultimate": out["hidden_states"][-2],
            "pooled": pooled}


@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["clip_l", "clip_bigg"])
def test_full_size(name, dtype):
    half_parity(name, dtype, call, lambda seed, _dtype: ids(seed))

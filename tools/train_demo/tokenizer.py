"""A CLIP byte-pair tokenizer with a small vocabulary of its own.

The vocabulary is CLIP's: 256 bytes, the same at the end of a word, merged pieces, start and end
marks.  The merges are learnt here until every word of the captions is one token; any other text
still splits into bytes, so no prompt is ever unknown.
"""

import json
import re
from collections import Counter
from itertools import pairwise

from . import captions, scene

LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
EXTRA_TEXT = """
    orange black pink brown grey gray castle boat river ocean sea forest village town
    road bridge garden spring rain storm fog stars star warm cold light big large old
    happy quiet peaceful one two three flowers field valley pond cliff tower church barn
    horse bird
"""


def byte_letters():
    """The printable character CLIP's vocabulary uses for each byte, in the published order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return list(letters.values())


def learn_merges(words):
    """Byte-pair merges, most frequent pair first, until each word is a single piece."""
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while True:
        pairs = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, parts in pieces.items():
            pieces[word] = _merge(parts, best)


def _merge(parts, pair):
    out, i = [], 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            out.append(parts[i] + parts[i + 1])
            i += 2
        else:
            out.append(parts[i])
            i += 1
    return out


def build(folder):
    """Learn the vocabulary from captions and write it as a tokenizer folder."""
    sample = scene.sample(3000, seed=11)
    words = Counter()
    for texts in captions.captions(sample, 4, seed=12):
        for text in texts:
            words.update(re.findall("[a-z]+", text.lower()))
    for word in EXTRA_TEXT.split():
        words[word] += 1
    merges = learn_merges(words)
    letters = byte_letters()
    vocabulary = {}
    for piece in [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges)]:
        vocabulary.setdefault(piece, len(vocabulary))
    for mark in (START, END):
        vocabulary[mark] = len(vocabulary)
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
        **marks,
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in (
        ("vocab.json", vocabulary),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", marks),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=None if "vocab" in name else 2)
        (folder / name).write_text(text, encoding="utf-8")


def load(folder):
    """The tokenizer as transformers reads it; builds the folder first when it is missing."""
    from transformers import CLIPTokenizer

    if not (folder / "vocab.json").exists():
        build(folder)
    return CLIPTokenizer.from_pretrained(folder)


def encode(tokenizer, texts):
    """Token ids of texts, [len(texts), LENGTH] int16 on the CPU."""
    import torch

    ids = torch.full((len(texts), LENGTH), tokenizer.pad_token_id, dtype=torch.int16)
    for start in range(0, len(texts), 20000):
        batch = texts[start : start + 20000]
        for i, row in enumerate(tokenizer(batch, truncation=True)["input_ids"], start):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int16)
    return ids

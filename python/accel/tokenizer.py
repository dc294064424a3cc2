"""CLIP's tokenizer, by the `tokenizers` package, from the files of a model folder.

Byte-level BPE over lower-cased, NFC-normalised text with collapsed white space; a word's last piece
carries `</w>`.  A text is <start> pieces <end>, cut and padded to one length.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ._core import FileError, FormatError, InvalidArgument
from .components import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
# Contractions, runs of letters, single digits, runs of other signs: how CLIP was trained.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class TruncationWarning(UserWarning):
    """A prompt was longer than the text encoder can take."""


def _content(token):
    """A special token is a string, or an object that has it as "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _added(token, special):
    """A token that is cut out of a text whole, before anything else is done to the text."""
    if isinstance(token, str):
        return AddedToken(token, special=special)
    flags = {f: token[f] for f in ("lstrip", "rstrip", "single_word", "normalized")
             if isinstance(token.get(f), bool)}
    return AddedToken(token["content"], special=special, **flags)


def _listed_tokens(folder, config):
    """Tokens of added_tokens_decoder and of added_tokens.json as {id: token}."""
    found = {}
    if (folder / "added_tokens.json").is_file():
        found = {n: token for token, n in read_json(folder / "added_tokens.json").items()}
    decoder = config.get("added_tokens_decoder")
    if decoder is not None and not isinstance(decoder, dict):
        raise FormatError(f"{folder}: added_tokens_decoder: found {json.dumps(decoder):.100}, "
                          "expected an object of ids and tokens")
    for number, token in (decoder or {}).items():
        found[int(number) if number.isdecimal() else number] = token
    for number, token in found.items():
        if type(number) is not int or not isinstance(_content(token), str):
            raise FormatError(f"{folder}: added tokens: found {number!r:.100} for {token!r:.100}, "
                              "expected a number for a token")
    return found


def _add_listed_tokens(tokenizer, folder, config):
    for number, token in sorted(_listed_tokens(folder, config).items()):
        special = isinstance(token, dict) and token.get("special") is True
        tokenizer.add_tokens([_added(token, special)])
        now = tokenizer.token_to_id(_content(token))
        if now != number:
            raise FormatError(f"{folder}: added token {_content(token)!r:.100}: found id {number}, "
                              f"expected {now}, the next one or the vocabulary's own")


def _max_length(folder, found):
    """Tokens of a text, start and end among them."""
    if found is None:
        return 77
    if isinstance(found, int | float) and not isinstance(found, bool):
        if found >= 1e6:  # transformers writes 1e30 for "no limit"; CLIP always has one
            return 77
        if found >= 2 and found == int(found):
            return int(found)
    raise FormatError(f"{folder}: model_max_length: found {json.dumps(found):.100}, expected a "
                      "whole number, 2 or more")


def _from_vocabulary(folder):
    vocabulary = read_json(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{folder / 'merges.txt'}: {error}") from error
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    try:
        model = BPE(vocab=vocabulary, merges=merges, unk_token=END, end_of_word_suffix="</w>",
                    continuing_subword_prefix="", fuse_unk=False)
    except Exception as error:  # the package raises plain Exception for all of them
        raise FormatError(f"{folder}: vocab.json and merges.txt do not fit: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class Tokenizer:
    """Texts to token ids.

    Parameters
    ----------
    folder : path
        With tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json,
        special_tokens_map.json and added_tokens.json are read where they are.
    """

    def __init__(self, folder):
        folder = Path(folder)
        if (folder / "tokenizer.json").is_file():
            try:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the package raises plain Exception for all of them
                raise FormatError(f"{folder / 'tokenizer.json'}: {error}") from error
        elif (folder / "vocab.json").is_file():
            self._tokenizer = _from_vocabulary(folder)
        else:
            raise FileError(f"{folder}: found neither tokenizer.json nor vocab.json and merges.txt")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = self._settings(folder)
        _add_listed_tokens(self._tokenizer, folder, config)
        self.max_length = _max_length(folder, config.get("model_max_length"))
        self.start = self._id(folder, config, "bos_token", START)
        self.end = self._id(folder, config, "eos_token", END)
        self.pad = self._id(folder, config, "pad_token", END)

    @staticmethod
    def _settings(folder):
        config = {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                config |= read_json(folder / name)
        return config

    def _id(self, folder, config, key, default):
        text = _content(config.get(key))
        text = default if text is None else text
        if not isinstance(text, str):
            raise FormatError(f"{folder}: {key}: found {json.dumps(text):.100}, expected a token")
        number = self._tokenizer.token_to_id(text)
        if number is None:
            raise FormatError(f"{folder}: {key}: {json.dumps(text):.100} is not in the vocabulary")
        if all(t.content != text for t in self._tokenizer.get_added_tokens_decoder().values()):
            token = text if _content(config.get(key)) is None else config[key]
            self._tokenizer.add_special_tokens([_added(token, True)])
        return number

    def pieces(self, text):
        """Token ids of one text, without start and end."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return list(ids)

    def decode(self, ids):
        """The text of token ids."""
        ids = [i for i in ids if i not in (self.start, self.end)]
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text.replace("</w>", " ").strip()

    def __call__(self, texts, max_length=None):
        """ids [n, max_length] int64 of a text or a list of them.

        What does not fit is cut, with a TruncationWarning that says what.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = max_length or self.max_length
        out = np.full((len(texts), length), self.pad, np.int64)
        for row, text in zip(out, texts, strict=True):
            if not isinstance(text, str):
                raise InvalidArgument(f"prompt: found {type(text).__name__}, expected a string")
            ids = self.pieces(text)
            if len(ids) > length - 2:
                warnings.warn(
                    f"the prompt has {len(ids) + 2} tokens and the text encoder takes {length}; "
                    f"cut: {self.decode(ids[length - 2:])!r}", TruncationWarning, stacklevel=5)
                ids = ids[:length - 2]
            row[:len(ids) + 2] = [self.start, *ids, self.end]
        return out

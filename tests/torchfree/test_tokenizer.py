"""The tokenizer on a vocabulary small enough to know what must come out."""

import json

import pytest
import tiny

import accel


@pytest.fixture(scope="module")
def tokenizer(sd_folder):
    return accel.Tokenizer(sd_folder / "tokenizer")


@pytest.fixture(scope="module")
def words(sd_folder):
    return json.loads((sd_folder / "tokenizer" / "vocab.json").read_text())


def pieces(tokenizer, words, text):
    names = {i: w for w, i in words.items()}
    return [names[i] for i in tokenizer.pieces(text)]


@pytest.mark.parametrize(("text", "expected"), [
    ("the red house", ["the</w>", "red</w>", "house</w>"]),
    ("  THE\tRed\nhouse ", ["the</w>", "red</w>", "house</w>"]),
    ("red27", ["red</w>", "2</w>", "7</w>"]),
    ("house's", ["house</w>", "'", "s</w>"]),
    ("red,!red", ["red</w>", ",", "!</w>", "red</w>"]),
    ("redred", ["re", "d", "red</w>"]),
    ("e\u0301", ["\u00c3", "\u00a9</w>"]),  # composed by NFC, then two bytes
    ("\u00e9", ["\u00c3", "\u00a9</w>"]),
    ("", []), (" \n ", []),
])
def test_pieces(tokenizer, words, text, expected):
    assert pieces(tokenizer, words, text) == expected


def test_ids(tokenizer, words):
    ids = tokenizer(["the red", ""])
    assert ids.shape == (2, 16) and ids.dtype.name == "int64"
    start, end = words["<|startoftext|>"], words["<|endoftext|>"]
    assert ids[0].tolist() == [start, words["the</w>"], words["red</w>"]] + [end] * 13
    assert ids[1].tolist() == [start] + [end] * 15
    assert tokenizer("the red").tolist() == ids[:1].tolist()


def test_own_pad(tmp_path):
    tiny.write_tokenizer(tmp_path / "t", pad="!")
    tokenizer = accel.Tokenizer(tmp_path / "t")
    assert tokenizer.decode(tokenizer("the")[0, 3:]) == "!" * 13


def test_the_sign_to_pad_with_is_one_token_in_a_text_too(tmp_path, tokenizer, words):
    """As in SDXL's second tokenizer: it is special, so it does not end a word."""
    tiny.write_tokenizer(tmp_path / "t", pad="!")
    assert pieces(tokenizer, words, "red!") == ["red</w>", "!</w>"]
    assert pieces(accel.Tokenizer(tmp_path / "t"), words, "red!") == ["red</w>", "!"]


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens(tmp_path, where):
    tiny.write_tokenizer(tmp_path / "t")
    if where == "added_tokens.json":
        (tmp_path / "t" / where).write_text(json.dumps({"<cat>": 601, "<dog>": 600}))
    else:
        config = json.loads((tmp_path / "t" / where).read_text())
        config["added_tokens_decoder"] = {"601": {"content": "<cat>"}, "600": {"content": "<dog>"}}
        (tmp_path / "t" / where).write_text(json.dumps(config))
    assert accel.Tokenizer(tmp_path / "t").pieces("<cat><dog>") == [601, 600]


def test_a_special_token_without_content_is_the_usual_one(tmp_path, words):
    tiny.write_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "special_tokens_map.json").write_text('{"bos_token": {"lstrip": true}}')
    assert accel.Tokenizer(tmp_path / "t").start == words["<|startoftext|>"]


def test_truncation_names_what_is_cut(tokenizer, words):
    text = " ".join("0123456789") + " " + " ".join("01234567")
    with pytest.warns(UserWarning, match="20 tokens .* takes 16; cut: '4 5 6 7'"):
        ids = tokenizer(text)
    assert ids[0, -1] == words["<|endoftext|>"] and ids[0, -2] == words["3</w>"]


def test_tokenizer_json_is_the_same(tokenizer, sd_folder, tmp_path):
    tokenizer._tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        (sd_folder / "tokenizer" / "tokenizer_config.json").read_text())
    other = accel.Tokenizer(tmp_path)
    for text in ("The RED house, 27!", "", "e\u0301"):
        assert other(text).tolist() == tokenizer(text).tolist()


@pytest.mark.parametrize(("name", "content"), [
    ("vocab.json", "{}"), ("vocab.json", "[]"), ("vocab.json", "{"), ("vocab.json", '{"a": "b"}'),
    ("merges.txt", "a b c d\n"), ("merges.txt", "never seen\n"), ("tokenizer_config.json", "3"),
    ("tokenizer_config.json", '{"pad_token": "no such"}'), ("tokenizer.json", "{}"),
    ("tokenizer_config.json", '{"pad_token": 3}'),
    ("tokenizer_config.json", '{"eos_token": ["a"]}'),
    ("special_tokens_map.json", '{"bos_token": {"content": 1.5}}'),
    ("added_tokens.json", '{"<cat>": 700}'), ("added_tokens.json", '{"<cat>": "a"}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": 3}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"600": 3}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<cat>"}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": "<cat>"}}}'),
    ("tokenizer_config.json", '{"model_max_length": -1e30}'),
    ("tokenizer_config.json", '{"model_max_length": 1}'),
    ("tokenizer_config.json", '{"model_max_length": 7.5}'),
    ("tokenizer_config.json", '{"model_max_length": NaN}'),
    ("tokenizer_config.json", '{"model_max_length": "16"}'),
    ("tokenizer.json", "\0")])
def test_broken_files(tmp_path, name, content):
    tiny.write_tokenizer(tmp_path / "t")
    (tmp_path / "t" / name).write_text(content)
    with pytest.raises(accel.AccelError):
        accel.Tokenizer(tmp_path / "t")

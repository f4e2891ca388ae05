from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port.load import load_hf, vocabulary_from_gguf
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

from .conftest import BOS, EOS, EOT, LETTERS, TEMPLATE, Maker, added_entry, metadata, n_tokens


def test_deepseek_facts(vocab: Vocabulary, deepseek_json: dict[str, Any]) -> None:
    n = n_tokens(deepseek_json)
    index = vocab.index
    assert vocab.pre == "deepseek-coder"
    assert vocab.bos == index[BOS]
    assert vocab.eos == vocab.eot == index[EOT]
    assert vocab.pad == index[EOS]
    assert vocab.unk is None
    assert vocab.fim_prefix == index["<｜fim▁begin｜>"]
    assert vocab.fim_suffix == index["<｜fim▁hole｜>"]
    assert vocab.fim_middle == index["<｜fim▁end｜>"]
    assert vocab.add_bos
    assert not vocab.add_eos
    assert vocab.chat_template == TEMPLATE
    assert len(vocab.tokens) == n + 10
    assert vocab.tokens[n:] == tuple(f"[PAD{i}]" for i in range(n, n + 10))


def test_types(vocab: Vocabulary, deepseek_json: dict[str, Any]) -> None:
    n = n_tokens(deepseek_json)
    assert vocab.ids_of_type(TokenType.USER_DEFINED) == [vocab.index[c] for c in LETTERS]
    control = {vocab.tokens[i] for i in vocab.ids_of_type(TokenType.CONTROL)}
    assert control == {e["content"] for e in deepseek_json["added_tokens"]} - {*LETTERS}
    assert vocab.ids_of_type(TokenType.UNUSED) == list(range(n, n + 10))
    assert vocab.types[0] == TokenType.NORMAL


def test_merges_as_pairs_and_as_strings(
    vocab: Vocabulary, make_dir: Maker, deepseek_json: dict[str, Any]
) -> None:
    other = copy.deepcopy(deepseek_json)
    pairs = isinstance(other["model"]["merges"][0], list)
    other["model"]["merges"] = [
        " ".join(m) if pairs else m.split(" ") for m in other["model"]["merges"]
    ]
    assert load_hf(make_dir(other), len(vocab.tokens)).merges == vocab.merges
    assert all(merge.count(" ") == 1 for merge in vocab.merges)


def test_ids_from_config_when_tokenizer_config_is_silent(
    make_dir: Maker, deepseek_json: dict[str, Any]
) -> None:
    directory = make_dir(settings={"bos_token": None, "eos_token": None})
    n = n_tokens(deepseek_json)
    vocab = load_hf(
        directory, n, config={"bos_token_id": 5}, generation_config={"eos_token_id": [7, 8]}
    )
    assert (vocab.bos, vocab.eos) == (5, 7)
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    assert load_hf(directory, n, config={"bos_token_id": 5}).eos == vocab.index[EOS]


@pytest.mark.parametrize(
    ("settings", "processor", "expected"),
    [
        ({"add_bos_token": False}, "template", False),
        ({"add_bos_token": None}, "template", True),
        ({"add_bos_token": None}, "bytes", True),  # LlamaTokenizerFast's habit
        ({"add_bos_token": None, "tokenizer_class": "GPT2TokenizerFast"}, "bytes", False),
    ],
)
def test_add_bos(
    make_dir: Maker,
    deepseek_json: dict[str, Any],
    settings: dict[str, Any],
    processor: str,
    expected: bool,
) -> None:
    single = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    steps = {
        "template": {"type": "TemplateProcessing", "single": single},
        "bytes": {"type": "ByteLevel"},
    }
    tokenizer = {**deepseek_json, "post_processor": steps[processor]}
    directory = make_dir(tokenizer, {k: v for k, v in settings.items() if v is not None} or None)
    if settings["add_bos_token"] is None:
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text())
        del config["add_bos_token"]
        path.write_text(json.dumps(config))
    assert load_hf(directory, n_tokens(tokenizer)).add_bos is expected


def test_chat_templates(make_dir: Maker, deepseek_json: dict[str, Any]) -> None:
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    directory = make_dir(settings={"chat_template": named})
    n = n_tokens(deepseek_json)
    vocab = load_hf(directory, n)
    assert (vocab.chat_template, vocab.chat_templates) == ("A", {"tool_use": "B"})
    (directory / "chat_template.jinja").write_text("C\r\n", newline="")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("D")
    vocab = load_hf(directory, n)
    assert (vocab.chat_template, vocab.chat_templates) == ("C\r\n", {"tool_use": "B", "rag": "D"})


def test_added_token_that_is_in_the_base_vocabulary(
    make_dir: Maker, deepseek_json: dict[str, Any]
) -> None:
    """SmolLM2 and Llama 3 list a token twice, with one id."""
    tokenizer = copy.deepcopy(deepseek_json)
    for entry in tokenizer["added_tokens"]:
        tokenizer["model"]["vocab"][entry["content"]] = entry["id"]
    vocab = load_hf(make_dir(tokenizer), n_tokens(tokenizer))
    assert len(vocab.tokens) == n_tokens(tokenizer)
    assert vocab.types[vocab.index[EOT]] == TokenType.CONTROL


def test_token_of_a_fine_tune_in_added_tokens_json_only(
    make_dir: Maker, deepseek_json: dict[str, Any]
) -> None:
    n = n_tokens(deepseek_json)
    directory = make_dir()
    (directory / "added_tokens.json").write_text(json.dumps({"<think>": n + 3}))
    vocab = load_hf(directory, n + 5)
    assert vocab.tokens[n + 3] == "<think>"
    assert vocab.types[n : n + 4] == (5, 5, 5, TokenType.USER_DEFINED)
    # A gap before it: `tokenizers` alone would number it n.
    assert Tokenizer.from_vocabulary(vocab).encode("<think>", add_bos=False) == [n + 3]


# DeepSeek's fine-tunes come with 32022, 32023, 32024, 32029 or 32256 rows.
@pytest.mark.parametrize("more_rows", [0, 1, 2, 7, 234])
@pytest.mark.parametrize("more_tokens", [0, 1])
def test_rows_beyond_the_tokens(
    make_dir: Maker, deepseek_json: dict[str, Any], more_rows: int, more_tokens: int
) -> None:
    tokenizer = copy.deepcopy(deepseek_json)
    n = n_tokens(tokenizer)
    if more_tokens:
        tokenizer["added_tokens"].append(added_entry(n, "<think>", False))
    directory = make_dir(tokenizer)
    if more_rows < more_tokens:
        with pytest.raises(InputError, match="larger than the rows"):
            load_hf(directory, n + more_rows)
        return
    vocab = load_hf(directory, n + more_rows)
    assert vocab.pre == "deepseek-coder"
    pads = range(n + more_tokens, n + more_rows)
    assert vocab.ids_of_type(TokenType.UNUSED) == [*pads]
    assert [vocab.tokens[i] for i in pads] == [f"[PAD{i}]" for i in pads]
    # The same tokens from the file itself, and rebuilt from what a GGUF holds.
    own = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    rebuilt = vocabulary_from_gguf(metadata(vocab))
    for text in ("def f():\n  return 'ü'", f"a{EOT}<think>{BOS}", f"[PAD{n + more_rows - 1}]"):
        expected = own.encode(text).ids
        for each in (vocab, rebuilt):
            found = Tokenizer.from_vocabulary(each).encode(text, add_bos=False, parse_special=True)
            assert found == expected


def test_special_flag_in_added_tokens_decoder(
    make_dir: Maker, deepseek_json: dict[str, Any]
) -> None:
    n = n_tokens(deepseek_json)
    entry = {"content": "[TOOL]", "special": True}
    vocab = load_hf(make_dir(settings={"added_tokens_decoder": {str(n): entry}}), n + 1)
    assert (vocab.tokens[n], vocab.types[n]) == ("[TOOL]", TokenType.CONTROL)


def broken(change: str, tokenizer: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(tokenizer)
    last = max(entry["id"] for entry in made["added_tokens"])
    if change == "one id, two tokens":
        made["added_tokens"].append(added_entry(0, "<x>", False))
    elif change == "one token, two ids":
        made["added_tokens"].append(added_entry(last + 1, EOT, False))
    elif change == "a base token again":
        text = next(iter(made["model"]["vocab"]))
        made["added_tokens"].append(added_entry(last + 1, text, False))
    elif change == "bad merge":
        made["model"]["merges"][3] = "a b c"
    elif change == "absent part":
        made["model"]["merges"][3] = "☃ a"
    elif change == "absent result":
        made["model"]["merges"][3] = ["~", "~"]
    elif change == "unigram":
        made["model"]["type"] = "Unigram"
    elif change == "byte fallback":
        made["model"]["byte_fallback"] = True
    elif change == "word parts":
        made["model"]["continuing_subword_prefix"] = "##"
    elif change == "metaspace":
        made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁"}
    elif change == "no chain":
        made["pre_tokenizer"] = None
    elif change == "negative id":
        made["model"]["vocab"]["zz"] = -1
    return made


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("one id, two tokens", InputError, "id 0 belongs to .* and to '<x>'"),
        ("one token, two ids", InputError, r"'<\|EOT\|>' has the ids"),
        ("a base token again", InputError, "are both"),
        ("bad merge", InputError, "merge 3 is 'a b c'"),
        ("absent part", InputError, "merge 3 is '☃ a', but '☃' is no token"),
        ("absent result", InputError, "merge 3 is '~ ~', but '~~' is no token"),
        ("unigram", UnsupportedError, "'Unigram'; only byte-level BPE"),
        ("byte fallback", UnsupportedError, "SentencePiece-style"),
        ("metaspace", UnsupportedError, "SentencePiece-style"),
        ("no chain", UnsupportedError, r"no step .* is ByteLevel \(pre_tokenizer is None\)"),
        ("word parts", UnsupportedError, "model.continuing_subword_prefix is '##'"),
        ("negative id", InputError, "has the id -1"),
    ],
)
def test_contradictions_are_refused(
    make_dir: Maker,
    deepseek_json: dict[str, Any],
    change: str,
    error: type[Exception],
    message: str,
) -> None:
    directory = make_dir(broken(change, deepseek_json))
    with pytest.raises(error, match=message) as caught:
        load_hf(directory, 2000)
    assert "\n" not in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_more_tokens_than_rows(make_dir: Maker, deepseek_json: dict[str, Any]) -> None:
    n = n_tokens(deepseek_json)
    load_hf(make_dir(), n)
    with pytest.raises(InputError, match=f"larger than the rows: .* {n - 1}, .* has {n - 1} rows"):
        load_hf(make_dir(), n - 1)


def test_bos_that_is_no_token(make_dir: Maker) -> None:
    with pytest.raises(InputError, match="bos_token is '<s>', which is no token"):
        load_hf(make_dir(settings={"bos_token": "<s>"}), 2000)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found; copy tokenizer"):
        load_hf(tmp_path, 10)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="a SentencePiece tokenizer"):
        load_hf(tmp_path, 10)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(InputError, match="tokenizer.json: is a directory; put the file"):
        load_hf(tmp_path, 10)
    (tmp_path / "tokenizer.json").rmdir()
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        load_hf(tmp_path, 10)
    for text in ("{", "[]", "{}", '{"model": {"vocab": 3}}', "[" * 100_000):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            load_hf(tmp_path, 10)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", 7, "model is 7; an object is needed"),
        ("model", {"vocab": {}}, "model.vocab has no token"),
        ("model", {"vocab": []}, r"model.vocab is \[\]; an object is needed"),
        ("model", {"vocab": {"a": True}}, "token 'a' has the id True"),
        ("model", {"vocab": {"a": 0}, "merges": 3}, "model.merges is 3; a list is needed"),
        ("model", {"vocab": {"a": 0}, "merges": [["a"]]}, r"merge 0 is \['a'\], not two"),
        ("model", {"vocab": {"a": 0}, "unk_token": [1]}, r"unk_token is \[1\]; a string"),
        ("added_tokens", 5, "added_tokens is 5; a list is needed"),
        ("added_tokens", [5], r"added_tokens\[0\] is 5; an object is needed"),
        ("added_tokens", [{"id": "1"}], r"added_tokens\[0\].id is '1'; a whole number"),
        ("added_tokens", [{"id": 1}], r"added_tokens\[0\].content is missing; a string"),
        ("added_tokens", [{"id": 1, "content": ""}], r"added_tokens\[0\].content is ''; a token"),
        ("decoder", 7, "decoder is 7; an object is needed"),
        ("pre_tokenizer", 7, "pre_tokenizer is 7; an object is needed"),
        ("normalizer", {"type": "Sequence", "normalizers": 5}, "normalizer.normalizers is 5;"),
        ("normalizer", "NFC", "normalizer is 'NFC'; an object is needed"),
        ("post_processor", 5, "post_processor is 5; an object is needed"),
        (
            "post_processor",
            {"type": "Sequence", "processors": [None]},
            "post_processor.processors: a step is missing; an object is needed",
        ),
        (
            "post_processor",
            {"type": "TemplateProcessing", "single": [3]},
            "a piece of TemplateProcessing.single is 3; an object",
        ),
    ],
)
def test_wrong_types_in_tokenizer_json(
    make_dir: Maker, deepseek_json: dict[str, Any], key: str, value: Any, message: str
) -> None:
    directory = make_dir({**deepseek_json, key: value}, {"bos_token": None, "add_bos_token": False})
    with pytest.raises(InputError, match=rf"tokenizer\.json: .*{message}") as caught:
        load_hf(directory, 2000)
    assert not isinstance(caught.value, UnsupportedError)


@pytest.mark.parametrize("pretokenizers", [{}, {"a": 1}, 5, None, [7]])
def test_a_sequence_that_is_none(
    make_dir: Maker, deepseek_json: dict[str, Any], pretokenizers: Any
) -> None:
    chain = {"type": "Sequence", "pretokenizers": pretokenizers}
    made = {**deepseek_json, "pre_tokenizer": chain, "normalizer": {"type": "ByteLevel"}}
    with pytest.raises(InputError, match=r"pre_tokenizer\.pretokenizers.* (list|object) is needed"):
        load_hf(make_dir(made), 2000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\]; an object is needed"),
        ({"added_tokens_decoder": {"1": 5}}, "added_tokens_decoder.1 is 5; a row number and"),
        ({"added_tokens_decoder": {"²": "x"}}, "added_tokens_decoder.² is 'x'; a row number and"),
        (
            {"added_tokens_decoder": {"1": {"content": "x", "special": "no"}}},
            "added_tokens_decoder.1.special is 'no'; true or false",
        ),
        ({"chat_template": 5}, "chat_template is 5; a string is needed: give one"),
        ({"chat_template": {"a": "b"}}, r"chat_template is \{'a': 'b'\}; a string"),
        ({"chat_template": ["x"]}, r"chat_template\[0\] is 'x'; an object"),
        ({"chat_template": [{"template": "x"}]}, r"chat_template\[0\].name is missing"),
        ({"chat_template": [{"name": "x", "template": 1}]}, r"chat_template\[0\].template is 1"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'; true or false is needed"),
        ({"add_prefix_space": 0}, "add_prefix_space is 0; true or false is needed"),
        ({"tokenizer_class": ["x"]}, r"tokenizer_class is \['x'\]; a string is needed"),
        ({"bos_token": 5}, "bos_token is 5, which is no token"),
        ({"eos_token": {"content": None}}, "eos_token is {'content': None}, which is no token"),
    ],
)
def test_wrong_types_in_tokenizer_config(
    make_dir: Maker, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"tokenizer_config.json: {message}"):
        load_hf(make_dir(settings=settings), 2000)


@pytest.mark.parametrize("config", [{"bos_token_id": "5"}, {"bos_token_id": [None]}])
def test_a_token_id_that_is_no_number(make_dir: Maker, config: dict[str, Any]) -> None:
    directory = make_dir(settings={"bos_token": None})
    with pytest.raises(InputError, match="config.json: bos_token_id is"):
        load_hf(directory, 2000, config=config)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", '{"model": 1, "model": {}}', "the key 'model' is given twice"),
        ("tokenizer_config.json", '{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ("tokenizer_config.json", '{"chat_template": "\\ud83d"}', "half a character"),
        ("tokenizer_config.json", '{"a": NaN}', "NaN is no JSON"),
        ("tokenizer_config.json", '{"a":' + 150 * "[" + 150 * "]" + "}", "more than 100 deep"),
        ("special_tokens_map.json", "[]", "holds a JSON list"),
        ("added_tokens.json", '{"": 5}', "the added token 5 has no text; remove the entry"),
        ("added_tokens.json", '{"x": true}', "the id of 'x' is True; a whole number"),
    ],
)
def test_json_is_read_strictly(make_dir: Maker, name: str, text: str, message: str) -> None:
    directory = make_dir()
    (directory / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}: .*{message}"):
        load_hf(directory, 2000)


def test_pairs_of_surrogates_are_a_character(make_dir: Maker) -> None:
    directory = make_dir(settings={"chat_template": "🙂 \\ud800"})
    assert r"\ud83d\ude42 \\ud800" in (directory / "tokenizer_config.json").read_text()
    assert load_hf(directory, 2000).chat_template == "🙂 \\ud800"

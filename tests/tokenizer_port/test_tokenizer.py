from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsq.convert.gguf.reader import read_gguf
from dsq.errors import InputError
from dsq.tokenizer_port.bytelevel import printable
from dsq.tokenizer_port.chains import CHAINS
from dsq.tokenizer_port.load import load_hf, vocabulary_from_gguf
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

from .conftest import ADDED, BOS, EOS, EOT, LETTERS, added_entry, trained


@pytest.fixture
def tok(vocab: Vocabulary) -> Tokenizer:
    return Tokenizer.from_vocabulary(vocab)


CONTROL_TEXTS = [text for text in ADDED if text not in LETTERS]


def test_a_users_text_never_becomes_a_control_token(tok: Tokenizer) -> None:
    control = {*tok.vocab.ids_of_type(TokenType.CONTROL)}
    for text in CONTROL_TEXTS:
        ids = tok.encode(f"a{text}b", add_bos=False)
        assert not control & {*ids}
        assert tok.decode(ids) == f"a{text}b"
        assert tok.vocab.index[text] in tok.encode(f"a{text}b", parse_special=True)


def test_control_tokens_do_not_slip_through_ignore_merges(vocab: Vocabulary) -> None:
    """A control token whose text the pre-tokenizer leaves whole must not be found as a piece."""
    definition = json.loads(vocab.tokenizer_json or "")
    definition["model"]["ignore_merges"] = True
    row = vocab.tokens.index(f"[PAD{len(vocab.tokens) - 1}]")
    definition["model"]["vocab"]["Stop"] = row
    tokens, types = list(vocab.tokens), list(vocab.types)
    tokens[row], types[row] = "Stop", int(TokenType.CONTROL)
    changed = dataclasses.replace(
        vocab, tokens=tuple(tokens), types=tuple(types), tokenizer_json=json.dumps(definition)
    )
    tok = Tokenizer.from_vocabulary(changed)
    assert tok.encode("Stop", add_bos=False, parse_special=True) == [row]
    assert row not in tok.encode("Stop")


def test_parse_special_is_hugging_faces_encoding(
    tok: Tokenizer, deepseek_json: dict[str, Any]
) -> None:
    reference = tokenizers.Tokenizer.from_str(json.dumps(deepseek_json))
    text = f"{BOS}def f():\n\treturn 'ü' {EOT} <pad>{LETTERS}"
    assert tok.encode(text, parse_special=True) == reference.encode(text).ids


def test_bos_exactly_once(tok: Tokenizer) -> None:
    bos = tok.vocab.bos
    assert tok.encode("") == [bos]
    assert tok.encode("x")[0] == bos
    assert tok.encode("x").count(bos or 0) == 1
    assert tok.encode(f"{BOS}x", parse_special=True).count(bos or 0) == 1
    assert bos not in tok.encode("x", add_bos=False)
    without = Tokenizer.from_vocabulary(dataclasses.replace(tok.vocab, add_bos=False))
    assert bos not in without.encode("x")
    assert without.encode("x", add_bos=True)[0] == bos


def test_letters_come_back(tok: Tokenizer) -> None:
    text = f"Führer {LETTERS}\n"
    ids = tok.encode(text)
    assert tok.vocab.index["ü"] in ids
    assert tok.decode(ids) == text
    assert tok.token_bytes(tok.vocab.index["ü"]) == "ü".encode()


def test_decode_skips_special_tokens(tok: Tokenizer) -> None:
    v = tok.vocab
    assert v.bos is not None
    ids = [v.bos, *tok.encode("ab", add_bos=False), v.index[EOT], len(v.tokens) - 1]
    assert tok.decode(ids) == "ab"
    assert tok.decode(ids, skip_special=False) == f"{BOS}ab{EOT}[PAD{len(v.tokens) - 1}]"


@settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from([*ADDED]))
def test_any_text_survives_and_streams(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    stream = tok.stream_decoder()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


FAMILIES = (
    "deepseek-coder",
    "deepseek-llm",
    "deepseek-v3",
    "gpt-2",
    "llama-bpe",
    "qwen2",
    "falcon",
)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    found = {}
    for family in FAMILIES:
        definition = trained(family, 500)
        n = len(definition["model"]["vocab"])
        letters = [added_entry(n + i, text, special=False) for i, text in enumerate(LETTERS)]
        definition["added_tokens"] = [*letters, added_entry(n + len(letters), BOS, special=True)]
        folder = tmp_path_factory.mktemp(family)
        (folder / "tokenizer.json").write_text(json.dumps(definition))
        settings_ = {"bos_token": BOS, "eos_token": BOS, "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
        found[family] = Tokenizer.from_vocabulary(load_hf(folder, n + 20))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_any_text_survives_in_every_family(family: str, families: dict[str, Tokenizer]) -> None:
    tok = families[family]
    normalizes = bool(CHAINS[family].normalizers)

    @settings(max_examples=100, deadline=None, database=None)
    @given(text=UNICODE | st.text(st.sampled_from(f"{LETTERS} \r\nü\u0301中。'sS1{BOS}")))
    def check(text: str) -> None:
        given_back = tok.decode(tok.encode(text))
        assert given_back == (unicodedata.normalize("NFC", text) if normalizes else text)
        special = tok.encode(text, parse_special=True, add_bos=False)
        assert tok.decode(special, skip_special=False) == given_back

    check()


@settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_stream_of_any_tokens_is_their_decoding(tok: Tokenizer, data: st.DataObject) -> None:
    """Also where their bytes make no characters: the same replacement characters."""
    ids = data.draw(st.lists(st.integers(0, len(tok) - 1), max_size=30))
    for skip in (True, False):
        stream = tok.stream_decoder(skip_special=skip)
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.finish() == tok.decode(ids, skip_special=skip)


def test_a_byte_without_a_token(tmp_path: Path) -> None:
    """As HF and llama.cpp: left out, or the unknown token where there is one."""
    vocab = {"a": 0, "b": 1, "?": 2}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "a", "eos_token": "b"}')
    for unknown, ids in ((None, [0, 1]), ("?", [0, 2, 1])):
        definition = {**trained("gpt-2", 300), "model": {**model, "unk_token": unknown}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
        tok = Tokenizer.from_vocabulary(load_hf(tmp_path, 3))
        assert tok.encode("a~b", add_bos=False) == ids


def test_streaming_waits_for_the_last_byte(tok: Tokenizer) -> None:
    ids = [tok.vocab.index[char] for char in "ðŁĻĤ"]  # the four bytes of a smiley
    stream = tok.stream_decoder()
    assert [stream.push(token) for token in ids] == ["", "", "", "🙂"]
    assert stream.finish() == ""
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


def test_pieces(tok: Tokenizer) -> None:
    index = tok.vocab.index
    assert tok.piece(index["ü"]) == "ü"
    assert tok.piece(index[EOT]) == EOT
    assert tok.piece(index["Ġ"]) == " "
    assert tok.piece(index["ð"]) == "<0xF0>"
    for raw, shown in (
        (b"", ""),
        ("aü中".encode(), "aü中"),
        (b"a\xe4b\xbd\xa0c\xe4\xbd", "a<0xE4>b<0xBD><0xA0>c<0xE4><0xBD>"),
        (b"\xed\xa0\x80\xc0\x80\xff", "<0xED><0xA0><0x80><0xC0><0x80><0xFF>"),
    ):
        assert printable(raw) == shown


def test_fim(tok: Tokenizer) -> None:
    v = tok.vocab
    ids = tok.fim("def f():\n", "\n    return x <｜fim▁end｜>")
    assert tok.decode(ids, skip_special=False) == (
        f"{BOS}<｜fim▁begin｜>def f():\n<｜fim▁hole｜>\n    return x <｜fim▁end｜><｜fim▁end｜>"
    )
    assert ids[:2] == [v.bos, v.fim_prefix]
    assert ids.count(v.fim_suffix or 0) == 1
    assert ids.count(v.fim_middle or 0) == 1
    assert ids[-1] == v.fim_middle
    assert tok.fim("a", "b", add_bos=False) == tok.fim("a", "b")[1:]
    # BOS once, also where the caller wrote it and lets it through.
    assert tok.fim(f"{BOS}a", "b", parse_special=True) == tok.fim("a", "b")
    assert tok.fim(f"{BOS}a", "b").count(v.bos or 0) == 1
    without = Tokenizer.from_vocabulary(dataclasses.replace(v, add_bos=False))
    assert v.bos not in without.fim("a", "b")
    assert v.index[EOT] in tok.fim(EOT, "", parse_special=True)
    with pytest.raises(InputError, match="no fill-in-the-middle"):
        Tokenizer.from_vocabulary(dataclasses.replace(v, fim_middle=None)).fim("a", "b")


def test_stop_ids(vocab: Vocabulary) -> None:
    eos, eot = vocab.index[EOS], vocab.index[EOT]
    base = dataclasses.replace(vocab, eos=eos, chat_template=None)
    early_instruct = dataclasses.replace(vocab, eos=eos)

    def stops(v: Vocabulary) -> tuple[frozenset[int], frozenset[int]]:
        tok = Tokenizer.from_vocabulary(v)
        return tok.stop_ids("complete"), tok.stop_ids("chat")

    assert stops(base) == ({eos}, {eos, eot})
    assert stops(vocab) == ({eos, eot}, {eos, eot})
    assert stops(early_instruct) == ({eos, eot}, {eos, eot})


def test_the_real_vocabulary(llama_cpp_source: Path) -> None:
    """DeepSeek Coder: 32014 ends a text, 32021 a turn. Instruct models complete code, too."""
    path = llama_cpp_source / "models" / "ggml-vocab-deepseek-coder.gguf"
    base = vocabulary_from_gguf(read_gguf(path).metadata)
    instruct = dataclasses.replace(base, eos=32021, chat_template="{{ messages }}")
    assert Tokenizer.from_vocabulary(base).stop_ids("complete") == {32014}
    tok = Tokenizer.from_vocabulary(instruct)
    assert tok.stop_ids("chat") == {32014, 32021}
    assert tok.stop_ids("complete") == {32014, 32021}
    assert tok.fim("a", "b") == [32013, 32016, 64, 32015, 65, 32017]
    assert tok.decode(tok.encode(f"Führer {LETTERS}")) == f"Führer {LETTERS}"


def test_errors(tok: Tokenizer) -> None:
    for ids in ([len(tok)], [-1], [2**70], ["1"], [None], [1.0], "ab"):
        with pytest.raises(InputError, match="ids go from 0 to"):
            tok.decode(ids)  # type: ignore[arg-type]
    for ids in (None, 3):
        with pytest.raises(InputError, match="a list of whole numbers is needed"):
            tok.decode(ids)  # type: ignore[arg-type]
    assert tok.decode(np.array([0, 1])) == tok.decode([0, 1])
    with pytest.raises(InputError, match=r"character 1 is a lone surrogate \(U\+D800\)"):
        tok.encode("a\ud800")
    for text in (None, 3, b"ab", ["a"]):
        with pytest.raises(InputError, match="a str is needed"):
            tok.encode(text)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="a str is needed"):
            tok.encode_batch(["a", text])  # type: ignore[list-item]
        with pytest.raises(InputError, match="a str is needed"):
            tok.fim("a", text)  # type: ignore[arg-type]
    for texts in ("ab", None, 3):
        with pytest.raises(InputError, match="a list of them"):
            tok.encode_batch(texts)  # type: ignore[arg-type]


def test_truncation_and_dropout_in_the_file_are_ignored(vocab: Vocabulary) -> None:
    definition = json.loads(vocab.tokenizer_json or "")
    definition["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    definition["model"]["dropout"] = 1.0
    tok = Tokenizer.from_vocabulary(
        dataclasses.replace(vocab, tokenizer_json=json.dumps(definition))
    )
    text = "def add(a: int, b: int) -> int:"
    assert tok.encode(text) == Tokenizer.from_vocabulary(vocab).encode(text)


def test_a_tokenizer_json_of_another_model_is_refused(vocab: Vocabulary) -> None:
    definition = json.loads(vocab.tokenizer_json or "")
    first, second, *_ = definition["model"]["vocab"]
    tokens = definition["model"]["vocab"]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    for text in (json.dumps(definition), "{}", "[", '{"model": {"vocab": 1}}'):
        with pytest.raises(InputError, match=r"tokenizer\.huggingface\.json"):
            Tokenizer.from_vocabulary(dataclasses.replace(vocab, tokenizer_json=text))


def test_a_panic_of_the_library_is_an_error(
    vocab: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    panic = type("PanicException", (BaseException,), {})  # as pyo3 makes it

    def raises(error: type[BaseException]) -> Any:
        def from_str(text: str) -> None:
            raise error("range end index\nout of range")

        return type("Library", (), {"from_str": from_str})

    monkeypatch.setattr(tokenizers, "Tokenizer", raises(panic))
    with pytest.raises(InputError, match="cannot build it: range end index out of range"):
        Tokenizer.from_vocabulary(vocab)
    monkeypatch.setattr(tokenizers, "Tokenizer", raises(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.from_vocabulary(vocab)


def test_imports_are_light() -> None:
    code = (
        "import sys, dsq.tokenizer_port.tokenizer, dsq.tokenizer_port.load, "
        "dsq.tokenizer_port.to_hf, dsq.tokenizer_port.verify\n"
        "print(*{'tokenizers', 'jinja2', 'torch', 'transformers', 'gguf'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == ""

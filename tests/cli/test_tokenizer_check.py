"""`dsq tokenizer check` from the command line: what it prints, and when it fails."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsq.cli.main import main
from dsq.convert.gguf.metadata import vocabulary_entries
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.gguf.writer import gguf_layout, write_gguf
from dsq.errors import InputError
from dsq.runtime.read_vocabulary import read_vocabulary
from dsq.runtime.tokenizer_check import on_deep_stack
from dsq.tokenizer_port.corpus import corpus
from dsq.tokenizer_port.load import vocabulary_from_gguf
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary
from tests.models import TINY_CODER

CHECK = ["tokenizer", "check"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def vocab() -> Vocabulary:
    """tiny-coder's, of DeepSeek Coder's family."""
    return read_vocabulary(TINY_CODER)


@pytest.fixture
def tokenizer_only(tmp_path: Path) -> Path:
    """A directory with neither weights nor config.json."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_CODER / name, folder)
    return folder


def write(path: Path, vocab: Vocabulary, **changes: Any) -> Path:
    changed = dataclasses.replace(vocab, **changes)
    write_gguf(path, gguf_layout(vocabulary_entries(changed), ()), ())
    return path


def run_json(capsys: Capture, *args: object) -> tuple[int, dict[str, Any]]:
    code = main([*CHECK, *map(str, args), "--json"])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, json.loads(captured.out)


def run_error(capsys: Capture, *args: object) -> str:
    assert main([*CHECK, *map(str, args)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_right_model(vocab: Vocabulary, tokenizer_only: Path, capsys: Capture) -> None:
    for model in (TINY_CODER, tokenizer_only):
        code, report = run_json(capsys, model)
        texts, tokens = report.pop("texts"), report.pop("tokens")
        assert report.pop("seconds") > 0
        assert report.pop("tokens_per_second") > 0
        assert (code, report) == (
            0,
            {
                "model": str(model),
                "against": None,
                "rebuilt_by": None,
                "fuzz": 0,
                "seed": 0,
                "mismatches": 0,
                "dsq_mismatches": 0,
                "first": None,
                "first_dsq": None,
                "explained": 0,
                "blame": [],
                "notes": [],
            },
        )
        own = Tokenizer.from_vocabulary(vocab)
        encoded = [own.encode(t, add_bos=False, parse_special=True) for t in corpus(vocab)]
        assert (texts, tokens) == (len(encoded), sum(map(len, encoded)))


def test_a_gguf_is_read_by_llama_cpp_itself(
    tmp_path: Path, vocab: Vocabulary, capsys: Capture
) -> None:
    assert run_json(capsys, write(tmp_path / "a.gguf", vocab))[1]["rebuilt_by"] is None
    path = write(tmp_path / "b.gguf", vocab, tokenizer_json=None)
    code, report = run_json(capsys, path)
    assert (code, report["rebuilt_by"]) == (0, "deepseek-coder")
    assert main([*CHECK, str(path)]) == 0
    assert "rebuilt by the rules of 'deepseek-coder'" in capsys.readouterr().out


def test_a_wrong_pre_tokenizer(tmp_path: Path, vocab: Vocabulary, capsys: Capture) -> None:
    wrong = write(tmp_path / "wrong.gguf", vocab, pre="gpt-2")
    for args in ((TINY_CODER, "--against", wrong), (wrong,)):
        code, report = run_json(capsys, *args)
        assert code == 1
        assert report["mismatches"] > 10
        assert report["dsq_mismatches"] == 0
        first = report["first"]
        assert len(first["text"]) <= 3 < first["length"]
        assert first["hf"]["ids"] != first["llama_cpp"]["ids"]
        for side in (first["hf"], first["llama_cpp"]):
            assert "".join(side["pieces"]) == first["text"]


def test_the_right_code_point_is_blamed(tmp_path: Path, vocab: Vocabulary, capsys: Capture) -> None:
    """One letter token without its type, as the oldest converters left all 13."""
    row = vocab.index["ü"]
    types = [int(TokenType.NORMAL) if i == row else kind for i, kind in enumerate(vocab.types)]
    wrong = write(tmp_path / "wrong.gguf", vocab, types=tuple(types))
    code, report = run_json(capsys, TINY_CODER, "--against", wrong)
    name = "LATIN SMALL LETTER U WITH DIAERESIS"
    blamed = {"code": "U+00FC", "name": name, "category": "Ll"}
    assert code == 1
    assert (report["first"]["text"], report["first"]["blame"]) == ("ü", [blamed])
    assert report["first"]["hf"] == {"ids": [row], "pieces": ["ü"]}
    assert report["blame"] == [{**blamed, "texts": report["explained"]}]
    assert main([*CHECK, str(TINY_CODER), "--against", str(wrong)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("first, of ") and line.endswith(r"'\xfc'") for line in lines)
    assert f"  to blame   U+00FC {name} (Ll)" in lines


def test_a_file_without_a_pre_tokenizer(
    tmp_path: Path, llama_cpp_source: Path, capsys: Capture
) -> None:
    """As they were made before April 2024; what llama.cpp makes of it is seen, not refused."""
    metadata = read_gguf(llama_cpp_source / "models/ggml-vocab-deepseek-coder.gguf").metadata
    vocab = vocabulary_from_gguf(metadata)
    right = write(tmp_path / "right.gguf", vocab)
    old = write(tmp_path / "old.gguf", vocab, pre="default")
    assert main([*CHECK, str(right)]) == 0
    assert main([*CHECK, str(right), "--against", str(old)]) == 1
    capsys.readouterr()
    assert "dsq doctor" in run_error(capsys, old)


def test_a_pre_tokenizer_by_name(
    tmp_path: Path, llama_cpp_source: Path, vocab: Vocabulary, capsys: Capture
) -> None:
    """It is what HF and dsq go by; llama.cpp still reads the file as it is."""
    aquila = llama_cpp_source / "models/ggml-vocab-aquila.gguf"
    assert "--pre NAME" in run_error(capsys, aquila)
    code, report = run_json(capsys, aquila, "--pre", "gpt-2")
    assert (report["rebuilt_by"], report["dsq_mismatches"]) == ("gpt-2", 0)
    assert code == int(report["mismatches"] > 0)
    assert "llama.cpp reads" in report["notes"][0]
    right = write(tmp_path / "right.gguf", vocab, tokenizer_json=None)
    assert run_json(capsys, right, "--pre", "deepseek-coder")[0] == 0
    assert run_json(capsys, right, "--pre", "gpt-2")[0] == 1
    assert "did you mean gpt-2" in run_error(capsys, right, "--pre", "gtp-2")


def test_the_model_may_be_left_out_or_last(
    tmp_path: Path, vocab: Vocabulary, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "one.gguf", vocab)
    text = tmp_path / "a.txt"
    text.write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    n = run_json(capsys, path)[1]["texts"]
    for args, more, model in (
        (("--fuzz", 5), 5, "one.gguf"),
        (("--text", text), 1, "one.gguf"),
        (("--text", text, path), 1, str(path)),
        (("--text", text, TINY_CODER), 1, str(TINY_CODER)),
        (("--text", text, "--text", text, "--fuzz", 1, path), 3, str(path)),
    ):
        report = run_json(capsys, *args)[1]
        assert (report["model"], report["texts"]) == (model, n + more)
    write(tmp_path / "two.gguf", vocab)
    assert "2 models in this folder" in run_error(capsys, "--text", text)


def test_text_files(tmp_path: Path, vocab: Vocabulary, capsys: Capture) -> None:
    row = next(i for i, token in enumerate(vocab.tokens) if token == "<|EOT|>")
    types = [int(TokenType.NORMAL) if i == row else kind for i, kind in enumerate(vocab.types)]
    wrong = write(tmp_path / "wrong.gguf", vocab, types=tuple(types))
    _, without = run_json(capsys, TINY_CODER, "--against", wrong)
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("x = 1\n")
    long.write_text("line\n" * 2000 + "<|EOT|>\n" + "x" * 5000, encoding="utf-8")
    args = (TINY_CODER, "--against", wrong, "--text", short, long)
    _, report = run_json(capsys, *args)
    assert report["texts"] - without["texts"] == 1 + 5 + 1  # pieces of 4096, and the whole
    assert report["mismatches"] - without["mismatches"] == 2
    assert report["notes"] == []


def test_random_texts(tmp_path: Path, vocab: Vocabulary, capsys: Capture) -> None:
    wrong = write(tmp_path / "wrong.gguf", vocab, pre="smollm")
    args = (TINY_CODER, "--against", wrong, "--fuzz", 60, "--seed")
    reports = []
    for seed in (3, 3, 4):
        code, report = run_json(capsys, *args, seed)
        assert code == 1
        for key in ("seconds", "tokens_per_second"):
            del report[key]
        reports.append(report)
    assert reports[0] == reports[1]
    assert reports[0]["tokens"] != reports[2]["tokens"]
    assert reports[0]["texts"] == len(corpus(vocab)) + 60


def test_bad_input(tmp_path: Path, vocab: Vocabulary, capsys: Capture) -> None:
    binary = tmp_path / "x.bin"
    binary.write_bytes(b"text\xff\xfe")
    assert "--text" in run_error(capsys, TINY_CODER, "--text", binary)
    assert "is no UTF-8 text (byte 4)" in run_error(capsys, TINY_CODER, "--text", binary)
    missing = tmp_path / "missing"
    assert str(missing) in run_error(capsys, TINY_CODER, "--text", missing)
    assert str(missing) in run_error(capsys, TINY_CODER, "--against", missing)
    assert "missing" in run_error(capsys, missing)
    assert "not found" in run_error(capsys, tmp_path)
    assert str(binary) in run_error(capsys, binary)
    assert str(binary) in run_error(capsys, TINY_CODER, "--against", binary)
    assert "--fuzz" in run_error(capsys, TINY_CODER, "--fuzz", "-1")
    assert "vocab_size" in run_error(capsys, with_rows(tmp_path / "m", 10**12))


def with_rows(folder: Path, rows: int) -> Path:
    folder.mkdir()
    shutil.copy(TINY_CODER / "tokenizer.json", folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return folder


def test_another_vocabulary(tmp_path: Path, vocab: Vocabulary, capsys: Capture) -> None:
    tokens = list(vocab.tokens)
    tokens[300], tokens[301] = tokens[301], tokens[300]
    other = write(tmp_path / "other.gguf", vocab, tokens=tuple(tokens), tokenizer_json=None)
    message = run_error(capsys, TINY_CODER, "--against", other)
    assert f"token 300 is {tokens[300]!r}, not {tokens[301]!r}" in message


def test_more_rows_without_tokens_are_the_same_vocabulary(
    tmp_path: Path, vocab: Vocabulary, capsys: Capture
) -> None:
    n = len(vocab.tokens)
    more = write(
        tmp_path / "more.gguf",
        vocab,
        tokens=(*vocab.tokens, f"[PAD{n}]"),
        types=(*vocab.types, int(TokenType.UNUSED)),
    )
    assert run_json(capsys, TINY_CODER, "--against", more)[0] == 0


def test_a_word_that_ends_llama_cpp_on_a_small_stack(tmp_path: Path) -> None:
    """In a process of its own: on the main thread's 8 MiB it would end with a signal."""
    path = tmp_path / "long.txt"
    path.write_text("a" * 120_000 + "\n" + "-" * 120_000)
    command = [sys.executable, "-m", "dsq.cli.main", *CHECK, str(TINY_CODER), "--text", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_deep_stack_returns_and_raises() -> None:
    assert on_deep_stack(lambda: 7) == 7

    def fail() -> None:
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        on_deep_stack(fail)


def test_a_fault_in_the_encoding_of_a_users_text(
    vocab: Vocabulary, tokenizer_only: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dsq makes of ordinary text is held to HF's tokens, not only what it makes of markers."""
    encode = Tokenizer.encode

    def wrong(self: Tokenizer, text: str, **options: Any) -> list[int]:
        ids = encode(self, text, **options)
        return ids if options.get("parse_special") or "def" not in text else ids[1:]

    monkeypatch.setattr(Tokenizer, "encode", wrong)
    code, report = run_json(capsys, tokenizer_only)
    assert code == 1
    assert report["dsq_mismatches"] > 0

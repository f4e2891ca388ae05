"""dsq tokenize: what stands in its output, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import select
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from dsq.cli import tokenize
from dsq.cli.main import main
from dsq.errors import InputError
from dsq.runtime.read_vocabulary import read_vocabulary
from tests.cli.test_main import fails
from tests.models import TINY_CODER, write_hf
from tests.test_architecture import modules_after

TEXT = 'def f(x):\n\treturn "Führer 你好 🙂"  # <|EOT|>\r\n'
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|EOT|>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def vocab_gguf(llama_cpp_source):
    """DeepSeek Coder's 32k vocabulary without weights."""
    return llama_cpp_source / "models" / "ggml-vocab-deepseek-coder.gguf"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenize") / "tiny.gguf"
    assert main(["quantize", "q8_0", str(TINY_CODER), "-o", str(out)]) == 0
    return out


@pytest.fixture
def tokenized(capsys):
    def run(*args):
        capsys.readouterr()
        assert main(["tokenize", *map(str, args), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def stdin(monkeypatch):
    def give(raw):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))

    return give


def library():
    return tokenizers.Tokenizer.from_file(str(TINY_CODER / "tokenizer.json"))


def special_id(text):
    return library().token_to_id(text)


def test_ids_pieces_and_text(gguf, tokenized):
    for model in (TINY_CODER, gguf):
        found = tokenized(model, TEXT)
        assert list(found) == ["ids", "pieces", "text"]
        assert found["text"] == TEXT
        assert len(found["pieces"]) == len(found["ids"])
        plain = tokenized(model, TEXT, "--no-bos")
        assert found["ids"][1:] == plain["ids"]
        assert found["pieces"][0] == "<｜begin▁of▁sentence｜>"
        special = tokenized(model, TEXT, "--special", "--no-bos")
        assert special["ids"] == library().encode(TEXT, add_special_tokens=False).ids
        assert special["text"] == TEXT
        assert special_id("<|EOT|>") in special["ids"]
        assert special_id("<|EOT|>") not in found["ids"]


def test_a_byte_that_is_no_character(tokenized):
    found = tokenized(TINY_CODER, "\U0001f9ff", "--no-bos")
    assert "".join(found["pieces"]) == "<0xF0><0x9F><0xA7><0xBF>"
    assert found["text"] == "\U0001f9ff"


def test_fill_in_the_middle(tokenized):
    found = tokenized(TINY_CODER, "--fim", "a\n", "")
    assert found["text"] == "<｜fim▁begin｜>a\n<｜fim▁hole｜><｜fim▁end｜>"
    assert found["ids"][0] == special_id("<｜begin▁of▁sentence｜>")
    assert tokenized(TINY_CODER, "--fim", "a\n", "", "--no-bos")["ids"] == found["ids"][1:]
    assert special_id("<|EOT|>") not in tokenized(TINY_CODER, "--fim", "<|EOT|>", "")["ids"]


def test_chat(tmp_path, tokenized, stdin):
    model = write_hf(tmp_path / "instruct")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    messages = json.dumps([{"role": "user", "content": "hi <|EOT|>"}])
    found = tokenized(model, "--chat", messages)
    assert found["text"] == "user: hi <|EOT|><|EOT|>\nassistant:"
    assert found["ids"].count(special_id("<|EOT|>")) == 1
    assert found["ids"].count(special_id("<｜begin▁of▁sentence｜>")) == 1
    stdin(messages.encode())
    assert tokenized(model, "--chat", "-") == found
    special = tokenized(model, "--chat", messages, "--special")
    assert special["ids"].count(special_id("<|EOT|>")) == 2


def test_lines(tmp_path, capsys, tokenized, stdin):
    texts = ["", "a\nb", TEXT, "\u2028\x85 ü"]
    spelled = [json.dumps(text, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    lines = "".join(line + "\n" for line in spelled)
    file = tmp_path / "texts.jsonl"
    file.write_bytes(lines.rstrip("\n").encode())
    stdin(lines.encode())
    for name in (file, "-"):
        capsys.readouterr()
        assert main(["tokenize", str(TINY_CODER), "--lines", str(name)]) == 0
        out = capsys.readouterr().out
        reports = [json.loads(line) for line in out.split("\n")[:-1]]
        assert reports == [tokenized(TINY_CODER, text) for text in texts]
        assert [report["text"] for report in reports] == texts


def test_the_table(capsys, stdin):
    stdin("x  = '\\'\n\u200b".encode())
    assert main(["tokenize", str(TINY_CODER), "-"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("  <｜begin▁of▁sentence｜>  (control)")
    pieces = [line.split(None, 1)[1] for line in lines[1:-1]]
    assert "".join(pieces) in (r"x␣␣=␣'\\'\n\u200b", r"x␣␣=␣'\\'\n<0xE2><0x80><0x8B>")
    assert lines[-1] == f"{len(pieces) + 1} tokens"


def test_a_program_at_the_other_end_gets_each_answer_at_once():
    with subprocess.Popen(
        [sys.executable, "-m", "dsq.cli.main", "tokenize", str(TINY_CODER), "--lines", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    ) as process:
        for text in ("one", "two"):
            process.stdin.write(json.dumps(text).encode() + b"\n")
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 60)[0], "no answer"
            assert json.loads(process.stdout.readline())["text"] == text
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def test_json_survives_a_terminal_without_unicode():
    done = subprocess.run(
        [sys.executable, "-m", "dsq.cli.main", "tokenize", str(TINY_CODER), TEXT, "--json"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["text"] == TEXT


def test_neither_torch_nor_llama_cpp_is_loaded(gguf):
    for model in (TINY_CODER, gguf):
        loaded = modules_after(
            f"from dsq.cli.main import main\nmain(['tokenize', {str(model)!r}, 'x'])"
        )
        assert not loaded & {"torch", "transformers", "llama_cpp", "safetensors", "jinja2"}


def test_a_directory_without_weights_or_config(tmp_path, tokenized):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY_CODER / name).read_bytes())
    assert tokenized(tmp_path, TEXT) == tokenized(TINY_CODER, TEXT)
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    assert tokenized(tmp_path, TEXT) == tokenized(TINY_CODER, TEXT)
    (tmp_path / "config.json").write_text('{"vocab_size": "x"}')
    with pytest.raises(InputError, match=r"config.json: vocab_size is 'x'; a whole number"):
        read_vocabulary(tmp_path)


def test_a_directory_with_one_gguf(gguf, tokenized):
    assert tokenized(gguf.parent, TEXT) == tokenized(gguf, TEXT)


@pytest.mark.filterwarnings("ignore:.*fault.* of its conversion")
def test_a_pre_tokenizer_by_name(llama_cpp_source, tokenized, capsys):
    """A file of another family that names none: llama.cpp's default keeps no digits apart."""
    path = llama_cpp_source / "models" / "ggml-vocab-aquila.gguf"
    assert tokenized(path, "a 1234") != tokenized(path, "a 1234", "--pre", "llama-bpe")
    assert tokenized(path, "x", "--pre", "gpt-2")["text"] == "x"
    assert "--pre gtp-2: llama.cpp has no" in fails(capsys, "tokenize", path, "x", "--pre", "gtp-2")


def test_an_error_of_the_vocabulary_names_the_file(llama_cpp_source, tmp_path, capsys):
    path = llama_cpp_source / "models" / "ggml-vocab-llama-spm.gguf"
    assert f"{path}: tokenizer.ggml.model: is 'llama'" in fails(capsys, "tokenize", path, "x")
    definition = json.loads((TINY_CODER / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**definition, "decoder": {"type": "x"}}))
    (tmp_path / "tokenizer_config.json").write_bytes(
        (TINY_CODER / "tokenizer_config.json").read_bytes()
    )
    assert f"{tmp_path}" in fails(capsys, "tokenize", tmp_path, "x")


def test_the_real_vocabulary(vocab_gguf, tokenized, recwarn):
    found = tokenized(vocab_gguf, "Führer", "--no-bos")
    assert found["ids"] == [37, 32009, 71, 6247]
    assert found["pieces"] == ["F", "ü", "h", "rer"]
    assert found["text"] == "Führer"


def test_a_text_that_does_not_come_back_is_told(tmp_path, capsys):
    definition = json.loads((TINY_CODER / "tokenizer.json").read_text())
    del definition["model"]["vocab"]["~"]
    definition["model"]["merges"] = [m for m in definition["model"]["merges"] if "~" not in m]
    vocab = [t for t in definition["model"]["vocab"] if "~" not in t]
    added = [entry["content"] for entry in definition["added_tokens"]]
    definition["model"]["vocab"] = {t: i for i, t in enumerate(t for t in vocab if t not in added)}
    n = len(definition["model"]["vocab"])
    for i, entry in enumerate(definition["added_tokens"]):
        entry["id"] = n + i
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_bytes(
        (TINY_CODER / "tokenizer_config.json").read_bytes()
    )
    assert main(["tokenize", str(tmp_path), "a~b"]) == 0
    assert "do not give this text back" in capsys.readouterr().err
    assert main(["tokenize", str(tmp_path), "ab"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("args", "raw", "message"),
    [
        ([], b"", "give one of TEXT"),
        (["a", "--fim", "a", "b"], b"", "give one of TEXT"),
        (["-"], b"ab\xff", "standard input: is not UTF-8: byte 2 is 0xFF"),
        (["-"], b"ab\xe4\xbd", "byte 2 is 0xE4, unexpected end of data"),
        (["a\udcff"], b"", "TEXT: is not UTF-8: character 1 is the byte 0xFF"),
        (["--fim", "a", "\udc80"], b"", "SUFFIX: is not UTF-8: character 0 is the byte 0x80"),
        (["--chat", "\udcc3"], b"", "--chat: is not UTF-8: character 0 is the byte 0xC3"),
        (["\ud800"], b"", r"character 0 is a lone surrogate \(U\+D800\)"),
        (["--lines", "-"], b'"a"\n"b\xff"\n', "standard input: line 2: is not UTF-8: byte 2"),
        (["--lines", "-"], b'"a"\n"\\udc80"\n', "line 2: text: character 0 is a lone surrogate"),
        (["--lines", "-"], b'"a"\n\n"b"\n', "line 2: is no JSON"),
        (["--lines", "-"], b'"a"\n3\n', "line 2: is 3; a JSON string is needed"),
        (["--lines", "-"], b'"a"\n["b"]\n', r"line 2: is \['b'\]; a JSON string"),
        (["--lines", "-"], b"[" * 100_000, "line 1: is no JSON"),
        (["--lines", "-"], b"9" * 10_000, "line 1: is no JSON"),
        (["--lines", "missing.jsonl"], b"", "missing.jsonl: cannot read it: No such file"),
        (["--lines", "."], b"", "cannot read it: Is a directory"),
        (["--chat", "{}"], b"", "--chat: is no list"),
        (["--chat", "[1"], b"", "--chat: is no JSON"),
        (["--chat", "[1]"], b"", "messages: one is 1; an object is needed"),
        (["--chat", '[{"role": "user", "content": "x"}]'], b"", "no chat template"),
        (["--chat", "-"], b"\xff", "standard input: is not UTF-8"),
    ],
)
def test_bad_input(capsys, stdin, args, raw, message):
    stdin(raw)
    assert main(["tokenize", str(TINY_CODER), *args]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1


def test_a_closed_standard_input(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert "standard input is closed" in fails(capsys, "tokenize", TINY_CODER, "-")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's /dev/full")
@pytest.mark.parametrize("option", [[], ["--json"], ["--lines"]])
def test_an_output_that_cannot_be_written(tmp_path, option):
    (tmp_path / "lines").write_text('"a"\n')
    args = [*option, str(tmp_path / "lines")] if "--lines" in option else ["a", *option]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dsq.cli.main", "tokenize", str(TINY_CODER), *args],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == "dsq: error: cannot write the output: No space left on device\n"


def test_lines_before_a_bad_one_are_answered(capsys, stdin):
    stdin(b'"a"\nx\n')
    assert main(["tokenize", str(TINY_CODER), "--lines", "-"]) == 2
    assert json.loads(capsys.readouterr().out)["text"] == "a"


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.parametrize("option", ["-", "--lines"])
def test_a_line_of_a_gigabyte_is_refused_before_it_is_held(tmp_path, option):
    file = tmp_path / "long"
    with open(file, "wb") as out:
        out.truncate(1 << 30)  # holes: takes no disk
    args = ["-"] if option == "-" else ["--lines", str(file)]
    with open(file, "rb") as given:
        done = subprocess.run(
            [sys.executable, "-m", "dsq.cli.main", "tokenize", str(TINY_CODER), *args],
            stdin=given,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)),
        )
    assert done.returncode == 2
    assert "longer than 16 MiB" in done.stderr


def test_the_longest_line(monkeypatch, capsys, stdin):
    monkeypatch.setattr(tokenize, "MOST_BYTES", 8)
    stdin(b'"12345"\n"123456"\n')
    assert main(["tokenize", str(TINY_CODER), "--lines", "-"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["text"] == "12345"
    assert "line 2: is longer" in captured.err


@pytest.mark.parametrize("args", [["tokenize"], ["tokenizer"], ["tokenizer", "check"], ["doctor"]])
def test_the_help_fits_80_columns(args, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*args, "--help"])
    out = capsys.readouterr().out
    assert "example:" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []

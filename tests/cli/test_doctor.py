"""`dsq doctor`: broken files are found, mended, and then run like a fresh conversion."""

from __future__ import annotations

import hashlib
import json
import warnings

import pytest

from dsq.cli.main import main
from dsq.convert.doctor import diagnose, mended_entries
from dsq.convert.doctor.template import CODER_TEMPLATE
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.gguf.writer import gguf_layout, write_gguf
from dsq.runtime.complete import complete
from dsq.runtime.llama_vocab import LlamaVocab
from dsq.runtime.llamacpp import LlamaCppEngine
from dsq.runtime.source import EngineSettings, Source
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.old_conversions import EVERY_FAULT, convert, drop, foreign, put, write

CODE = "def über(self, naïve):\n    # größer als 42?\n    return self.data[0] + 123\n"
SPECIAL = f"<｜fim▁begin｜>{CODE}<｜fim▁hole｜>\n<｜fim▁end｜><|EOT|>[PAD4120]"
RUN = EngineSettings(n_ctx=256, n_threads=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("instruct"), template=CODER_TEMPLATE)


def doctor(capsys, *args):
    """(exit code, the JSON)"""
    capsys.readouterr()
    code = main(["doctor", *map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


def data_hash(path):
    file, digest = read_gguf(path), hashlib.sha256()
    for name in file.tensors:
        digest.update(name.encode() + file.data(name).tobytes())
    return digest.hexdigest()


def in_llama_cpp(path, engine):
    """What llama.cpp makes of a file by itself: the tokens of texts, the logits to the bit."""
    with LlamaVocab(path) as vocab:
        ids = [vocab.encode(text, add_special=True) for text in (CODE, SPECIAL)]
    return ids, hashlib.sha256(engine.logits(ids[0], all=False).tobytes()).hexdigest()


def in_dsq(engine):
    """Greedy completions, and what ends a chat."""
    whole = complete(engine, CODE, max_tokens=4).result.tokens
    filled = complete(engine, CODE, "\n\nprint(", max_tokens=4).result.tokens
    return whole, filled, engine.tokenizer.stop_ids("chat")


def behaviour(path):
    with LlamaCppEngine(path, n_ctx=256, n_threads=1) as engine:
        return in_llama_cpp(path, engine), in_dsq(engine)


@pytest.fixture(scope="module")
def healthy(base):
    return behaviour(base)


@pytest.mark.parametrize("name", EVERY_FAULT)
def test_a_mended_file_runs_like_a_fresh_conversion(base, healthy, name, tmp_path, capsys):
    code, fault = EVERY_FAULT[name]
    metadata = foreign(base)
    fault(metadata)
    broken, mended = write(base, metadata, tmp_path / "broken.gguf"), tmp_path / "mended.gguf"
    before = hashlib.sha256(broken.read_bytes()).hexdigest()

    exit_code, report = doctor(capsys, broken, "--fix", mended)
    assert exit_code == 0
    assert code in [finding["code"] for finding in report["findings"]]
    exit_code, report = doctor(capsys, mended)
    assert (exit_code, report["findings"]) == (0, [])

    assert hashlib.sha256(broken.read_bytes()).hexdigest() == before
    assert data_hash(mended) == data_hash(base)
    assert behaviour(mended) == healthy


@pytest.mark.parametrize(
    "name",
    ["no pre", "pre gpt-2", "rope factor 1", "no rope base", "markers normal", "letters normal"],
)
def test_what_is_called_serious_changes_the_output(base, healthy, name, tmp_path):
    metadata = foreign(base)
    EVERY_FAULT[name][1](metadata)
    broken = write(base, metadata, tmp_path / "broken.gguf")
    with LlamaCppEngine(broken, n_ctx=256, n_threads=1) as engine:
        assert in_llama_cpp(broken, engine) != healthy[0]


def test_an_instruct_model_of_2023(instruct, tmp_path, capsys):
    """Everything at once, as such files are; mended, it converses as a fresh conversion."""
    metadata = foreign(instruct)
    put(eos_token_id=4110)(metadata)
    drop("tokenizer.chat_template", "tokenizer.ggml.eot_token_id")(metadata)
    for name in ("no pre", "old rope key", "no fim ids", "markers user-defined", "no add_bos"):
        EVERY_FAULT[name][1](metadata)
    broken, mended = write(instruct, metadata, tmp_path / "old.gguf"), tmp_path / "new.gguf"
    code, report = doctor(capsys, broken, "--fix", mended)
    assert code == 0
    assert [finding["code"] for finding in report["findings"]] == [
        *("pre", "rope_old_key", "add_bos", "eos", "eot", "fim", "chat_template"),
        "control_types",
    ]
    messages = [{"role": "user", "content": "Say <|EOT|> in Python."}]
    a, b = (Tokenizer.from_vocabulary(Source(path).vocabulary) for path in (instruct, mended))
    assert b.chat(messages) == a.chat(messages)
    assert behaviour(mended) == behaviour(instruct)


# -- what is printed


def test_a_paragraph_for_each_fault(base, tmp_path, capsys):
    metadata = foreign(base)
    for name in ("no pre", "rows normal"):
        EVERY_FAULT[name][1](metadata)
    broken = write(base, metadata, tmp_path / "broken.gguf")
    assert main(["doctor", str(broken)]) == 1
    first, second, last = capsys.readouterr().out.split("\n\n")
    assert first.splitlines()[0] == (
        "✗ pre: tokenizer.ggml.pre is absent, as in files made before April 2024"
    )
    assert [line.split()[0] for line in first.splitlines()[1:]] == ["does:", "mend:"]
    assert second.startswith("! padding_types: rows without a token (4118–")
    assert last.splitlines()[0].startswith(f"{broken}: deepseek-coder: 13 letters, ")
    assert last.splitlines()[1].startswith("examined: pre-tokenizer, special ids, token types")
    assert last.splitlines()[-2:] == [
        "2 faults, 1 of which changes its output",
        f"write a mended copy with: dsq doctor {broken} --fix OUT",
    ]


def test_nothing_to_mend(base, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    assert main(["doctor", str(base), "--fix", str(out)]) == 0
    assert capsys.readouterr().out.endswith(
        f"✓ nothing wrong found in what was examined; {out} not written\n"
    )
    assert not out.exists()


def test_no_health_is_claimed_of_what_was_not_examined(tmp_path, llama_cpp_source, capsys):
    path = llama_cpp_source / "models" / "ggml-vocab-llama-spm.gguf"
    assert main(["doctor", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "! nothing wrong found in what was examined"
    assert any(line.startswith("not examined: pre-tokenizer, ") for line in lines)
    code, report = doctor(capsys, path)
    assert (code, report["examined"]) == (0, ["RoPE's old key"])
    assert len(report["not_examined"]) == 3
    whole = dict(read_gguf(llama_cpp_source / "models/ggml-vocab-deepseek-coder.gguf").metadata)
    kinds = read_gguf(llama_cpp_source / "models/ggml-vocab-deepseek-coder.gguf").metadata_types
    entries = mended_entries(whole, kinds, diagnose(whole, ()).findings)
    write_gguf(tmp_path / "whole.gguf", gguf_layout(entries, ()), ())
    assert main(["doctor", str(tmp_path / "whole.gguf")]) == 0
    assert capsys.readouterr().out.endswith("✓ nothing wrong found\n")


def test_the_command_to_copy_is_quoted_and_says_pre(base, tmp_path, capsys):
    metadata = foreign(base)
    EVERY_FAULT["no pre"][1](metadata)
    path = write(base, metadata, tmp_path / "my model.gguf")
    assert main(["doctor", str(path)]) == 1
    assert capsys.readouterr().out.endswith(f"dsq doctor '{path}' --fix OUT\n")
    tokens = ["<letter>" if t == "û" else t for t in metadata["tokenizer.ggml.tokens"]]
    path = write(base, {**metadata, "tokenizer.ggml.tokens": tokens}, tmp_path / "x.gguf")
    assert main(["doctor", str(path)]) == 1
    assert capsys.readouterr().out.endswith(f"dsq doctor {path} --fix OUT --pre NAME\n")


def test_paragraphs_are_as_wide_as_the_terminal(base, tmp_path, capsys, monkeypatch):
    metadata = foreign(base)
    for name in ("no pre", "rows normal"):
        EVERY_FAULT[name][1](metadata)
    write(base, metadata, tmp_path / "b.gguf")
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "b.gguf"]) == 1
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["doctor", "b.gguf"]) == 1
    wrapped = capsys.readouterr().out
    assert max(map(len, plain.splitlines())) > 80
    assert max(map(len, wrapped.splitlines())) <= 60
    assert wrapped.split() == plain.split()


def test_the_one_file_in_this_folder(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 2
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"x")
    assert main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert "this folder has no .gguf; give one" in error
    assert "a-00001-of-00002.gguf: " in error  # tried, and no GGUF
    (tmp_path / "a-00001-of-00002.gguf").unlink()
    (tmp_path / "b.gguf").write_bytes(base.read_bytes())
    assert doctor(capsys)[1]["path"] == "b.gguf"
    (tmp_path / "c.gguf").write_bytes(b"x")
    assert main(["doctor"]) == 2
    assert "this folder has b.gguf, c.gguf; give one of them" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path)]) == 2
    assert "is a directory; it has b.gguf, c.gguf" in capsys.readouterr().err


def test_what_cannot_be_mended_is_left_and_told(base, tmp_path, capsys):
    metadata = foreign(base)
    tokens = ["<letter>" if t == "û" else t for t in metadata["tokenizer.ggml.tokens"]]
    metadata["tokenizer.ggml.tokens"] = tokens
    for name in ("no pre", "rows normal"):
        EVERY_FAULT[name][1](metadata)
    broken = write(base, metadata, tmp_path / "broken.gguf")
    assert main(["doctor", str(broken), "--fix", str(tmp_path / "half.gguf")]) == 1
    out = capsys.readouterr().out
    assert "family not recognised" in out
    assert out.splitlines()[-2] == "not mended: pre"
    assert out.endswith(f"dsq doctor {broken} --fix OUT --pre NAME\n")
    assert main(["doctor", str(tmp_path / "half.gguf"), "--fix", str(tmp_path / "x.gguf")]) == 1
    assert "1 fault, 1 of which changes its output; nothing written" in capsys.readouterr().out
    fixed = tmp_path / "fixed.gguf"
    assert doctor(capsys, broken, "--pre", "deepseek-coder", "--fix", fixed)[0] == 0
    assert read_gguf(fixed).metadata["tokenizer.ggml.pre"] == "deepseek-coder"


def test_names_from_the_file_do_not_steer_the_terminal(base, tmp_path, capsys):
    metadata = {**foreign(base), "tokenizer.chat_template": "{{ raise_exception('\x1b[2J') }}"}
    assert main(["doctor", str(write(base, metadata, tmp_path / "b.gguf"))]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_bad_input(base, tmp_path, capsys):
    (tmp_path / "no.gguf").write_text("no")
    for args in (
        [tmp_path / "nowhere.gguf"],
        [tmp_path],
        [tmp_path / "no.gguf"],
        [base, "--pre", "nonsense"],
        [],
    ):
        assert main(["doctor", *map(str, args)]) == 2
    metadata = foreign(base)
    EVERY_FAULT["no pre"][1](metadata)
    broken = write(base, metadata, tmp_path / "broken.gguf")
    assert main(["doctor", str(broken), "--fix", str(broken), "--force"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("dsq: error: ") == err.count("\n") == 6
    assert "it is never written to" in err


# -- the warning of the verbs that run a model


@pytest.fixture
def old(base, tmp_path):
    metadata = foreign(base)
    for name in ("pre gpt-2", "no rope factor", "rows normal"):
        EVERY_FAULT[name][1](metadata)
    return write(base, metadata, tmp_path / "old.gguf")


def test_a_faulty_foreign_file_is_warned_of_once(old):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = Source(old)
        _ = source.vocabulary
        source.engine(RUN).close()
    assert [str(w.message) for w in caught] == [
        f"{old}: 2 faults of its conversion change what it answers: tokenizer.ggml.pre is 'gpt-2'; "
        f"by the vocabulary it is 'deepseek-coder'; see and mend: dsq doctor {old} --fix OUT"
    ]


def test_no_warning_of_what_changes_nothing_or_is_dsqs_own(base, tmp_path):
    metadata = foreign(base)
    EVERY_FAULT["rows normal"][1](metadata)
    write(base, metadata, tmp_path / "slight.gguf")
    own = dict(read_gguf(base).metadata)
    EVERY_FAULT["no rope factor"][1](own)
    write(base, own, tmp_path / "own.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (tmp_path / "slight.gguf", tmp_path / "own.gguf", base):
            _ = Source(path).vocabulary


def test_the_verbs_print_it_as_one_line(old, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["complete", str(old), "-p", "def f(", "-n", "2", "-t", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    warned = [line for line in lines if line.startswith("dsq: warning: ")]
    assert len(warned) == 1
    assert "dsq doctor" in warned[0]

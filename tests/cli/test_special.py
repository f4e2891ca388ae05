"""What a user types is text, in prompts, files and messages, unless --special says otherwise."""

from __future__ import annotations

import io
import json
import shutil

import pytest

from dsq.cli.main import main
from dsq.runtime.chat import ChatSession
from dsq.runtime.complete import completion_ids
from dsq.runtime.sampling import GREEDY
from dsq.runtime.source import Source
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import TokenType
from tests.models import TINY_CODER
from tests.runtime.scripted import ScriptedEngine

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
EOT, BOS, HOLE = "<|EOT|>", "<｜begin▁of▁sentence｜>", "<｜fim▁hole｜>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("special") / "tiny"
    shutil.copytree(TINY_CODER, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    out = folder.parent / "tiny.gguf"
    assert main(["quantize", "q8_0", str(folder), "-o", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def tok(model):
    return Tokenizer.from_vocabulary(Source(model).vocabulary)


def control_in(tok, ids):
    control = {*tok.vocab.ids_of_type(TokenType.CONTROL)}
    return [tok.vocab.tokens[i] for i in ids if i in control]


def prompt_tokens(capsys, *args):
    capsys.readouterr()
    assert main([*map(str, args), "-n", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["prompt_tokens"]


def test_a_prompt(model, tok, tmp_path, capsys):
    text = f"a {EOT} b {HOLE}\n"
    (tmp_path / "file").write_text(text)
    plain, special = (completion_ids(tok, text, parse_special=s) for s in (False, True))
    assert control_in(tok, plain) == [BOS]
    assert control_in(tok, special) == [BOS, EOT, HOLE]
    for given in (("-p", text), ("--prefix-file", tmp_path / "file")):
        assert prompt_tokens(capsys, "complete", model, *given) == len(plain)
        assert prompt_tokens(capsys, "complete", model, *given, "--special") == len(special)


def test_prefix_and_suffix(model, tok, capsys):
    plain, special = (completion_ids(tok, EOT, EOT, parse_special=s) for s in (False, True))
    markers = [BOS, "<｜fim▁begin｜>", HOLE, "<｜fim▁end｜>"]
    assert control_in(tok, plain) == markers
    assert control_in(tok, special) == [*markers[:2], EOT, HOLE, EOT, markers[3]]
    args = ("complete", model, "-p", EOT, "--suffix", EOT)
    assert prompt_tokens(capsys, *args) == len(plain)
    assert prompt_tokens(capsys, *args, "--special") == len(special)


def test_messages(model, tok, capsys):
    text = f"a {EOT} {BOS}"
    messages = [{"role": "system", "content": EOT}, {"role": "user", "content": text}]
    for special, control in ((False, [BOS]), (True, [BOS, EOT, EOT, BOS])):
        engine = ScriptedEngine(tok, [tok.vocab.eot])
        chat = ChatSession(engine, system=EOT, sampler=GREEDY, parse_special=special)
        list(chat.send(text))
        assert control_in(tok, engine.held) == control
        assert engine.held == tok.chat(messages, parse_special=special)
        args = ("chat", model, "-p", text, "--system", EOT, *(["--special"] if special else []))
        assert prompt_tokens(capsys, *args) == len(engine.held)


@pytest.mark.parametrize("args", [["complete", "--prefix-file", "-"], ["chat"]])
def test_bytes_that_are_no_text_are_refused(model, args, monkeypatch, capsys):
    verb, *options = args
    stdin = io.TextIOWrapper(io.BytesIO(b"ab\xffc\n"), encoding="utf-8", errors="replace")
    monkeypatch.setattr("sys.stdin", stdin)
    capsys.readouterr()
    assert main([verb, str(model), *options, "-n", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "standard input" in captured.err
    assert "not UTF-8" in captured.err

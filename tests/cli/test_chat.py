"""`dsq chat`, as a person uses it: on a terminal, with /reset, /exit and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from dsq.cli.main import main
from tests.cli.test_main import fails
from tests.models import TINY_CODER

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(TINY_CODER, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    out = folder.parent / "tiny.gguf"
    assert main(["quantize", "q8_0", str(folder), "-o", str(out)]) == 0
    return out


def test_lines_from_a_pipe_are_messages(model, monkeypatch, capsys):
    lines = "hello\n\n/reset\nhello\n/exit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", str(model), "-n", "6", "--temp", "0"]) == 0
    out = capsys.readouterr().out
    half = len(out) // 2
    assert out
    assert out[:half] == out[half:]  # after /reset the same question has the same answer


def test_one_message_as_json(model, capsys):
    capsys.readouterr()
    assert main(["chat", str(model), "-p", "hi", "-n", "4", "--temp", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["stop_reason"] in ("eos", "length")
    assert {"text", "tokens", "tokens_per_second"} <= set(report)


def test_a_conversation_is_not_one_object(model, capsys):
    assert "-p" in fails(capsys, "chat", model, "--json")


PROMPT = r"\x1b\[\?2004h[^>]*>"  # the editor takes over the keyboard, and draws its prompt


def read_until(fd, wanted, seconds=60):
    """What the terminal shows, up to and with what the pattern `wanted` finds."""
    seen = ""
    end = time.monotonic() + seconds
    while not re.search(wanted, seen, re.DOTALL):
        ready, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            pytest.fail(f"{wanted!r} did not come; the terminal shows {seen!r}")
        seen += os.read(fd, 4096).decode(errors="replace")
    return seen


@contextmanager
def on_a_terminal(*args, state):
    """`dsq chat` on a terminal: the process, and the terminal's other end."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dsq.cli.main", "chat", *map(str, args)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        # This terminal does not say where its cursor is.
        env={**os.environ, "XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1"},
        # Whoever runs the tests in the background made SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(slave)
    try:
        read_until(master, PROMPT)
        yield process, master
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_ctrl_c_stops_the_answer_and_returns_to_the_prompt(model, tmp_path):
    with on_a_terminal(model, "--temp", "1", "--seed", "1", state=tmp_path) as (process, master):
        os.write(master, b"hello\r")
        read_until(master, r"hello.*\r\n[^\x1b]*[a-z]")  # the answer has begun
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in read_until(master, PROMPT)
        process.send_signal(signal.SIGINT)  # at the prompt it drops the line
        assert "Traceback" not in read_until(master, PROMPT)
        os.write(master, b"/quit\r")
        assert process.wait(timeout=30) == 0


def test_a_terminal_remembers_and_takes_several_lines(model, tmp_path):
    with on_a_terminal(model, "-n", "3", "--temp", "0", state=tmp_path) as (process, master):
        os.write(master, b"one\x1b\rtwo\r")
        assert "tokens/s, context" in read_until(master, PROMPT)
        os.write(master, b"'''\rthree\rfour'''\r")
        assert "tokens/s, context" in read_until(master, PROMPT)
        os.write(master, f"/save {tmp_path / 'talk.json'}\r".encode())
        assert "Saved" in read_until(master, PROMPT)
        os.write(master, b"\x04")
        assert process.wait(timeout=30) == 0
    said = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [m["content"] for m in said if m["role"] == "user"] == ["one\ntwo", "three\nfour"]
    history = tmp_path / "dsq" / "chat_history"
    assert "+one\n+two\n" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.parent.stat().st_mode & 0o777 == 0o700

"""`dsq chat`, as a person uses it: on a terminal, with /reset, /exit and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

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
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/reset\nhello\n/exit\nnever read\n"))
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


def read_until(fd, wanted, seconds=60):
    """What the terminal shows, up to and with `wanted`."""
    seen = ""
    end = time.monotonic() + seconds
    while wanted not in seen:
        ready, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            pytest.fail(f"{wanted!r} did not come; the terminal shows {seen!r}")
        seen += os.read(fd, 4096).decode(errors="replace")
    return seen


def test_ctrl_c_stops_the_answer_and_returns_to_the_prompt(model):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dsq.cli.main", "chat", str(model), "--temp", "1", "--seed", "1"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        # Whoever runs the tests in the background made SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(slave)
    try:
        read_until(master, "> ")
        os.write(master, b"hello\n")
        read_until(master, "hello\r\n")
        os.read(master, 1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in read_until(master, "> ")
        process.send_signal(signal.SIGINT)  # at the prompt it drops the line
        os.write(master, b"\n")  # input() may have been about to wait when the signal came
        assert "Traceback" not in read_until(master, "> ")
        os.write(master, b"/exit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)

"""Runs vLLM for a server, and ends all of it when the server is gone: `python -I THIS COMMAND…`.

vLLM does not look at stdin, and its engine and workers are processes of their own, which outlive it
when it is killed. So this one stands between: it starts the command in a session of its own, says
`dsq-guard PID` on stdout, passes on what the command says, and waits. When stdin ends, the command
gets SIGTERM, and after a grace the whole session SIGKILL, which it also gets when the command ended
by itself. The exit code is the command's, 128 + n for signal n. Only the standard library: any
Python runs it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

GRACE_S = 10.0
GREETING = "dsq-guard "
_LAST_WORDS_S = 1.0  # for output that comes after the end


def main(command: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        # The server decides, by closing stdin. Not SIG_IGN, which the command would inherit.
        signal.signal(number, lambda *_: None)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        _say(f"{command[0]}: {error.strerror}\n".encode())
        return 127
    _say(f"{GREETING}{child.pid}\n".encode())
    assert child.stdout is not None
    relay = threading.Thread(target=_pass_on, args=(child.stdout.fileno(),), daemon=True)
    relay.start()
    threading.Thread(target=_end_with_stdin, args=(child,), daemon=True).start()
    code = child.wait()
    _kill_all(child.pid)
    relay.join(_LAST_WORDS_S)
    return code if code >= 0 else 128 - code


def _pass_on(source: int) -> None:
    """Through this process, so that nothing but it holds the server's pipe open."""
    while data := os.read(source, 1 << 16):
        _say(data)


def _say(data: bytes) -> None:
    with suppress(OSError):  # the server is gone, and stdin's end tells it, too
        while data:
            data = data[os.write(1, data) :]


def _end_with_stdin(child: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _kill_all(child.pid)


def _kill_all(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # a thread may still wait for stdin

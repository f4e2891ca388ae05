"""Where vLLM is, how it is started and ended, and what its processes take."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import shutil
import signal
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsq.errors import InputError
from dsq.runtime.server.backend import MAX_LOGPROBS
from dsq.runtime.server.vllm_guard import GRACE_S, GREETING

log = logging.getLogger("dsq.server")

_GUARD = Path(__file__).with_name("vllm_guard.py")
_PATIENCE_S = GRACE_S + 5
_KEEP_LINES = 400  # of vLLM's output
_MAX_LINE = 1 << 16
COMMAND_VARIABLE = "DSQ_VLLM"
INSTALL = "python -m venv ~/vllm-env && ~/vllm-env/bin/pip install vllm"
SERVED_NAME = "dsq"
DEFAULT_PARALLEL = 256

# What dsq decides itself; `--vllm-args` may not say otherwise.
_TAKEN = {
    "--host": "it listens on a socket of dsq's own",
    "--port": "it listens on a socket of dsq's own",
    "--uds": "it listens on a socket of dsq's own",
    "--api-key": "give dsq serve --api-key",
    "--tensor-parallel-size": "give --tensor-parallel-size itself",
    "-tp": "give --tensor-parallel-size itself",
    "--max-model-len": "give -c",
    "--max-num-seqs": "give --parallel",
    "--served-model-name": "give --alias",
    "--model": "give the model to dsq serve",
    "--tokenizer": "dsq tokenizes by the model's own files",
    "--generation-config": "dsq knows the stop tokens and the defaults",
}


@dataclass(frozen=True)
class VllmSettings:
    """`command`: the vllm executable, None to talk to the server at `url`, which runs already.

    `n_ctx` 0: as long as the model and the memory allow. `extra` goes to `vllm serve` as it is.
    """

    path: str
    command: str | None
    url: str | None = None
    n_ctx: int = 0
    n_parallel: int = DEFAULT_PARALLEL
    tensor_parallel: int = 1
    extra: tuple[str, ...] = ()
    n_ctx_train: int = 0
    n_vocab: int = 0
    n_parameters: int = 0
    size_bytes: int = 0


def find_vllm(given: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The vllm executable: `given` (`--vllm`), DSQ_VLLM, the PATH, beside this Python.

    Raises InputError with the command that installs it.
    """
    named = given or environ.get(COMMAND_VARIABLE)
    if named:
        where = "--vllm" if given else COMMAND_VARIABLE
        found = shutil.which(Path(named).expanduser(), path=environ.get("PATH"))
        if found is None:
            raise InputError(
                f"{where} {named}: no such executable; name the bin/vllm of an environment that "
                f"has vLLM, or make one: {INSTALL}"
            )
        return str(Path(found).absolute())
    found = shutil.which("vllm", path=environ.get("PATH")) or shutil.which(
        "vllm", path=str(Path(sys.executable).parent)
    )
    if found is None:
        raise InputError(
            "--engine vllm: there is no vllm command here; install it in an environment of its own "
            f"(it wants another torch): {INSTALL}, and add --vllm ~/vllm-env/bin/vllm"
        )
    return str(Path(found).absolute())


def extra_arguments(text: str | None) -> tuple[str, ...]:
    """`--vllm-args`, split as a shell does. Raises InputError for what dsq decides itself."""
    try:
        words = tuple(shlex.split(text or ""))
    except ValueError as error:
        raise InputError(f"--vllm-args {text}: {error}; quote it as for a shell") from None
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name in _TAKEN:
            raise InputError(f"--vllm-args {name}: {_TAKEN[name]}")
    return words


def serve_command(settings: VllmSettings, socket: str, tokenizer: str | None = None) -> list[str]:
    """`vllm serve` on a Unix socket: no port that others could reach or take.

    `tokenizer`: the folder of another one than the model's own (see `vllm_tokenizer`).
    """
    assert settings.command is not None
    command = [settings.command, "serve", settings.path, "--uds", socket]
    command += ["--served-model-name", SERVED_NAME]
    # dsq's sampling defaults and stop tokens, not those of generation_config.json.
    command += ["--generation-config", "vllm"]
    command += ["--max-logprobs", str(MAX_LOGPROBS), "--enable-prompt-tokens-details"]
    command += ["--disable-uvicorn-access-log", "--max-num-seqs", str(settings.n_parallel)]
    command += ["--max-model-len", str(settings.n_ctx or "auto")]  # auto: as much as fits
    if tokenizer is not None:
        command += ["--tokenizer", tokenizer]
    if settings.tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(settings.tensor_parallel)]
    return [*command, *settings.extra]


def environment(settings: VllmSettings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """vLLM's: the tools beside it (ninja, for kernels compiled on the spot) are found, it reports
    nothing to its makers, and it asks no hub for a model that lies in a folder."""
    beside = str(Path(settings.command or "").parent)
    path = os.pathsep.join((beside, environ.get("PATH", os.defpath)))
    made = {key: value for key, value in environ.items() if key != "PYTHONPATH"}
    return {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **made, "PATH": path}


class VllmProcess:
    """A running `vllm serve`, behind `vllm_guard`.

    Its output goes to the log at INFO while it loads and at DEBUG afterwards, where it may hold
    what users wrote. The last lines are kept to say why it ended.
    """

    def __init__(self, guard: asyncio.subprocess.Process) -> None:
        self._guard = guard
        self.pid: int | None = None  # vLLM's, and its session's
        self.loading = True
        self._lines: deque[str] = deque(maxlen=_KEEP_LINES)
        self._reader = asyncio.create_task(self._read())
        self._exit = asyncio.create_task(guard.wait())

    @classmethod
    async def start(cls, command: list[str], environ: Mapping[str, str]) -> VllmProcess:
        log.info("starting %s", shlex.join(command))
        guard = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", str(_GUARD), *command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(environ),
            start_new_session=True,  # Ctrl-C is for the server, which then ends this
        )
        return cls(guard)

    async def ended_within(self, seconds: float | None) -> bool:
        """Waits so long for it to end; None: until it does."""
        await asyncio.wait({self._exit}, timeout=seconds)
        return self._exit.done()

    def hang_up(self) -> None:
        """Lets the guard end it."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()

    async def end(self) -> str:
        """End it if it runs; how it ended and what it said of that, to follow "vLLM ended"."""
        self.hang_up()
        if not await self.ended_within(_PATIENCE_S):
            with contextlib.suppress(ProcessLookupError):
                self._guard.kill()
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)  # what a killed guard left
        code = await self._exit
        await asyncio.wait({self._reader}, timeout=1)
        self._reader.cancel()
        cause = root_cause(self._lines)
        return _exit_words(code) + (f": {cause}" if cause else "")

    async def _read(self) -> None:
        assert self._guard.stdout is not None
        rest = b""
        while data := await self._guard.stdout.read(_MAX_LINE):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[-_MAX_LINE:]
            for line in lines:
                self._take(line.decode("utf-8", "replace").rstrip())

    def _take(self, line: str) -> None:
        if self.pid is None and line.startswith(GREETING):
            self.pid = int(line.removeprefix(GREETING))
            return
        self._lines.append(line)
        log.log(logging.INFO if self.loading else logging.DEBUG, "vllm: %s", line)


def _exit_words(code: int) -> str:
    number = -code if code < 0 else code - 128
    if code < 0 or code > 128:
        with contextlib.suppress(ValueError):
            return f" (killed by {signal.Signals(number).name})"
    return f" (exit code {code})" if code else ""


_ERROR = re.compile(r"(?<![\w.])((?:\w+\.)*\w*(?:Error|Exception|Exit)\b: .*)")
_CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError", "Engine process failed")


def root_cause(lines: Iterable[str]) -> str:
    """The last exception that is not only the echo of another; else the last line."""
    last = found = ""
    for line in lines:
        last = line.strip() or last
        match = _ERROR.search(line)
        if match and not any(words in line for words in _CONSEQUENCES):
            found = match[1]
    return (found or last)[:500]


def resident_bytes(session: int, proc: Path = Path("/proc")) -> int:
    """Resident memory of all processes of a session. Memory they share counts for each."""
    pages = 0
    for folder in proc.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                pages += int((folder / "statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it ended meanwhile
    return pages * os.sysconf("SC_PAGE_SIZE")

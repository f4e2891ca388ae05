"""Running a command and weighing it: time, processor time, memory, bytes written. Linux only."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02
_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class Usage:
    """What one command took, its children included. The memory is None unless it was sampled."""

    seconds: float
    cpu_seconds: float  # user and system
    written: int  # bytes given to write(2), whatever the kernel did with them
    output: str  # stdout and stderr, in the order written
    anonymous: int | None = None  # peak of RssAnon, summed over the processes: the heap, the stacks
    mapped: int | None = None  # peak of RssFile: pages of mapped files, which the kernel can drop
    resident: int | None = None  # the kernel's own VmHWM, of the largest process


@dataclass
class _Peaks:
    anonymous: int = 0
    mapped: int = 0
    resident: int = 0

    def sample(self, pid: int) -> None:
        anonymous = mapped = 0
        for process in _tree(pid):
            status = _status(process)
            anonymous += status.get("RssAnon", 0) + status.get("RssShmem", 0)
            mapped += status.get("RssFile", 0)
            self.resident = max(self.resident, status.get("VmHWM", 0))
        self.anonymous = max(self.anonymous, anonymous)
        self.mapped = max(self.mapped, mapped)


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    sample: bool = False,
) -> Usage:
    """Run `command` to its end. Raises RuntimeError with its output when it fails.

    Sampling reads /proc every 20 ms and takes processor time: leave it off where time is measured.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
        peaks = _Peaks() if sample else None
        # Waiting without reaping: /proc/PID/io can be read until the process is reaped.
        try:
            _wait(process.pid, peaks)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        written = _io(process.pid)["wchar"]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} failed ({process.returncode}):\n{output[-4000:]}")
    return Usage(
        seconds,
        usage.ru_utime + usage.ru_stime,
        written,
        output,
        *((peaks.anonymous, peaks.mapped, peaks.resident) if peaks else ()),
    )


def _wait(pid: int, peaks: _Peaks | None) -> None:
    if peaks is None:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        peaks.sample(pid)
        time.sleep(SAMPLE_SECONDS)


def _tree(pid: int) -> list[int]:
    """`pid` and its descendants."""
    found = [pid]
    for process in found:
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += [int(child) for child in path.read_text().split()]
            except OSError:  # it ended meanwhile
                continue
    return found


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {m[1]: int(m[2]) << 10 for m in re.finditer(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _io(pid: int) -> dict[str, int]:
    """A process's own and its reaped children's I/O."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


def warm(paths: Iterable[Path]) -> None:
    """Read the files once, so that both sides find them in the page cache (if they fit)."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass


def settle() -> None:
    """Let the disk finish what was written before, so that nobody pays for another's output."""
    os.sync()


def fsync_seconds(path: Path) -> float:
    """How long it takes until `path` is on the disk."""
    start = time.perf_counter()
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return time.perf_counter() - start


@dataclass(frozen=True)
class CpuTimes:
    """The machine's processor time since it started, in ticks."""

    busy: int
    stolen: int
    total: int

    @classmethod
    def now(cls) -> CpuTimes:
        user, nice, system, idle, iowait, irq, softirq, steal = (
            int(word) for word in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
        busy = user + nice + system + irq + softirq
        return cls(busy, steal, busy + idle + iowait + steal)

    def since(self, earlier: CpuTimes) -> tuple[float, float]:
        """Shares (busy, stolen by other guests of the host) between two readings."""
        total = max(1, self.total - earlier.total)
        return (self.busy - earlier.busy) / total, (self.stolen - earlier.stolen) / total


def load(seconds: float = 2.0) -> float:
    """How busy the machine is while this process sleeps, 0 to 1."""
    before = CpuTimes.now()
    time.sleep(seconds)
    busy, stolen = CpuTimes.now().since(before)
    return busy + stolen

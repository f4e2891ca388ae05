from __future__ import annotations

from pathlib import Path

import pytest

from dsq.quant import threads


def test_one_thread_a_physical_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.sys, "platform", "linux")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 4, 5}, raising=False)
    monkeypatch.setattr(threads, "_quota", lambda: None)
    monkeypatch.setattr(threads, "_siblings", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
    assert threads.default_threads() == 2
    monkeypatch.setattr(threads, "_siblings", str)  # no hyper-threading
    assert threads.default_threads() == 4
    monkeypatch.setattr(threads, "_quota", lambda: 3)
    assert threads.default_threads() == 3


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("max 100000\n", None), ("150000 100000\n", 2), ("50000 100000", 1), ("junk", None)],
)
def test_cgroup_quota(tmp_path: Path, text: str, cpus: int | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert threads._quota(file) == cpus


def test_no_cgroup(tmp_path: Path) -> None:
    assert threads._quota(tmp_path / "absent") is None


STAT = """cpu  900 0 0 9000 0 0 0 0 0 0
cpu0 {0} 0 10 100 7 0 0 0 0 0
cpu1 {1} 5 0 100 0 0 0 0 50 0
cpu10 7 0 0 0 0 0 0 0 0 0
intr 12
"""


def test_busy_seconds_of_the_cpus_that_are_ours(tmp_path: Path) -> None:
    file = tmp_path / "stat"
    file.write_text(STAT.format(100, 200))
    tick = threads.os.sysconf("SC_CLK_TCK")
    assert threads._busy_seconds({0}, file) == pytest.approx(110 / tick)
    assert threads._busy_seconds({0, 1}, file) == pytest.approx(315 / tick)
    assert threads._busy_seconds({0}, tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("load", "worked", "mine", "free"),
    [
        (0.1, 9.0, 0.0, 4),  # an idle minute: nobody looks
        (3.0, 0.0, 0.0, 4),  # the load is what ended just now
        (3.0, 0.2, 0.2, 4),  # it is this process itself
        (3.0, 0.1, 0.0, 3),
        (3.0, 0.25, 0.05, 2),
        (9.0, 0.4, 0.0, 1),
    ],
)
def test_busy_cores_are_left_to_others(
    monkeypatch: pytest.MonkeyPatch, load: float, worked: float, mine: float, free: int
) -> None:
    """In a look of a tenth of a second on four cores: CPU seconds `worked`, `mine` of them."""
    clock = iter([10.0, 10.1])
    busy, own = iter([5.0, 5.0 + worked]), iter([1.0, 1.0 + mine])
    monkeypatch.setattr(threads, "default_threads", lambda: 4)
    monkeypatch.setattr(threads.os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(threads, "_busy_seconds", lambda usable: next(busy))
    monkeypatch.setattr(threads.os, "times", lambda: (next(own), 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(threads.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    threads._busy_elsewhere.cache_clear()
    try:
        assert threads.free_cores() == free
    finally:
        threads._busy_elsewhere.cache_clear()

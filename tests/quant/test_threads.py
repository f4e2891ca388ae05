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

"""The progress bar: only on a terminal, only after two seconds, never with --json."""

from __future__ import annotations

import io
import sys

import pytest

from dsq.cli import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(monkeypatch, clock, *, stream, seconds, quiet=False):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.progress_bar("working", 100, quiet=quiet) as advance:
        clock[0] = seconds
        advance(10)
        advance(10)
    return stream.getvalue()


def test_a_long_job_on_a_terminal_shows_a_bar(monkeypatch, clock):
    assert "working" in shown(monkeypatch, clock, stream=Terminal(), seconds=3)


def test_a_short_job_shows_nothing(monkeypatch, clock):
    assert shown(monkeypatch, clock, stream=Terminal(), seconds=1) == ""


def test_a_pipe_shows_nothing(monkeypatch, clock):
    assert shown(monkeypatch, clock, stream=io.StringIO(), seconds=3) == ""


def test_json_shows_nothing(monkeypatch, clock):
    assert shown(monkeypatch, clock, stream=Terminal(), seconds=3, quiet=True) == ""

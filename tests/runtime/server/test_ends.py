"""How answers end that do not end well: what the client is told, and what the log says."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import httpx
import pytest

from dsq.runtime.server.backend import WorkerDied
from dsq.runtime.server.limits import Limits
from dsq.runtime.server.transport import TimeLimits
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.server.scripted_backend import (
    ScriptedBackend,
    pool_of,
    serving,
    wait_until,
)

STREAM = {"prompt": "x", "n_predict": 50, "stream": True}


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(lambda request: [65, 66, 67])


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The log's lines of requests, as they come."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(("GET ", "POST ")):
                found.append(record.getMessage())

    caplog.set_level(logging.INFO, "dsq.server")
    handler = Keep()
    logging.getLogger("dsq.server").addHandler(handler)
    yield found
    logging.getLogger("dsq.server").removeHandler(handler)


def test_the_log_says_how_it_ended(
    backend: ScriptedBackend, tokenizer: Tokenizer, lines: list[str]
) -> None:
    with serving(pool_of(backend, tokenizer)) as url:
        whole = httpx.post(f"{url}/completion", json=STREAM)
        assert '"stop":true' in whole.text
        backend.script = lambda request: [65, WorkerDied("the worker process ended")]
        assert "worker process ended" in httpx.post(f"{url}/completion", json=STREAM).text
        backend.script = lambda request: [65, ValueError("secret")]
        assert "secret" not in httpx.post(f"{url}/completion", json=STREAM).text
        backend.script, backend.hold_at = lambda request: [65, 66, 67], 1
        backend.hold = threading.Event()
        with httpx.stream("POST", f"{url}/completion", json=STREAM) as answer:
            next(answer.iter_lines())
        wait_until(lambda: backend.n_running == 0)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/completion", json={**STREAM, "stream": False}, timeout=0.3)
        wait_until(lambda: backend.n_running == 0)
        httpx.get(f"{url}/v1/models/none")
        httpx.get(f"{url}/nothing")
    said = [(line.split()[1:3], line.partition("end=")[2].partition(" ")[0]) for line in lines]
    assert said == [
        (["/completion", "200"], ""),
        (["/completion", "503"], "worker_died"),
        (["/completion", "500"], "internal_error"),
        (["/completion", "499"], "client-gone"),
        (["/completion", "499"], "client-gone"),
        (["/v1/models/{name}", "200"], ""),
        (["other", "404"], "not_found"),
    ]
    assert "finish=stop" in lines[0]
    assert "generated=1" in lines[1]
    assert "generated=1" in lines[3]


def test_refused_at_the_gate_is_logged_by_its_route(
    backend: ScriptedBackend, tokenizer: Tokenizer, lines: list[str]
) -> None:
    limits = Limits(api_keys=("a-long-enough-key",), max_body=1000)
    with serving(pool_of(backend, tokenizer), limits) as url:
        httpx.post(f"{url}/completion", json=STREAM)
        key = {"X-Api-Key": "a-long-enough-key"}
        httpx.post(f"{url}/infill", content=b"x" * 2000, headers=key)
        httpx.post(f"{url}/v1/completions", content=b"{", headers=key)
    assert [line.split()[1:3] for line in lines] == [
        ["/completion", "401"],
        ["/infill", "413"],
        ["/v1/completions", "400"],
    ]
    assert [line.rpartition("end=")[2] for line in lines] == [
        "invalid_api_key",
        "body_too_large",
        "invalid_request",
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_what_the_end_of_the_drain_cuts_off_is_told(
    backend: ScriptedBackend, tokenizer: Tokenizer, lines: list[str], stream: bool
) -> None:
    backend.hold, backend.hold_at = threading.Event(), 1
    told: list[httpx.Response] = []
    with serving(pool_of(backend, tokenizer), drain_seconds=1) as url:
        ask = threading.Thread(
            target=lambda: told.append(
                httpx.post(f"{url}/completion", json={**STREAM, "stream": stream}, timeout=20)
            )
        )
        ask.start()
        wait_until(lambda: backend.n_running == 1)
    ask.join()
    (answer,) = told
    assert answer.status_code == (200 if stream else 503)
    assert '"code":"shutting_down"' in answer.text
    assert "shutting down" in answer.text.splitlines()[-2 if stream else -1]
    assert backend.n_running == 0
    assert "POST /completion 503" in lines[-1]
    assert lines[-1].endswith("end=shutdown")


def test_a_wait_in_a_stream_is_measured(
    backend: ScriptedBackend, tokenizer: Tokenizer, lines: list[str]
) -> None:
    backend.hold, backend.hold_at = threading.Event(), 1
    with serving(pool_of(backend, tokenizer), times=TimeLimits(ping=0.02)) as url:
        with httpx.stream("POST", f"{url}/completion", json=STREAM) as answer:
            waiting = answer.iter_lines()
            while not next(waiting).startswith(":"):
                pass
            backend.hold.set()
            list(waiting)
        metrics = httpx.get(f"{url}/metrics").text
    wait_ms = float(lines[0].partition("longest_wait=")[2].partition("ms")[0])
    assert wait_ms >= 15
    assert "dsq_longest_wait_seconds_count 1.0" in metrics
    assert 'dsq_longest_wait_seconds_bucket{le="0.01"} 0.0' in metrics

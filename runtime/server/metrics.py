"""What one request did, and the counters that Prometheus reads."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from dsq.runtime.server.backend import BackendStats, Usage

log = logging.getLogger("dsq.server")

RECORD = "dsq.record"  # the scope's key for a request's Record

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass
class Record:
    """One request's line in the log. Times are `time.perf_counter()`."""

    began: float = field(default_factory=time.perf_counter)
    route: str = "other"
    status: int = 0
    model: str = ""
    first_token: float | None = None
    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0
    n_sent: int = 0  # tokens given out, of answers that were cut off, too
    n_answers: int = 0  # that came to their end
    predict_ms: float = 0.0
    longest_wait: float = 0.0  # seconds for the next tokens, after the first
    finish: str = ""
    broken: str = ""  # why it ended otherwise than well
    prompt: str | None = None  # only with --log-prompts

    def add(self, usage: Usage, finish: str) -> None:
        self.n_prompt += usage.n_prompt
        self.n_cached += usage.n_cached
        self.n_generated += usage.n_generated
        self.predict_ms += usage.predict_ms
        self.n_answers += 1
        self.finish = finish

    def came(self, now: float, asked: float, n_tokens: int) -> None:
        """New tokens, for which the request waited since `asked`."""
        if self.first_token is None:
            self.first_token = now
        else:
            self.longest_wait = max(self.longest_wait, now - asked)
        self.n_sent += n_tokens

    @property
    def n_tokens(self) -> int:
        return max(self.n_generated, self.n_sent)

    def broke(self, status: int, why: str) -> None:
        """It ended badly, perhaps after a stream's 200; what is told first counts."""
        if not self.broken:
            self.status, self.broken = status, why

    def line(self, method: str, ended: float) -> str:
        parts = [method, self.route, str(self.status), f"{(ended - self.began) * 1e3:.0f}ms"]
        if self.model:
            parts.append(f"model={self.model}")
        if self.n_prompt:
            parts.append(f"prompt={self.n_prompt} cached={self.n_cached}")
        if self.first_token is not None:
            parts.append(f"first={(self.first_token - self.began) * 1e3:.0f}ms")
        if self.n_tokens:
            parts.append(f"generated={self.n_tokens}")
        n = self.n_generated - self.n_answers  # the first token takes no time after the prompt
        if n > 0 and self.predict_ms:
            parts.append(f"rate={n / self.predict_ms * 1e3:.1f}/s")
        if self.longest_wait:
            parts.append(f"longest_wait={self.longest_wait * 1e3:.0f}ms")
        if self.broken or self.finish:
            parts.append(f"end={self.broken}" if self.broken else f"finish={self.finish}")
        if self.prompt is not None:
            parts.append(f"text={self.prompt!r}")
        return " ".join(parts)


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dsq_requests", "Requests answered", ("route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "dsq_request_seconds", "Whole requests", ("route",), registry=registry, buckets=_SECONDS
        )
        self.first_token = Histogram(
            "dsq_first_token_seconds", "Until the first token", registry=registry, buckets=_SECONDS
        )
        self.longest_wait = Histogram(
            "dsq_longest_wait_seconds",
            "Longest wait of an answer for its next tokens, after the first",
            registry=registry,
            buckets=_SECONDS,
        )
        self.prompt_tokens = Counter(
            "dsq_prompt_tokens", "Prompt tokens, cached ones included", registry=registry
        )
        self.cached_tokens = Counter(
            "dsq_prompt_tokens_cached", "Prompt tokens found in the cache", registry=registry
        )
        self.generated_tokens = Counter(
            "dsq_generated_tokens", "Generated tokens", registry=registry
        )
        self.in_flight = Gauge("dsq_requests_in_flight", "Requests now", registry=registry)
        self._models = {
            name: Gauge(f"dsq_{name}", what, ("model",), registry=registry)
            for name, what in (
                ("slots", "Requests that can run at once"),
                ("slots_busy", "Requests that run"),
                ("requests_queued", "Requests that wait for a slot"),
                ("kv_tokens", "Tokens in the KV cache"),
                ("kv_tokens_max", "Tokens that fit the KV cache"),
                ("tokens_per_second", "Generated lately"),
                ("worker_memory_bytes", "Resident in the worker"),
                ("worker_restarts", "Restarts of the worker"),
                ("drafted_tokens", "Tokens drafted from the prompt"),
                ("accepted_tokens", "Drafted tokens that were right"),
            )
        }

    def finished(self, record: Record, ended: float) -> None:
        self.requests.labels(record.route, str(record.status)).inc()
        self.seconds.labels(record.route).observe(ended - record.began)
        if record.first_token is not None:
            self.first_token.observe(record.first_token - record.began)
        self.prompt_tokens.inc(record.n_prompt)
        self.cached_tokens.inc(record.n_cached)
        self.generated_tokens.inc(record.n_tokens)
        if record.longest_wait:
            self.longest_wait.observe(record.longest_wait)

    def text(self, models: dict[str, BackendStats]) -> bytes:
        """Prometheus' format. `models`: those that are loaded now."""
        for gauge in self._models.values():
            gauge.clear()
        for name, stats in models.items():
            for key, value in (
                ("slots", stats.n_slots),
                ("slots_busy", stats.n_busy),
                ("requests_queued", stats.n_queued),
                ("kv_tokens", stats.kv_used),
                ("kv_tokens_max", stats.kv_size),
                ("tokens_per_second", stats.tokens_per_second),
                ("worker_memory_bytes", stats.memory_bytes),
                ("worker_restarts", stats.restarts),
                ("drafted_tokens", stats.drafted_tokens_total),
                ("accepted_tokens", stats.accepted_tokens_total),
            ):
                self._models[key].labels(name).set(value)
        return generate_latest(self.registry)

"""What went wrong, as an HTTP status and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsq.errors import DsqError, InputError
from dsq.runtime.server.backend import Busy, PromptTooLong, WorkerDied

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class HttpProblem(DsqError):
    """An answer other than 200 that has nothing to do with a model."""

    def __init__(self, status: int, message: str, code: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


SHUTTING_DOWN = HttpProblem(
    503,
    "the server is shutting down and gave this answer up; send the request again when it is back",
    "shutting_down",
    Retry_After="5",
)


class ModelNotFound(InputError):
    """HTTP 404."""


@dataclass(frozen=True)
class Problem:
    status: int
    message: str
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    param: str | None = None  # the field that is wrong

    @property
    def content(self) -> dict[str, Any]:
        """OpenAI's shape; `extra` as llama.cpp adds it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {**error, **self.extra}}


def problem(error: Exception) -> Problem:
    """Never shows what is inside an unexpected error: that is for the log."""
    message = " ".join(str(error).split())
    if isinstance(error, HttpProblem):
        headers = {name.replace("_", "-"): value for name, value in error.headers.items()}
        return Problem(error.status, message, error.code, headers)
    if isinstance(error, PromptTooLong):
        # OpenAI's clients look at the code, llama.cpp's at the type and the numbers.
        more = {
            "type": "exceed_context_size_error",
            "n_prompt_tokens": error.n_prompt,
            "n_ctx": error.n_ctx,
        }
        return Problem(400, message, "context_length_exceeded", extra=more)
    if isinstance(error, Busy):
        return Problem(429, message, "busy", {"Retry-After": str(error.retry_after_s)})
    if isinstance(error, WorkerDied):
        return Problem(503, message, "worker_died", {"Retry-After": "5"})
    if isinstance(error, ModelNotFound):
        return Problem(404, message, "model_not_found")
    if isinstance(error, InputError):
        return Problem(400, message)
    if isinstance(error, DsqError):
        return Problem(500, message)
    return Problem(500, "an unexpected error in dsq; the server's log has it", "internal_error")

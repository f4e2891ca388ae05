"""What crosses the pipes between server and worker: a small JSON object and an array of token ids.

A frame is two little-endian lengths (bytes of JSON, number of ids), the JSON, the ids as int32.
Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dsq.errors import DsqError, InputError
from dsq.runtime.server.backend import (
    GenerateRequest,
    PromptTooLong,
    Sampling,
    Step,
    TokenLogprobs,
    Usage,
)

HEADER = struct.Struct("<II")
MAX_BYTES = 1 << 30  # of one frame; more is garbage
Message = dict[str, Any]
_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True).encode


def pack(message: Message, ids: Sequence[int] = ()) -> bytes:
    text = _json(message).encode()
    return HEADER.pack(len(text), len(ids)) + text + np.asarray(ids, "<i4").tobytes()


def body_bytes(header: bytes) -> tuple[int, int]:
    """Bytes of JSON and of both. Raises DsqError for what is no frame."""
    n_text, n_ids = HEADER.unpack(header)
    total = n_text + 4 * n_ids
    if total > MAX_BYTES:
        raise DsqError(f"a frame of {total} bytes between server and worker; something wrote there")
    return n_text, total


def unpack(body: bytes, n_text: int) -> tuple[Message, list[int]]:
    message: Message = json.loads(body[:n_text].decode())  # of bytes it would guess the encoding
    return message, np.frombuffer(body, "<i4", offset=n_text).tolist()


class FrameBuffer:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Message, list[int]]]:
        self._data += data
        while len(self._data) >= HEADER.size:
            n_text, total = body_bytes(bytes(self._data[: HEADER.size]))
            end = HEADER.size + total
            if len(self._data) < end:
                return
            body = bytes(self._data[HEADER.size : end])
            del self._data[:end]
            yield unpack(body, n_text)


def pack_request(id: int, request: GenerateRequest) -> bytes:
    message = {
        "op": "submit",
        "id": id,
        "max_tokens": request.max_tokens,
        "sampling": asdict(request.sampling),
        "stop_ids": sorted(request.stop_ids),
        "logit_bias": request.logit_bias,
        "n_logprobs": request.n_logprobs,
        "grammar": request.grammar,
        "prompt_logprobs": request.prompt_logprobs,
        "cache_prompt": request.cache_prompt,
        "lookup": request.lookup,
    }
    return pack(message, request.prompt_ids)


def read_request(message: Message, ids: Sequence[int]) -> GenerateRequest:
    return GenerateRequest(
        prompt_ids=tuple(ids),
        max_tokens=message["max_tokens"],
        sampling=Sampling(**message["sampling"]),
        stop_ids=frozenset(message["stop_ids"]),
        logit_bias=tuple((token, bias) for token, bias in message["logit_bias"]),
        n_logprobs=message["n_logprobs"],
        grammar=message["grammar"],
        prompt_logprobs=message["prompt_logprobs"],
        cache_prompt=message["cache_prompt"],
        lookup=message["lookup"],
    )


def pack_steps(steps: Sequence[tuple[int, Step | DsqError]], stats: Message | None = None) -> bytes:
    """All requests' steps of one batch. Of a step's parts only those that are there are sent."""
    ids: list[int] = []
    entries = []
    for id, step in steps:
        if isinstance(step, DsqError):
            entries.append((id, 0, {"error": _error(step)}))
            continue
        ids += step.token_ids
        more: Message = {}
        if step.finish is not None:
            more["finish"] = step.finish
        if step.usage is not None:
            more["usage"] = asdict(step.usage)
        if step.logprobs is not None:
            more["logprobs"] = [(t.logprob, t.top) for t in step.logprobs]
        if step.prompt_logprobs is not None:
            more["prompt"] = [t and (t.logprob, t.top) for t in step.prompt_logprobs]
        entries.append((id, len(step.token_ids), more))
    message: Message = {"op": "steps", "steps": entries}
    if stats is not None:
        message["stats"] = stats
    return pack(message, ids)


def read_steps(message: Message, ids: Sequence[int]) -> Iterator[tuple[int, Step | DsqError]]:
    at = 0
    for id, n, more in message["steps"]:
        if "error" in more:
            yield id, _read_error(more["error"])
            continue
        usage = Usage(**more["usage"]) if "usage" in more else None
        chosen = tuple(map(_logprobs, more["logprobs"])) if "logprobs" in more else None
        prompt = None
        if "prompt" in more:
            prompt = tuple(None if t is None else _logprobs(t) for t in more["prompt"])
        yield id, Step(tuple(ids[at : at + n]), chosen, prompt, more.get("finish"), usage)
        at += n


def _logprobs(value: Any) -> TokenLogprobs:
    logprob, top = value
    return TokenLogprobs(logprob, tuple((token, p) for token, p in top))


def _error(error: DsqError) -> Message:
    if isinstance(error, PromptTooLong):
        return {"n_prompt": error.n_prompt, "n_ctx": error.n_ctx}
    return {"text": str(error), "input": isinstance(error, InputError)}


def _read_error(error: Message) -> DsqError:
    if "n_prompt" in error:
        return PromptTooLong(error["n_prompt"], error["n_ctx"])
    return InputError(error["text"]) if error["input"] else DsqError(error["text"])

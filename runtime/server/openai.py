"""OpenAI's answers: /v1/completions and /v1/chat/completions, whole and as events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsq import __version__
from dsq.runtime.server.backend import TokenLogprobs, Usage
from dsq.runtime.server.bodies import ChatBody, CompletionBody
from dsq.runtime.server.generation import Answer, Delta
from dsq.runtime.server.prepare import Prepared
from dsq.runtime.server.text_stream import TextToken
from dsq.runtime.server.transport import DONE, event
from dsq.tokenizer_port.tokenizer import Tokenizer


class _Shape:
    """What both kinds of answers share."""

    prefix = ""
    whole = ""
    chunk = ""

    def __init__(
        self,
        body: CompletionBody | ChatBody,
        prepared: Prepared,
        tokenizer: Tokenizer,
        model: str,
    ) -> None:
        self.prepared, self.tokenizer = prepared, tokenizer
        options = body.stream_options
        self._usage_wanted = bool(options and options.include_usage)
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"build-dsq-{__version__}",
        }
        self._usages: list[Usage] = []
        self._begun: set[int] = set()

    def answer(self, answers: Sequence[Answer]) -> dict[str, Any]:
        usages = [a.usage for a in answers if a.usage is not None]
        return {
            **self._head,
            "object": self.whole,
            "choices": [self._choice(i, answer) for i, answer in enumerate(answers)],
            "usage": self._usage(usages),
            "dsq": self._report(usages),
        }

    def events(self, delta: Delta) -> Iterator[bytes]:
        if delta.usage is not None:
            self._usages.append(delta.usage)
        for choice in self._choices(delta):
            yield event(self._chunk([choice]))

    def end(self) -> Iterator[bytes]:
        last = self._chunk([])
        if self._usage_wanted:
            yield event({**last, "usage": self._usage(self._usages)})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk, "choices": choices}
        if not choices or choices[0].get("finish_reason") is not None:
            chunk["dsq"] = self._report(self._usages)
        return chunk

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _choices(self, delta: Delta) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _usage(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """A prompt counts once, however many answers it has."""
        n_prompt = sum(len(r.prompt_ids) for r in self.prepared.requests[:: self.prepared.n])
        n_new = 0 if self.prepared.no_answer else sum(u.n_generated for u in usages)
        cached = sum(u.n_cached for u in usages[:1])
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _report(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """dsq's own field: what was dropped, and how fast it went."""
        return {**self.prepared.report, **speed(usages)}


def speed(usages: Sequence[Usage]) -> dict[str, Any]:
    """Milliseconds and rates of one or several answers."""
    n = sum(u.n_generated for u in usages)
    ms = sum(u.predict_ms for u in usages)
    return {
        "prompt_ms": round(sum(u.prompt_ms for u in usages), 3),
        "predict_ms": round(ms, 3),
        "tokens_per_second": round((n - len(usages)) / ms * 1e3, 2)
        if ms and n > len(usages)
        else 0.0,
        "drafted_tokens": sum(u.n_drafted for u in usages),
        "accepted_tokens": sum(u.n_accepted for u in usages),
    }


class CompletionShape(_Shape):
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        echo, text, tokens = self._echo(index), answer.text, answer.tokens
        if self.prepared.no_answer:
            text, tokens = "", []
        return {
            "index": index,
            "text": echo + text,
            "logprobs": self._logprobs(index, tokens, answer.prompt_logprobs, len(echo)),
            "finish_reason": answer.finish,
        }

    def _choices(self, delta: Delta) -> Iterator[dict[str, Any]]:
        echo = self._echo(delta.index)
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        text, tokens = delta.text, delta.tokens
        if self.prepared.no_answer:
            text, tokens = "", ()
        prompt = delta.prompt_logprobs
        yield {
            "index": delta.index,
            "text": (echo if first else "") + text,
            "logprobs": self._logprobs(delta.index, tokens, prompt, len(echo)),
            "finish_reason": delta.finish,
        }

    def _echo(self, index: int) -> str:
        if not self.prepared.echo:
            return ""
        return self.tokenizer.decode(self.prepared.requests[index].prompt_ids)

    def _logprobs(
        self,
        index: int,
        tokens: Sequence[TextToken],
        prompt: Sequence[TokenLogprobs | None] | None,
        offset: int,
    ) -> dict[str, Any] | None:
        """The legacy form: parallel lists, the prompt's tokens first where they are echoed."""
        if self.prepared.show_top is None:
            return None
        rows: list[tuple[int, int, TokenLogprobs | None]] = []
        if prompt is not None:
            decoder, at = self.tokenizer.stream_decoder(), 0
            ids = self.prepared.requests[index].prompt_ids
            for token, found in zip(ids, prompt, strict=True):
                rows.append((token, at, found))
                at += len(decoder.push(token))
        rows += [(token.id, offset + token.offset, token.logprobs) for token in tokens]
        show = self.prepared.show_top
        return {
            "tokens": [token_text(self.tokenizer, token) for token, _, _ in rows],
            "token_logprobs": [_finite(found.logprob) if found else None for _, _, found in rows],
            "top_logprobs": [
                _by_text(self.tokenizer, found.top[:show]) if found else None
                for _, _, found in rows
            ],
            "text_offset": [at for _, at, _ in rows],
        }


class ChatShape(_Shape):
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": answer.finish,
        }

    def _choices(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            opening = {"role": "assistant", "content": ""}
            yield {"index": delta.index, "delta": opening, "logprobs": None, "finish_reason": None}
        if delta.text or delta.tokens:
            yield {
                "index": delta.index,
                "delta": {"content": delta.text},
                "logprobs": self._logprobs(delta.tokens),
                "finish_reason": None,
            }
        if delta.finish is not None:
            yield {
                "index": delta.index,
                "delta": {},
                "logprobs": None,
                "finish_reason": delta.finish,
            }

    def _logprobs(self, tokens: Sequence[TextToken]) -> dict[str, Any] | None:
        show = self.prepared.show_top
        if show is None:
            return None
        return {
            "content": [
                {
                    **_token(self.tokenizer, token.id, token.logprobs.logprob),
                    "top_logprobs": [
                        _token(self.tokenizer, i, value) for i, value in token.logprobs.top[:show]
                    ],
                }
                for token in tokens
                if token.logprobs is not None
            ],
            "refusal": None,
        }


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    text = data.decode("utf-8", errors="replace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """OpenAI's legacy spelling: half a character is `bytes:\\xe2\\x82`."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _by_text(tokenizer: Tokenizer, top: Sequence[tuple[int, float]]) -> Mapping[str, float]:
    """Two tokens of one text: the likelier one."""
    found: dict[str, float] = {}
    for token, value in top:
        found.setdefault(token_text(tokenizer, token), _finite(value))
    return found


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot be."""
    return max(logprob, -9999.0)

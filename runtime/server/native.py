"""llama.cpp's own answers: /completion and /infill, and what /tokenize shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from dsq.runtime.server.backend import GenerateRequest, ModelInfo, Usage
from dsq.runtime.server.bodies import NativeBody
from dsq.runtime.server.generation import Answer, Delta
from dsq.runtime.server.prepare import Prepared
from dsq.runtime.server.text_stream import TextToken
from dsq.runtime.server.transport import event
from dsq.tokenizer_port.tokenizer import Tokenizer


class NativeShape:
    """As tools/server's README describes them. `dsq` says what of a file was dropped."""

    def __init__(
        self,
        body: NativeBody,
        prepared: Prepared,
        tokenizer: Tokenizer,
        model: str,
        info: ModelInfo,
    ) -> None:
        self.prepared, self.tokenizer = prepared, tokenizer
        self._body, self._model, self._info = body, model, info
        self._so_far: dict[int, Answer] = {}

    def answer(self, answers: Sequence[Answer]) -> Any:
        found = [self._whole(i, answer) for i, answer in enumerate(answers)]
        return found[0] if len(found) == 1 else found

    def events(self, delta: Delta) -> Iterator[bytes]:
        answer = self._so_far.setdefault(delta.index, Answer())
        answer.add(delta)
        if (delta.text or delta.tokens) and not self.prepared.no_answer:
            chunk: dict[str, Any] = {
                "index": delta.index,
                "content": delta.text,
                "tokens": [token.id for token in delta.tokens],
                "stop": False,
                "tokens_predicted": len(answer.tokens),
                "tokens_evaluated": len(self.prepared.requests[delta.index].prompt_ids),
            }
            if self.prepared.show_top is not None:
                chunk["completion_probabilities"] = self._probabilities(delta.tokens)
            yield event(chunk)
        if delta.finish is not None:
            last = self._whole(delta.index, answer)
            last |= {"content": "", "tokens": []}
            last.pop("completion_probabilities", None)
            yield event(last)

    def end(self) -> Iterator[bytes]:
        """llama.cpp sends no [DONE] here."""
        return iter(())

    def _whole(self, index: int, answer: Answer) -> dict[str, Any]:
        request = self.prepared.requests[index]
        text, tokens = answer.text, answer.tokens
        if self.prepared.no_answer:
            text, tokens = "", []
        kind = "limit" if answer.finish == "length" else "word" if answer.stop_string else "eos"
        usage = answer.usage
        sampling = request.sampling
        found: dict[str, Any] = {
            "index": index,
            "content": text,
            "tokens": [token.id for token in tokens] if self._body.return_tokens else [],
            "id_slot": -1,
            "stop": True,
            "model": self._model,
            "tokens_predicted": len(tokens),
            "tokens_evaluated": len(request.prompt_ids),
            "generation_settings": {
                "n_predict": -1 if self._body.n_predict is None else self._body.n_predict,
                "n_ctx": self._info.n_ctx,
                "seed": -1 if sampling.seed is None else sampling.seed,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
                "repeat_penalty": sampling.repeat_penalty,
                "repeat_last_n": sampling.repeat_last_n,
                "presence_penalty": sampling.presence_penalty,
                "frequency_penalty": sampling.frequency_penalty,
                "stop": list(self.prepared.stops),
                "n_probs": self._body.n_probs or 0,
                "grammar": request.grammar or "",
                "n_indent": self._body.n_indent or 0,
                "ignore_eos": bool(self._body.ignore_eos),
                "stream": bool(self._body.stream),
                "logit_bias": [
                    {"token": token, "bias": bias if math.isfinite(bias) else None}
                    for token, bias in request.logit_bias
                ],
            },
            "prompt": self.tokenizer.decode(request.prompt_ids, skip_special=False),
            "has_new_line": "\n" in text,
            "truncated": self._is_full(request, answer),
            "stop_type": kind,
            "stopping_word": answer.stop_string or "",
            "tokens_cached": usage.n_cached if usage else 0,
            "timings": timings(usage),
            "dsq": dict(self.prepared.report),
        }
        if self.prepared.show_top is not None:
            found["completion_probabilities"] = self._probabilities(tokens)
        return self._selected(found)

    def _is_full(self, request: GenerateRequest, answer: Answer) -> bool:
        """Whether the context ended the answer, before what was asked for did."""
        usage = answer.usage
        if usage is None or answer.finish != "length":
            return False
        full = usage.n_prompt + usage.n_generated >= self._info.n_ctx
        return full and usage.n_generated < request.max_tokens

    def _selected(self, found: dict[str, Any]) -> dict[str, Any]:
        """Only `response_fields`; `timings/prompt_n` is a field of a field."""
        if not self._body.response_fields:
            return found
        chosen: dict[str, Any] = {}
        for name in self._body.response_fields:
            value: Any = found
            for part in name.split("/"):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                chosen[name] = value
        return chosen

    def _probabilities(self, tokens: Sequence[TextToken]) -> list[dict[str, Any]]:
        return [
            {
                **self._token(token.id, token.logprobs.logprob),
                "top_logprobs": [self._token(i, value) for i, value in token.logprobs.top],
            }
            for token in tokens
            if token.logprobs is not None
        ]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token)
        return {
            "id": token,
            "token": data.decode("utf-8", errors="replace"),
            "bytes": list(data),
            "logprob": max(logprob, -9999.0),
        }


def timings(usage: Usage | None) -> dict[str, Any]:
    """llama.cpp's: `prompt_n` are the tokens that were evaluated, `cache_n` those that were not."""
    if usage is None:
        return {}
    prompt_n, n = usage.n_prompt - usage.n_cached, usage.n_generated
    steps, ms = max(0, n - 1), usage.predict_ms  # the first token comes of the prompt's last step
    return {
        "cache_n": usage.n_cached,
        "prompt_n": prompt_n,
        "prompt_ms": usage.prompt_ms,
        "prompt_per_token_ms": usage.prompt_ms / max(1, prompt_n),
        "prompt_per_second": prompt_n / usage.prompt_ms * 1e3 if usage.prompt_ms else 0.0,
        "predicted_n": n,
        "predicted_ms": ms,
        "predicted_per_token_ms": ms / steps if steps else 0.0,
        "predicted_per_second": steps / ms * 1e3 if ms else 0.0,
        "draft_n": usage.n_drafted,
        "draft_n_accepted": usage.n_accepted,
    }


def with_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[dict[str, Any]]:
    """/tokenize: a piece is a string, or a list of bytes where it is half a character."""
    found = []
    for token in ids:
        data = tokenizer.token_bytes(token)
        piece: str | list[int]
        try:
            piece = data.decode()
        except UnicodeDecodeError:
            piece = list(data)
        found.append({"id": token, "piece": piece})
    return found

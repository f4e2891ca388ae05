"""vLLM's HTTP interface: a request as the body of its /v1/completions, its events as steps.

Token ids go in (`prompt`) and come out (`return_token_ids`, vLLM 0.10.2 and later); vLLM's own
tokenizer, chat template, end-of-sequence rule and sampling defaults have no say. Pure.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any, cast

from dsq.errors import DsqError, InputError, UnsupportedError
from dsq.runtime.server.backend import (
    Busy,
    Finish,
    GenerateRequest,
    PromptTooLong,
    Sampling,
    Step,
    TokenLogprobs,
    WorkerDied,
)

_MOST_BIAS = 100.0  # vLLM takes from -100 to 100; -100 forbids in practice
_LEAST_TOP_P = 1e-6  # vLLM wants more than 0; the most likely token stays in any case
_DEFAULT_LAST_N = Sampling().repeat_last_n
_ID = "token_id:"


def completion_body(request: GenerateRequest, model: str, n_ctx: int) -> dict[str, Any]:
    """What to POST. Raises UnsupportedError for what vLLM has no word for."""
    sampling = request.sampling
    _check_window(sampling)
    on = sampling.penalizes
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": min(request.max_tokens, n_ctx - len(request.prompt_ids)),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": max(sampling.top_p, _LEAST_TOP_P),
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repeat_penalty if on else 1.0,
        "presence_penalty": sampling.presence_penalty if on else 0.0,
        "frequency_penalty": sampling.frequency_penalty if on else 0.0,
        "stop_token_ids": sorted(request.stop_ids),
        "ignore_eos": True,  # the stop ids are dsq's; the model's files may name others
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if request.logit_bias:
        body["logit_bias"] = {
            str(token): max(-_MOST_BIAS, min(_MOST_BIAS, bias))
            for token, bias in request.logit_bias
        }
    if request.n_logprobs:
        body["logprobs"] = request.n_logprobs
        body["return_tokens_as_token_ids"] = True
        body["echo"] = request.prompt_logprobs
    if request.grammar is not None:
        body["structured_outputs"] = {"grammar": request.grammar}
    if not request.cache_prompt:
        body["cache_salt"] = secrets.token_hex(16)  # shares no prefix with anyone
    return body


def _check_window(sampling: Sampling) -> None:
    """vLLM's penalties look at all tokens. The default window is let through: who asks for a
    penalty alone has not asked for 64."""
    if sampling.penalizes and sampling.repeat_last_n not in (-1, _DEFAULT_LAST_N):
        raise UnsupportedError(
            f"repeat_last_n is {sampling.repeat_last_n}; vLLM's penalties look at all tokens: "
            "give -1, or leave it out"
        )


class Events:
    """One stream's events, as the steps they mean.

    The last step waits for the event after it, which has the usage, so `finish` gives it out.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self.n_generated = 0
        self.n_cached = 0
        self.last: Step | None = None  # the one with `finish`

    def read(self, data: str) -> Step | None:
        """The step of one `data:` line; None for one that has no tokens, or has the last ones.

        Raises what an error event says.
        """
        try:
            event = json.loads(data)
        except ValueError:
            raise WorkerDied(
                "vLLM sent an event that is not JSON; send the request again"
            ) from None
        if "error" in event:
            raise problem_of(event, self._request)
        usage = event.get("usage")
        if usage:
            details = usage.get("prompt_tokens_details") or {}
            self.n_cached = int(details.get("cached_tokens") or 0)
        if not event.get("choices"):
            return None
        step = self._step(event["choices"][0])
        self.n_generated += len(step.token_ids)
        if step.finish is not None:
            self.last = step
            return None
        return step if step.token_ids or step.prompt_logprobs else None

    def _step(self, choice: Mapping[str, Any]) -> Step:
        ids = tuple(choice.get("token_ids") or ())
        if not ids and choice.get("text"):
            raise DsqError("this vLLM sends no token ids: it is older than 0.10.2; install a newer")
        finish = _finish(choice.get("finish_reason"))
        logprobs: tuple[TokenLogprobs, ...] | None = None
        prompt: tuple[TokenLogprobs | None, ...] | None = None
        if self._request.n_logprobs:
            found = _logprobs(choice.get("logprobs"), self._request.n_logprobs)
            n_prompt = len(found) - len(ids)  # with `echo` the prompt's come first, once
            prompt = found[:n_prompt] if n_prompt else None
            logprobs = cast("tuple[TokenLogprobs, ...]", found[n_prompt:])
        if finish == "stop" and ids and ids[-1] in self._request.stop_ids:
            ids = ids[:-1]
            logprobs = None if logprobs is None else logprobs[:-1]
        return Step(ids, logprobs, prompt, finish)


def _finish(reason: str | None) -> Finish | None:
    if reason is None or reason in ("stop", "length"):
        return cast("Finish | None", reason)
    raise WorkerDied(f"vLLM ended the answer ({reason}); send the request again")


def _logprobs(found: Mapping[str, Any] | None, n_top: int) -> tuple[TokenLogprobs | None, ...]:
    """vLLM shows the chosen token beside the `n_top` most likely ones."""
    if not found:
        return ()
    made: list[TokenLogprobs | None] = []
    for logprob, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        if logprob is None or top is None:
            made.append(None)
            continue
        pairs = [(int(name.removeprefix(_ID)), float(value)) for name, value in top.items()]
        pairs.sort(key=lambda pair: -pair[1])
        made.append(TokenLogprobs(float(logprob), tuple(pairs[:n_top])))
    return tuple(made)


def problem_of(
    content: object, request: GenerateRequest, *, status: int = 0, n_ctx: int = 0
) -> DsqError:
    """An answer other than 200, or an error event, as what the front says of it.

    `status` 0: what the event itself says.
    """
    error = content.get("error", content) if isinstance(content, dict) else {}
    error = error if isinstance(error, dict) else {"message": error}
    message = " ".join(str(error.get("message") or "no message").split())[:500]
    code = status or _code(error.get("code"))
    if code in (400, 422):
        if n_ctx and "maximum context length" in message:
            return PromptTooLong(len(request.prompt_ids), n_ctx)
        return InputError(f"vLLM refuses the request: {message}")
    if code in (401, 403):
        return DsqError(f"vLLM refuses its key (HTTP {code}); set VLLM_API_KEY to the right one")
    if code == 429:
        busy = Busy(0, 5)
        busy.args = (f"vLLM is busy: {message}",)  # what waits there is not known here
        return busy
    if code == 404:
        return DsqError(f"vLLM no longer has this model or path: {message}")
    return WorkerDied(f"vLLM failed (HTTP {code or 500}): {message}; send the request again")


def _code(value: object) -> int:
    return value if isinstance(value, int) else 500


def gauges(text: str) -> tuple[int, int]:
    """Tokens in the KV cache and tokens that fit, of vLLM's /metrics; 0 where it does not say."""
    from prometheus_client.parser import text_string_to_metric_families

    used, size = 0.0, 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
                used = max(used, sample.value)
            elif sample.name == "vllm:cache_config_info":
                blocks, block = (sample.labels.get(k) for k in ("num_gpu_blocks", "block_size"))
                if (blocks or "").isdecimal() and (block or "").isdecimal():
                    size += int(blocks or 0) * int(block or 0)
    return round(used * size), size

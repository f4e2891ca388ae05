"""From a request's body to the token ids that a backend takes. Everything is checked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsq.errors import InputError
from dsq.runtime import chat_context
from dsq.runtime.server.backend import GenerateRequest, ModelInfo, PromptTooLong
from dsq.runtime.server.bodies import (
    MAX_ANSWERS,
    ChatBody,
    CompletionBody,
    InfillBody,
    NativeBody,
    NativeCompletionBody,
    SamplingBody,
)
from dsq.runtime.server.infill import Extra, in_strides, infill, prompt_room, with_files
from dsq.runtime.server.repos import Repositories
from dsq.tokenizer_port.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions alone
CHAT_SPARE = 64  # tokens for the words around a repository's files
NO_REPOS = Repositories()


@dataclass(frozen=True)
class Prepared:
    """`requests`: n for each prompt, prompt after prompt. `report` is the response's `dsq` field.

    `show_top` is how many alternatives to show beside each token, None for no logprobs at all.
    With `no_answer` the one generated token that a backend cannot do without is thrown away.
    """

    requests: tuple[GenerateRequest, ...]
    stops: tuple[str, ...]
    n: int = 1
    report: Mapping[str, Any] = field(default_factory=dict)
    show_top: int | None = None
    echo: bool = False
    no_answer: bool = False
    max_seconds: float | None = None


def prepare_completion(
    body: CompletionBody, tokenizer: Tokenizer, info: ModelInfo, repos: Repositories = NO_REPOS
) -> Prepared:
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise InputError(f"best_of is {body.best_of}; this server takes only n, which is {n}")
    n_predict = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    no_answer = n_predict == 0
    special = bool(body.parse_special)
    report: Mapping[str, Any] = {}
    if body.suffix is not None and (body.suffix or tokenizer.vocab.fim_suffix is not None):
        if not isinstance(body.prompt, str):
            raise InputError("suffix: goes with one prompt that is a string")
        if body.echo:
            raise InputError("echo: does not go with a suffix")
        found = infill(
            tokenizer,
            body.prompt,
            body.suffix,
            n_ctx=info.n_ctx,
            n_predict=n_predict,
            around=repos.around(body, tokenizer, body.prompt + body.suffix),
            parse_special=special,
        )
        prompts, report = [found.ids], found.report()
    elif body.repo or body.path:
        if body.echo:
            raise InputError("echo: does not go with repo or path")
        prompts, report = _with_files(body, body.prompt, n_predict, tokenizer, info, repos)
    else:
        prompts = [_ids(p, tokenizer, special) for p in _openai_prompts(body.prompt)]
    show_top = body.logprobs
    prepared = _prepared(body, tokenizer, info, prompts, n, n_predict, show_top)
    requests = prepared.requests
    if body.echo and show_top is not None:
        requests = tuple(replace(request, prompt_logprobs=True) for request in requests)
    return replace(
        prepared, requests=requests, report=report, echo=bool(body.echo), no_answer=no_answer
    )


def prepare_chat(
    body: ChatBody, tokenizer: Tokenizer, info: ModelInfo, repos: Repositories = NO_REPOS
) -> Prepared:
    special = bool(body.parse_special)
    messages = [message.plain() for message in body.messages]
    ids = tokenizer.chat(messages, parse_special=special)
    wanted = body.max_completion_tokens
    wanted = body.max_tokens if wanted is None else wanted
    if wanted == 0:
        raise InputError("max_tokens is 0; an answer needs 1 or more")
    if body.top_logprobs and not body.logprobs:
        raise InputError("top_logprobs: goes with logprobs: true")
    show_top = (body.top_logprobs or 0) if body.logprobs else None
    n_predict = -1 if wanted is None else wanted
    report: dict[str, Any] = {}
    if body.repo:
        planned = repos.around(body, tokenizer, None).repo
        assert planned is not None, "a request that names a repository has one, or was refused"
        room = prompt_room(info.n_ctx, n_predict)
        context = planned(in_strides(room, room - len(ids) - CHAT_SPARE))
        messages = chat_context.with_files(messages, chat_context.repo_text(context, tokenizer))
        ids = tokenizer.chat(messages, parse_special=special)
        report = {"repo": context.report()}
    prepared = _prepared(
        body, tokenizer, info, [tuple(ids)], body.n or 1, n_predict, show_top, chat=True
    )
    return replace(prepared, report=report)


def prepare_native(
    body: NativeCompletionBody,
    tokenizer: Tokenizer,
    info: ModelInfo,
    repos: Repositories = NO_REPOS,
) -> Prepared:
    if body.repo or body.path:
        prompts, report = _with_files(body, body.prompt, _n_predict(body), tokenizer, info, repos)
        return _native(body, tokenizer, info, prompts, report)
    special = bool(body.parse_special)
    prompts = [_ids(p, tokenizer, special) for p in _native_prompts(body.prompt)]
    return _native(body, tokenizer, info, prompts, {})


def prepare_infill(
    body: InfillBody, tokenizer: Tokenizer, info: ModelInfo, repos: Repositories = NO_REPOS
) -> Prepared:
    if body.input_prefix is None and body.input_suffix is None:
        raise InputError("input_prefix and input_suffix are both absent; give one of them")
    prefix = (body.input_prefix or "") + (body.prompt or "")
    suffix = body.input_suffix or ""
    extra = tuple(Extra(file.filename or "", file.text) for file in body.input_extra or [])
    found = infill(
        tokenizer,
        prefix,
        suffix,
        n_ctx=info.n_ctx,
        n_predict=_n_predict(body),
        around=repos.around(body, tokenizer, prefix + suffix, extra),
        parse_special=bool(body.parse_special),
    )
    return _native(body, tokenizer, info, [found.ids], found.report())


def _with_files(
    body: SamplingBody,
    prompt: Any,
    n_predict: int,
    tokenizer: Tokenizer,
    info: ModelInfo,
    repos: Repositories,
) -> tuple[list[tuple[int, ...]], Mapping[str, Any]]:
    """One prompt behind a repository's files, and the response's `dsq` field."""
    if not isinstance(prompt, str):
        raise InputError("repo, path: go with one prompt that is a string")
    ids, report = with_files(
        tokenizer,
        prompt,
        n_ctx=info.n_ctx,
        n_predict=n_predict,
        around=repos.around(body, tokenizer, prompt),
        parse_special=bool(body.parse_special),
    )
    return [ids], report


def _n_predict(body: NativeBody) -> int:
    wanted = body.n_predict if body.n_predict is not None else body.max_tokens
    return -1 if wanted is None else wanted


def _native(
    body: NativeBody,
    tokenizer: Tokenizer,
    info: ModelInfo,
    prompts: Sequence[tuple[int, ...]],
    report: Mapping[str, Any],
) -> Prepared:
    n_predict = _n_predict(body)
    prepared = _prepared(body, tokenizer, info, prompts, 1, n_predict, body.n_probs or None)
    limit = body.t_max_predict_ms
    return replace(
        prepared,
        report=report,
        no_answer=n_predict == 0,
        max_seconds=limit / 1e3 if limit and limit > 0 else None,
    )


def _prepared(
    body: SamplingBody,
    tokenizer: Tokenizer,
    info: ModelInfo,
    prompts: Sequence[tuple[int, ...]],
    n: int,
    n_predict: int,
    show_top: int | None,
    *,
    chat: bool = False,
) -> Prepared:
    body.refuse_unsupported()
    if len(prompts) * n > MAX_ANSWERS:
        raise InputError(
            f"{len(prompts)} prompts and n {n} are {len(prompts) * n} answers; "
            f"a request may ask for {MAX_ANSWERS}"
        )
    for ids in prompts:
        if not ids:
            raise InputError("the prompt is empty; give at least one character")
        if len(ids) >= info.n_ctx:
            raise PromptTooLong(len(ids), info.n_ctx)
        bad = next((i for i in ids if not 0 <= i < len(tokenizer)), None)
        if bad is not None:
            raise InputError(
                f"the prompt has the token {bad}; ids go from 0 to {len(tokenizer) - 1}"
            )
    stop_ids = tokenizer.stop_ids("chat" if chat else "complete")
    biases = body.biases(tokenizer)
    if body.ignore_eos:
        biases = (*(b for b in biases if b[0] not in stop_ids), *_forbid(stop_ids))
        stop_ids = frozenset()
    sampling, grammar = body.sampling(), body.gbnf()
    max_tokens = info.n_ctx if n_predict < 0 else max(1, min(n_predict, info.n_ctx))
    requests = tuple(
        GenerateRequest(
            prompt_ids=ids,
            max_tokens=max_tokens,
            sampling=sampling if sampling.seed is None else replace(sampling, seed=seed),
            stop_ids=stop_ids,
            logit_bias=biases,
            n_logprobs=0 if show_top is None else max(1, show_top),
            grammar=grammar,
            cache_prompt=body.cache_prompt is not False,
        )
        for ids in prompts
        for seed in _seeds(sampling.seed, n)
    )
    return Prepared(requests, body.stops(), n, show_top=show_top)


def _forbid(ids: frozenset[int]) -> tuple[tuple[int, float], ...]:
    return tuple((i, float("-inf")) for i in ids)


def _seeds(seed: int | None, n: int) -> list[int]:
    """One for each of n answers, or they would all be the same."""
    return [((seed or 0) + i) % 0xFFFFFFFF for i in range(n)]


def _openai_prompts(prompt: Any) -> list[Any]:
    """A string, strings, ids, or lists of ids: one entry a prompt."""
    if prompt is None:
        raise InputError("prompt: is missing; give a string, or token ids")
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _native_prompts(prompt: Any) -> list[Any]:
    """As llama.cpp reads them: a list with a number in it is one prompt, others are several."""
    if prompt is None:
        raise InputError("prompt: is missing; give a string, or token ids")
    if not isinstance(prompt, list) or any(isinstance(part, int) for part in prompt):
        return [prompt]
    return prompt


def _ids(prompt: Any, tokenizer: Tokenizer, special: bool) -> tuple[int, ...]:
    """One prompt's ids: BOS in front of text where the model wants it, ids as they are."""
    if isinstance(prompt, dict):
        if prompt.get("multimodal_data"):
            raise InputError("multimodal_data: this server takes text only")
        prompt = prompt.get("prompt_string")
        if not isinstance(prompt, str):
            raise InputError("prompt: an object needs prompt_string, a string")
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt, parse_special=special))
    ids: list[int] = []
    for at, part in enumerate(prompt):
        if isinstance(part, int):
            ids.append(part)
        elif isinstance(part, str):
            bos = None if at == 0 else False
            ids += tokenizer.encode(part, add_bos=bos, parse_special=special)
        else:
            raise InputError("prompt: a list holds token ids and strings only")
    return tuple(ids)

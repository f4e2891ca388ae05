"""Backend: what the HTTP face asks of whatever generates tokens. Token ids only; text stays above.

A backend is used from one asyncio event loop. Errors of a request come from the first step asked of
its generator (`InputError` and its kinds: the request is wrong; `Busy`: come back later;
`WorkerDied`: not the request's fault, later steps can raise it too).
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from dsq.errors import DsqError, InputError

Finish = Literal["stop", "length"]
MAX_SEED = 0xFFFFFFFE  # llama.cpp takes the next one for "draw a seed"
MAX_LOGPROBS = 64
MAX_GRAMMAR = 1 << 18  # characters
_MAX_DEPTH = 500  # parentheses in a grammar; llama.cpp's parser recurses, and 100,000 crash it


class Busy(DsqError):
    """The queue is full: HTTP 429, with Retry-After: `retry_after_s`."""

    def __init__(self, n_queued: int, retry_after_s: int) -> None:
        super().__init__(
            f"{n_queued} requests wait already, the most this server queues; "
            f"try again in {retry_after_s} s"
        )
        self.n_queued, self.retry_after_s = n_queued, retry_after_s


class WorkerDied(DsqError):
    """The process that runs the model is gone or not ready yet: HTTP 503."""


class PromptTooLong(InputError):
    """HTTP 400. The context must hold the prompt and one token more."""

    def __init__(self, n_prompt: int, n_ctx: int) -> None:
        super().__init__(
            f"the prompt has {n_prompt} tokens, but a context of {n_ctx} holds at most "
            f"{n_ctx - 1} and one to generate; shorten the prompt or serve with a larger -c"
        )
        self.n_prompt, self.n_ctx = n_prompt, n_ctx


@dataclass(frozen=True)
class Sampling:
    """llama.cpp's samplers, applied in its order: penalties, top_k, top_p, min_p, temperature.

    Temperature 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0, `repeat_penalty` 1 and the other
    penalties 0 switch their step off. `repeat_last_n` is how many of the last tokens, the prompt's
    included, the penalties look at (-1: all). `seed` None draws one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 2**31 - 1),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repeat_penalty", 0.01, 100.0),
            ("presence_penalty", -100.0, 100.0),
            ("frequency_penalty", -100.0, 100.0),
            ("repeat_last_n", -1, 2**31 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses nan
                raise InputError(f"{name} is {value}; it must be between {low:g} and {high:g}")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"seed is {self.seed}; it must be from 0 to {MAX_SEED}")

    @property
    def penalizes(self) -> bool:
        return (
            self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        ) and self.repeat_last_n != 0


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt to continue.

    `logit_bias` is added to the logits before sampling (-inf forbids a token). `n_logprobs` asks
    for that many most likely tokens beside each generated one (0: no logprobs at all; the chosen
    token alone is not on offer). `grammar` is GBNF with the start rule `root`. `prompt_logprobs`
    also reports the prompt's own tokens, and turns the reuse of cached tokens off. `lookup` allows
    drafting from the prompt; it changes speed, never which tokens come.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    logit_bias: tuple[tuple[int, float], ...] = ()
    n_logprobs: int = 0
    grammar: str | None = None
    prompt_logprobs: bool = False
    cache_prompt: bool = True
    lookup: bool = True

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InputError("the prompt is empty; give at least one token")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; it must be 1 or more")
        if not 0 <= self.n_logprobs <= MAX_LOGPROBS:
            raise InputError(f"{self.n_logprobs} logprobs asked for; give from 0 to {MAX_LOGPROBS}")
        if self.prompt_logprobs and not self.n_logprobs:
            raise InputError("logprobs of the prompt asked for with n_logprobs 0; give 1 or more")
        if self.grammar is not None:
            _check_grammar(self.grammar)
        for token, bias in self.logit_bias:
            if math.isnan(bias) or bias == math.inf:
                raise InputError(f"the logit bias of token {token} is {bias}; give a finite number")


def _check_grammar(text: str) -> None:
    """What llama.cpp's parser would not survive."""
    if len(text) > MAX_GRAMMAR:
        raise InputError(f"the grammar has {len(text)} characters; at most {MAX_GRAMMAR} are taken")
    if not text.strip():
        raise InputError("the grammar is empty; leave it out to have none")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError("the grammar holds half a surrogate pair, which is no character")
    depth = 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if depth > _MAX_DEPTH:
            raise InputError(f"the grammar nests parentheses more than {_MAX_DEPTH} deep")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities (temperature 1, before any sampler)."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # n_logprobs (token, logprob), most likely first


@dataclass(frozen=True)
class Usage:
    """What a request took. `n_cached` of the `n_prompt` tokens were in the cache already."""

    n_prompt: int
    n_cached: int
    n_generated: int
    prompt_ms: float  # from its first prompt token in a batch to its first sampled token
    predict_ms: float  # from there to the end
    n_drafted: int = 0
    n_accepted: int = 0


@dataclass(frozen=True)
class Step:
    """The tokens that came since the last step: mostly one, several when a draft was accepted.

    A stop token ends the request with finish "stop" and is not among `token_ids`. "length" is
    max_tokens or a full context. `logprobs` has one entry a token, or is None when not asked for.
    `prompt_logprobs` comes once, on the first step: one entry a prompt token, None for the first.
    `usage` comes with the first step, so that who stops there knows `n_cached`, and with the last.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish: Finish | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class ModelInfo:
    """`n_ctx` tokens, prompt and answer, fit one request; `n_slots` requests run at once."""

    path: str
    n_ctx: int
    n_ctx_train: int
    n_vocab: int
    n_slots: int
    n_parameters: int
    size_bytes: int
    kv_type: str


@dataclass(frozen=True)
class BackendStats:
    """`*_total` count since the backend began, over restarts of its worker."""

    n_slots: int
    n_busy: int
    n_queued: int
    kv_used: int  # tokens in the cache, idle prefixes included
    kv_size: int
    prompt_tokens_total: int
    cached_tokens_total: int
    generated_tokens_total: int
    drafted_tokens_total: int
    accepted_tokens_total: int
    prompt_seconds_total: float  # of steps that carried prompt tokens
    predict_seconds_total: float  # of the other steps
    tokens_per_second: float  # generated, over about the last ten seconds
    memory_bytes: int  # resident in the worker
    restarts: int
    outside_seconds_total: float = 0.0  # the worker's processor time outside of the engine


class Backend(Protocol):
    """See the module's docstring."""

    @property
    def info(self) -> ModelInfo:
        """Known once `start` has returned; it stays while a worker restarts."""
        ...

    @property
    def healthy(self) -> bool:
        """A request sent now would be taken."""
        ...

    async def start(self) -> None:
        """Load the model. Raises InputError or DsqError when that is not possible."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Step, None]:
        """Steps until one has `finish`. Closing the generator cancels the request.

        Nothing is sent before the first step is asked for.
        """
        ...

    async def stats(self) -> BackendStats: ...

    async def close(self) -> None:
        """End the worker; requests in flight get WorkerDied. Closing twice is allowed."""
        ...

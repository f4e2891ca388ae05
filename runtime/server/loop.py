"""The loop around the model: requests in, steps out. One thread, no I/O; the worker drives it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from dsq.errors import DsqError, InputError
from dsq.runtime.engine import Floats
from dsq.runtime.server.backend import (
    Finish,
    GenerateRequest,
    ModelInfo,
    Step,
    TokenLogprobs,
    Usage,
)
from dsq.runtime.server.draft_model import MOST_GUESSES, DraftModel
from dsq.runtime.server.llama_batch import LlamaBatch, LlamaSettings
from dsq.runtime.server.parking import Parking
from dsq.runtime.server.scheduler import Copy, Plan, Rows, Scheduler
from dsq.runtime.server.sequences import LoopSettings, SequenceModel
from dsq.runtime.server.speculation import Generating, Speculation
from dsq.runtime.server.token_sampler import TokenSampler, logprobs

_MIN_PROMPT = 32  # smaller chunks waste the batch


@dataclass
class Counters:
    """Since the loop began. See BackendStats."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prompt_seconds: float = 0.0
    predict_seconds: float = 0.0
    outside_seconds: float = 0.0  # this thread's processor time outside the model


@dataclass
class _Run:
    """A request on its way."""

    request: GenerateRequest
    sampler: TokenSampler
    began: float | None = None  # first row in a batch
    first: float | None = None  # first token sampled
    n_generated: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)


class Loop:
    """Runs `model`, or the GGUF that the settings name; `submit` and `cancel` between calls of
    `step`.


    `submit` raises InputError for a request the model cannot take (PromptTooLong among them).
    """

    def __init__(self, settings: LoopSettings, model: SequenceModel | None = None) -> None:
        self._settings = settings
        model, draft_model = _open(settings) if model is None else (model, None)
        self._llama: SequenceModel = model
        self._parking = Parking(model) if isinstance(model, LlamaBatch) else None
        self._coupled = draft_model is not None
        self._speculation = Speculation(settings.n_draft, draft_model, settings.gap_ms)
        # Else the first request waits for the file's pages and the graph's buffers.
        self._llama.decode([0], [0], [0], [1])
        self._llama.clear()
        self._scheduler = Scheduler(
            n_parallel=settings.n_parallel,
            n_slots=settings.n_parallel + settings.n_prefixes,
            n_ctx=self._llama.n_ctx,
            kv_size=self._llama.kv_size,
            n_batch=settings.n_batch,
        )
        self._runs: dict[int, _Run] = {}
        self._prompt_rate = 0.0  # tokens a second in steps with prompt tokens
        self.counters = Counters()
        self._outside_since = time.thread_time()

    @property
    def info(self) -> ModelInfo:
        llama = self._llama
        return ModelInfo(
            path=self._settings.path,
            n_ctx=llama.n_ctx,
            n_ctx_train=llama.n_ctx_train,
            n_vocab=llama.n_vocab,
            n_slots=self._settings.n_parallel,
            n_parameters=llama.n_parameters,
            size_bytes=llama.size_bytes,
            kv_type=llama.kv_type,
        )

    @property
    def idle(self) -> bool:
        return not self._runs

    @property
    def n_running(self) -> int:
        return self._scheduler.n_running

    @property
    def n_waiting(self) -> int:
        return self._scheduler.n_waiting

    @property
    def kv_used(self) -> int:
        return self._scheduler.kv_used

    @property
    def kv_size(self) -> int:
        return self._llama.kv_size

    def submit(self, id: int, request: GenerateRequest) -> None:
        n_vocab = self._llama.n_vocab
        biased = [token for token, _ in request.logit_bias]
        for token in (*request.prompt_ids, *biased):
            if not 0 <= token < n_vocab:
                raise InputError(f"token {token} is outside the model's {n_vocab} tokens")
        sampler = TokenSampler(request, self._llama.vocab, n_vocab, coupled=self._coupled)
        try:
            self._scheduler.submit(
                id,
                request.prompt_ids,
                request.max_tokens,
                share=request.cache_prompt,
                all_logits=request.prompt_logprobs,
            )
        except BaseException:
            sampler.close()
            raise
        self._runs[id] = _Run(request, sampler)
        self._speculation.begin(id, request, sampler)

    def cancel(self, id: int) -> None:
        """End a request without a word; unknown ones are ignored."""
        run = self._runs.pop(id, None)
        if run is not None:
            run.sampler.close()
            self._speculation.end(id)
            self._scheduler.end(id)

    def step(self) -> list[tuple[int, Step | DsqError]]:
        """Evaluate one batch. What came of it, by request; an error ends its request."""
        scheduler = self._scheduler
        generating = scheduler.generating
        began = time.perf_counter()
        self._speculation.plan(
            [Generating(i, s, scheduler.tokens(i), scheduler.most_draft(i)) for i, s in generating]
        )
        drafted = time.perf_counter()
        plan = scheduler.plan(self._prompt_budget(len(generating)), self._speculation.take)
        if not plan.rows:
            return []
        for rows in plan.rows:
            run = self._runs[rows.request]
            if run.began is None:
                run.began = began
                n_cached = self._scheduler.n_cached(rows.request)
                self.counters.cached_tokens += n_cached
                if run.request.prompt_logprobs:
                    run.prompt_logprobs.append(None)
        try:
            logits = self._evaluate(plan)
        except DsqError as error:
            return self._fail(error)
        now = time.perf_counter()
        self._time(plan, now - began, now - drafted)
        return [*self._read(plan, logits, now)]

    def close(self) -> None:
        for id in list(self._runs):
            self.cancel(id)
        self._speculation.close()
        self._llama.close()

    def _prompt_budget(self, generating: int) -> int:
        """Prompt tokens for the next step: all that fit, or so many that no stream stalls."""
        if not generating or not self._prompt_rate:
            return self._settings.n_batch if not generating else 4 * _MIN_PROMPT
        return max(_MIN_PROMPT, int(self._prompt_rate * self._settings.gap_ms / 1e3))

    def _evaluate(self, plan: Plan) -> Floats:
        if self._parking is not None:
            self._parking.fetch(plan)
        self._speculation.apply(plan.cache)
        for op in plan.cache:
            if isinstance(op, Copy):
                self._llama.copy(op.source, op.target, op.n)
            else:
                self._llama.remove(op.slot, op.start)
        if self._parking is not None:
            self._parking.make_way(plan, self._scheduler.idle)
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wanted: list[int] = []
        for rows in plan.rows:
            n = len(rows.tokens)
            tokens.extend(rows.tokens)
            positions.extend(range(rows.start, rows.start + n))
            sequences.extend([rows.slot] * n)
            wanted.extend([0] * (n - rows.n_wanted) + [1] * rows.n_wanted)
        before = time.thread_time()
        self.counters.outside_seconds += before - self._outside_since
        try:
            return self._llama.decode(tokens, positions, sequences, wanted)
        finally:
            self._outside_since = time.thread_time()

    def _fail(self, error: DsqError) -> list[tuple[int, Step | DsqError]]:
        """The batch is lost and with it the cache's state: who ran gets the error."""
        failed = self._scheduler.reset()
        self._llama.clear()
        if self._parking is not None:
            self._parking.clear()
        self._speculation.clear()
        for id in failed:
            self._runs.pop(id).sampler.close()
            self._speculation.end(id)
        return [(id, error) for id in failed]

    def _time(self, plan: Plan, seconds: float, evaluating: float) -> None:
        """`seconds` of a step, `evaluating` without the making of its drafts."""
        counters, n = self.counters, plan.n_tokens
        n_prompt = sum(len(r.tokens) for r in plan.rows if r.is_prompt)
        counters.prompt_tokens += n_prompt
        if n_prompt:
            counters.prompt_seconds += seconds
            if n_prompt >= _MIN_PROMPT:
                rate = n / evaluating
                self._prompt_rate = (
                    0.8 * self._prompt_rate + 0.2 * rate if self._prompt_rate else rate
                )
        else:
            counters.predict_seconds += seconds
            self._speculation.cost.observe(n, evaluating)

    def _read(self, plan: Plan, logits: Floats, now: float) -> list[tuple[int, Step]]:
        """Sample where logits were wanted."""
        steps = []
        index = first = 0  # in the batch; among the rows of logits
        for rows in plan.rows:
            index += len(rows.tokens)
            if not rows.n_wanted:
                continue
            own = logits[first : first + rows.n_wanted]
            first += rows.n_wanted
            run = self._runs[rows.request]
            if run.request.prompt_logprobs and rows.is_prompt:
                self._note_prompt(rows, run, own)
                own = own[-1:]
            if not rows.samples:
                continue
            steps.append((rows.request, self._sample(rows, run, own, index - len(own), now)))
        return steps

    def _note_prompt(self, rows: Rows, run: _Run, logits: Floats) -> None:
        # A request that was put back to the queue sees its prompt twice.
        done = len(run.prompt_logprobs)
        following = run.request.prompt_ids[done : rows.start + 1 + len(rows.tokens)]
        known = logits[done - rows.start - 1 :][: len(following)]
        run.prompt_logprobs += logprobs(known, following, run.request.n_logprobs)

    def _sample(self, rows: Rows, run: _Run, logits: Floats, index: int, now: float) -> Step:
        """Tokens of one request; `index` is the first row's place in the batch."""
        request, draft = run.request, rows.tokens[len(rows.tokens) - rows.n_draft :]
        sampled: list[int] = []
        finish: Finish | None = None
        best = logits.argmax(axis=1).tolist() if run.sampler.is_argmax else None
        for i in range(len(logits)):
            if best is not None:
                token = best[i]
            else:
                token = run.sampler.sample(logits[i], self._llama.context, index + i)
            if token is None or token in request.stop_ids or run.sampler.ends(token):
                finish = "stop"
                break
            sampled.append(token)
            if i < len(draft) and token != draft[i]:
                break
        is_first = run.first is None
        if is_first:
            run.first = now
        if sampled and not self._scheduler.advance(rows.request, sampled) and finish is None:
            finish = "length"
        n_accepted = min(len(sampled), len(logits) - 1) if finish == "stop" else len(sampled) - 1
        self._count(run, len(sampled), rows.n_draft, n_accepted)
        if finish is None:
            self._speculation.learn(rows.request, sampled, rows.n_draft, n_accepted)
        chosen = None
        if request.n_logprobs:
            chosen = tuple(logprobs(logits[: len(sampled)], sampled, request.n_logprobs))
        prompt = None
        if request.prompt_logprobs and is_first:
            prompt = tuple(run.prompt_logprobs)
        usage = self._usage(rows.request, run) if is_first or finish is not None else None
        if finish is not None:
            self.cancel(rows.request)
        return Step(tuple(sampled), chosen, prompt, finish, usage)

    def _count(self, run: _Run, n: int, n_drafted: int, n_accepted: int) -> None:
        run.n_generated += n
        run.n_drafted += n_drafted
        run.n_accepted += n_accepted
        self.counters.generated_tokens += n
        self.counters.drafted_tokens += n_drafted
        self.counters.accepted_tokens += n_accepted

    def _usage(self, id: int, run: _Run) -> Usage:
        now = time.perf_counter()
        assert run.began is not None
        assert run.first is not None
        return Usage(
            n_prompt=len(run.request.prompt_ids),
            n_cached=self._scheduler.n_cached(id),
            n_generated=run.n_generated,
            prompt_ms=1e3 * (run.first - run.began),
            predict_ms=1e3 * (now - run.first),
            n_drafted=run.n_drafted,
            n_accepted=run.n_accepted,
        )


def _open(settings: LoopSettings) -> tuple[LlamaBatch, DraftModel | None]:
    assert isinstance(settings, LlamaSettings), "other engines bring their model"
    model = LlamaBatch(settings)
    if not settings.draft_path:
        return model, None
    try:
        small = replace(
            settings,
            path=settings.draft_path,
            n_ctx=model.n_ctx,
            kv_size=model.kv_size + settings.n_parallel * MOST_GUESSES,
        )
        return model, DraftModel(small, model.n_vocab)
    except BaseException:
        model.close()
        raise

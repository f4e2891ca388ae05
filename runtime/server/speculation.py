"""Drafts for the running requests, from their own n-grams or a draft model, as long as they pay."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsq.errors import DsqError
from dsq.runtime.server.backend import GenerateRequest
from dsq.runtime.server.draft_model import MOST_GUESSES, DraftModel, Followed
from dsq.runtime.server.drafting import Batch, StepCost, best_length
from dsq.runtime.server.lookup import Drafter
from dsq.runtime.server.scheduler import Copy, Remove
from dsq.runtime.server.token_sampler import TokenSampler

_NEARLY = 8  # tokens that the first round of guessing evaluates on the way
_PRIOR, _WEIGHT = 0.7, 4.0  # of the draft model's guesses, the part that is right, as if seen
_MEMORY = 0.95  # weight of the past in the count of right guesses
_DRIFT = 0.005  # in a step without guesses the count forgets this much, so that they come again
_REST = 64  # steps without the draft model after it failed; twice as many each time
_SAVING = 0.3  # of the large model's time, at the most hoped for: bounds the reading of a prompt

log = logging.getLogger("dsq.server")


@dataclass(frozen=True)
class Generating:
    """A request that waits for its next token. `most` guesses could be kept."""

    id: int
    slot: int
    tokens: Sequence[int]
    most: int


@dataclass
class _Run:
    sampler: TokenSampler
    drafter: Drafter | None
    right: float = _PRIOR * _WEIGHT  # guesses of the draft model
    seen: float = _WEIGHT
    from_model: bool = False  # the present draft

    @property
    def chance(self) -> float:
        return min(self.right / self.seen, 0.99)


class Speculation:
    """`n_lookup`: the longest draft from n-grams, 0 for none. The draft model is closed here."""

    def __init__(self, n_lookup: int, model: DraftModel | None, gap_ms: float) -> None:
        self._n_lookup, self._model, self._gap = n_lookup, model, gap_ms / 1e3
        self._n_failed = self._rest = 0  # how often the model did; steps until it is asked again
        self._runs: dict[int, _Run] = {}
        self._drafts: dict[int, list[int]] = {}
        self.cost = StepCost()

    def begin(self, id: int, request: GenerateRequest, sampler: TokenSampler) -> None:
        if request.lookup and request.max_tokens > 1 and (self._n_lookup or self._model):
            drafter = Drafter(request.prompt_ids) if self._n_lookup else None
            self._runs[id] = _Run(sampler, drafter)

    def end(self, id: int) -> None:
        self._runs.pop(id, None)

    def plan(self, generating: Sequence[Generating]) -> None:
        """Make the next step's drafts."""
        self._drafts.clear()
        self._rest = max(0, self._rest - 1)
        model = None if self._rest else self._model
        batch = Batch(len(generating), len(generating))
        others: list[Generating] = []
        for one in generating:
            run = self._runs.get(one.id)
            if run is None or one.most < 1:
                continue
            run.from_model = False
            chance = run.drafter.chance if run.drafter is not None else 0.0
            if model is not None and chance < run.chance:
                others.append(one)
            elif chance and run.drafter is not None:
                n = best_length(self.cost, batch, [chance], min(one.most, self._n_lookup))
                if n:
                    self._drafts[one.id] = run.drafter.propose(n)
                    batch.add(n, chance)
        if others and model is not None:
            try:
                self._ask(model, others, batch)
            except DsqError as error:  # the request does not need it
                log.warning("the draft model failed: %s", error)
                self._rest = _REST << min(self._n_failed, 10)
                self._n_failed += 1

    def _ask(self, model: DraftModel, generating: Sequence[Generating], batch: Batch) -> None:
        runs = {one.id: self._runs[one.id] for one in generating}
        chances = [run.chance for run in runs.values()]
        most = min(MOST_GUESSES, *(one.most for one in generating))
        each = model.round_seconds
        n = best_length(self.cost, batch, chances, most, each) if each else min(most, 2)
        if not n:
            for run in runs.values():
                run.right += _DRIFT * (_PRIOR * _WEIGHT - run.right)
                run.seen += _DRIFT * (_WEIGHT - run.seen)
            return
        followed = {
            one.id: Followed(one.slot, one.tokens, runs[one.id].sampler) for one in generating
        }
        behind = [
            followed[one.id]
            for one in generating
            if (missing := model.n_missing(followed[one.id])) > _NEARLY
            and missing * model.token_seconds <= _SAVING * one.most * self.cost.seconds(1)
        ]
        seconds = model.token_seconds
        model.catch_up(behind, max(32, int(self._gap / seconds)) if seconds else 32)
        ready = [id for id, one in followed.items() if model.n_missing(one) <= _NEARLY]
        if ready:
            guesses = model.guess([followed[id] for id in ready], n)
            for id, guess in zip(ready, guesses, strict=True):
                self._drafts[id], runs[id].from_model = guess, True

    def take(self, id: int, most: int) -> list[int]:
        """The request's draft, at most `most` tokens of it."""
        return self._drafts.get(id, [])[:most]

    def apply(self, changes: Iterable[Remove | Copy]) -> None:
        """What happens to the large model's cache."""
        if self._model is not None:
            self._model.apply(changes)

    def learn(self, id: int, tokens: Sequence[int], n_drafted: int, n_accepted: int) -> None:
        """What came, and how much of its draft was right."""
        run = self._runs.get(id)
        if run is None:
            return
        if run.drafter is not None:
            run.drafter.extend(tokens)
        if run.from_model:
            for right in [True] * n_accepted + [False] * (n_accepted < n_drafted):
                run.right = _MEMORY * run.right + right
                run.seen = _MEMORY * run.seen + 1

    def clear(self) -> None:
        """The cache was cleared."""
        if self._model is not None:
            self._model.clear()

    def close(self) -> None:
        if self._model is not None:
            self._model.close()

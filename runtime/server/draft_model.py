"""A second, smaller model that guesses what the large one will say.

It holds the same sequences in the same slots as the large model and follows it by itself: what it
has of a slot is cut to what agrees with the request's tokens, and what is missing is evaluated, a
limited part in each step, so that no stream waits for a long prompt to be read twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsq.errors import DsqError
from dsq.runtime.engine import Floats
from dsq.runtime.server.llama_batch import LlamaBatch, LlamaSettings
from dsq.runtime.server.scheduler import Copy, Remove, common_prefix
from dsq.runtime.server.token_sampler import TokenSampler

MOST_GUESSES = 16  # in a row
_SHARED = 32  # tokens; fewer are evaluated again


@dataclass(frozen=True)
class Followed:
    """A request: its slot, all its tokens, and the sampler that will choose the next one."""

    slot: int
    tokens: Sequence[int]
    sampler: TokenSampler


class DraftModel:
    """`settings` are the large model's with the small one's path; `n_vocab` is the large one's."""

    def __init__(self, settings: LlamaSettings, n_vocab: int) -> None:
        self._llama = LlamaBatch(settings)
        self._n_vocab, self._n_batch = n_vocab, settings.n_batch
        self._have: dict[int, list[int]] = {}  # by slot
        self.round_seconds = 0.0  # of one more guess for every request; 0: not known yet
        self.token_seconds = 0.0  # of one token in a long batch

    def apply(self, changes: Iterable[Remove | Copy]) -> None:
        """The large model's cache changes, done here too."""
        for change in changes:
            if isinstance(change, Copy):
                self._cut(change.target, 0)
                shared = self._have.get(change.source, [])[: change.n]
                if shared:
                    self._llama.copy(change.source, change.target, len(shared))
                    self._have[change.target] = shared
            elif change.start == 0:  # what is only shortened is cut when it is next looked at
                self._cut(change.slot, 0)

    def n_missing(self, request: Followed) -> int:
        """How many of the request's tokens but the last are not evaluated here."""
        return len(request.tokens) - 1 - self._known(request)

    def catch_up(self, requests: Sequence[Followed], budget: int) -> None:
        """Evaluate up to `budget` missing tokens."""
        for request in requests:
            self._share(request)
            while budget > 0 and (missing := self.n_missing(request)) > 0:
                n = min(missing, budget, self._n_batch)
                budget -= n
                start = self._known(request)
                began = time.perf_counter()
                self._decode([(request.slot, request.tokens[start : start + n])], wanted=False)
                if n >= self._n_batch // 4 or not self.token_seconds:
                    self.token_seconds = (time.perf_counter() - began) / n

    def guess(self, requests: Sequence[Followed], n: int) -> list[list[int]]:
        """`n` guesses for each request (fewer at a token that the large model lacks); those must
        have caught up, but for a few tokens."""
        missing = sum(self.n_missing(request) for request in requests)
        if missing + len(requests) > self._n_batch:
            self.catch_up(requests, missing)
        forks = [request.sampler.fork() for request in requests]
        guesses: list[list[int]] = [[] for _ in requests]
        try:
            open_ = list(range(len(requests)))
            for round_ in range(n):
                if not open_:
                    break
                began = time.perf_counter()
                rows = []
                for i in open_:
                    slot, tokens = requests[i].slot, requests[i].tokens
                    start = self._known(requests[i]) if round_ == 0 else 0
                    rows.append((slot, guesses[i][-1:] if round_ else tokens[start:]))
                logits = self._decode(rows, wanted=True)
                last = -1
                for (_, new), row, i in zip(rows, logits, list(open_), strict=True):
                    last += len(new)
                    token = forks[i].sample(row, self._llama.context, last)
                    if token is None or token >= self._n_vocab:
                        open_.remove(i)
                    else:
                        guesses[i].append(token)
                if round_:  # the first one also catches up
                    seconds = time.perf_counter() - began
                    old = self.round_seconds or seconds
                    self.round_seconds = old + 0.1 * (min(seconds, 3 * old) - old)
        finally:
            for fork in forks:
                fork.close()
        return guesses

    def clear(self) -> None:
        self._llama.clear()
        self._have.clear()

    def close(self) -> None:
        self._llama.close()

    def _known(self, request: Followed) -> int:
        """Cut what is here of the slot to what agrees with all tokens but the last; its length."""
        have = self._have.setdefault(request.slot, [])
        n = common_prefix(have, request.tokens, len(request.tokens) - 1)
        self._cut(request.slot, n)
        return n

    def _share(self, request: Followed) -> None:
        """Share what another slot has of the request's tokens: the large model's slots do, so that
        without it these would not fit."""
        most, known = len(request.tokens) - 1, self._known(request)
        source, n = request.slot, known
        for slot, have in self._have.items():
            if (same := common_prefix(have, request.tokens, most)) > n:
                source, n = slot, same
        if n - known >= _SHARED:
            self._cut(request.slot, 0)
            self._llama.copy(source, request.slot, n)
            self._have[request.slot] = self._have[source][:n]

    def _cut(self, slot: int, n: int) -> None:
        have = self._have.get(slot, [])
        if len(have) > n:
            self._llama.remove(slot, n)
            del have[n:]

    def _decode(self, rows: Sequence[tuple[int, Sequence[int]]], *, wanted: bool) -> Floats:
        """Append tokens to slots; with `wanted` the logits after the last of each."""
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        marks: list[int] = []
        for slot, new in rows:
            start = len(self._have.setdefault(slot, []))
            tokens += new
            positions += range(start, start + len(new))
            sequences += [slot] * len(new)
            marks += [0] * (len(new) - 1) + [int(wanted)]
        try:
            logits = self._llama.decode(tokens, positions, sequences, marks)
        except DsqError:
            self.clear()  # its cache is in no known state
            raise
        for slot, new in rows:
            self._have[slot] += new
        return logits

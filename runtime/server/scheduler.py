"""Which tokens of which requests go into the next batch. Pure: no model, no clock, no I/O.

Every step carries one token of each request that is generating (more with a draft) and up to a
given number of prompt tokens, so a long prompt never holds up the running streams. The KV cache is
one pool of `kv_size` cells; a slot is one of its sequences, and slots that begin alike share cells.
A slot whose request has ended keeps its tokens until the cells or the slot are needed: the least
recently used goes first. When running requests outgrow the pool, the youngest is put back to the
head of the queue and later evaluated anew; the oldest can always go on, so all get done.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from dsq.runtime.server.backend import PromptTooLong

_HEADROOM = 64  # cells a request should find free to generate into, before it is let in
Propose = Callable[[int, int], Sequence[int]]


@dataclass(frozen=True)
class Remove:
    """Forget a slot's tokens from position `start` on."""

    slot: int
    start: int


@dataclass(frozen=True)
class Copy:
    """Let the empty slot `target` share the first `n` tokens of `source`."""

    source: int
    target: int
    n: int


@dataclass(frozen=True)
class Rows:
    """Tokens of one request to evaluate at positions `start`, `start` + 1, …

    Logits are wanted of the last `n_wanted`. The last `n_draft` tokens are guesses. With `samples`
    all the request's tokens are in, and the logits of the last 1 + n_draft are to be sampled.
    """

    request: int
    slot: int
    start: int
    tokens: tuple[int, ...]
    n_wanted: int
    n_draft: int
    is_prompt: bool
    samples: bool


@dataclass(frozen=True)
class Plan:
    """Do `cache` in order, then evaluate `rows` as one batch."""

    cache: tuple[Remove | Copy, ...]
    rows: tuple[Rows, ...]

    @property
    def n_tokens(self) -> int:
        return sum(len(r.tokens) for r in self.rows)


@dataclass
class _Request:
    id: int
    order: int
    tokens: list[int]  # the prompt and what was generated
    n_prompt: int
    limit: int  # the most tokens `tokens` may get
    share: bool
    all_logits: bool
    slot: _Slot | None = None
    leader: _Request | None = None  # is about to bring its beginning into the cache
    n_cached: int | None = None

    @property
    def pending(self) -> int:
        """Tokens not yet in the cache; 1 while generating."""
        return len(self.tokens) - (len(self.slot.tokens) if self.slot else 0)


@dataclass
class _Slot:
    index: int
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    request: _Request | None = None
    used: int = 0  # when last


class _Uses:
    """How many slots use each cell; `len` is the number of cells in use."""

    def __init__(self) -> None:
        self._count: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._count)

    def of(self, cell: int) -> int:
        return self._count[cell]

    def add(self, cells: Iterable[int]) -> None:
        self._count.update(cells)

    def drop(self, cells: Iterable[int]) -> None:
        for cell in cells:
            if self._count[cell] == 1:
                del self._count[cell]
            else:
                self._count[cell] -= 1


class Scheduler:
    """`n_parallel` requests run at once, each up to `n_ctx` tokens, in `n_slots` slots.

    The slots beyond n_parallel only keep prefixes. A batch never exceeds `n_batch` tokens. A
    request waits while an older one evaluates `min_shared` or more tokens that it can share, and
    shares `min_copied` or more of another slot's: fewer are not worth the bond.
    """

    def __init__(
        self,
        *,
        n_parallel: int,
        n_slots: int,
        n_ctx: int,
        kv_size: int,
        n_batch: int,
        min_shared: int = 64,
        min_copied: int = 8,
    ) -> None:
        if not (1 <= n_parallel <= n_slots and n_parallel <= n_batch and 2 <= n_ctx <= kv_size):
            raise ValueError(f"{n_parallel=} {n_slots=} {n_ctx=} {kv_size=} {n_batch=} do not fit")
        self._n_parallel, self._n_ctx, self._kv_size = n_parallel, n_ctx, kv_size
        self._n_batch, self._min_shared, self._min_copied = n_batch, min_shared, min_copied
        self._slots = [_Slot(i) for i in range(n_slots)]
        self._waiting: list[_Request] = []  # by order
        self._running: list[_Request] = []  # by order
        self._known: dict[int, _Request] = {}
        self._ops: list[Remove | Copy] = []
        self._used, self._busy = _Uses(), _Uses()  # by all slots; by those with a request
        self._ticks = self._cells = 0

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def generating(self) -> list[tuple[int, int]]:
        """Requests that wait for their next token, and their slots; the oldest first."""
        return [(r.id, r.slot.index) for r in self._running if r.slot and r.pending == 1]

    @property
    def idle(self) -> list[tuple[int, int]]:
        """Slots without a request that share no cell with another one, and how many they hold."""
        return [
            (s.index, len(s.cells))
            for s in self._slots
            if s.request is None and s.cells and self._used.of(s.cells[0]) == 1
        ]

    @property
    def kv_used(self) -> int:
        return len(self._used)

    def tokens(self, request: int) -> Sequence[int]:
        """Prompt and generated tokens; not to be changed."""
        return self._known[request].tokens

    def n_cached(self, request: int) -> int:
        """How many prompt tokens were in the cache when the request was let in."""
        return self._known[request].n_cached or 0

    def submit(
        self,
        request: int,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        share: bool = True,
        all_logits: bool = False,
    ) -> None:
        """Queue a request. `share`: use and leave cached prefixes. Raises PromptTooLong."""
        if request in self._known:
            raise ValueError(f"request {request} is there already")
        n = len(prompt)
        if n >= self._n_ctx:
            raise PromptTooLong(n, self._n_ctx)
        limit = min(n + max_tokens, self._n_ctx)
        made = _Request(request, self._tick(), list(prompt), n, limit, share, all_logits)
        self._known[request] = made
        self._waiting.append(made)

    def plan(self, prompt_budget: int, propose: Propose | None = None) -> Plan:
        """The next step. `prompt_budget` bounds its prompt tokens (at least 1 is taken).

        `propose(request, most)` may guess up to `most` tokens that follow the request's tokens.
        Report the outcome of every row that wanted logits with `advance`.
        """
        self._admit()
        granted = self._grant(max(1, prompt_budget))
        rows: dict[int, Rows] = {}
        for request in list(self._running):
            # Preempting takes younger requests only, whose rows are not planned yet.
            wish = granted.get(request.id, 0)
            n = self._room(wish, request) if request.slot else 0
            if n:
                rows[request.id] = self._take(request, n)
        left = self._n_batch - sum(len(r.tokens) for r in rows.values())
        if propose is not None:
            for request in self._running:
                if left > 0 and request.id in rows and not rows[request.id].is_prompt:
                    drafted = self._draft(request, rows[request.id], left, propose)
                    left -= drafted.n_draft
                    rows[request.id] = drafted
        ops, self._ops = tuple(self._ops), []
        return Plan(ops, tuple(rows.values()))

    def advance(self, request: int, sampled: Sequence[int]) -> bool:
        """Append tokens sampled from a row's wanted logits; all but the last equal its draft.

        Returns whether the request may go on; if not, its length limit is reached. Tokens beyond
        the limit are a mistake of the caller.
        """
        known = self._known[request]
        if known.slot is None or not sampled:
            raise ValueError(f"request {request} has no row to advance by {len(sampled)} tokens")
        kept = len(known.tokens) + len(sampled) - 1
        if kept > len(known.slot.tokens) or kept >= known.limit:
            raise ValueError(f"request {request}: {len(sampled)} tokens exceed what was evaluated")
        self._cut(known.slot, kept)
        known.tokens.extend(sampled)
        return len(known.tokens) < known.limit

    def end(self, request: int) -> None:
        """The request has ended or is cancelled. Its slot is free, and keeps its prefix."""
        known = self._known.pop(request)
        if known.slot is None:
            self._waiting.remove(known)
            return
        slot = self._leave(known)
        if not known.share:
            self._cut(slot, 0)

    def reset(self) -> list[int]:
        """After a failed batch: the cache is to be cleared. Returns the requests that ran."""
        ended = [r.id for r in self._running]
        for request in ended:
            self.end(request)
        for slot in self._slots:
            self._cut(slot, 0)
        self._ops.clear()
        return ended

    def most_draft(self, request: int) -> int:
        """More guesses than this could not be kept: the limit comes before."""
        known = self._known[request]
        return known.limit - len(known.tokens) - 1

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def _admit(self) -> None:
        for request in list(self._waiting):
            if len(self._running) >= self._n_parallel:
                return
            if request.leader is not None and self._is_in_prompt(request.leader):
                continue
            source, n = self._longest_prefix(request)
            request.leader = self._leader(request, n)
            if request.leader is not None:
                continue  # soon its beginning is in the cache: computing it twice gains nothing
            if self._running and self._claim(request, source, n) > self._kv_size:
                return  # first come, first served: who waits for cells is not overtaken
            self._waiting.remove(request)
            slot = self._choose(source, n)
            if slot is source:
                self._cut(slot, n)
            else:
                self._cut(slot, 0)
                if source is not None and n:
                    slot.tokens, slot.cells = source.tokens[:n], source.cells[:n]
                    source.used = self._tick()
                    self._used.add(slot.cells)
                    self._ops.append(Copy(source.index, slot.index, n))
            self._busy.add(slot.cells)
            slot.request, request.slot = request, slot
            if request.n_cached is None:
                request.n_cached = n
            bisect.insort(self._running, request, key=lambda r: r.order)

    def _is_in_prompt(self, request: _Request) -> bool:
        return request.slot is not None and request.pending > 1

    def _leader(self, request: _Request, n: int) -> _Request | None:
        """An older request that is evaluating much more of the same beginning than n tokens."""
        if not request.share or request.all_logits:
            return None
        for other in self._running:
            if other.order < request.order and other.share and self._is_in_prompt(other):
                most = len(request.tokens) - 1
                if common_prefix(other.tokens, request.tokens, most) >= n + self._min_shared:
                    return other
        return None

    def _claim(self, request: _Request, source: _Slot | None, n: int) -> int:
        """Cells that the running requests and this one need soon."""
        need = len(self._busy) + len(request.tokens) - n
        if source is not None and source.request is None:
            need += n  # idle cells become busy
        everyone = [*self._running, request]
        need += sum(r.pending for r in self._running)
        return need + sum(min(_HEADROOM, r.limit - len(r.tokens)) for r in everyone)

    def _longest_prefix(self, request: _Request) -> tuple[_Slot | None, int]:
        """The slot that begins most like the request, and how far. Idle ones go before busy."""
        best: tuple[int, bool, int] = (0, False, 0)
        found = None
        if request.share and not request.all_logits:
            most = len(request.tokens) - 1  # the last token always runs: its logits are wanted
            for slot in self._slots:
                if slot.request is not None and not slot.request.share:
                    continue
                n = common_prefix(slot.tokens, request.tokens, most)
                rank = (n, slot.request is None, -slot.used)
                if n and rank > best:
                    best, found = rank, slot
        n = best[0]
        if found is not None and n < self._min_copied and not self._takes_over(found, n):
            return None, 0  # a BOS in common
        return found, n

    def _takes_over(self, source: _Slot, n: int) -> bool:
        return source.request is None and 2 * n >= len(source.tokens)

    def _choose(self, source: _Slot | None, n: int) -> _Slot:
        """An idle slot: the source itself if little of it would be lost, else the oldest."""
        if source is not None and self._takes_over(source, n):
            return source
        idle = [s for s in self._slots if s.request is None]
        others = [s for s in idle if s is not source] or idle
        return min(others, key=lambda s: (bool(s.tokens), s.used))

    def _grant(self, budget: int) -> dict[int, int]:
        """Rows wished for each running request, within n_batch.

        Prompts: a quarter goes to the oldest, so that it always moves; the rest to the shortest
        first, so that a keystroke does not wait for somebody's whole repository.
        """
        granted = {r.id: 1 for r in self._running if r.pending == 1}
        left = min(budget, self._n_batch - len(granted))
        prompts = [r for r in self._running if r.pending > 1]
        if not prompts or left <= 0:
            return granted
        oldest = prompts[0]
        granted[oldest.id] = first = min(oldest.pending, max(1, left // 4))
        left -= first
        for request in sorted(prompts, key=lambda r: r.pending):
            n = min(left, request.pending - granted.get(request.id, 0))
            if n > 0:
                granted[request.id] = granted.get(request.id, 0) + n
                left -= n
        return granted

    def _room(self, wish: int, request: _Request) -> int:
        """Make room for up to `wish` cells, at the cost of idle slots and younger requests."""
        while self._kv_size - len(self._used) < wish:
            if self._evict():
                continue
            youngest = self._running[-1]
            if youngest is request:
                break
            slot = self._leave(youngest)
            self._cut(slot, 0)
            bisect.insort(self._waiting, youngest, key=lambda r: r.order)
        return min(wish, self._kv_size - len(self._used))

    def _evict(self) -> bool:
        idle = [s for s in self._slots if s.request is None and s.tokens]
        if not idle:
            return False
        self._cut(min(idle, key=lambda s: s.used), 0)
        return True

    def _take(self, request: _Request, n: int) -> Rows:
        slot = request.slot
        assert slot is not None
        start, pending = len(slot.tokens), request.pending
        tokens = tuple(request.tokens[start : start + n])
        wanted = n if request.all_logits and pending > 1 else int(n == pending)
        self._extend(slot, tokens)
        return Rows(request.id, slot.index, start, tokens, wanted, 0, pending > 1, n == pending)

    def _draft(self, request: _Request, rows: Rows, left: int, propose: Propose) -> Rows:
        slot = request.slot
        assert slot is not None
        most = min(left, self.most_draft(request.id))
        draft = tuple(propose(request.id, most))[: max(0, most)] if most > 0 else ()
        while len(draft) > self._kv_size - len(self._used) and self._evict():
            pass
        draft = draft[: self._kv_size - len(self._used)]
        self._extend(slot, draft)
        n = len(draft)
        return replace(rows, tokens=rows.tokens + draft, n_wanted=rows.n_wanted + n, n_draft=n)

    def _extend(self, slot: _Slot, tokens: Sequence[int]) -> None:
        cells = range(self._cells, self._cells + len(tokens))
        self._cells += len(tokens)
        slot.tokens.extend(tokens)
        slot.cells.extend(cells)
        slot.used = self._tick()
        self._used.add(cells)
        self._busy.add(cells)

    def _cut(self, slot: _Slot, n: int) -> None:
        """Keep the slot's first n tokens."""
        if len(slot.tokens) <= n:
            return
        gone = slot.cells[n:]
        self._used.drop(gone)
        if slot.request is not None:
            self._busy.drop(gone)
        del slot.tokens[n:], slot.cells[n:]
        self._ops.append(Remove(slot.index, n))

    def _leave(self, request: _Request) -> _Slot:
        slot = request.slot
        assert slot is not None
        self._busy.drop(slot.cells)
        slot.request = request.slot = None
        self._running.remove(request)
        return slot


def common_prefix(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """How many of the first `most` tokens are equal. Lists: compared 64 at a time, in C."""
    n, most = 0, min(most, len(a), len(b))
    while n < most and a[n : n + 64] == b[n : n + 64]:
        n += 64
    while n < most and a[n] == b[n]:
        n += 1
    return min(n, most)

"""The scheduler against a model of a KV cache, under any order of requests and cancels."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.runtime.server.backend import PromptTooLong
from dsq.runtime.server.scheduler import Copy, Plan, Remove, Rows, Scheduler, common_prefix


def _next_token(tokens: list[int]) -> int:
    """The "model": depends on every token before, and repeats often enough to share prefixes."""
    return sum((i + 1) * t for i, t in enumerate(tokens)) % 3


class _Cache:
    """What llama.cpp's unified cache would hold: (token, position) cells with their sequences."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.cells: list[tuple[int, int, set[int]]] = []  # token, position, sequences

    def apply(self, plan: Plan) -> None:
        for op in plan.cache:
            if isinstance(op, Copy):
                assert not self.tokens(op.target), "a copy needs an empty target"
                for _, position, sequences in self.cells:
                    if op.source in sequences and position < op.n:
                        sequences.add(op.target)
            else:
                assert isinstance(op, Remove)
                for _, position, sequences in self.cells:
                    if position >= op.start:
                        sequences.discard(op.slot)
            self.cells = [c for c in self.cells if c[2]]
        for rows in plan.rows:
            assert len(self.tokens(rows.slot)) == rows.start, "rows must follow what is cached"
            for i, token in enumerate(rows.tokens):
                self.cells.append((token, rows.start + i, {rows.slot}))
        assert len(self.cells) <= self.size, "the KV budget was exceeded"

    def tokens(self, sequence: int) -> list[int]:
        own = sorted((p, t) for t, p, sequences in self.cells if sequence in sequences)
        assert [p for p, _ in own] == list(range(len(own)))
        return [t for _, t in own]


@dataclass
class _Server:
    scheduler: Scheduler
    cache: _Cache
    budget: int
    guesses: bool
    answers: dict[int, list[int]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    n_steps: int = 0

    def step(self) -> Plan:
        self.n_steps += 1
        scheduler = self.scheduler
        running = scheduler.n_running + scheduler.n_waiting
        plan = scheduler.plan(self.budget, self._propose if self.guesses else None)
        assert bool(plan.rows) == bool(running), "work waits, but nothing was planned"
        assert len({r.request for r in plan.rows}) == len({r.slot for r in plan.rows})
        self.cache.apply(plan)
        assert scheduler.kv_used == len(self.cache.cells)
        for rows in plan.rows:
            assert rows.samples <= bool(rows.n_wanted)
            if rows.samples:
                self._read(rows)
        return plan

    def _propose(self, request: int, most: int) -> list[int]:
        """Right for a while, then wrong."""
        tokens = list(self.scheduler.tokens(request))
        guess: list[int] = []
        for i in range(min(most, 4)):
            guess.append((_next_token(tokens + guess) + (i == request % 4)) % 3)
        return guess

    def _read(self, rows: Rows) -> None:
        held, request = self.cache.tokens(rows.slot), rows.request
        draft = held[len(held) - rows.n_draft :]
        known = held[: len(held) - rows.n_draft]
        assert known == list(self.scheduler.tokens(request))
        sampled = [_next_token(known)]
        for guess in draft:
            if guess != sampled[-1]:
                break
            known.append(guess)
            sampled.append(_next_token(known))
        self.answers[request] += sampled
        if not self.scheduler.advance(request, sampled):
            self.end(request)

    def end(self, request: int) -> None:
        self.scheduler.end(request)
        self.ended.add(request)


_prompts = st.lists(st.integers(0, 2), min_size=1, max_size=19)
_requests = st.tuples(st.just("ask"), _prompts, st.integers(1, 25), st.booleans(), st.booleans())
_actions = st.lists(
    st.one_of(
        _requests,
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.integers(1, 5)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(
    actions=_actions,
    n_parallel=st.integers(1, 4),
    n_prefixes=st.integers(0, 3),
    kv_size=st.integers(20, 70),
    n_batch=st.integers(4, 16),
    budget=st.integers(1, 12),
    guesses=st.booleans(),
)
def test_every_request_gets_its_tokens_in_order_whatever_comes(
    actions: list[tuple],  # type: ignore[type-arg]
    n_parallel: int,
    n_prefixes: int,
    kv_size: int,
    n_batch: int,
    budget: int,
    guesses: bool,
) -> None:
    scheduler = Scheduler(
        n_parallel=n_parallel,
        n_slots=n_parallel + n_prefixes,
        n_ctx=20,
        kv_size=kv_size,
        n_batch=n_batch,
        min_shared=3,
        min_copied=2,
    )
    server = _Server(scheduler, _Cache(kv_size), budget, guesses)
    asked: dict[int, tuple[list[int], int]] = {}
    cancelled: set[int] = set()
    for action in actions:
        if action[0] == "ask":
            id, (_, prompt, most, share, all_logits) = len(asked), action
            scheduler.submit(id, prompt, most, share=share, all_logits=all_logits)
            asked[id], server.answers[id] = (prompt, most), []
        elif action[0] == "cancel" and action[1] in asked and action[1] not in server.ended:
            server.end(action[1])
            cancelled.add(action[1])
        elif action[0] == "step":
            for _ in range(action[1]):
                plan = server.step()
                assert plan.n_tokens <= n_batch
                prompt_tokens = sum(len(r.tokens) for r in plan.rows if r.is_prompt)
                assert prompt_tokens <= budget
    # No starvation: the oldest request moves at every step, so this many suffice.
    most_steps = sum(2 * 20 + 2 for _ in asked)
    while scheduler.n_running + scheduler.n_waiting:
        server.step()
        assert server.n_steps <= most_steps + len(actions) * 5, "a request starves"
    for id, (prompt, most) in asked.items():
        expected: list[int] = []
        while len(prompt) + len(expected) < min(len(prompt) + most, 20):
            expected.append(_next_token(prompt + expected))
        answer = server.answers[id]
        assert answer == expected[: len(answer)]
        assert len(answer) == len(expected) or id in cancelled
    # No slot leaks: all can be had again at once.
    for id in range(n_parallel):
        scheduler.submit(1000 + id, [1], 1)
        server.answers[1000 + id] = []
    scheduler_plan = scheduler.plan(100)
    server.cache.apply(scheduler_plan)
    assert scheduler.n_running == n_parallel


def _scheduler(**changed: int) -> Scheduler:
    sizes = {"n_parallel": 2, "n_slots": 4, "n_ctx": 1000, "kv_size": 2000, "n_batch": 64}
    return Scheduler(**{**sizes, **changed})


def _finish(scheduler: Scheduler, request: int) -> None:
    while not any(r.request == request and r.n_wanted for r in scheduler.plan(64).rows):
        pass
    scheduler.end(request)


def test_a_long_prompt_does_not_stall_a_running_stream() -> None:
    scheduler = _scheduler()
    scheduler.submit(1, [7] * 3, 500)
    scheduler.plan(16)
    scheduler.advance(1, [5])
    scheduler.submit(2, range(900), 10)
    for _ in range(20):
        plan = scheduler.plan(16)
        assert [(r.request, len(r.tokens)) for r in plan.rows] == [(1, 1), (2, 16)]
        scheduler.advance(1, [5])


def test_a_short_prompt_overtakes_a_long_one_that_still_moves() -> None:
    scheduler = _scheduler()
    scheduler.submit(1, range(900), 10)
    scheduler.submit(2, range(1000, 1040), 10)
    plan = scheduler.plan(64)
    assert {r.request: len(r.tokens) for r in plan.rows} == {1: 24, 2: 40}


def test_an_idle_slot_that_begins_alike_is_used_again() -> None:
    scheduler = _scheduler()
    scheduler.submit(1, [*range(100), 7], 5)
    _finish(scheduler, 1)
    scheduler.submit(2, [*range(100), 8, 9], 5)
    plan = scheduler.plan(64)
    assert plan.cache == (Remove(0, 100),)
    assert [(r.start, r.tokens) for r in plan.rows] == [(100, (8, 9))]
    assert scheduler.n_cached(2) == 100


def test_a_prefix_is_shared_with_a_running_request_without_new_cells() -> None:
    scheduler = _scheduler()
    scheduler.submit(1, range(60), 5)
    scheduler.plan(64)
    scheduler.advance(1, [3])
    scheduler.submit(2, [*range(50), 4], 5)
    plan = scheduler.plan(64)
    assert plan.cache == (Copy(0, 1, 50),)
    assert scheduler.kv_used == 62  # 60 and a token each


def test_answers_to_one_prompt_evaluate_it_once_and_hold_up_nobody_else() -> None:
    scheduler = _scheduler(n_parallel=4)
    for request in (1, 2, 3):
        scheduler.submit(request, range(150), 5)
    scheduler.submit(4, [500, 501], 5)
    for expected in ({1: 62, 4: 2}, {1: 63, 4: 1}, {1: 25, 4: 1}):
        rows = scheduler.plan(64).rows
        assert {r.request: len(r.tokens) for r in rows} == expected
        scheduler.advance(4, [1])
    scheduler.advance(1, [1])
    plan = scheduler.plan(64)
    assert {r.request: len(r.tokens) for r in plan.rows} == {1: 1, 2: 1, 3: 1, 4: 1}
    assert [op.n for op in plan.cache if isinstance(op, Copy)] == [149, 149]


def test_the_same_prompt_again_evaluates_its_last_token_only() -> None:
    scheduler = _scheduler()
    scheduler.submit(1, range(60), 5)
    _finish(scheduler, 1)
    scheduler.submit(2, range(60), 5)
    assert [r.tokens for r in scheduler.plan(64).rows] == [(59,)]


def test_requests_that_do_not_share_leave_nothing_and_take_nothing() -> None:
    scheduler = _scheduler()
    scheduler.submit(1, range(60), 5, share=False)
    _finish(scheduler, 1)
    assert scheduler.kv_used == 0
    scheduler.submit(2, range(60), 5)
    _finish(scheduler, 2)
    scheduler.submit(3, range(60), 5, share=False)
    scheduler.plan(64)
    assert scheduler.n_cached(3) == 0


def test_the_least_recently_used_prefix_goes_first() -> None:
    scheduler = _scheduler(n_parallel=1, n_slots=3)
    for id, begin in ((1, 100), (2, 200), (3, 300)):
        scheduler.submit(id, range(begin, begin + 50), 5)
        _finish(scheduler, id)
    scheduler.submit(4, range(100, 151), 5)  # 1 is used again, 2 is now the oldest
    _finish(scheduler, 4)
    scheduler.submit(5, range(500, 550), 5)
    _finish(scheduler, 5)
    found = {}
    for id, begin in ((6, 300), (7, 100), (8, 200)):
        scheduler.submit(id, range(begin, begin + 50), 5)
        scheduler.plan(64)
        found[begin] = scheduler.n_cached(id)
        scheduler.end(id)
    assert found == {300: 49, 100: 49, 200: 0}


def test_a_request_waits_until_there_is_room_to_generate() -> None:
    scheduler = _scheduler(n_ctx=100, kv_size=100)
    scheduler.submit(1, range(10), 80)
    scheduler.submit(2, range(20, 30), 80)
    assert {r.request for r in scheduler.plan(64).rows} == {1}
    scheduler.end(1)
    assert {r.request for r in scheduler.plan(64).rows} == {2}


def test_when_cells_run_out_the_youngest_goes_back_to_the_queue() -> None:
    scheduler = _scheduler(n_ctx=100, kv_size=160)
    scheduler.submit(1, range(10), 80)
    scheduler.submit(2, range(20, 30), 80)
    n_together = 0
    while len(rows := scheduler.plan(64).rows) == 2:
        n_together += 1
        for row in rows:
            scheduler.advance(row.request, [1])
    assert n_together == (160 - 2 * 10) // 2 + 1  # the cells hold all but the newest token
    assert (scheduler.n_running, scheduler.n_waiting) == (1, 1)
    scheduler.end(1)
    again = scheduler.plan(64).rows[0]
    assert (again.start, again.tokens) == (0, tuple(scheduler.tokens(2))[:64])


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(PromptTooLong, match="1000 tokens.*1000") as caught:
        _scheduler().submit(1, range(1000), 5)
    assert (caught.value.n_prompt, caught.value.n_ctx) == (1000, 1000)


@given(st.lists(st.integers(0, 1), max_size=200), st.lists(st.integers(0, 1), max_size=200))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    together = [x == y for x, y in zip(a, b, strict=False)]
    expected = together.index(False) if False in together else len(together)
    assert common_prefix(a, b, 1000) == expected
    assert common_prefix(a, a, 1000) == len(a)
    assert common_prefix(a, a, 65) == min(65, len(a))

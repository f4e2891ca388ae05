"""Drafts from earlier tokens, and when they are worth their rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsq.runtime.server.drafting import Batch, StepCost, best_length
from dsq.runtime.server.lookup import Drafter

FILE = [*range(100, 500)]
CHANGED = [*FILE[:130], 7, 8, *FILE[131:]]
Curve = Callable[[int], float]


def _speed(known: list[int], tokens: list[int], seconds: Curve) -> float:
    """Let `tokens` come after `known`; how much faster than one a step, drafts of up to 24."""
    drafter, cost, at, spent = Drafter(known), StepCost(), 0, 0.0
    while at < len(tokens):
        most = min(24, len(tokens) - at - 1)
        n = best_length(cost, Batch(1, 1), [drafter.chance], most) if drafter.chance else 0
        draft = drafter.propose(n)
        right = 0
        while right < len(draft) and draft[right] == tokens[at + right]:
            right += 1
        cost.observe(1 + len(draft), seconds(1 + len(draft)))
        spent += seconds(1 + len(draft))
        drafter.extend(tokens[at : at + right + 1])
        at += right + 1
    return len(tokens) * seconds(1) / spent


def test_it_goes_on_as_it_did_before() -> None:
    assert Drafter([*FILE, 7, *FILE[:5]]).propose(3) == FILE[5:8]


def test_what_runs_into_the_end_goes_round() -> None:
    assert Drafter([9, 1, 2, 3, 1, 2, 3, 1, 2, 3]).propose(7) == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("tokens", [FILE, [1, 2], []])
def test_it_knows_nothing_of_what_never_came(tokens: list[int]) -> None:
    assert Drafter(tokens).chance == 0
    assert Drafter(tokens).propose(10) == []


def test_the_longest_match_wins_then_the_latest() -> None:
    long, short = [1, 2, 3, 4, 5, 60], [9, 3, 4, 5, 70]
    assert Drafter([*long, *short, 0, 1, 2, 3, 4, 5]).propose(1) == [60]
    assert Drafter([*long, *short, 0, 8, 3, 4, 5]).propose(1) == [70]


@pytest.mark.parametrize(
    ("seconds", "least"),
    [
        (lambda n: 1 + 0.02 * (n - 1), 6.0),  # a GPU: the weights are what a step waits for
        (lambda n: 1 + 0.45 * (n - 1), 1.6),  # SmolLM2 on two cores
        (lambda n: n, 0.95),  # nothing to be gained, little lost
    ],
)
def test_repeating_a_file_with_one_change(seconds: Curve, least: float) -> None:
    assert _speed(FILE, CHANGED, seconds) > least


def test_text_that_only_begins_alike_costs_little() -> None:
    """Each match misleads."""
    known = [t for i in range(30) for t in (1, 2, 3, 200 + i)]
    tokens = [t for i in range(30) for t in (1, 2, 3, 300 + i)]
    assert _speed(known, tokens, lambda n: 1 + 0.45 * (n - 1)) > 0.9


def test_poor_guesses_lower_the_chance_and_good_ones_raise_it() -> None:
    drafter = Drafter([1, 2, 3, 200])
    for i in range(20):
        for token in (1, 2, 3, 300 + i):
            drafter.extend([token])
    drafter.extend([1, 2, 3])
    assert 0 < drafter.chance < 0.1
    for token in FILE[:40] * 3:
        drafter.extend([token])
    assert drafter.chance > 0.9


@given(st.lists(st.integers(0, 3), max_size=120), st.integers(0, 40), st.integers(0, 12))
def test_a_draft_always_followed_the_same_three_tokens(
    tokens: list[int], cut: int, most: int
) -> None:
    """There or, where that runs into the end, in the draft itself."""
    in_one, in_parts = Drafter(tokens), Drafter(tokens[:cut])
    for token in tokens[cut:]:
        in_parts.extend([token])
    for drafter in (in_one, in_parts):
        draft = drafter.propose(most)
        assert len(draft) in (0, most)
        if draft:
            text = f",{','.join(map(str, [*tokens, *draft[:-1]]))},"
            assert f",{','.join(map(str, [*tokens[-3:], draft[0]]))}," in text
            for i in range(1, most):
                assert f",{','.join(map(str, [*tokens, *draft][: len(tokens) + i][-3:]))}," in text


def test_what_a_row_costs_is_learned() -> None:
    cost = StepCost()
    assert cost.seconds(5) > cost.seconds(1)
    for rows in (1, 4, 9, 17):
        cost.observe(rows, 1e-3 + 3e-3 * rows)
    for rows in (1, 4, 6, 9, 12, 17):
        assert cost.seconds(rows) == pytest.approx(1e-3 + 3e-3 * rows, rel=0.1)


def test_kernels_tiles_are_seen() -> None:
    """Six rows cost less than five: with q5_0 on AVX2 they do."""
    cost = StepCost()
    for rows, seconds in ((1, 1.0), (4, 3.1), (5, 3.7), (6, 3.5), (7, 4.3)):
        cost.observe(rows, seconds)
    assert best_length(cost, Batch(1, 1), [0.99], 6) == 5


def test_more_streams_leave_less_room() -> None:
    cost = StepCost()
    for rows in range(1, 60):
        cost.observe(rows, 10.0 + max(0, rows - 8))  # free up to eight rows
    alone = best_length(cost, Batch(1, 1), [0.8], 24)
    beside = best_length(cost, Batch(8, 8), [0.8], 24)
    assert alone >= 7 > beside
    assert best_length(cost, Batch(1, 1), [0.8], 24, seconds_each=9.0) == 0, "dear guesses"


def test_hiccups_and_old_costs_are_forgotten() -> None:
    cost = StepCost()
    for rows in (1, 9) * 5:
        cost.observe(rows, 10e-3 + 0.1e-3 * rows)
    before = cost.seconds(9)
    cost.observe(9, 30.0)
    assert cost.seconds(9) == pytest.approx(before)
    for _ in range(1200):
        cost.observe(1, 10e-3)
    assert cost.seconds(9) == pytest.approx(10e-3 * StepCost().seconds(9))

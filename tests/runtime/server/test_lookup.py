"""Drafts from earlier tokens, and when they are worth their rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsq.runtime.server.lookup import Drafter, StepCost

FILE = [*range(100, 160)]
CHEAP, DEAR = 0.05, 0.6


def _copy(drafter: Drafter, tokens: list[int], break_even: float) -> tuple[int, int, int]:
    """Let `tokens` come; steps taken, tokens drafted and accepted."""
    steps = drafted = accepted = at = 0
    while at < len(tokens):
        draft = drafter.propose(len(tokens) - at - 1, break_even)
        n = 0
        while n < len(draft) and draft[n] == tokens[at + n]:
            n += 1
        steps, drafted, accepted = steps + 1, drafted + len(draft), accepted + n
        drafter.extend(tokens[at : at + n + 1])
        at += n + 1
    return steps, drafted, accepted


def test_it_goes_on_as_it_did_before() -> None:
    assert Drafter([*FILE, 7, *FILE[:5]]).propose(3, CHEAP) == FILE[5:8]


def test_it_knows_nothing_of_what_never_came() -> None:
    assert Drafter(FILE).propose(10, CHEAP) == []
    assert Drafter([1, 2]).propose(10, CHEAP) == []
    assert Drafter().propose(10, CHEAP) == []


def test_the_longest_match_wins_then_the_latest() -> None:
    long, short = [1, 2, 3, 4, 5, 60], [9, 3, 4, 5, 70]
    assert Drafter([*long, *short, 0, 1, 2, 3, 4, 5]).propose(1, CHEAP) == [60]
    assert Drafter([*long, *short, 0, 8, 3, 4, 5]).propose(1, CHEAP) == [70]


def test_repeating_a_file_with_one_change_takes_few_steps() -> None:
    changed = [*FILE[:30], 7, 8, *FILE[31:]]
    steps, drafted, accepted = _copy(Drafter(FILE), changed, 0.3)
    assert accepted > 0.85 * len(changed) - 10
    assert steps < 20
    assert accepted > 0.7 * drafted


def test_poor_guesses_end_the_drafting_and_good_ones_start_it_again() -> None:
    """The same beginnings, other endings: each match misleads."""
    misleading = [t for i in range(60) for t in (1, 2, 3, 200 + i)]
    drafter = Drafter(misleading)
    assert drafter.propose(8, 0.3) == []
    again = _copy(drafter, FILE * 6, 0.3)
    assert again[2] > 4 * len(FILE)


def test_dear_rows_need_surer_guesses() -> None:
    tokens = [*FILE, 7, *FILE[:4]]
    assert len(Drafter(tokens).propose(20, 0.1)) > len(Drafter(tokens).propose(20, 0.3))
    assert Drafter(tokens).propose(20, 0.95) == []


@given(st.lists(st.integers(0, 3), max_size=120), st.integers(0, 40), st.integers(0, 12))
def test_a_draft_always_followed_the_same_three_tokens(
    tokens: list[int], cut: int, most: int
) -> None:
    in_one, in_parts = Drafter(tokens), Drafter(tokens[:cut])
    for token in tokens[cut:]:
        in_parts.extend([token])
    for drafter in (in_one, in_parts):
        draft = drafter.propose(most, 0.01)
        assert len(draft) <= most
        if draft:
            found = [*tokens[-3:], *draft]
            text, want = f",{','.join(map(str, tokens))},", f",{','.join(map(str, found))},"
            assert want in text


def test_what_a_row_costs_is_learned() -> None:
    flat, steep = StepCost(), StepCost()
    for rows in (1, 1, 4, 1, 9, 17, 1, 4):
        flat.observe(rows, 10e-3 + 0.1e-3 * rows)
        steep.observe(rows, 1e-3 + 3e-3 * rows)
    assert flat.break_even(1) < 0.02
    assert 0.7 < steep.break_even(1) < 0.8
    assert flat.break_even(8) > flat.break_even(1), "many streams fill the machine already"


def test_one_hiccup_does_not_end_the_drafting() -> None:
    cost = StepCost()
    for rows in (1, 9) * 10:
        cost.observe(rows, 10e-3 + 0.1e-3 * rows)
    before = cost.break_even(1)
    cost.observe(9, 30.0)
    assert cost.break_even(1) < before + 0.3
    for _ in range(600):
        cost.observe(1, 10e-3)
    assert cost.break_even(1) == StepCost().break_even(1), "old costs are forgotten"

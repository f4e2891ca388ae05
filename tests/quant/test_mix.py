"""The integer program against trying everything, and recipes as files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.errors import InputError
from dsq.quant.mix import (
    Choice,
    Mix,
    Recipe,
    candidates,
    curve,
    main_type,
    read_recipe,
    under_budget,
    under_divergence,
)
from dsq.quant.scheme import BY_NAME

TYPES = [BY_NAME[name] for name in ("q2_k", "q4_k", "q8_0")]

tables = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 1000)), min_size=3, max_size=3),
    min_size=1,
    max_size=5,
).map(
    lambda rows: {
        f"t{i}": [Choice(of, n, k / 1000) for of, (n, k) in zip(TYPES, row, strict=True)]
        for i, row in enumerate(rows)
    }
)


def all_mixes(table: dict[str, list[Choice]]) -> list[tuple[int, float]]:
    return [
        (sum(c.n_bytes for c in picks), sum(c.kld for c in picks))
        for picks in itertools.product(*table.values())
    ]


@settings(deadline=None, max_examples=60)
@given(table=tables, share=st.floats(0, 1))
def test_no_other_mix_is_better(table: dict[str, list[Choice]], share: float) -> None:
    mixes = all_mixes(table)
    least, most = min(n for n, _ in mixes), max(n for n, _ in mixes)
    budget = int(least + share * (most - least))
    found = under_budget(table, budget)
    assert found.n_bytes <= budget
    assert found.kld == pytest.approx(min(k for n, k in mixes if n <= budget), rel=1e-5)

    allowed = min(k for _, k in mixes) * (1 + share) + 1e-9
    smallest = under_divergence(table, allowed)
    assert smallest.kld <= allowed * (1 + 1e-6)
    assert smallest.n_bytes == min(n for n, k in mixes if k <= allowed)


def test_what_cannot_be() -> None:
    table = {"t": [Choice(of, 100, 0.5) for of in TYPES]}
    with pytest.raises(InputError, match="they take 100 at the least"):
        under_budget(table, 99)
    with pytest.raises(InputError, match=r"mean KLD of 0\.1"):
        under_divergence(table, 0.1)


def test_the_curve_falls() -> None:
    table = {
        f"t{i}": [Choice(of, (j + 1) * (i + 1), 1 / (j + 1)) for j, of in enumerate(TYPES)]
        for i in range(6)
    }
    points = curve(table)
    assert [p.n_bytes for p in points] == sorted(p.n_bytes for p in points)
    assert [p.kld for p in points] == sorted((p.kld for p in points), reverse=True)


def test_candidates_fit_the_row() -> None:
    assert all(512 % of.block_size == 0 for of in candidates(512))
    assert {of.name for of in candidates(576)} == {
        *("q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")
    }
    assert [of.name for of in candidates(40)] == ["f16"]


def test_a_mix_is_called_by_what_most_of_it_is() -> None:
    q2_k, q4_k, q8_0 = TYPES
    assert main_type([(q2_k, 40), (q8_0, 50), (q4_k, 30), (q4_k, 30)]) is q4_k


RECIPE = Recipe(Mix({"blk.0.ffn_up.weight": TYPES[1]}, 144, 0.1).types, {"predicted_kld": 0.1})


def test_a_recipe_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RECIPE.to_json()))
    assert read_recipe(path) == RECIPE
    ((pattern, of),) = read_recipe(path).tensor_types()
    assert of is TYPES[1]
    assert pattern.search("blk.0.ffn_up.weight")
    assert not pattern.search("blk.10.ffn_up.weight")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no recipe"),
        ('{"types": {}}', "no recipe"),
        ('{"types": {"a": "q4_k"}}', "dsq_recipe is None"),
        ('{"dsq_recipe": 1, "types": {"a": "q9"}}', "a: unknown tensor type 'q9'"),
        ('{"dsq_recipe": 1, "types": {"a": 4}}', "the type of a is 4"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_recipe(path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"blk.0.ffn_up.weight": (8, 256)}, None),
        ({"blk.0.ffn_up.weight": (8, 288)}, "q4_k cannot hold"),
        ({"blk.0.ffn_down.weight": (8, 256)}, "no matrix of this model"),
        ({"blk.0.ffn_up.weight": (8, 256), "output.weight": (9, 256)}, "no type for output"),
    ],
)
def test_a_recipe_of_another_model(shapes: dict[str, tuple[int, ...]], message: str | None) -> None:
    if message is None:
        RECIPE.check(shapes, "recipe.json")
    else:
        with pytest.raises(InputError, match=message):
            RECIPE.check(shapes, "recipe.json")

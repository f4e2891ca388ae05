"""The sampler: each step does what its name says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dsq.errors import InputError
from dsq.runtime.sampling import GREEDY, Sampler, SamplerSettings

LOGITS = np.log(np.array([0.05, 0.4, 0.3, 0.2, 0.05], np.float32))
PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7}


def draw(n: int = 4000, **settings: float) -> Counter[int]:
    sampler = Sampler(SamplerSettings(**{"temp": 1.0, **PLAIN, **settings}), 5)  # type: ignore[arg-type]
    counts = Counter(sampler.sample(LOGITS) for _ in range(n))
    sampler.close()
    return counts


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert Sampler(GREEDY, 3).sample(np.array([1, 2, 2], np.float32)) == 1


def test_temperature_one_draws_from_the_distribution() -> None:
    counts = draw()
    for token, p in enumerate(np.exp(LOGITS)):
        assert counts[token] / 4000 == pytest.approx(p, abs=0.03)


def test_low_temperature_sharpens() -> None:
    assert draw(temp=0.1)[1] > 3600


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 1}, {1}),
        ({"top_p": 0.65}, {1, 2}),
        ({"min_p": 0.4}, {1, 2, 3}),
        ({"min_p": 0.6}, {1, 2}),
    ],
)
def test_what_is_cut_off(settings: dict[str, float], kept: set[int]) -> None:
    assert set(draw(500, **settings)) == kept


def test_the_repeat_penalty_sees_the_prompt_and_what_was_sampled() -> None:
    sampler = Sampler(SamplerSettings(temp=0.0, repeat_penalty=50.0), 3)
    logits = np.array([3, 2, 1], np.float32)
    sampler.accept([0])
    assert [sampler.sample(logits) for _ in range(2)] == [1, 2]
    assert logits.tolist() == [3, 2, 1]
    sampler.close()
    sampler.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temp": -0.1}, "temp is -0.1; it must be 0 or more"),
        ({"temp": float("nan")}, "temp is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.1}, "top_p is 1.1; it must be between 0 and 1"),
        ({"min_p": -1}, "min_p is -1"),
        ({"repeat_penalty": 0}, "repeat_penalty is 0"),
        ({"seed": -5}, "seed is -5"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplerSettings(**settings)  # type: ignore[arg-type]

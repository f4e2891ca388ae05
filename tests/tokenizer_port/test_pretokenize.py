from __future__ import annotations

import copy
from typing import Any

import pytest

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port.pretokenize import (
    ALIASES,
    CHAINS,
    LLAMA_CPP_NAMES,
    chain_for,
    checked_name,
    recognise,
)

from .conftest import added_entry


def tokenizer_with(chain: dict[str, Any]) -> dict[str, Any]:
    return {**chain, "model": {"type": "BPE", "ignore_merges": chain["ignore_merges"]}}


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_is_recognised(name: str) -> None:
    assert recognise(tokenizer_with(chain_for(name))) == name


def test_chains_differ() -> None:
    chains = list(CHAINS.values())
    assert all(a != b for i, a in enumerate(chains) for b in chains[:i])


def test_names_are_llama_cpp_names() -> None:
    assert {*CHAINS, *ALIASES} <= LLAMA_CPP_NAMES
    assert not {*CHAINS} & {*ALIASES}
    assert {*ALIASES.values()} <= {*CHAINS}


def test_deepseek_coder_as_published(deepseek_json: dict[str, Any]) -> None:
    """Newlines themselves instead of escapes, an empty normalizer, another trim_offsets."""
    made = copy.deepcopy(deepseek_json)
    made["normalizer"] = {"type": "Sequence", "normalizers": []}
    first = made["pre_tokenizer"]["pretokenizers"][0]
    assert first["pattern"]["Regex"] == r"[\r\n]"
    first["pattern"]["Regex"] = "[\r\n]"
    made["pre_tokenizer"]["pretokenizers"][-1]["trim_offsets"] = False
    made["added_tokens"].append(added_entry(9999, "<extra>", False))
    assert recognise(made) == "deepseek-coder"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("behaviour", r"step 2 is .*\"Removed\".*nearest known chain, deepseek-coder, has"),
        ("regex", r"step 3 is .*\\\\p\{S\}.*deepseek-coder"),
        ("order", "step 1 is"),
        ("missing digits", r"step 5 is .*ByteLevel.*deepseek-coder, has .*Digits"),
        ("prefix space", r"step 6 is .*\"add_prefix_space\": true"),
        ("lower case", r"step 1 is .*Lowercase"),
        ("ignore merges", r"step 7 is .*ignore_merges.*true"),
        ("inverted", r"step 1 is .*\"invert\": true"),
    ],
)
def test_an_unknown_chain_names_the_first_step_that_differs(
    deepseek_json: dict[str, Any], change: str, message: str
) -> None:
    made = copy.deepcopy(deepseek_json)
    steps = made["pre_tokenizer"]["pretokenizers"]
    if change == "behaviour":
        steps[1]["behavior"] = "Removed"
    elif change == "regex":
        steps[2]["pattern"]["Regex"] = r"\s?\p{S}+"
    elif change == "order":
        steps[0], steps[1] = steps[1], steps[0]
    elif change == "missing digits":
        del steps[4]
    elif change == "prefix space":
        steps[-1]["add_prefix_space"] = True
    elif change == "lower case":
        made["normalizer"] = {"type": "Lowercase"}
    elif change == "ignore merges":
        made["model"]["ignore_merges"] = True
    elif change == "inverted":
        steps[0]["invert"] = True
    with pytest.raises(UnsupportedError, match=message) as caught:
        recognise(made)
    assert "--pre NAME" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_given_by_hand() -> None:
    assert checked_name("tekken") == "tekken"
    with pytest.raises(InputError, match="did you mean deepseek-coder"):
        checked_name("deepseek-codr")


def test_a_chain_that_cannot_be_rebuilt() -> None:
    with pytest.raises(UnsupportedError, match=r"'tekken'.*deepseek-coder"):
        chain_for("tekken")

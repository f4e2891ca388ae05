from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port.chains import (
    ADDS_BOS_UNSAID,
    ALIASES,
    CHAINS,
    LLAMA_CPP_NAMES,
    NOT_BYTE_LEVEL,
)
from dsq.tokenizer_port.llama_chains import LLAMA_CPP_CHAINS
from dsq.tokenizer_port.pretokenize import chain_for, checked_name, recognise

from .conftest import added_entry


def tokenizer_with(chain: dict[str, Any]) -> dict[str, Any]:
    return {**chain, "model": {"type": "BPE", "ignore_merges": chain["ignore_merges"]}}


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_is_recognised(name: str) -> None:
    assert recognise(tokenizer_with(chain_for(name))) == name


def test_chains_differ() -> None:
    chains = list(CHAINS.values())
    assert all(a != b for i, a in enumerate(chains) for b in chains[:i])


@dataclass(frozen=True)
class Branch:
    """One branch of llama.cpp's choice by `tokenizer.ggml.pre`."""

    names: frozenset[str]
    ignore_merges: bool
    add_bos: bool


@pytest.fixture(scope="module")
def branches(llama_cpp_source: Path) -> list[Branch]:
    source = (llama_cpp_source / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    start = source.index("// for now, only BPE models have pre-tokenizers")
    source = source[start : source.index("unknown pre-tokenizer type", start)]
    return [
        Branch(
            frozenset(re.findall(r'tokenizer_pre == "([^"]+)"', branch)),
            "ignore_merges = true" in branch,
            "add_bos = true" in branch,
        )
        for branch in re.split(r"\}\s*else", source)
    ]


def test_the_names_are_llama_cpps(branches: list[Branch]) -> None:
    groups = ({*CHAINS, *LLAMA_CPP_CHAINS}, {*ALIASES}, NOT_BYTE_LEVEL)
    assert sum(map(len, groups)) == len(LLAMA_CPP_NAMES)  # none stands twice
    assert frozenset().union(*groups) == LLAMA_CPP_NAMES
    assert frozenset().union(*(branch.names for branch in branches)) == LLAMA_CPP_NAMES
    assert {*ALIASES.values()} <= {*CHAINS, *LLAMA_CPP_CHAINS}


def test_the_flags_are_llama_cpps(branches: list[Branch]) -> None:
    for branch in branches:
        for name in branch.names - NOT_BYTE_LEVEL - {"llama4"}:  # Meta's file ignores merges
            assert chain_for(name)["ignore_merges"] is branch.ignore_merges, name
            assert (name in ADDS_BOS_UNSAID) is branch.add_bos, name


def test_deepseek_coder_in_another_spelling(deepseek_json: dict[str, Any]) -> None:
    """Escapes instead of newlines themselves, no normalizer, another trim_offsets, one token."""
    made = copy.deepcopy(deepseek_json)
    assert made["normalizer"] == {"type": "Sequence", "normalizers": []}
    made["normalizer"] = None
    first = made["pre_tokenizer"]["pretokenizers"][0]
    assert first["pattern"]["Regex"] == "[\r\n]"
    first["pattern"]["Regex"] = r"[\r\n]"
    made["pre_tokenizer"]["pretokenizers"][-1]["trim_offsets"] = False
    made["added_tokens"].append(added_entry(9999, "<extra>", False))
    assert recognise(made) == "deepseek-coder"


def test_removing_what_lies_between_the_matches() -> None:
    """As the GPT-4o file spells it, whose regex leaves nothing between."""
    made = tokenizer_with(copy.deepcopy(chain_for("gpt-4o")))
    step = made["pre_tokenizer"]["pretokenizers"][0]
    step.update(behavior="Removed", invert=True)
    assert recognise(made) == "gpt-4o"
    step["pattern"]["Regex"] = r"\p{L}+"  # this one would lose text
    with pytest.raises(UnsupportedError, match="Removed"):
        recognise(made)


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
    assert checked_name("youtu") == "youtu"
    with pytest.raises(InputError, match="did you mean deepseek-coder"):
        checked_name("deepseek-codr")
    with pytest.raises(UnsupportedError, match="--pre gemma4: is no byte-level"):
        checked_name("gemma4")


@pytest.mark.parametrize(
    ("name", "message"), [("gemma4", "no byte-level"), ("k2-horizon", "update dsq")]
)
def test_a_chain_that_cannot_be_rebuilt(name: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'{name}'.*{message}"):
        chain_for(name)

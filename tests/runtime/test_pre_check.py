"""`--pre NAME` against a model's own tokenizer.json, with llama.cpp as the judge."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsq.cli.main import main
from dsq.errors import InputError
from dsq.runtime.pre_check import check_pre
from dsq.tokenizer_port.load import load_hf
from dsq.tokenizer_port.vocabulary import Vocabulary
from tests.models import llama_config, write_hf
from tests.tokenizer_port.conftest import n_tokens, trained


@dataclass(frozen=True)
class Directory:
    path: Path
    n_rows: int

    def vocabulary(self, *, pre: str | None = None) -> Vocabulary:
        return load_hf(self.path, self.n_rows, pre=pre, config={"eos_token_id": 0})


@pytest.fixture(scope="module")
def smollm() -> dict[str, Any]:
    return trained("smollm", 600)


def another_spelling(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Digits cut by a regex: no known chain, but smollm's in effect."""
    made = copy.deepcopy(tokenizer)
    made["pre_tokenizer"]["pretokenizers"][0] = {
        "type": "Split",
        "pattern": {"Regex": r"\p{N}"},
        "behavior": "Isolated",
        "invert": False,
    }
    return made


def directory(path: Path, tokenizer: dict[str, Any]) -> Directory:
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return Directory(path, n_tokens(tokenizer))


def test_a_name_that_gives_the_same_tokens(tmp_path: Path, smollm: dict[str, Any]) -> None:
    made = directory(tmp_path, another_spelling(smollm))
    with pytest.raises(InputError, match=r"give it with --pre NAME"):
        made.vocabulary()
    check_pre(made, "smollm")
    check_pre(made, "starcoder")  # llama.cpp's other name for it


def test_a_name_that_gives_other_tokens(tmp_path: Path, smollm: dict[str, Any]) -> None:
    made = directory(tmp_path, another_spelling(smollm))
    with pytest.raises(InputError, match=r"--pre llama-bpe: .* texts, first '.*not") as caught:
        check_pre(made, "llama-bpe")
    assert "try another name" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recognised_file_under_another_name(tmp_path: Path, smollm: dict[str, Any]) -> None:
    made = directory(tmp_path, smollm)
    check_pre(made, "smollm")
    check_pre(made, "starcoder")
    with pytest.raises(InputError, match="leave --pre out: it is smollm"):
        check_pre(made, "deepseek-coder")


def test_what_llama_cpp_never_does_is_no_ground_for_refusal(tmp_path: Path) -> None:
    """A file that normalizes (NFC) differs from llama.cpp under every name."""
    tokenizer = another_spelling(trained("command-r", 600))
    check_pre(directory(tmp_path, tokenizer), "command-r")


@pytest.mark.parametrize("verb", [["convert"], ["quantize", "q8_0"]])
def test_on_the_command_line(
    tmp_path: Path, smollm: dict[str, Any], verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = llama_config(vocab_size=n_tokens(smollm), eos_token_id=0, bos_token_id=0)
    model = write_hf(tmp_path / "model", config)
    (model / "tokenizer_config.json").unlink()
    directory(model, another_spelling(smollm))
    out = tmp_path / "out.gguf"
    command = [*verb, str(model), "-o", str(out)]
    assert main([*command, "--pre", "llama-bpe"]) == 2
    assert "llama.cpp gives other tokens" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--pre", "smollm"]) == 0
    assert out.exists()

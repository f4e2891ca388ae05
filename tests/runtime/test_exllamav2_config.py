"""Each directory that dsq writes, read by exllamav2's rules, by exllamav2 and by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from dsq.cli.main import main
from tests import exllamav2_config
from tests.models import TINY_CODER, llama_config, write_hf

pytestmark = [pytest.mark.torch, pytest.mark.slow]
KINDS = ("hf", "gptq", "gptq_v2", "exl2")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By `dsq convert`, from one model: dense from its GGUF, GPTQ and EXL2 calibrated."""
    folder = tmp_path_factory.mktemp("written")
    source, gguf = write_hf(folder / "source", llama_config()), folder / "m.gguf"
    assert main(["convert", str(source), "-o", str(gguf)]) == 0
    text = ["--text", str(TINY_CODER / "heldout.txt"), "--tokens", "256", "--ctx", "64", "-t", "1"]
    gptq = ["convert", str(source), "--to", "gptq", "--group-size", "64"]
    commands = {
        "hf": ["convert", str(gguf), "--to", "hf"],
        "gptq": [*gptq, *text],
        "gptq_v2": [*gptq, "--format", "gptq_v2", *text],
        "exl2": ["convert", str(source), "--to", "exl2", "--bpw", "4", *text],
    }
    assert tuple(commands) == KINDS
    for kind, command in commands.items():
        assert main([*command, "-o", str(folder / kind)]) == 0
    return {kind: folder / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_factor_and_base_by_exllamav2s_rules(written: dict[str, Path], kind: str) -> None:
    assert exllamav2_config.by_its_rules(written[kind]) == (100000, 4)


@pytest.mark.skipif(not exllamav2_config.is_installed(), reason=exllamav2_config.MISSING)
def test_factor_base_and_end_by_exllamav2_itself(written: dict[str, Path]) -> None:
    found = exllamav2_config.by_itself(*written.values())
    eos = json.loads((TINY_CODER / "generation_config.json").read_text())["eos_token_id"]
    for kind, read in zip(KINDS, found, strict=True):
        assert (read["theta"], read["factor"]) == (100000, 4), kind
        assert (read["eos"], read["generation_eos"]) == (eos, [eos]), kind
        assert read["max_seq_len"] == llama_config()["max_position_embeddings"], kind
        assert read["gptq_v2"] == (kind == "gptq_v2"), kind
        with safe_open(written[kind] / "model.safetensors", "np") as file:
            assert read["tensors"] == len(file.keys()), kind


@pytest.mark.parametrize("kind", KINDS)
def test_factor_and_base_by_transformers(written: dict[str, Path], kind: str) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    steps = LlamaRotaryEmbedding(AutoConfig.from_pretrained(written[kind])).inv_freq.numpy()
    assert steps[0] == 0.25  # factor 4
    assert steps[1] == pytest.approx(100000 ** (-1 / len(steps)) / 4)

"""GPTQ and EXL2 directories in the torch engine: transformers' numbers, without the memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsq.convert.checkpoint import HfCheckpoint, open_checkpoint
from dsq.convert.unpack import plan_unpack, run_unpack
from dsq.errors import InputError
from dsq.runtime import packed_engine
from dsq.runtime.torch_engine import TorchEngine
from tests.models import ROOT, llama_config
from tests.packed_models import exl2_rounded, is_linear, write_exl2, write_gptq, write_packed

pytestmark = pytest.mark.torch
IDS = np.random.default_rng(1).integers(0, 4000, 40).tolist()


def transformers_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """transformers alone, on the directory unpacked to float32."""
    import torch
    from transformers import LlamaForCausalLM

    source = open_checkpoint(folder)
    assert isinstance(source, HfCheckpoint)
    dense = folder.with_name(f"{folder.name}-dense")
    run_unpack(source, plan_unpack(source), dense, threads=1)
    model = LlamaForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def write_half_words(folder: Path, config: dict[str, Any]) -> None:
    """EXL2 whose last group ends in the middle of a word."""

    def quantize(name: str, weight: np.ndarray) -> Any:
        groups = [(6, 16), (5, weight.shape[-1] - 16)]
        return exl2_rounded(weight, groups) if is_linear(name) else None

    write_packed(folder, quantize, {"quant_method": "exl2"}, config=config)


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "gptq": (write_gptq, {}, {}),
    "scattered, biases, shared heads": (
        write_gptq,
        {"attention_bias": True, "num_key_value_heads": 1},
        {"desc_act": True, "bits": 3, "sym": False},
    ),
    "tied": (write_gptq, {"tie_word_embeddings": True}, {}),
    "exl2": (write_exl2, {}, {}),
    "exl2, half a word": (write_half_words, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers_own(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, changes, settings = CASES[case]
    write(tmp_path / "m", config=llama_config(torch_dtype="float16", **changes), **settings)
    wanted = transformers_logits(tmp_path / "m", IDS)
    atol = 1e-5 * wanted.std()
    monkeypatch.setattr(packed_engine, "_ROWS", 96)  # so that no matrix is one tile
    monkeypatch.setattr(packed_engine, "_COLUMNS", 100)
    with TorchEngine(tmp_path / "m", n_ctx=64, n_threads=1) as engine:
        np.testing.assert_allclose(engine.logits(IDS), wanted, atol=atol)
        engine.logits(IDS[:10])
        np.testing.assert_allclose(engine.eval(IDS[10:12]), wanted[11], atol=atol)
        windows = np.array([IDS, IDS[::-1]], np.int32)
        both = engine.window_logits(windows, 20)
        np.testing.assert_allclose(both[:19], wanted[20:-1], atol=atol)


def test_damage_is_told_by_the_matrix(tmp_path: Path) -> None:
    write_gptq(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.scales"][0, 5] = np.nan
    save_file(tensors, file)
    with (
        TorchEngine(tmp_path / "m", n_ctx=64, n_threads=1) as engine,
        pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj: 1 of \d+ scales are NaN"),
    ):
        engine.logits(IDS)


_MEASURE = """
import resource, sys
from pathlib import Path
from dsq.runtime.torch_engine import TorchEngine

def peak(path):
    with TorchEngine(path, n_ctx=64, n_threads=1) as engine:
        for token in range(10, 13):
            engine.eval([token])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

print(peak(Path(sys.argv[1])), peak(Path(sys.argv[2])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts other units elsewhere")
def test_memory_is_the_quantized_size_and_a_layer(tmp_path: Path) -> None:
    """A small model first, for what torch takes by itself; then what a larger one adds."""
    write_gptq(tmp_path / "small")
    config = llama_config(
        torch_dtype="float16", hidden_size=512, intermediate_size=1536, num_hidden_layers=8
    )
    write_gptq(tmp_path / "large", config=config)
    stored = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    layer = 4 * (4 * 512 * 512 + 3 * 512 * 1536)  # bytes in float32
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    small, large = map(int, done.stdout.split())
    assert large - small < stored + layer  # 24 + 13 MiB; in float32 it would add 117 MiB

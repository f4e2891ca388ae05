"""transformers as the reference: equality with llama.cpp, and the RoPE factor."""

from __future__ import annotations

import builtins
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dsq.convert.rope import Rope
from dsq.convert.spec import spec_from_config
from dsq.errors import DsqError, InputError
from dsq.runtime.llamacpp import LlamaCppEngine
from dsq.runtime.torch_engine import TorchEngine, check_rope, llama_config
from tests.tiny_gguf import BOS, token_id, write_tiny_hf

pytestmark = pytest.mark.torch
IDS = [token_id(BOS), *range(60, 99)]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hf(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="module")
def torch_engine(hf: Path) -> TorchEngine:
    return TorchEngine(hf, n_ctx=256, n_threads=1)


def test_logits_equal_llama_cpp(tiny: Path, torch_engine: TorchEngine) -> None:
    # without flash attention, which computes in half precision on a CPU
    with LlamaCppEngine(
        tiny, n_ctx=256, kv_type="f32", flash_attention=False, n_threads=1
    ) as engine:
        wanted = engine.logits(IDS).copy()
    np.testing.assert_allclose(torch_engine.logits(IDS), wanted, atol=5e-5)


def test_sequences_and_windows(torch_engine: TorchEngine) -> None:
    whole = torch_engine.logits(IDS).copy()
    torch_engine.logits(IDS[:10])
    np.testing.assert_allclose(torch_engine.eval(IDS[10:12]), whole[11], atol=1e-4)
    assert torch_engine.tokens == tuple(IDS[:12])
    tail = torch_engine.logits(IDS[5:], pos0=5)
    np.testing.assert_allclose(tail, whole[5:], atol=1e-4)
    windows = np.array([IDS, IDS[::-1]], np.int32)
    both = torch_engine.window_logits(windows, 20)
    assert both.shape == (2 * 19, 293)
    np.testing.assert_allclose(both[:19], whole[20:-1], atol=1e-4)
    assert torch_engine.n_past == 0


def test_what_does_not_fit(torch_engine: TorchEngine) -> None:
    with pytest.raises(InputError, match="257 tokens do not fit a context of 256"):
        torch_engine.logits([1] * 257)
    with pytest.raises(InputError, match="token 293 is outside"):
        torch_engine.logits([293])


@pytest.mark.parametrize(
    "rope",
    [
        Rope(100000.0, "linear", 4.0),
        Rope(10000.0),
        Rope(500000.0, "llama3", 8.0, 8192, 1.0, 4.0),
        Rope(10000.0, "yarn", 4.0, 4096),
    ],
)
def test_every_rope_survives_transformers(rope: Rope, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    spec = dataclasses.replace(spec_of_size_16(), rope=rope, n_ctx=16384)
    model = LlamaForCausalLM(llama_config(spec))
    check_rope(model, spec, tmp_path)
    wrong = dataclasses.replace(rope, freq_base=rope.freq_base * 1.1)
    with pytest.raises(DsqError, match="other rotary frequencies"):
        check_rope(model, dataclasses.replace(spec, rope=wrong), tmp_path)


def spec_of_size_16():  # type: ignore[no-untyped-def]
    return spec_from_config(
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 8,
        }
    )


def test_without_torch_the_extra_is_named(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *rest: object, **more: object) -> object:
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return original(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"pip install 'dsq\[torch\]'"):
        TorchEngine(hf)

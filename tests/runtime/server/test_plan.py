"""The context that a server chooses by itself, and what it says that the model takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest

from dsq.errors import InputError
from dsq.runtime import devices
from dsq.runtime.server.engines import EngineOptions
from dsq.runtime.server.llama_batch import LlamaBatch
from dsq.runtime.server.plan import (
    DEFAULT_CTX,
    LEAST_CTX,
    llama_settings,
    plan_llama,
    plan_torch,
)
from tests.models import llama_config, write_hf
from tests.packed_models import write_gptq
from tests.tiny_gguf import write_tiny_gguf

PLENTY = 1 << 40
ASKED = EngineOptions(n_threads=1)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("plan") / "long.gguf", n_ctx=16384)


def test_the_context_is_the_most_that_fits(long: Path) -> None:
    whole, n_bytes = plan_llama(long, ASKED, PLENTY)
    assert whole.n_ctx == DEFAULT_CTX
    assert plan_llama(long, ASKED, n_bytes) == (whole, n_bytes)
    half, fewer = plan_llama(long, ASKED, n_bytes - 1)
    assert half.n_ctx == DEFAULT_CTX // 2
    assert fewer < n_bytes
    least, too_many = plan_llama(long, ASKED, 1)
    assert least.n_ctx == LEAST_CTX
    assert too_many > 1, "who loads it refuses it"


def test_the_models_own_context_is_not_exceeded(tiny: Path) -> None:
    planned, _ = plan_llama(tiny, ASKED, PLENTY)
    with LlamaBatch(llama_settings(tiny, replace(planned, n_ctx=0))) as llama:
        assert planned.n_ctx == llama.n_ctx_train
    with pytest.raises(InputError, match=f"-c 4000: .* trained on {planned.n_ctx} tokens"):
        plan_llama(tiny, replace(ASKED, n_ctx=4000), PLENTY)


def test_what_is_asked_for_is_not_changed(long: Path) -> None:
    for asked in (replace(ASKED, n_ctx=8192), replace(ASKED, kv_size=8192)):
        planned, n_bytes = plan_llama(long, asked, 1)
        assert planned.n_ctx == (asked.n_ctx or DEFAULT_CTX)
        assert n_bytes > plan_llama(long, ASKED, PLENTY)[1], "a larger cache takes more"


@pytest.mark.torch
def test_a_directory_in_torch_takes_no_more_than_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cards", lambda: [])
    config = llama_config(torch_dtype="float16")
    write_hf(tmp_path / "hf", config)
    write_gptq(tmp_path / "gptq", config=config)
    dense, packed = (plan_torch(tmp_path / name, ASKED, PLENTY) for name in ("hf", "gptq"))
    assert dense[0].n_ctx == packed[0].n_ctx == DEFAULT_CTX
    assert packed[1] < dense[1], "packed matrices stay packed"
    half, fewer = plan_torch(tmp_path / "hf", ASKED, dense[1] - 1)
    assert half.n_ctx == DEFAULT_CTX // 2
    one, two = dense[1] - fewer, plan_torch(tmp_path / "hf", replace(ASKED, n_ctx=1024), PLENTY)[1]
    cache = 2 * 4 * config["num_hidden_layers"] * config["hidden_size"]  # bytes a token, K and V
    assert one > cache * DEFAULT_CTX // 2
    assert fewer - two > cache * DEFAULT_CTX // 4


def test_layers_go_to_the_card_by_themselves(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where llama.cpp can use one, and as many as its free memory holds."""
    free = 80 << 30
    monkeypatch.setattr(devices, "cards", lambda: [devices.GraphicsCard("a card", 80 << 30, free)])
    asked = replace(ASKED, auto_layers=True)
    assert plan_llama(long, asked, PLENTY)[0].n_gpu_layers == 0, "this build is for the CPU"
    with pytest.raises(InputError, match="-ngl 2: llama-cpp-python was built without a GPU"):
        plan_llama(long, replace(ASKED, n_gpu_layers=2), PLENTY)
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
    whole, n_bytes = plan_llama(long, asked, PLENTY)
    assert (whole.n_gpu_layers, n_bytes) == (2 + 1, 0), "both layers and the head; not estimated"
    assert plan_llama(long, ASKED, PLENTY)[0].n_gpu_layers == 0, "-ngl 0"
    free = 1 << 20
    assert plan_llama(long, asked, PLENTY)[0].n_gpu_layers == 0
    monkeypatch.setattr(devices, "cards", lambda: [])
    assert plan_llama(long, asked, PLENTY)[0].n_gpu_layers == 0

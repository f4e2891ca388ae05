"""The context that a server chooses by itself, and what it says that the model takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsq.errors import InputError
from dsq.runtime.server.llama_batch import LlamaBatch, LlamaSettings
from dsq.runtime.server.plan import DEFAULT_CTX, LEAST_CTX, plan_server
from tests.tiny_gguf import write_tiny_gguf

PLENTY = 1 << 40
ASKED = LlamaSettings("", n_threads=1)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("plan") / "long.gguf", n_ctx=16384)


def test_the_context_is_the_most_that_fits(long: Path) -> None:
    whole, n_bytes = plan_server(long, ASKED, PLENTY)
    assert (whole.path, whole.n_ctx) == (str(long), DEFAULT_CTX)
    assert plan_server(long, ASKED, n_bytes) == (whole, n_bytes)
    half, fewer = plan_server(long, ASKED, n_bytes - 1)
    assert half.n_ctx == DEFAULT_CTX // 2
    assert fewer < n_bytes
    least, too_many = plan_server(long, ASKED, 1)
    assert least.n_ctx == LEAST_CTX
    assert too_many > 1, "who loads it refuses it"


def test_the_models_own_context_is_not_exceeded(tiny: Path) -> None:
    planned, _ = plan_server(tiny, ASKED, PLENTY)
    with LlamaBatch(replace(planned, n_ctx=0)) as llama:
        assert planned.n_ctx == llama.n_ctx_train
    with pytest.raises(InputError, match=f"-c 4000: .* trained on {planned.n_ctx} tokens"):
        plan_server(tiny, replace(ASKED, n_ctx=4000), PLENTY)


def test_what_is_asked_for_is_not_changed(long: Path) -> None:
    for asked in (replace(ASKED, n_ctx=8192), replace(ASKED, kv_size=8192)):
        planned, n_bytes = plan_server(long, asked, 1)
        assert planned.n_ctx == (asked.n_ctx or DEFAULT_CTX)
        assert n_bytes > plan_server(long, ASKED, PLENTY)[1], "a larger cache takes more"

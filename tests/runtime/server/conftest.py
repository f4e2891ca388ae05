"""The tiny model's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsq.runtime.source import Source
from dsq.tokenizer_port.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_vocabulary(Source(tiny).vocabulary)

"""Small repositories made here, and tiny-coder's tokenizer, which has DeepSeek's FIM tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dsq.tokenizer_port.load import load_hf
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.models import TINY_CODER

NAMES = "alpha beta gamma delta count total index value buffer token layer weight path".split()


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def python_module(seed: int, n_functions: int = 12) -> str:
    """Plausible code that no other seed gives."""
    rng = random.Random(seed)
    lines = [f'"""Module number {seed}: what it does with {rng.choice(NAMES)}."""', ""]
    for i in range(n_functions):
        a, b, c = (rng.choice(NAMES) for _ in range(3))
        lines += [
            f"def {a}_{b}_{seed}_{i}({a}, {c}_{i}={rng.randint(1, 999)}):",
            f'    """Combine {a} with {c} of {rng.choice(NAMES)}."""',
            f"    {b}_sum = {a} * {rng.randint(2, 99)} + {c}_{i}",
            f"    return {b}_sum if {a} > {rng.randint(0, 50)} else None",
            "",
        ]
    return "\n".join(lines)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    rows = json.loads((TINY_CODER / "config.json").read_text())["vocab_size"]
    return Tokenizer.from_vocabulary(load_hf(TINY_CODER, rows))


@pytest.fixture
def big_repo(tmp_path: Path) -> Path:
    """40 modules in four packages: more than the tests ask for."""
    files = {
        f"part{i % 4}/module_{i}.py": python_module(i) for i in range(40)
    } | {f"part{i}/__init__.py": "" for i in range(4)}  # fmt: skip
    return write_files(tmp_path / "big", files)

"""Published tokenizers: llama.cpp's own test vectors, and a real GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest

from dsq.tokenizer_port.load import vocabulary_from_gguf
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.verify import parity


def read(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: f.contents() for key, f in fields.items() if key.startswith("tokenizer.")}


@pytest.mark.parametrize(
    "name",
    [
        "deepseek-coder",
        *(
            pytest.param(name, marks=pytest.mark.slow)  # reading these files takes seconds
            for name in ("deepseek-llm", "gpt-2", "llama-bpe", "refact", "starcoder", "falcon")
        ),
    ],
)
def test_llama_cpps_vectors(llama_cpp_source: Path, name: str) -> None:
    path = llama_cpp_source / "models" / f"ggml-vocab-{name}.gguf"
    tok = Tokenizer.from_vocabulary(vocabulary_from_gguf(read(path)))
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().split("\n")
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        assert tok.encode(text, add_bos=False) == [int(word) for word in line.split()]


def test_smollm2_rebuilt_from_its_gguf(smollm2_gguf: Path) -> None:
    vocab = vocabulary_from_gguf(read(smollm2_gguf))
    model = llama_cpp.Llama(str(smollm2_gguf), vocab_only=True, verbose=False)
    for special in (True, False):
        found = parity(
            vocab,
            lambda text, s=special: model.tokenize(text.encode(), add_bos=False, special=s),
            parse_special=special,
        )
        assert found == []
    assert Tokenizer.from_vocabulary(vocab).stop_ids("chat") == {0, 2}

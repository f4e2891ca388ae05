"""Published tokenizers: llama.cpp's own test vectors, and a real GGUF."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from dsq.convert.gguf.reader import read_gguf
from dsq.tokenizer_port.load import vocabulary_from_gguf
from dsq.tokenizer_port.to_hf import tokenizer_json
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.verify import parity

# sha256 of DeepSeek Coder's published tokenizer.json as canonical JSON.
DEEPSEEK_CODER = "a274847de66e4c1bbb038c6b2116d0e269551b5f026b1e1abf28abff0b1fefe8"

VECTORS = (
    *("deepseek-coder", "deepseek-llm", "gpt-2", "llama-bpe", "refact", "starcoder", "falcon"),
    *("command-r", "mpt", "qwen2", "qwen35"),
)


def read(path: Path) -> dict[str, Any]:
    return read_gguf(path).metadata


def test_deepseek_coders_tokenizer_json_from_a_gguf(llama_cpp_source: Path) -> None:
    """Of a file whose token types are careless, and which has no tokenizer.json inside."""
    metadata = read(llama_cpp_source / "models" / "ggml-vocab-deepseek-coder.gguf")
    assert "tokenizer.huggingface.json" not in metadata
    made = tokenizer_json(vocabulary_from_gguf(metadata))
    text = json.dumps(made, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == DEEPSEEK_CODER


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "command-r" else n for n in VECTORS],
)
def test_llama_cpps_vectors(llama_cpp_source: Path, name: str) -> None:
    path = llama_cpp_source / "models" / f"ggml-vocab-{name}.gguf"
    tok = Tokenizer.from_vocabulary(vocabulary_from_gguf(read(path)))
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().split("\n")
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        assert tok.encode(text, add_bos=False) == [int(word) for word in line.split()]


def test_no_byte_level_vectors_are_left_out(llama_cpp_source: Path) -> None:
    paths = (llama_cpp_source / "models").glob("ggml-vocab-*.gguf.out")
    names = {path.name.removesuffix(".gguf.out").removeprefix("ggml-vocab-") for path in paths}
    assert names - {*VECTORS} == {"bert-bge", "gemma-4", "llama-spm", "phi-3"}


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

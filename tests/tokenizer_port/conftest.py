"""Small tokenizers made here, and llama.cpp reading them from a GGUF."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import tokenizers

from dsq.tokenizer_port.bytelevel import BYTE_TO_CHAR
from dsq.tokenizer_port.corpus import corpus
from dsq.tokenizer_port.load import load_hf
from dsq.tokenizer_port.pretokenize import chain_for
from dsq.tokenizer_port.vocabulary import Vocabulary

LETTERS = "õ÷ÁýÀÿøúþüùöû"
BOS, EOS, HOLE = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>"
BEGIN, END, EOT = "<｜fim▁begin｜>", "<｜fim▁end｜>", "<|EOT|>"
ADDED = (*LETTERS, BOS, EOS, HOLE, BEGIN, END, "<pad>", "<|User|>", "<|Assistant|>", EOT)

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n"
    "{{ '### Instruction:\\n' + message['content'] + '\\n' }}\n"
    "{% else %}\n"
    "{{ '### Response:\\n' + message['content'] | trim + '\\n<|EOT|>\\n' }}\n"
    "{% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '### Response:' }}{% endif %}"
)

Maker = Callable[..., Path]


def added_entry(row: int, text: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    return {"id": row, "content": text, **flags, "special": special}


def trained(pre: str, n_tokens: int) -> dict[str, Any]:
    """A tokenizer.json with the chain of `pre`, trained on the corpus of `verify`."""
    chain = chain_for(pre)
    fragments = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    empty: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        **{name: chain[name] for name in fragments},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(empty))
    # DeepSeek's vocabulary has no symbols for the 13 bytes that UTF-8 never uses.
    alphabet = [char for char in BYTE_TO_CHAR.values() if char not in LETTERS]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_tokens, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    blank = Vocabulary(
        *("gpt2", pre, (), (), ()),
        *(None,) * 8,
        add_bos=False,
        add_eos=False,
        add_space_prefix=None,
    )
    tokenizer.train_from_iterator(corpus(blank) * 2, trainer)
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    found["model"]["ignore_merges"] = chain["ignore_merges"]
    return found


@pytest.fixture(scope="session")
def deepseek_json() -> dict[str, Any]:
    """DeepSeek Coder's tokenizer in miniature: its chain, its 22 added tokens."""
    made = trained("deepseek-coder", 700)
    first = len(made["model"]["vocab"])
    made["added_tokens"] = [
        added_entry(first + i, text, special=text in (BOS, EOS)) for i, text in enumerate(ADDED)
    ]
    return made


@pytest.fixture
def make_dir(tmp_path: Path, deepseek_json: dict[str, Any]) -> Maker:
    """Write a model directory; keyword arguments replace files (None leaves one out)."""

    def make(
        tokenizer: dict[str, Any] | None = None, settings: dict[str, Any] | None = None
    ) -> Path:
        own = deepseek_json if tokenizer is None else tokenizer
        defaults = {
            "add_bos_token": True,
            "bos_token": {"__type": "AddedToken", "content": BOS},
            "eos_token": EOT,
            "pad_token": EOS,
            "unk_token": None,
            "tokenizer_class": "LlamaTokenizerFast",
            "chat_template": TEMPLATE,
        }
        merged = {**defaults, **(settings or {})}
        (tmp_path / "tokenizer.json").write_text(json.dumps(own), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(merged), encoding="utf-8")
        return tmp_path

    return make


def n_tokens(tokenizer: dict[str, Any]) -> int:
    return len({*tokenizer["model"]["vocab"], *(e["content"] for e in tokenizer["added_tokens"])})


@pytest.fixture
def vocab(make_dir: Maker, deepseek_json: dict[str, Any]) -> Vocabulary:
    return load_hf(make_dir(), n_tokens(deepseek_json) + 10)


def metadata(vocab: Vocabulary) -> dict[str, Any]:
    """A vocabulary as a GGUF's metadata, without the whole tokenizer.json."""
    ids = {
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
        "eot_token_id": vocab.eot,
        "padding_token_id": vocab.pad,
    }
    found: dict[str, Any] = {
        "model": vocab.model,
        "pre": vocab.pre,
        "tokens": list(vocab.tokens),
        "token_type": list(vocab.types),
        "merges": list(vocab.merges),
        "add_bos_token": vocab.add_bos,
        "add_eos_token": vocab.add_eos,
        **{name: row for name, row in ids.items() if row is not None},
    }
    entries = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
    if vocab.chat_template is not None:
        entries["tokenizer.chat_template"] = vocab.chat_template
    return entries


def llama_cpp_encoder(
    vocab: Vocabulary, path: Path, *, special: bool = True
) -> Callable[[str], list[int]]:
    """llama.cpp's own tokenization with this vocabulary, read from a GGUF at `path`."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata(vocab).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return lambda text: model.tokenize(text.encode(), add_bos=False, special=special)

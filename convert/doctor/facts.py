"""What a diagnosis looks at: a GGUF's metadata, read without trusting any key's type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

TOKENIZER = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
HF_JSON = "tokenizer.huggingface.json"


@dataclass(frozen=True, eq=False)
class Facts:
    """One model's metadata, and the names of its tensors."""

    metadata: Mapping[str, Any]
    tensor_names: frozenset[str]

    @cached_property
    def arch(self) -> str:
        return self.text("general.architecture") or "llama"

    @cached_property
    def is_bpe(self) -> bool:
        """Whether the tokenizer is byte-level BPE, whose rules dsq knows."""
        return self.text(TOKENIZER + "model") == "gpt2" and bool(self.tokens)

    @cached_property
    def tokens(self) -> list[str]:
        """Empty where there are none, or where they are no list of texts."""
        value = self.metadata.get(TOKENIZER + "tokens")
        return value if isinstance(value, list) and set(map(type, value)) <= {str} else []

    @cached_property
    def index(self) -> dict[str, int]:
        """Token text → id."""
        return dict(zip(self.tokens, range(len(self.tokens)), strict=True))

    @cached_property
    def types(self) -> list[int] | None:
        """`tokenizer.ggml.token_type`, or None where it is no array of whole numbers."""
        value = self.metadata.get(TOKENIZER + "token_type")
        items: Any = value.tolist() if isinstance(value, np.ndarray) else value
        return items if isinstance(items, list) and set(map(type, items)) <= {int} else None

    @cached_property
    def merged(self) -> frozenset[str]:
        """The texts that BPE can build from smaller ones."""
        merges = self.metadata.get(TOKENIZER + "merges")
        texts = merges if isinstance(merges, list) else []
        return frozenset(text.replace(" ", "") for text in texts if isinstance(text, str))

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def number(self, key: str) -> float | None:
        value = self.metadata.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return float(value)

    def id(self, name: str) -> int | None:
        """A token id that is one of the rows: `bos`, `eot`, `fim_pre`, …; else None."""
        value = self.metadata.get(f"{TOKENIZER}{name}_token_id")
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        return value if 0 <= value < len(self.tokens) else None

    def has_id(self, name: str) -> bool:
        """Whether the key is there, whatever it says."""
        return f"{TOKENIZER}{name}_token_id" in self.metadata

"""A tokenizer for vLLM that has a token for every row of the model's vocabulary.

Models pad their vocabulary (DeepSeek Coder: 32,256 rows for 32,022 tokens). vLLM 0.32 looks up the
text of each token that its logprobs name, and when a padding row is among them the whole server
ends: `TypeError: 'NoneType' object is not iterable` in `detokenizer_utils`. dsq uses none of these
texts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json")


def write_padded_tokenizer(model: Path, n_vocab: int, folder: Path) -> bool:
    """The tokenizer of `model` in `folder`, with `n_vocab` tokens; False: it needs no padding, or
    has no tokenizer.json to add to."""
    source = model / "tokenizer.json"
    if not source.is_file():
        return False
    content: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    vocabulary = content.get("model", {}).get("vocab", {})
    added = content.setdefault("added_tokens", [])
    if not isinstance(vocabulary, dict):  # Unigram's list of pairs
        vocabulary = {pair[0]: i for i, pair in enumerate(vocabulary)}
    first = max([*vocabulary.values(), *(token["id"] for token in added)], default=-1) + 1
    if first >= n_vocab:
        return False
    added += [_padding(i) for i in range(first, n_vocab)]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for name in _FILES:
        if (model / name).is_file():
            shutil.copy(model / name, folder)
    return True


def _padding(id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": f"[PAD{id}]", **flags, "special": True}

"""Which token does what, found by its text.

The lists mirror llama.cpp's auto-detection (`llama-vocab.cpp`, "auto-detect special tokens by
text") and its converter's `does_token_look_special`, with one addition: DeepSeek's `<|EOT|>`,
which llama.cpp does not know and therefore replaces by the end-of-sentence token.
"""

from __future__ import annotations

from collections.abc import Mapping

# One row a model family: prefix, suffix, middle. DeepSeek's "hole" stands where other
# families put the suffix marker. The three ids are always taken from one row.
FIM_FAMILIES: tuple[tuple[str, str, str], ...] = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite, Refact
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    ("<PRE>", "<SUF>", "<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM-4.5
    ("<|prefix|>", "<|suffix|>", "<|middle|>"),  # Falcon-H1-Tiny-Coder
)

# Ends a turn of a conversation. The first one present wins.
END_OF_TURN: tuple[str, ...] = (
    "<|EOT|>",  # DeepSeek Coder instruct
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<end_of_utterance>",
)

# Ends a document: where a base model stops.
END_OF_TEXT: tuple[str, ...] = (
    "<｜end▁of▁sentence｜>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
)

# Begins the next file or repository, so a completion is over; llama.cpp stops on them as well.
NEXT_FILE: tuple[str, ...] = (
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<reponame>",
    "<|file_sep|>",
)

_CONTROL_TEXTS = frozenset(
    ("<pad>", "<mask>", "<2mass>", "[@BOS@]", *(t for row in FIM_FAMILIES for t in row))
)


def looks_special(text: str) -> bool:
    """Whether an added token is a control token although its file does not call it special.

    DeepSeek's FIM markers, `<pad>`, `<|User|>` and `<|EOT|>` are such tokens.
    """
    return (
        text in _CONTROL_TEXTS
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def find_fim(index: Mapping[str, int]) -> tuple[int | None, int | None, int | None]:
    """(prefix, suffix, middle) of the first family that is present whole, else three None."""
    for prefix, suffix, middle in FIM_FAMILIES:
        if prefix in index and suffix in index and middle in index:
            return index[prefix], index[suffix], index[middle]
    return None, None, None


def find_end_of_turn(index: Mapping[str, int]) -> int | None:
    return next((index[text] for text in END_OF_TURN if text in index), None)


def find_all(index: Mapping[str, int], texts: tuple[str, ...]) -> frozenset[int]:
    return frozenset(index[text] for text in texts if text in index)

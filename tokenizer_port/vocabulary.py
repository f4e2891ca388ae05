"""The vocabulary: all that a GGUF's `tokenizer.*` keys need and a tokenizer.json is built from."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

from dsq.errors import InputError
from dsq.tokenizer_port.json_file import brief


class TokenType(IntEnum):
    """GGUF's `tokenizer.ggml.token_type` values."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary, one entry a row of the embedding.

    `tokens`: NORMAL ones in the byte-level alphabet (`Ġ` for a space), as in tokenizer.json;
    CONTROL and USER_DEFINED ones are the literal text; rows without a token are `[PAD{i}]`, UNUSED.
    """

    model: str  # GGUF's name for the kind: "gpt2" is byte-level BPE
    pre: str  # llama.cpp's pre-tokenizer name
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]  # "a b"
    bos: int | None
    eos: int | None
    eot: int | None
    pad: int | None
    unk: int | None
    fim_prefix: int | None
    fim_suffix: int | None  # DeepSeek: the hole
    fim_middle: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict)  # named extra ones
    tokenizer_json: str | None = None  # the whole file; GGUF's tokenizer.huggingface.json

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if len(self.types) != n:
            raise InputError(
                f"vocabulary: {n} tokens but {len(self.types)} token types; one type a token is "
                "needed: convert the model again"
            )
        for name in ("bos", "eos", "eot", "pad", "unk", "fim_prefix", "fim_suffix", "fim_middle"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < n:
                raise InputError(
                    f"vocabulary: {name} is token {value}, but ids go from 0 to {n - 1}; "
                    "correct the id in the tokenizer's configuration"
                )
        if self.add_bos and self.bos is None:
            raise InputError(
                "vocabulary: add_bos is true, but there is no BOS token; "
                "give bos_token in tokenizer_config.json"
            )

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Token text → id."""
        return {token: i for i, token in enumerate(self.tokens)}

    def ids_of_type(self, *types: TokenType) -> list[int]:
        return [i for i, kind in enumerate(self.types) if kind in types]


def pad_token(row: int) -> str:
    """The text of an embedding row without a token, as llama.cpp's converter writes it."""
    return f"[PAD{row}]"


def check_unique(tokens: Iterable[str], where: str) -> None:
    """llama.cpp aborts on two tokens of one text, so refuse them here, with their ids."""
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if token in seen:
            raise InputError(
                f"{where}: tokens {seen[token]} and {i} are both {token!r}; a text may have one id "
                "only: rename or remove one of the two"
            )
        seen[token] = i


def check_merges(merges: Sequence[str], index: Container[str], where: str) -> None:
    """Each merge "a b" joins two tokens to a third one.

    llama.cpp passes over the others without a word, `tokenizers` does not say which it is.
    """
    for i, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left in index and right in index and left + right in index and left and right:
            continue
        if not left or not right or " " in right:
            raise InputError(
                f"{where}: merge {i} is {brief(merge)}, not two tokens with one space; convert or "
                "download the model again"
            )
        absent = next(text for text in (left, right, left + right) if text not in index)
        raise InputError(
            f"{where}: merge {i} is {brief(merge)}, but {brief(absent)} is no token; the merges "
            "belong to another vocabulary: convert or download the model again"
        )

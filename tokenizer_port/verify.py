"""Compare another program's tokenizer with ours, text by text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dsq.tokenizer_port.corpus import corpus
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import Vocabulary


@dataclass(frozen=True)
class Mismatch:
    text: str
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    first: int  # index of the first token that differs

    def __str__(self) -> str:
        ours, theirs = (ids[self.first : self.first + 5] for ids in (self.ours, self.theirs))
        return f"{self.text!r}: from token {self.first} on {list(ours)}, not {list(theirs)}"


def parity(
    vocab: Vocabulary,
    encode: Callable[[str], list[int]],
    texts: Iterable[str] | None = None,
    *,
    parse_special: bool = True,
) -> list[Mismatch]:
    """Where `encode` differs from our tokenizer, over `texts` or the built-in corpus.

    `encode` must add no BOS, and make control tokens of their texts if `parse_special`:
    llama.cpp's is `tokenize(text.encode(), add_bos=False, special=parse_special)`.
    """
    tokenizer = Tokenizer.from_vocabulary(vocab)
    found = []
    for text in corpus(vocab) if texts is None else texts:
        ours = tokenizer.encode(text, add_bos=False, parse_special=parse_special)
        theirs = list(encode(text))
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            shorter = min(len(ours), len(theirs))
            first = next((i for i, (a, b) in pairs if a != b), shorter)
            found.append(Mismatch(text, tuple(ours), tuple(theirs), first))
    return found

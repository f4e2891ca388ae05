"""Documents cut to samples that fit a window, some of them to be filled in the middle."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from dsq.runtime.corpus import fim
from dsq.runtime.corpus.sources import Document, Entry, digest
from dsq.tokenizer_port import special
from dsq.tokenizer_port.tokenizer import Tokenizer

_SLACK = 16  # tokens more that a text may become when it is tokenized in three parts
_LEAST = 8  # tokens of text in a sample, however small the window


@dataclass(frozen=True)
class Sample:
    ids: list[int]  # with the end-of-text token
    is_fim: bool
    entries: tuple[Entry, ...]  # the files that it is from


class Cutter:
    """Makes samples of at most `n_ctx` tokens, BOS and end of text counted.

    DeepSeek Coder applies fill-in-the-middle to documents before it packs them; a document longer
    than a calibration window would nearly never show its three markers in one. So documents are cut
    first, between files where possible, else between lines, and then each sample is plain or FIM.
    """

    def __init__(self, tokenizer: Tokenizer, n_ctx: int, seed: int, fim_rate: float) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._most = n_ctx - 1
        self._limit = max(_LEAST, n_ctx - 2 - fim.MARKERS - _SLACK)
        self.fim_rate = fim_rate if fim.has_fim(tokenizer) else 0.0
        self.end = _end_of_text(tokenizer)

    def code(self, document: Document) -> Iterator[Sample]:
        for text, entries in self._pieces(document):
            rng = random.Random(f"{self._seed}/{digest(text)}")
            if rng.random() < self.fim_rate:
                ids = self._ended(fim.sample(self._tokenizer, text, rng))
                if len(ids) <= self._most:
                    yield Sample(ids, True, entries)
                    continue
            yield Sample(self._ended(self._encode(text)), False, entries)

    def prose(self, document: Document) -> Iterator[Sample]:
        for text, entries in self._pieces(document):
            yield Sample(self._ended(self._encode(text)), False, entries)

    def shorten(self, sample: Sample, n_tokens: int) -> Sample:
        """The first `n_tokens` of a sample; of a FIM sample, which is none without all of it, the
        text in its own order."""
        ids = sample.ids
        if sample.is_fim:
            v = self._tokenizer.vocab
            assert v.fim_suffix is not None  # there would be no FIM samples
            assert v.fim_middle is not None
            hole, end = ids.index(v.fim_suffix), ids.index(v.fim_middle)
            last = len(ids) - (self.end is not None)
            ids = ids[1:hole] + ids[end + 1 : last] + ids[hole + 1 : end]
        return Sample(ids[:n_tokens], False, sample.entries)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_bos=False)

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self.end is None else [*ids, self.end]

    def _pieces(self, document: Document) -> Iterator[tuple[str, tuple[Entry, ...]]]:
        """Whole files as long as they fit; a file that does not fit alone in several pieces."""
        held: list[Entry] = []
        size = 0
        for entry in document.entries:
            n = self._size(entry.text)
            if held and size + n > self._limit:
                yield "".join(e.text for e in held), tuple(held)
                held, size = [], 0
            if n > self._limit:
                for text in self._split(entry.text, n):
                    yield text, (entry,)
            else:
                held.append(entry)
                size += n
        if held:
            yield "".join(e.text for e in held), tuple(held)

    def _size(self, text: str) -> int:
        """Its tokens; of a text much longer than the limit an estimate from its beginning."""
        most = 16 * self._limit  # characters; more is over the limit at any density
        if len(text) <= most:
            return len(self._encode(text))
        head = len(self._encode(text[: most // 4]))
        return max(self._limit + 1, 4 * head * len(text) // most)

    def _split(self, text: str, n: int) -> Iterator[str]:
        """Pieces of at most the limit's tokens, at line ends where there are any."""
        start = 0
        length = max(1, self._limit * len(text) // n)  # characters, by the text's own density
        while start < len(text):
            take = length
            while True:
                end = start + take
                if end < len(text):
                    line = text.rfind("\n", start, end)
                    end = line + 1 if line > start else end
                piece = text[start:end]
                if take == 1 or len(self._encode(piece)) <= self._limit:
                    break
                take = max(1, take * 3 // 4)
            yield piece
            start += len(piece)


def _end_of_text(tokenizer: Tokenizer) -> int | None:
    """What ends a document: where a base model stops (an instruct model's EOS ends a turn)."""
    found = special.find_all(tokenizer.vocab.index, special.END_OF_TEXT)
    return min(found) if found else tokenizer.vocab.eos

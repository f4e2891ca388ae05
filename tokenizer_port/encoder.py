"""Encoding piece by piece: what was encoded before is looked up, which is most of a source text.

Text is cut between an ASCII letter or digit and an ASCII character that is neither (`foo|(bar`).
The pieces' tokens are the text's tokens where

- every family in `_CUTTABLE` cuts there too: none of its regexes matches both characters, none
  looks back, and those that look ahead (`\\s+(?!\\S)`, `\\s+$`) do so from white space, whose end
  lies in the same piece;
- normalization (NFC) leaves two ASCII neighbours as they are;
- no added token in the text reaches over a cut: a text with such a token is encoded whole.

For other families, and for text without a cut, the library does the work alone.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from dsq.errors import InputError
from dsq.tokenizer_port.bytelevel import BYTE_TO_CHAR
from dsq.tokenizer_port.chains import CHAINS
from dsq.tokenizer_port.definition import added_entries
from dsq.tokenizer_port.pretokenize import chain_of

if TYPE_CHECKING:
    import tokenizers

# Not o200k, whose words hold a contraction (`it's`), nor BLOOM, whose words hold symbols.
_CUTTABLE = (
    *("deepseek-coder", "deepseek-llm", "deepseek-v3", "gpt-2", "mpt", "smollm", "command-r"),
    *("llama-bpe", "dbrx", "qwen2", "deepseek-r1-qwen", "qwen35", "seed-coder", "bailingmoe"),
)
# These isolate line ends before all else, so their text can be cut at a line end too.
_LINEWISE = ("deepseek-coder", "deepseek-llm")

_CUT = r"(?<=[A-Za-z0-9])(?=[\x00-/:-@\[-`{-\x7f])"
# From one cut to the next. Nothing in it is tried twice, whatever the text.
_PIECE = re.compile(
    r"[^A-Za-z0-9]*[A-Za-z0-9]+(?:[^\x00-\x7f][^A-Za-z0-9]*(?:[A-Za-z0-9]+|\Z))*|[^A-Za-z0-9]+"
)
# What DeepSeek Coder's splits make of ASCII, one after another: line ends, words and punctuation
# with a space before them, digits, and what is left between these.
_PUNCTUATION = r"!-#%-*,-/:;?@\[-\]_{}"
_OTHER = rf"[^A-Za-z0-9{_PUNCTUATION}\r\n]+"
_DEEPSEEK_WORD = re.compile(
    rf"[A-Za-z]+|[{_PUNCTUATION}]+|[0-9]|[\r\n]|[ \t\v\f](?:[A-Za-z]+|[{_PUNCTUATION}]+)|"
    rf"{_OTHER}(?=[ \t\v\f][A-Za-z{_PUNCTUATION}])|{_OTHER}"
)

_CHUNK = 1 << 16  # characters cut into pieces at once: bounds the list of pieces
_LONGEST = 1 << 20  # without a cut; beyond it the regex's own stack would count
_MEMORABLE = 32  # characters of a piece worth keeping
_MOST_SEEN = 1 << 18  # pieces kept: about 60 MB
# Looking up outruns the library's threads on fewer cores; on more the two share a batch.
_FEW_CORES = 8
_SHARE = 1 << 18  # characters a core in one call of the library


class Encoder:
    """One tokenizer.json, built; encodes as `tokenizers` does, without what a post-processor adds.

    Raises InputError for what the tokenizers library refuses.
    """

    def __init__(self, definition: Mapping[str, Any]) -> None:
        self._library = _build(definition)
        self._model = self._library.model
        family = _family(definition)
        added = [e for e in added_entries(definition, "tokenizer.json") if e["content"]]
        self._cut = None if family is None else _cut(family)
        self._reaching: re.Pattern[str] | None = None
        reaching = [entry for entry in added if self._cut and _reaches(entry, self._cut)]
        if family and reaching:
            # Normalizing can make such a token of other characters (U+037E is a semicolon then).
            if CHAINS[family].normalizers:
                self._cut = None
            self._reaching = re.compile("|".join(re.escape(e["content"]) for e in reaching))
        pieces_hold_none = all(e in reaching or not e["content"].isascii() for e in added)
        words = family == "deepseek-coder" and pieces_hold_none
        self._words = _Seen(self._word) if words else None
        self._pieces = _Seen(self._piece)

    def encode(self, text: str) -> list[int]:
        """Token ids of a str without lone surrogates."""
        try:
            return self._encode(text)
        except BaseException as error:
            if not _is_theirs(error):
                raise
            raise _refusal(error, "encode with it") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, with all cores where that is faster."""
        found: list[list[int]] = [[]] * len(texts)
        waiting = deque(range(len(texts)))
        try:
            if self._cut is None:
                self._share(texts, waiting, found)
            elif _cores() <= _FEW_CORES:
                return [self._encode(text) for text in texts]
            else:
                self._both(texts, waiting, found)
        except BaseException as error:
            if not _is_theirs(error):
                raise
            raise _refusal(error, "encode with it") from error
        return found

    def _both(self, texts: Sequence[str], waiting: deque[int], found: list[list[int]]) -> None:
        """From the front by pieces, from the end by the library's threads."""
        with ThreadPoolExecutor(1) as pool:
            others = pool.submit(self._share, texts, waiting, found)
            try:
                while waiting:
                    with suppress(IndexError):  # the other took the last one meanwhile
                        i = waiting.popleft()
                        found[i] = self._encode(texts[i])
            except BaseException:
                waiting.clear()
                raise
            others.result()

    def _share(self, texts: Sequence[str], waiting: deque[int], found: list[list[int]]) -> None:
        most = _SHARE * _cores()
        while waiting:
            taken: list[int] = []
            size = 0
            with suppress(IndexError):
                while size < most:
                    taken.append(waiting.pop())
                    size += len(texts[taken[-1]])
            batch = [texts[i] for i in taken]
            encodings = self._library.encode_batch_fast(batch, add_special_tokens=False)
            for i, encoding in zip(taken, encodings, strict=True):
                found[i] = encoding.ids

    def _encode(self, text: str) -> list[int]:
        if self._cut is None or (self._reaching and self._reaching.search(text)):
            return self._whole(text)
        if len(text) <= _CHUNK:
            return self._by_pieces(text)
        ids: list[int] = []
        at = 0
        while at < len(text):
            cut = self._cut.search(text, at + _CHUNK)
            end = cut.start() if cut else len(text)
            ids += self._by_pieces(text[at:end])
            at = end
        return ids

    def _by_pieces(self, text: str) -> list[int]:
        if len(text) > _LONGEST:
            return self._whole(text)
        return list(chain.from_iterable(map(self._pieces.__getitem__, _PIECE.findall(text))))

    def _piece(self, piece: str) -> Iterable[int]:
        if self._words is None or not piece.isascii():
            return self._whole(piece)
        words = _DEEPSEEK_WORD.findall(piece)
        return chain.from_iterable(map(self._words.__getitem__, words))

    def _word(self, word: str) -> Iterable[int]:
        """Of a piece that no step of the chain divides: byte level and BPE are what is left."""
        return (token.id for token in self._model.tokenize(word.translate(BYTE_TO_CHAR)))

    def _whole(self, text: str) -> list[int]:
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids


class _Seen(dict[str, tuple[int, ...]]):
    """Text → tokens, by `encode` the first time; so many of them, and no long ones."""

    def __init__(self, encode: Callable[[str], Iterable[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, text: str) -> tuple[int, ...]:
        ids = tuple(self._encode(text))
        if len(text) <= _MEMORABLE:
            if len(self) >= _MOST_SEEN:
                self.clear()  # what is frequent is soon back
            self[text] = ids
        return ids


def _family(definition: Mapping[str, Any]) -> str | None:
    """The one of `_CUTTABLE` whose chain this is."""
    chain_ = chain_of(definition, "tokenizer.json")
    return next((name for name in _CUTTABLE if CHAINS[name] == chain_), None)


def _cut(family: str) -> re.Pattern[str]:
    return re.compile(_CUT + r"|(?=[\r\n])" if family in _LINEWISE else _CUT)


def _reaches(entry: Mapping[str, Any], cut: re.Pattern[str]) -> bool:
    """Whether an added token may reach over a cut, or looks at what stands beside it."""
    content = entry["content"]
    texts = (content, unicodedata.normalize("NFC", content))
    flags = ("lstrip", "rstrip", "single_word")
    return any(map(cut.search, texts)) or any(entry.get(flag) for flag in flags)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _build(definition: Mapping[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    model = {**definition["model"], "dropout": None}  # dropout is for training
    text = json.dumps({**definition, "model": model}, ensure_ascii=False)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        if not _is_theirs(error):
            raise
        raise _refusal(error, "build it") from error


def _is_theirs(error: BaseException) -> bool:
    """`tokenizers` raises bare Exception, or panics, which is no Exception at all."""
    if isinstance(error, Exception):
        return not isinstance(error, MemoryError)
    return type(error).__name__ == "PanicException"


def _refusal(error: BaseException, what: str) -> InputError:
    return InputError(
        f"tokenizer.json: the tokenizers library cannot {what}: {' '.join(str(error).split())}; "
        "the vocabulary and the merges do not fit together: convert again"
    )

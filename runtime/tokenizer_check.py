"""Hugging Face's tokenizer against llama.cpp's, text by text, down to the code points to blame."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dsq.errors import InputError
from dsq.runtime.read_vocabulary import named, read_vocabulary
from dsq.tokenizer_port.corpus import corpus
from dsq.tokenizer_port.fuzz import random_texts
from dsq.tokenizer_port.json_file import brief
from dsq.tokenizer_port.shrink import CodePoint, blame, shrink
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary, pad_token

if TYPE_CHECKING:
    import tokenizers

Encode = Callable[[str], list[int]]
Tokens = tuple[tuple[int, str], ...]
"""Ids with their pieces."""
T = TypeVar("T")

_STACK = 256 << 20  # bytes; room for a match of 800,000 characters in llama.cpp
_LONGEST = 500_000  # characters without a line end, or of nothing but white space
_PIECE = 4096  # characters of a file compared at once
_WHOLE = 4 << 20  # a longer file is compared in pieces only
_EXPLAINED = 20  # mismatches that are shrunk to find what is to blame


@dataclass(frozen=True)
class Text:
    where: str  # "corpus 3", "fuzz 17", "FILE, characters 0 to 4096"
    text: str


@dataclass(frozen=True)
class Finding:
    """A mismatch in its smallest form."""

    where: str
    length: int  # characters of the text it was found in
    text: str
    hf: Tokens
    other: Tokens
    blame: tuple[CodePoint, ...]


@dataclass(frozen=True)
class Report:
    model: Path
    against: Path | None  # None: the GGUF that dsq writes of the model, or the model itself
    rebuilt: str | None  # the pre-tokenizer's name, where the model has no tokenizer.json
    texts: int
    tokens: int  # as HF counts them
    seconds: float  # for HF, dsq and llama.cpp together, without what finding the blame took
    mismatches: int  # texts that HF and llama.cpp do not encode alike
    own_mismatches: int  # texts that HF and dsq do not encode alike
    first: Finding | None
    first_own: Finding | None
    blamed: tuple[tuple[CodePoint, int], ...]  # with the number of texts, of those explained
    explained: int
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.mismatches == self.own_mismatches == 0


def check(
    model: Path,
    *,
    against: Path | None = None,
    files: Sequence[Path] = (),
    fuzz: int = 0,
    seed: int = 0,
    pre: str | None = None,
) -> Report:
    """Compare over the built-in corpus, `files` and `fuzz` random texts.

    `model`: a directory with a tokenizer.json, or a GGUF; `pre`: its pre-tokenizer by the user's
    word, where it names none (llama.cpp still reads a GGUF as it is). Texts of control tokens
    become the tokens in both. Raises InputError for what cannot be read, and where `against` has
    another vocabulary.
    """
    vocab = read_vocabulary(model, pre=pre)
    if against is not None:
        _check_same(model, vocab, against)
    texts = [Text(f"corpus {i}", text) for i, text in enumerate(corpus(vocab))]
    notes: list[str] = []
    if pre is not None and against is None and model.is_file():
        notes.append(f"--pre {pre} is what HF and dsq go by; llama.cpp reads {model} as it is")
    for path in files:
        found, note = _texts_of(path)
        texts += found
        notes += note
    random = (Text(f"fuzz {i}", t) for i, t in enumerate(random_texts(fuzz, seed, vocab)))
    return on_deep_stack(lambda: _check(model, against, vocab, chain(texts, random), notes))


def _check(
    model: Path,
    against: Path | None,
    vocab: Vocabulary,
    texts: Iterable[Text],
    notes: Sequence[str],
) -> Report:
    from dsq.runtime.llama_vocab import LlamaVocab, llama_vocab

    tokenizer = Tokenizer.from_vocabulary(vocab)
    library = _library(model, vocab)

    def hf(text: str) -> list[int]:
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    control = tokenizer.control_texts.pattern

    def own(text: str) -> list[int]:
        """dsq's tokens. A text without control tokens is a user's too: that must make no odds."""
        ids = tokenizer.encode(text, add_bos=False, parse_special=True)
        if control.search(text):
            return ids
        plain = tokenizer.encode(text, add_bos=False)
        return plain if plain != ids and ids == hf(text) else ids

    with ExitStack() as stack:
        if against is not None or model.is_file():
            theirs = stack.enter_context(LlamaVocab(against or model))
        else:
            theirs = stack.enter_context(llama_vocab(vocab))
        start = time.perf_counter()
        n_texts = n_tokens = 0
        wrong, own_wrong = [], []
        for text in texts:
            ids = hf(text.text)
            n_texts += 1
            n_tokens += len(ids)
            if ids != theirs.encode(text.text):
                wrong.append(text)
            if ids != own(text.text):
                own_wrong.append(text)
        seconds = time.perf_counter() - start

        def explain(text: Text, other: Encode) -> Finding:
            smallest = shrink(text.text, lambda part: hf(part) != other(part))

            def tokens(encode: Encode) -> Tokens:
                return tuple((i, tokenizer.piece(i)) for i in encode(smallest))

            return Finding(
                where=text.where,
                length=len(text.text),
                text=smallest,
                hf=tokens(hf),
                other=tokens(other),
                blame=blame(smallest),
            )

        found = [explain(text, theirs.encode) for text in wrong[:_EXPLAINED]]
        first_own = explain(own_wrong[0], own) if own_wrong else None
    return Report(
        model=model,
        against=against,
        rebuilt=None if vocab.tokenizer_json is not None else vocab.pre,
        texts=n_texts,
        tokens=n_tokens,
        seconds=seconds,
        mismatches=len(wrong),
        own_mismatches=len(own_wrong),
        first=found[0] if found else None,
        first_own=first_own,
        blamed=tuple(Counter(point for f in found for point in f.blame).most_common()),
        explained=len(found),
        notes=tuple(notes),
    )


def _check_same(model: Path, vocab: Vocabulary, against: Path) -> None:
    """Other tokens under the same ids cannot be compared; other rules and types can."""
    from dsq.convert.gguf.reader import read_gguf
    from dsq.tokenizer_port.load import vocabulary_from_gguf

    if not against.is_file():
        raise InputError(f"--against {against}: no such file; give a .gguf")
    theirs = named(
        against, lambda: vocabulary_from_gguf(read_gguf(against).metadata, allow_default=True)
    )
    for i in range(max(len(vocab.tokens), len(theirs.tokens))):
        ours, other = _token(vocab, i), _token(theirs, i)
        if ours != other:
            raise InputError(
                f"--against {against}: has another vocabulary than {model}: token {i} is "
                f"{brief(other)}, not {brief(ours)}; give a GGUF of the same model"
            )


def _token(vocab: Vocabulary, i: int) -> str | None:
    """A row past the end is as good as one without a token."""
    if i >= len(vocab.tokens) or vocab.types[i] == TokenType.UNUSED:
        return None
    return None if vocab.tokens[i] == pad_token(i) else vocab.tokens[i]


def _library(model: Path, vocab: Vocabulary) -> tokenizers.Tokenizer:
    """The tokenizers library on the model's own tokenizer.json, or on one rebuilt from a GGUF."""
    import json

    import tokenizers

    from dsq.tokenizer_port.to_hf import tokenizer_json

    text = vocab.tokenizer_json or json.dumps(tokenizer_json(vocab))
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        what = " ".join(str(error).split())
        raise InputError(
            f"{model}: the tokenizers library refuses its tokenizer.json: {what}"
        ) from error
    # Left over from training: they would cut texts short, or encode them at random.
    library.no_truncation()
    library.no_padding()
    library.model.dropout = None
    return library


def _texts_of(path: Path) -> tuple[list[Text], list[str]]:
    """A file in pieces and whole, and a note if it cannot be compared whole."""
    text = _read_text(path)
    found = list(_pieces(path, text))
    if len(found) < 2:
        return found, []
    if len(text) > _WHOLE or _TOO_LONG.search(text):
        note = (
            f"{path}: compared in pieces only: it is longer than {_WHOLE} characters, or has "
            f"{_LONGEST} without a line end, which is more than llama.cpp bears"
        )
        return found, [note]
    return [*found, Text(f"{path}, whole", text)], []


_TOO_LONG = re.compile(rf"[^\n]{{{_LONGEST}}}|\s{{{_LONGEST}}}")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--text {path}: is no UTF-8 text (byte {error.start}); give a text file"
        ) from None
    except OSError as error:
        raise InputError(
            f"--text {path}: cannot read the file: {error.strerror or error}"
        ) from error


def _pieces(path: Path, text: str) -> Iterator[Text]:
    """Pieces of at most `_PIECE` characters, cut after a line end where there is one."""
    at = 0
    while at < len(text):
        end = at + _PIECE
        if end < len(text):
            end = text.rfind("\n", at, end) + 1 or end
        yield Text(f"{path}, characters {at} to {min(end, len(text))}", text[at:end])
        at = end


def on_deep_stack(work: Callable[[], T]) -> T:
    """Run `work` on a thread whose stack holds llama.cpp's regular expressions."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((True, work()))
        except BaseException as error:
            result.append((False, error))

    before = threading.stack_size(_STACK)
    try:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    ((done, value),) = result
    if not done:
        raise value
    returned: T = value
    return returned

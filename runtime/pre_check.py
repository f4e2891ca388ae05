"""`--pre NAME`: does llama.cpp, told this name, tokenize as the model's own tokenizer.json?"""

from __future__ import annotations

import tempfile
import unicodedata
from pathlib import Path
from typing import Protocol

from dsq.errors import InputError, UnsupportedError
from dsq.tokenizer_port.chains import ALIASES
from dsq.tokenizer_port.corpus import corpus
from dsq.tokenizer_port.json_file import parse_object
from dsq.tokenizer_port.pretokenize import chain_of, recognise
from dsq.tokenizer_port.verify import Mismatch, parity
from dsq.tokenizer_port.vocabulary import Vocabulary


class HasVocabulary(Protocol):
    """A checkpoint, as far as this is concerned."""

    @property
    def path(self) -> Path: ...

    def vocabulary(self, *, pre: str | None = None) -> Vocabulary: ...


def check_pre(checkpoint: HasVocabulary, pre: str) -> None:
    """Raise InputError unless `pre` gives the tokens of the checkpoint's tokenizer.json.

    A name that the file is recognised by needs no check; nor can a GGUF be checked that was made
    without a tokenizer.json.
    """
    vocab = checkpoint.vocabulary(pre=pre)
    if vocab.tokenizer_json is None:
        return
    where = f"{checkpoint.path}: tokenizer.json"
    definition = parse_object(vocab.tokenizer_json, where)
    try:
        recognised = recognise(definition, where)
    except UnsupportedError as error:
        remedy = f"try another name, or leave it out to read which known one is nearest ({error})"
    else:
        if recognised == ALIASES.get(pre, pre):
            return
        remedy = f"leave --pre out: it is {recognised}"
    texts = list(corpus(vocab))
    if {"type": "NFC"} in chain_of(definition, where).normalizers:
        # llama.cpp never normalizes, whatever the name.
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    found = _mismatches(vocab, texts)
    if found:
        raise InputError(
            f"--pre {pre}: llama.cpp gives other tokens by it than {where} in {len(found)} of "
            f"{len(texts)} texts, first {found[0]}; {remedy}"
        )


def _mismatches(vocab: Vocabulary, texts: list[str]) -> list[Mismatch]:
    from dsq.convert.gguf.metadata import vocabulary_entries
    from dsq.convert.gguf.writer import gguf_layout, write_gguf
    from dsq.runtime.llama_vocab import LlamaVocab

    with tempfile.TemporaryDirectory(prefix="dsq-") as directory:
        path = Path(directory) / "vocabulary.gguf"
        write_gguf(path, gguf_layout(vocabulary_entries(vocab), ()), ())
        with LlamaVocab(path) as theirs:
            return parity(vocab, theirs.encode, texts)

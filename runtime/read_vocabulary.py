"""The vocabulary of a model on disk, weights or none: for the verbs that look at tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.tokenizer_port.vocabulary import Vocabulary

T = TypeVar("T")

_MOST_ROWS = 1 << 24


def read_vocabulary(
    model: Path, *, pre: str | None = None, allow_default: bool = False
) -> Vocabulary:
    """Of a GGUF, or of a directory with a tokenizer.json; weights and config.json may lack.

    `pre` is the pre-tokenizer by the user's word. `allow_default` takes a GGUF that names none as
    llama.cpp takes it, and warns once of what `dsq doctor` finds in it. InputErrors name `model`.
    """
    if not model.exists():
        raise InputError(f"{model}: no such file or directory; give a model directory or a .gguf")
    if model.is_dir() and not (model / "tokenizer.json").exists() and any(model.glob("*.gguf")):
        from dsq.runtime.source import Source

        model = Source(model).path  # the one GGUF in there
    if model.is_file():
        return named(model, lambda: _of_gguf(model, pre, allow_default))
    return _of_directory(model, pre)


def named(path: Path, read: Callable[[], T]) -> T:
    """What `read` returns; an InputError of it that names no file gets `path` in front."""
    try:
        return read()
    except InputError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def _of_gguf(path: Path, pre: str | None, allow_default: bool) -> Vocabulary:
    if allow_default and pre is None:
        from dsq.runtime.source import Source

        return Source(path).vocabulary
    from dsq.convert.gguf.reader import read_gguf
    from dsq.tokenizer_port.load import vocabulary_from_gguf

    return vocabulary_from_gguf(read_gguf(path).metadata, pre=pre)


def _of_directory(model: Path, pre: str | None) -> Vocabulary:
    from dsq.tokenizer_port.json_file import expect, read_object
    from dsq.tokenizer_port.load import load_hf

    configs = [model / name for name in ("config.json", "generation_config.json")]
    config, generation = (read_object(path) if path.is_file() else {} for path in configs)
    rows = config.get("vocab_size")
    if rows is None:
        path = model / "tokenizer.json"
        rows = _token_count(path) if path.is_file() else 1  # load_hf says what is missing
    elif not 0 < expect(rows, int, f"{configs[0]}: vocab_size") <= _MOST_ROWS:
        raise InputError(
            f"{configs[0]}: vocab_size is {rows}; a number of rows up to {_MOST_ROWS} is needed"
        )
    return load_hf(model, rows, pre=pre, config=config, generation_config=generation)


def _token_count(path: Path) -> int:
    """The rows that a tokenizer.json asks for, where no config.json says how many there are."""
    from dsq.tokenizer_port.definition import added_entries
    from dsq.tokenizer_port.json_file import read_object
    from dsq.tokenizer_port.load import check_tokenizer

    definition = read_object(path)
    check_tokenizer(definition, path)
    added = [entry["id"] for entry in added_entries(definition, str(path))]
    count = 1 + int(max([*definition["model"]["vocab"].values(), *added]))
    if count > _MOST_ROWS:
        raise InputError(
            f"{path}: a token has the id {count - 1}; the largest that is read is "
            f"{_MOST_ROWS - 1}: correct it"
        )
    return count

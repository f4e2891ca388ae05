"""`dsq tokenize`: what a model makes of a text, token by token."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dsq.cli import common
from dsq.errors import DsqError, InputError

if TYPE_CHECKING:
    from dsq.tokenizer_port.tokenizer import Tokenizer

MOST_BYTES = 16 << 20  # a text: the tokenizers library takes up to 400 bytes of memory for one

DESCRIPTION = f"""\
Show the tokens of a text: ids and pieces, side by side. What looks like a
control token in the text stays text (--special makes it one).

A piece is the text of one token. A byte that makes no character within its
token is shown as <0xE4>; the table also shows a space as ␣ and escapes what
does not print. With --json, "text" is the decoding: the pieces' bytes together,
without the BOS in front. A text, or a line of --lines, may have {MOST_BYTES >> 20} MiB."""
EXAMPLE = """dsq tokenize coder-q4_0.gguf "def quicksort("
  dsq tokenize ./deepseek-coder-1.3b-base --lines texts.jsonl > tokens.jsonl"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=".gguf, directory or hub id")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="or - for standard input")
    other = parser.add_argument_group("instead of TEXT")
    other.add_argument("--fim", nargs=2, metavar=("PREFIX", "SUFFIX"), help="fill in the middle")
    other.add_argument(
        "--chat", metavar="JSON", help='[{"role": "user", "content": …}, …], or - for stdin'
    )
    other.add_argument(
        "--lines",
        metavar="FILE",
        help="one JSON string a line (- for stdin); prints one JSON object a line",
    )
    parser.add_argument(
        "--no-bos", action="store_true", help="add no BOS (a chat template may write its own)"
    )
    parser.add_argument(
        "--special", action="store_true", help="texts of control tokens become the tokens"
    )
    parser.add_argument(
        "--pre",
        metavar="NAME",
        help="llama.cpp's name of the pre-tokenizer, where none is known (a tokenizer.json in "
        "MODEL goes before it)",
    )
    common.add_hub(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    given = [args.text, args.fim, args.chat, args.lines]
    if sum(value is not None for value in given) != 1:
        raise InputError("give one of TEXT, --fim PREFIX SUFFIX, --chat JSON, --lines FILE")
    for what, value in _arguments(args):
        _check_bytes(what, value)
    text = _standard_input() if args.text == "-" else args.text
    messages = None if args.chat is None else _messages(args.chat)
    tok = _tokenizer(common.local_model(args.model, args), args.pre)
    how: dict[str, Any] = {
        "add_bos": False if args.no_bos else None,
        "parse_special": args.special,
    }
    if args.lines is not None:
        _lines(tok, args.lines, how)
        return 0
    if args.fim is not None:
        ids = tok.fim(*args.fim, **how)
    elif messages is not None:
        ids = tok.chat(messages, **how)
    else:
        ids = tok.encode(text, **how)
        if _decoded(tok, ids) != text:
            common.warn(
                "the tokens do not give this text back: the tokenizer normalizes it, or has no "
                "token for some of its bytes"
            )
    if args.json:
        _print_json(tok, ids)
    else:
        _print_table(tok, ids)
    return 0


def _tokenizer(model: Path, pre: str | None) -> Tokenizer:
    from dsq.runtime.read_vocabulary import named, read_vocabulary
    from dsq.tokenizer_port.tokenizer import Tokenizer

    vocab = read_vocabulary(model, pre=pre, allow_default=True)
    return named(model, lambda: Tokenizer.from_vocabulary(vocab))


def _arguments(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The texts on the command line, with their names."""
    prefix, suffix = args.fim or (None, None)
    given = (("TEXT", args.text), ("PREFIX", prefix), ("SUFFIX", suffix), ("--chat", args.chat))
    return ((what, value) for what, value in given if value is not None)


def _check_bytes(what: str, value: str) -> None:
    """Python keeps a byte of the command line that is no UTF-8 as U+DC80 and on."""
    for i, char in enumerate(value):
        if "\udc80" <= char <= "\udcff":
            raise InputError(
                f"{what}: is not UTF-8: character {i} is the byte 0x{ord(char) - 0xDC00:02X}; "
                "convert it to UTF-8"
            )


# Reading


def _standard_input() -> str:
    raw = _stdin().read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise InputError(f"standard input: {_TOO_LONG}")
    return _utf8(raw, "standard input")


def _stdin() -> BinaryIO:
    if sys.stdin is None:
        raise InputError("standard input is closed; give the text as an argument, or a file")
    return sys.stdin.buffer


_TOO_LONG = f"is longer than {MOST_BYTES >> 20} MiB; cut it, at a line end"


def _utf8(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what}: is not UTF-8: byte {error.start} is 0x{raw[error.start]:02X}, "
            f"{error.reason}; convert it to UTF-8"
        ) from None


def _messages(text: str) -> list[Any]:
    value = _parsed(_standard_input() if text == "-" else text, "--chat")
    if not isinstance(value, list):
        raise InputError(
            '--chat: is no list; give [{"role": "user", "content": "…"}], or - for standard input'
        )
    return value


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{what}: is no JSON: {error.msg} (character {error.pos})") from None
    except (ValueError, RecursionError) as error:  # an integer of 5000 digits, a deep list
        raise InputError(f"{what}: is no JSON to read: {' '.join(str(error).split())}") from None


def _lines(tok: Tokenizer, name: str, how: dict[str, Any]) -> None:
    """One line in memory at a time; each answer is flushed, for a program at the other end."""
    from dsq.tokenizer_port.json_file import brief

    what = "standard input" if name == "-" else name
    with _opened(name) as file:
        for where, raw in _numbered(file, what):
            text = _parsed(_utf8(raw, where), where)
            if not isinstance(text, str):
                raise InputError(f"{where}: is {brief(text)}; a JSON string is needed")
            try:
                ids = tok.encode(text, **how)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
            _print_json(tok, ids)


def _opened(name: str) -> AbstractContextManager[BinaryIO]:
    if name == "-":
        return nullcontext(_stdin())
    try:
        return open(name, "rb")
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError) -> InputError:
    return InputError(f"{name}: cannot read it: {error.strerror or error}")


def _numbered(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    for number in count(1):
        try:
            raw = file.readline(MOST_BYTES + 1)
        except OSError as error:
            raise _unreadable(name, error) from error
        if not raw:
            return
        if len(raw) > MOST_BYTES:
            raise InputError(f"{name}: line {number}: {_TOO_LONG}")
        yield f"{name}: line {number}", raw


# Writing


def _decoded(tok: Tokenizer, ids: list[int]) -> str:
    """The text, control tokens as their texts, without the BOS in front."""
    start = 1 if tok.vocab.bos is not None and ids[:1] == [tok.vocab.bos] else 0
    return tok.decode(ids[start:], skip_special=False)


def _print_json(tok: Tokenizer, ids: list[int]) -> None:
    report = {"ids": ids, "pieces": list(map(tok.piece, ids)), "text": _decoded(tok, ids)}
    # Where the terminal's encoding lacks a character, main prints `?` for it.
    unicode = (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")
    _write(json.dumps(report, ensure_ascii=not unicode) + "\n")


def _print_table(tok: Tokenizer, ids: list[int]) -> None:
    from dsq.tokenizer_port.vocabulary import TokenType

    width = len(str(max(ids, default=0)))
    lines = []
    for token in ids:
        kind = TokenType(tok.vocab.types[token])
        mark = "" if kind == TokenType.NORMAL else f"  ({kind.name.lower().replace('_', '-')})"
        lines.append(f"{token:>{width}}  {_visible(tok.piece(token))}{mark}\n")
    _write("".join(lines) + f"{len(ids)} token{'s' * (len(ids) != 1)}\n")


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # the reader has enough
    except OSError as error:
        raise DsqError(f"cannot write the output: {error.strerror or error}") from error


def _visible(piece: str) -> str:
    return "".join(map(_visible_char, piece))


def _visible_char(char: str) -> str:
    if char == " ":
        return "␣"
    if char.isprintable() and char != "\\":
        return char
    return char.encode("unicode_escape").decode("ascii")

"""`dsq tokenize`: what a model makes of a text, token by token."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dsq.cli import common
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.tokenizer_port.tokenizer import Tokenizer
    from dsq.tokenizer_port.vocabulary import Vocabulary

MOST_BYTES = 16 << 20  # a text: the tokenizers library takes up to 400 bytes of memory for one

DESCRIPTION = f"""\
Show the tokens of a text: ids and pieces, side by side. What looks like a control token in the
text stays text (--special makes it one).

A piece is the text of one token. A byte that makes no character within its token is shown as
<0xE4>; the table also shows a space as ␣ and escapes what does not print. With --json, "text" is
the decoding: the pieces' bytes together, without the BOS in front. A text, or a line of --lines,
may have {MOST_BYTES >> 20} MiB."""
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
    common.add_hub(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    given = [args.text, args.fim, args.chat, args.lines]
    if sum(value is not None for value in given) != 1:
        raise InputError("give one of TEXT, --fim PREFIX SUFFIX, --chat JSON, --lines FILE")
    text = _standard_input() if args.text == "-" else args.text
    messages = None if args.chat is None else _messages(args.chat)
    from dsq.tokenizer_port.tokenizer import Tokenizer

    tok = Tokenizer.from_vocabulary(_vocabulary(common.local_model(args.model, args)))
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


def _vocabulary(path: Path) -> Vocabulary:
    """Of a directory of any architecture, with weights or without, or of a GGUF."""
    if not (path / "tokenizer.json").is_file():
        from dsq.runtime.source import Source

        return Source(path).vocabulary
    from dsq.tokenizer_port.hf_settings import read_json
    from dsq.tokenizer_port.load import load_hf

    config = read_json(path / "config.json")
    rows = config.get("vocab_size")
    if not isinstance(rows, int) or not 0 < rows <= common.MOST:
        rows = _count_rows(read_json(path / "tokenizer.json"))
    generation_config = read_json(path / "generation_config.json")
    return load_hf(path, rows, config=config, generation_config=generation_config)


def _count_rows(definition: dict[str, Any]) -> int:
    """Where no config.json says it. What is malformed counts for nothing: `load_hf` refuses it."""
    model, added = definition.get("model"), definition.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [entry.get("id") for entry in added or [] if isinstance(entry, dict)]
    return 1 + max((i for i in ids if isinstance(i, int) and i < common.MOST), default=0)


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

    try:
        with nullcontext(_stdin()) if name == "-" else open(name, "rb") as file:
            for where, raw in _numbered(file, "standard input" if name == "-" else name):
                text = _parsed(_utf8(raw, where), where)
                if not isinstance(text, str):
                    raise InputError(f"{where}: is {brief(text)}; a JSON string is needed")
                try:
                    ids = tok.encode(text, **how)
                except InputError as error:
                    raise InputError(f"{where}: {error}") from error
                _print_json(tok, ids)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise InputError(f"{name}: cannot read it: {error.strerror}") from error


def _numbered(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    number = 0
    while raw := file.readline(MOST_BYTES + 1):
        number += 1
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
    print(json.dumps(report, ensure_ascii=not unicode), flush=True)


def _print_table(tok: Tokenizer, ids: list[int]) -> None:
    from dsq.tokenizer_port.vocabulary import TokenType

    width = len(str(max(ids, default=0)))
    for token in ids:
        kind = TokenType(tok.vocab.types[token])
        mark = "" if kind == TokenType.NORMAL else f"  ({kind.name.lower().replace('_', '-')})"
        print(f"{token:>{width}}  {_visible(tok.piece(token))}{mark}")
    print(f"{len(ids)} token{'s' * (len(ids) != 1)}", flush=True)


def _visible(piece: str) -> str:
    return "".join(map(_visible_char, piece))


def _visible_char(char: str) -> str:
    if char == " ":
        return "␣"
    if char.isprintable() and char != "\\":
        return char
    return char.encode("unicode_escape").decode("ascii")

"""`dsq VERB …`: find the verb, import only its file, run it, print errors as one line."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from dsq import __version__
from dsq.errors import DsqError, InputError

VERBS: dict[str, str] = {
    "convert": "a Hugging Face checkpoint to GGUF, or a GGUF back to Hugging Face",
    "calibrate": "statistics of calibration text: importance matrix, Hessians, gradients",
    "imatrix": "llama.cpp's importance matrices: make, merge, show",
    "quantize": "to any of llama.cpp's types, from a GGUF or straight from a checkpoint",
    "eval": "perplexity, and the divergence from a reference",
    "inspect": "what is in a model file, and the memory it needs",
    "fit": "which quantization fits this machine, and how fast it can be",
    "devices": "what each engine sees here, and how to install what is missing",
    "package": "a folder that Ollama or LM Studio takes in",
    "verify": "prove that an artifact is its source, and write a receipt",
    "tokenize": "ids and pieces of a text, side by side",
    "tokenizer": "check a tokenizer against llama.cpp's own",
    "doctor": "find and mend what old conversions got wrong in a GGUF",
    "complete": "complete code: plain, or fill in the middle",
    "chat": "talk to an instruct model",
    "serve": "models over HTTP, for editors and OpenAI clients",
    "report": "one page on what each quantized file cost",
}

USAGE = """\
usage: dsq VERB [options]        dsq VERB --help for an example of each

Quantize, measure and run code models. DeepSeek Coder first.

{verbs}

  dsq convert ./deepseek-coder-1.3b-base --to gguf -o coder.gguf
  dsq quantize q4_k_m ./deepseek-coder-1.3b-base -o coder-q4.gguf
  dsq complete coder-q4.gguf -p "def quicksort("

options: --help, --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code: 0, 1 failure, 2 bad input, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    _tame_streams()
    if sys.stdout is None:
        print(
            "dsq: error: standard output is closed; send it to a file, or to /dev/null",
            file=sys.stderr,
        )
        return 1
    code = _reported(args)
    try:
        sys.stdout.flush()
    except OSError:  # after an error that is reported already
        _discard_output()
    return code


def _reported(args: list[str]) -> int:
    """The exit code; every error is printed as one line."""
    try:
        code = _run(args)
        sys.stdout.flush()  # here, where an error can still be reported
        return code
    except DsqError as error:
        print(f"dsq: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard_output()  # the reader went away: `dsq inspect … | head`
        return 1
    except OSError as error:
        what = str(error)
        if error.errno in _OUTPUT_ERRORS and error.filename is None:
            _discard_output()
            what = f"cannot write the output: {error.strerror}"
        print(f"dsq: error: {what}", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("DSQ_TRACEBACK"):
            raise
        what = " ".join(str(error).split()) or "no message"
        print(
            f"dsq: error: unexpected {type(error).__name__}: {what} "
            f"(a bug in dsq; DSQ_TRACEBACK=1 shows where)",
            file=sys.stderr,
        )
        return 1


# What writing fails with and reading does not: without a file's name it is standard output's.
_OUTPUT_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def _discard_output() -> None:
    """What is still buffered goes nowhere, so that Python does not complain of it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tame_streams() -> None:
    """A terminal that cannot print `✓` gets `?`, not a crash; warnings are one line each."""
    if sys.stderr is None:  # closed (`2>&-`); print(file=None) would print to standard output
        sys.stderr = _null_stderr()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.showwarning = lambda message, *_, **__: print(
        f"dsq: warning: {message}", file=sys.stderr
    )


def _null_stderr() -> TextIO:
    """Also takes descriptor 2: libraries' messages would go into the next file that is opened."""
    handle = os.open(os.devnull, os.O_RDWR)
    while handle < 2:
        handle = os.open(os.devnull, os.O_RDWR)
    return open(handle, "w", encoding="utf-8")


def _stop(number: int, frame: object) -> NoReturn:
    """SIGTERM unwinds, so that temporary files are removed."""
    raise SystemExit(128 + number)


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and no file's name is empty."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.register("type", Path, _file_name)  # what `type=Path` calls

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _file_name(text: str) -> Path:
    """argparse type: Path("") is the current folder, which nobody meant."""
    if not text:
        raise argparse.ArgumentTypeError("the file's name is empty")
    return Path(text)


def _parsed(parser: argparse.ArgumentParser, args: list[str]) -> argparse.Namespace:
    """Options may stand anywhere, before the last positional too.

    argparse gives an optional positional its default at the first chance, and then has no place
    for one that comes later. Intermixed parsing is second choice: before Python 3.13 it takes
    what follows `--` for options.
    """
    namespace, left = parser.parse_known_args(args)
    if not left:
        return namespace
    try:
        return parser.parse_intermixed_args(args)
    except TypeError:  # not for a verb with actions, each of which has a parser of its own
        parser.error(f"unrecognized arguments: {' '.join(left)}")


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {name:<10} {what}" for name, what in VERBS.items())
        print(USAGE.format(verbs=verbs), flush=True)
        return 0 if args else 2
    verb, *args = args
    if verb in ("-V", "--version"):
        print(f"dsq {__version__}")
        return 0
    if verb not in VERBS:
        print(f"dsq: error: no verb {verb!r}; verbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"dsq.cli.{verb}")
    parser = _Parser(
        prog=f"dsq {verb}",
        description=f"{module.DESCRIPTION}",
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    code: int = module.run(_parsed(parser, args))
    return code


if __name__ == "__main__":
    sys.exit(main())

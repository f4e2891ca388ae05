"""`dsq chat`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import io
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from dsq.cli import common
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.runtime.chat import ChatSession

DESCRIPTION = (
    "Talk to an instruct model. /reset forgets, /exit (or Ctrl-D) leaves; Ctrl-C stops an answer\n"
    "and returns to the prompt. With -p, answer one message and leave."
)
EXAMPLE = "dsq chat coder-instruct-q4_0.gguf"

DEFAULT_CTX = 4096  # a 16k cache of a 6.7b would take 8 GiB unasked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, "model", ".gguf, directory or hub id")
    parser.add_argument("-p", "--prompt", help="one message, answered on standard output")
    parser.add_argument("--system", help="the system message (default: the template's own)")
    parser.add_argument(
        "--special", action="store_true", help="control tokens' texts in messages become tokens"
    )
    parser.add_argument("-n", "--n-predict", type=common.positive, metavar="N", help="per answer")
    parser.add_argument(
        "-c", "--ctx-size", type=common.positive, help=f"default: {DEFAULT_CTX} or the model's own"
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "llama.cpp", "torch"),
        default="auto",
        help="torch runs the exact codes of a GPTQ or EXL2 directory; auto runs it in llama.cpp, "
        "as a GGUF that is kept in the cache",
    )
    common.add_sampling(parser, temp=0.8)
    common.add_gpu(parser)
    common.add_threads(parser)
    common.add_hub(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("-p is empty; write a message")
    if sys.stdin is None and args.prompt is None:
        raise InputError("standard input is closed; give the message with -p")
    if args.json and args.prompt is None:
        raise InputError("--json goes with -p: a conversation is not one object")
    sampler = common.sampler(args)
    model = common.local_model(args.model, args)
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.runtime.chat import ChatSession
    from dsq.runtime.repack_cache import generation_engine
    from dsq.runtime.source import EngineSettings, Source

    n_ctx = args.ctx_size or min(DEFAULT_CTX, open_checkpoint(model).spec.n_ctx)
    settings = EngineSettings(n_ctx, args.threads, common.gpu_layers(args))
    engine = generation_engine(
        Source(model),
        settings,
        name=args.engine,
        tell=lambda text: print(f"dsq: {text}", file=sys.stderr),
    )
    try:
        session = ChatSession(
            engine,
            system=args.system,
            max_tokens=args.n_predict,
            sampler=sampler,
            parse_special=args.special,
        )
        if args.prompt is not None:
            return _once(session, args.prompt, as_json=args.json)
        if sys.stdin.isatty():
            print(f"{model.name}, context {n_ctx:,}. /reset forgets, Ctrl-C stops, Ctrl-D leaves.")
        return _converse(session)
    finally:
        engine.close()


def _once(session: ChatSession, prompt: str, *, as_json: bool) -> int:
    text = ""
    for piece in session.send(prompt):
        text += piece
        if not as_json:
            print(piece, end="", flush=True)
    if not as_json:
        print()
        return 0
    last = session.last
    common.print_json(
        {
            "text": text,
            "tokens": len(last.tokens) if last else 0,
            "prompt_tokens": last.prompt_tokens if last else 0,
            "stop_reason": last.stop_reason if last else None,
            "tokens_per_second": round(last.tokens_per_second, 2) if last else 0.0,
        }
    )
    return 0


def _converse(session: ChatSession) -> int:
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # a program's message is not changed silently
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return 0
        except UnicodeDecodeError as error:
            raise InputError(
                f"standard input: a message is not UTF-8: {error.reason} "
                f"(0x{error.object[error.start]:02X})"
            ) from None
        except KeyboardInterrupt:  # at the prompt: drop the line, stay
            print()
            continue
        if line.strip() in ("/exit", "/quit"):
            return 0
        if line.strip() == "/reset":
            session.reset()
            if interactive:
                print("(forgotten)")
            continue
        if re.fullmatch(r"/[a-z]+", line.strip()):
            print("commands: /reset, /exit", file=sys.stderr)
            continue
        if not line.strip():
            continue
        try:
            for piece in session.send(line):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except InputError as error:
            print(f"dsq: error: {error} (/reset starts anew)", file=sys.stderr)
        print()

"""`dsq chat`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from dsq.cli import common
from dsq.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dsq.runtime.chat import ChatSession
    from dsq.runtime.chat_commands import Command, Commands
    from dsq.runtime.chat_input import Reader
    from dsq.runtime.chat_plan import ChatPlan

DESCRIPTION = (
    "Talk to an instruct model. /help lists the commands; Alt-Enter begins a new line, Ctrl-C\n"
    "stops an answer, Ctrl-D leaves. Without a terminal each line is a message. With -p, answer\n"
    "one message and leave. Context, cache and layers on a GPU are chosen so that all fits."
)
EXAMPLE = "dsq chat coder-instruct-q4_0.gguf --repo ."

KV_TYPES = ("f16", "q8_0", "q4_0")
# What would move the cursor or change colours, if a model wrote it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, "model", ".gguf, directory or hub id")
    parser.add_argument("-p", "--prompt", help="one message, answered on standard output")
    parser.add_argument("--system", help="the system message (default: the template's own)")
    parser.add_argument(
        "--repo", type=Path, metavar="DIR", help="its files stand before the conversation"
    )
    parser.add_argument(
        "--file",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a file that goes with the first message; may be repeated",
    )
    parser.add_argument(
        "--special", action="store_true", help="control tokens' texts in messages become tokens"
    )
    parser.add_argument("-n", "--n-predict", type=common.positive, metavar="N", help="per answer")
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=common.positive,
        help="default: 4096 or the model's own, less where memory is short",
    )
    parser.add_argument(
        "--kv-type", choices=KV_TYPES, help="of the cache (default: the finest that fits)"
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "llama.cpp", "torch"),
        default="auto",
        help="torch runs the exact codes of a GPTQ or EXL2 directory; auto runs it in llama.cpp, "
        "as a GGUF that is kept in the cache",
    )
    parser.add_argument(
        "--no-history", action="store_true", help="do not remember what is typed for the next time"
    )
    common.add_sampling(parser, temp=0.8)
    parser.add_argument(
        "-ngl",
        "--n-gpu-layers",
        default="auto",
        metavar="N",
        help="layers on the GPU, or all (default: what fits; needs a CUDA build of "
        "llama-cpp-python)",
    )
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
    from dsq.runtime.chat import ChatSession
    from dsq.runtime.chat_commands import COMMANDS, Commands
    from dsq.runtime.chat_input import TerminalReader, reader, typed_ahead
    from dsq.runtime.chat_store import history_file
    from dsq.runtime.repack_cache import generation_engine
    from dsq.runtime.source import Source

    source = Source(model)
    plan = _plan(source.path, args)
    engine = generation_engine(source, plan.settings, name=args.engine, tell=_tell)
    try:
        session = ChatSession(
            engine,
            system=args.system,
            max_tokens=args.n_predict,
            sampler=sampler,
            parse_special=args.special,
        )
        commands = Commands(session, engine.tokenizer, model.name)
        terminal = _Terminal()
        if terminal.live and args.prompt is None:
            print(f"{model.name}: {plan.about()}")
        for path in args.file:
            _tell(commands.attach_file(str(path)))
        if args.repo is not None:
            _tell(commands.use_repo(str(args.repo)))
        if args.prompt is not None:
            return _once(session, args.prompt, as_json=args.json)
        terminal.quiet("/help lists the commands. Alt-Enter: new line. Ctrl-D leaves.")
        kept = (lambda: None) if args.no_history else history_file
        typed = reader(kept, list(COMMANDS))
        with typed_ahead() if isinstance(typed, TerminalReader) else nullcontext():
            return _converse(session, commands, typed, terminal)
    finally:
        engine.close()


def _tell(text: str) -> None:
    print(f"dsq: {text}", file=sys.stderr)


def _plan(path: Path, args: argparse.Namespace) -> ChatPlan:
    from dsq.runtime.chat_plan import Asked, plan_chat
    from dsq.runtime.devices import available_memory

    layers = None if args.n_gpu_layers == "auto" else common.gpu_layers(args)
    asked = Asked(args.ctx_size, args.kv_type, layers, args.threads)
    card_free = 0 if layers is not None else _card_free(path, args.engine)
    return plan_chat(path, asked, engine=args.engine, free=available_memory(), card_free=card_free)


def _card_free(path: Path, engine: str) -> int:
    """Bytes of the first card, where llama.cpp runs the model and can use one."""
    if engine == "torch" or path.is_dir():
        return 0
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        return 0
    from dsq.runtime.devices import cards

    found = cards()
    return found[0].vram_free if found else 0


class _Terminal:
    """Where answers go. Only a terminal (`live`) gets the lines about them, and those dimmed."""

    def __init__(self) -> None:
        self.live = sys.stdin.isatty() and sys.stdout.isatty()
        self._dim = self.live and not os.environ.get("NO_COLOR")

    def quiet(self, text: str) -> None:
        if self.live:
            print(f"\x1b[2m{text}\x1b[0m" if self._dim else text, flush=True)

    def say(self, text: str) -> None:
        """What a command answers: beside the answers, not among them."""
        print(text, file=sys.stdout if self.live else sys.stderr, flush=True)

    def error(self, error: InputError) -> None:
        print(f"dsq: error: {error}", file=sys.stderr, flush=True)

    def stream(self, pieces: Iterable[str]) -> None:
        from dsq.runtime.chat_wrap import Wrapper

        if not self.live:
            for piece in pieces:
                print(piece, end="", flush=True)
            return
        wrapper = Wrapper(shutil.get_terminal_size().columns)
        try:
            for piece in pieces:
                print(wrapper.push(_CONTROL.sub("\ufffd", piece)), end="", flush=True)
        finally:
            print(wrapper.finish(), end="", flush=True)


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


def _converse(session: ChatSession, commands: Commands, reader: Reader, terminal: _Terminal) -> int:
    from dsq.runtime.chat_commands import parse

    while True:
        try:
            text = reader.read()
        except KeyboardInterrupt:  # at the prompt: drop the line, stay
            print()
            continue
        if text is None:
            if terminal.live:
                print()
            return 0
        try:
            command = parse(text)
            if command is None:
                if text.strip():
                    _answer(session, text, terminal)
            elif command.name == "quit":
                return 0
            else:
                _obey(session, commands, command, terminal)
        except InputError as error:
            terminal.error(error)


def _obey(session: ChatSession, commands: Commands, command: Command, terminal: _Terminal) -> None:
    if command.name == "regenerate":
        _answer(session, None, terminal)
    else:
        terminal.say(commands.run(command))


def _answer(session: ChatSession, text: str | None, terminal: _Terminal) -> None:
    """Answer a message, or the last one again; then say how fast, and what did not fit."""
    from dsq.runtime.chat_commands import usage

    stopped = False
    try:
        pieces = session.regenerate() if text is None else session.send(text)
        if session.n_dropped:
            n = session.n_dropped
            turns = "the oldest turn was" if n == 1 else f"the {n} oldest turns were"
            note = f"{turns} dropped: the context is full"
            terminal.quiet(f"({note})") if terminal.live else _tell(note)
        terminal.stream(pieces)
    except KeyboardInterrupt:
        stopped = True
    print(" [stopped]" if stopped else "", flush=True)
    last = session.last
    if last is None:
        return
    if last.stop_reason == "context":
        _tell("the context is full, and the answer ends here; -c gives more")
    terminal.quiet(
        f"{len(last.tokens):,} tokens, {last.tokens_per_second:.1f} tokens/s, {usage(session)}"
    )

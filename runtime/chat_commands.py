"""The `/` commands of a conversation. Each returns what to say to the user."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dsq.errors import InputError
from dsq.runtime import chat_store
from dsq.runtime.chat import ChatSession
from dsq.runtime.chat_context import file_text, repo_text
from dsq.tokenizer_port.tokenizer import Tokenizer

MOST_FILE_BYTES = 4 << 20
REPO_SHARE, FILE_SHARE = 2, 2  # of the context: half for a repository, half for one file

# name → what stands behind it, what it does
COMMANDS: dict[str, tuple[str, str]] = {
    "help": ("", "this list"),
    "clear": ("", "forget the conversation (/reset, too)"),
    "undo": ("", "take the last message and its answer back"),
    "regenerate": ("", "answer the last message again"),
    "file": ("PATH", "put a file before the next message"),
    "repo": ("[DIR]", "put a repository's files before the conversation; none: remove them"),
    "system": ("[TEXT]", "the system message; none: remove it"),
    "temp": ("X", "the temperature, 0 is greedy"),
    "stats": ("", "tokens, speed, and how full the context is"),
    "save": ("FILE", "write the conversation"),
    "load": ("FILE", "go on with one that was saved"),
    "quit": ("", "leave (/exit and Ctrl-D, too)"),
}
SAME = {"reset": "clear", "exit": "quit", "retry": "regenerate"}


@dataclass(frozen=True)
class Command:
    name: str
    argument: str


def parse(line: str) -> Command | None:
    """The command in a line; None for a message. Raises InputError for a command that is none.

    A line of several that begins with a slash and no command's name is a message: `/etc is full`.
    """
    match = re.fullmatch(r"/([A-Za-z]+)(?:\s+(.*))?", line.strip(), re.DOTALL)
    if match is None:
        return None
    name = SAME.get(match[1].lower(), match[1].lower())
    argument = (match[2] or "").strip()
    if name not in COMMANDS:
        if argument:
            return None
        raise InputError(f"/{match[1]}: no such command; /help lists them")
    takes = COMMANDS[name][0]
    if argument and not takes:
        raise InputError(f"/{name}: takes nothing behind it")
    if not argument and takes and not takes.startswith("["):
        raise InputError(f"/{name}: needs {takes}")
    return Command(name, argument)


def help_text() -> str:
    rows = [(f"/{name} {takes}".rstrip(), what) for name, (takes, what) in COMMANDS.items()]
    width = max(len(left) for left, _ in rows)
    lines = [f"{left:<{width}}  {what}" for left, what in rows]
    lines.append("")
    lines.append(
        "A message of several lines: Alt-Enter, or ''' before the first and after the last."
    )
    lines.append("Ctrl-C stops an answer.")
    return "\n".join(lines)


class Commands:
    """What the commands do to a session. `regenerate` and `quit` are for the caller."""

    def __init__(self, session: ChatSession, tokenizer: Tokenizer, model: str) -> None:
        self._session, self._tokenizer, self._model = session, tokenizer, model
        self._repo: str | None = None
        self._do: dict[str, Callable[[str], str]] = {
            "help": lambda _: help_text(),
            "clear": self._clear,
            "undo": self._undo,
            "file": self.attach_file,
            "repo": self.use_repo,
            "system": self._system,
            "temp": self._temp,
            "stats": lambda _: self.stats(),
            "save": self._save,
            "load": self._load,
        }

    def run(self, command: Command) -> str:
        """Raises InputError, after which the session is as it was."""
        return self._do[command.name](command.argument)

    def _clear(self, _: str) -> str:
        self._session.reset()
        kept = f" The files of {self._repo} stay; /repo removes them." if self._repo else ""
        return f"Forgotten.{kept}"

    def _undo(self, _: str) -> str:
        text = self._session.undo()
        if text is None:
            raise InputError("/undo: there is nothing to take back")
        return f"Taken back: {_short(text.rpartition('---')[2] or text)}"

    def attach_file(self, argument: str) -> str:
        path = _path(argument)
        text = _read(path)
        room = self._session.n_ctx // FILE_SHARE
        shown, n_cut = file_text(argument.strip("'\""), text, self._tokenizer, room)
        self._session.attached.append(shown)
        n = len(self._tokenizer.encode(shown, add_bos=False))
        cut = f"; {n_cut:,} more had no room and were cut off" if n_cut else ""
        return f"{path}: {n:,} tokens go with the next message{cut}"

    def use_repo(self, argument: str) -> str:
        if not argument:
            self._session.files, self._repo = "", None
            return "No repository."
        from dsq.runtime.repo.context import ContextPlanner, summary
        from dsq.runtime.repo.index import RepoIndex

        graph = RepoIndex(_path(argument)).graph()
        room = self._session.n_ctx // REPO_SHARE
        context = ContextPlanner(self._tokenizer).plan(graph, room)
        self._session.files = repo_text(context, self._tokenizer)
        self._repo = graph.name
        return summary(context.report())

    def _system(self, argument: str) -> str:
        self._session.system = argument or None
        return "The system message is set." if argument else "No system message."

    def _temp(self, argument: str) -> str:
        try:
            value = float(argument)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 100:
            raise InputError(f"/temp {argument}: give a number from 0 to 100")
        self._session.sampler = replace(self._session.sampler, temp=value)
        return f"Temperature {value:g}."

    def stats(self) -> str:
        session, last = self._session, self._session.last
        lines = [f"{_many(len(session.turns()), 'turn')}, {usage(session)}"]
        if last is not None:
            lines.append(
                f"last answer: {_many(len(last.tokens), 'token')}, "
                f"{last.tokens_per_second:.1f} tokens/s, prompt {last.prompt_tokens:,} tokens"
            )
        if self._repo:
            n = len(self._tokenizer.encode(session.files, add_bos=False))
            lines.append(f"repository {self._repo}: {_many(n, 'token')}")
        return "\n".join(lines)

    def _save(self, argument: str) -> str:
        if not self._session.turns():
            raise InputError("/save: there is no conversation yet")
        path = _path(argument)
        chat_store.save(path, self._model, self._session.messages)
        return f"Saved to {path}."

    def _load(self, argument: str) -> str:
        self._session.replace(chat_store.load(_path(argument)))
        return f"{_many(len(self._session.turns()), 'turn')} loaded."


def usage(session: ChatSession) -> str:
    return f"context {session.n_used:,} of {session.n_ctx:,}"


def _many(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


def _path(argument: str) -> Path:
    """As a shell reads it: quotes, and ~ for the home folder."""
    try:
        parts = shlex.split(argument)
    except ValueError:
        parts = []
    name = parts[0] if len(parts) == 1 else argument
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if path.stat().st_size > MOST_FILE_BYTES:
            raise InputError(f"{path}: is larger than {MOST_FILE_BYTES >> 20} MiB")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no text in UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read it: {error}") from None
    if "\0" in text:
        raise InputError(f"{path}: is a binary file")
    if not text.strip():
        raise InputError(f"{path}: is empty")
    return text

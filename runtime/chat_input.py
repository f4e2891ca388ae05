"""Messages from a terminal or a pipe: one line each, or several between ''' and '''."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dsq.errors import InputError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

QUOTES = "'''"


class Reader(Protocol):
    def read(self) -> str | None:
        """The next message; None at the end. Raises KeyboardInterrupt where Ctrl-C drops it."""
        ...


class PlainReader:
    """Lines, with `prompt` before each where somebody sees it."""

    def __init__(self, *, prompt: str = "", more: str = "") -> None:
        self._prompt, self._more = prompt, more
        if prompt:
            with suppress(ImportError):
                import readline  # noqa: F401  (line editing for input())
        elif isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="strict")  # a program's message is not changed silently

    def read(self) -> str | None:
        try:
            text = input(self._prompt)
            while is_open(text):
                try:
                    text += "\n" + input(self._more)
                except EOFError:
                    break
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise InputError(
                f"standard input: a message is not UTF-8: {error.reason} "
                f"(0x{error.object[error.start]:02X})"
            ) from None
        return unquoted(text)


class TerminalReader:
    """prompt_toolkit's editor: history, several lines, Tab for commands."""

    def __init__(self, history: Path | None, commands: list[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory

        kept: History = InMemoryHistory() if history is None else FileHistory(str(history))
        self._session: PromptSession[str] = PromptSession(
            "> ",
            history=kept,
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
            complete_while_typing=False,
            enable_history_search=True,
        )

    def read(self) -> str | None:
        try:
            return unquoted(self._session.prompt())
        except EOFError:
            return None


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter begins a line; inside ''' Enter does so, too."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def is_open(text: str) -> bool:
    """Whether the text begins with ''' and goes on until another one."""
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


def unquoted(text: str) -> str:
    """Without the ''' around it, where they are."""
    bare = text.strip()
    if not bare.startswith(QUOTES):
        return text
    return bare.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")


def reader(history: Callable[[], Path | None], commands: list[str]) -> Reader:
    """For a terminal its editor, or where it is not installed a plain prompt; else plain lines."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return PlainReader()
    try:
        return TerminalReader(history(), commands)
    except ImportError:
        return PlainReader(prompt="> ", more="  ")


@contextmanager
def typed_ahead() -> Iterator[None]:
    """What is typed during an answer is not shown in the middle of it: it waits for the prompt."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    now = termios.tcgetattr(handle)
    now[0] &= ~termios.ICRNL  # Enter stays Enter until the editor reads it
    now[3] &= ~(termios.ECHO | termios.ICANON)  # but not ISIG: Ctrl-C stops an answer
    termios.tcsetattr(handle, termios.TCSADRAIN, now)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)

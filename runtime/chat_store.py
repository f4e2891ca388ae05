"""Conversations in files, and where what was typed is remembered."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsq.convert.atomic import write_text
from dsq.errors import InputError

FORMAT = "dsq chat"
MOST_BYTES = 64 << 20
ROLES = ("system", "user", "assistant")


def save(path: Path, model: str, messages: Sequence[dict[str, str]]) -> None:
    """Write the conversation as JSON. Raises InputError for a file that is something else."""
    if path.exists():
        try:
            load(path)
        except InputError:
            raise InputError(f"{path}: exists and is no conversation; give another name") from None
    content = {"format": FORMAT, "model": model, "messages": list(messages)}
    try:
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot write it: {error.strerror}") from error


def load(path: Path) -> list[dict[str, str]]:
    """The messages of a saved conversation. Raises InputError for anything else."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: is larger than {MOST_BYTES >> 20} MiB")
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is no conversation: it is not JSON in UTF-8") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: is no conversation that /save wrote")
    messages = content.get("messages")
    if not isinstance(messages, list):
        raise InputError(f"{path}: messages: is no list")
    for i, message in enumerate(messages):
        _check(path, i, message)
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _check(path: Path, i: int, message: Any) -> None:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES or not isinstance(message.get("content"), str):
        raise InputError(
            f"{path}: messages.{i}: needs a role ({', '.join(ROLES)}) and a content, a string"
        )
    if role == "system" and i:
        raise InputError(f"{path}: messages.{i}: a system message stands first")


def history_file() -> Path | None:
    """`$XDG_STATE_HOME/dsq/chat_history`, for its owner alone; None where it cannot be written."""
    base = Path(os.environ.get("XDG_STATE_HOME") or "")
    try:
        if not base.is_absolute():  # also what the specification says of a relative one
            base = Path.home() / ".local" / "state"
        folder = base / "dsq"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "chat_history"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
    except (OSError, RuntimeError):  # no home
        return None
    return path

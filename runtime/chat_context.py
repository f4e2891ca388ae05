"""Files in a conversation: a repository before the first message, single files before the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsq.runtime.line_cut import keep_start
from dsq.runtime.repo.context import Context, heading
from dsq.tokenizer_port.tokenizer import Tokenizer


def repo_text(context: Context, tokenizer: Tokenizer) -> str:
    """A repository's files as a user would paste them; empty without any."""
    if not context.parts:
        return ""
    files = tokenizer.decode(context.ids, skip_special=False).rstrip()
    return f"Files of the repository {context.name}:\n\n{files}\n"


def file_text(path: str, text: str, tokenizer: Tokenizer, room: int) -> tuple[str, int]:
    """One file under its path, cut at a line's end where it is longer than `room` tokens.

    Also how many tokens were cut off.
    """
    whole = heading(path) + text.rstrip() + "\n"
    ids = tokenizer.encode(whole, add_bos=False)
    kept = keep_start(tokenizer, whole, ids, room)
    return tokenizer.decode(kept, skip_special=False), len(ids) - len(kept)


def with_files(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """The conversation with `text` before its first user message's own."""
    found = [dict(message) for message in messages]
    first = next((m for m in found if m["role"] == "user"), None)
    if text and first is not None:
        first["content"] = joined(text, first["content"])
    return found


def joined(files: str, message: str) -> str:
    return f"{files}\n---\n\n{message}"

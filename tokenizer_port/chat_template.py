"""Render a chat template as transformers does, without trusting it."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from dsq.errors import InputError
from dsq.tokenizer_port.budget import MAX_SIZE, start_budget
from dsq.tokenizer_port.sandbox import MAX_WIDTH, TemplateEnvironment, guarded

_MAX_TEMPLATE = 128 * 2**10  # four times the longest published ones; compiling takes a second
_MAX_MESSAGE = 500


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool,
    **extra: Any,
) -> str:
    """The text of a conversation. `extra` variables (tools, documents) reach the template too.

    Raises InputError when the template refuses the conversation, is no valid template, tries to
    leave the sandbox, or takes too many steps, too long or too much memory.
    """
    start_budget()
    try:
        compiled = _compile(template)
        pieces = compiled.generate(
            messages=messages,
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
            # As transformers does: templates ask whether these are none, not whether they exist.
            **{"tools": None, "documents": None, **extra},
        )
        return _joined(pieces)
    except SecurityError as error:
        raise InputError(
            f"chat_template: stopped: {error}; use a template that you trust"
        ) from error
    except _Refused as error:
        raise InputError(f"chat_template: refuses these messages: {_line(error)}") from error
    except jinja2.TemplateError as error:
        raise InputError(f"chat_template: {type(error).__name__}: {_line(error)}") from error
    except (RecursionError, MemoryError) as error:
        why = "it runs out of memory" if isinstance(error, MemoryError) else "it nests too deeply"
        raise InputError(f"chat_template: stopped: {why}; use a template that you trust") from error
    except Exception as error:  # a template may fail in any way that Python code can
        raise InputError(
            f"chat_template: failed on these messages: {type(error).__name__}: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    text = " ".join(str(error)[: 2 * _MAX_MESSAGE].split())
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"


class _Refused(Exception):
    """The template called raise_exception."""


def _joined(pieces: Any) -> str:
    found: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_SIZE:
            raise SecurityError(f"the output is larger than {MAX_SIZE} characters")
        found.append(piece)
    return "".join(found)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    if len(template) > _MAX_TEMPLATE:
        raise SecurityError(f"the template is larger than {_MAX_TEMPLATE} characters")
    environment = TemplateEnvironment()
    environment.filters["tojson"] = guarded("tojson", _tojson)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' filter of the name: plain JSON, where jinja2's own would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    if len(form) > MAX_WIDTH:
        raise SecurityError(f"it formats a date with more than {MAX_WIDTH} characters")
    return datetime.datetime.now().strftime(form)

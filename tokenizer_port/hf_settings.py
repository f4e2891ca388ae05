"""The small files beside tokenizer.json: special ids, BOS and EOS rules, chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsq.errors import InputError

# Tokenizer classes of transformers that add BOS unless told otherwise.
_CLASSES_ADDING_BOS = frozenset(
    ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
)


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # no newline translation
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}; download the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, an object is needed")
    return value


def read_json(path: Path) -> dict[str, Any]:
    return parse_json(path, read_text(path)) if path.is_file() else {}


def is_special(entry: Any) -> bool:
    return isinstance(entry, Mapping) and bool(entry.get("special"))


def token_text(entry: Any) -> str | None:
    """A token entry is a string or an AddedToken dict with `content`."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


@dataclass(frozen=True)
class SpecialIds:
    directory: Path
    index: Mapping[str, int]
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]

    def find(self, name: str, *, required: bool = False) -> int | None:
        token_map = self.directory / "special_tokens_map.json"
        for path, source in (
            (self.directory / "tokenizer_config.json", self.settings),
            (token_map, read_json(token_map)),
        ):
            text = token_text(source.get(f"{name}_token"))
            if text is None:
                continue
            if text in self.index:
                return self.index[text]
            if required:
                raise InputError(
                    f"{path}: {name}_token is {text!r}, which is no token of tokenizer.json; "
                    "correct the name or add the token"
                )
        for source_name, config in (
            ("config.json", self.config),
            ("generation_config.json", self.generation_config),
        ):
            value = config.get(f"{name}_token_id")
            if isinstance(value, list) and value:
                value = value[0]  # several stop tokens: the first is the model's own
            if isinstance(value, int) and not isinstance(value, bool):
                if not 0 <= value < len(self.index):
                    if not required:  # -1 is a common way to say "no pad token"
                        continue
                    raise InputError(
                        f"{source_name}: {name}_token_id is {value}, but the embedding has "
                        f"{len(self.index)} rows; correct the id"
                    )
                return value
        return None


def adds(
    settings: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    name: str,
    row: int | None,
) -> bool:
    """Whether the model expects BOS (EOS) around every text.

    tokenizer_config.json decides; then the post-processor's template; then the class's habit.
    """
    said = settings.get(f"add_{name}_token")
    if isinstance(said, bool):
        return said
    processor = tokenizer.get("post_processor") or {}
    for step in processor.get("processors") or [processor]:
        pieces = step.get("single") or []
        if step.get("type") == "TemplateProcessing" and len(pieces) > 1:
            piece = pieces[0 if name == "bos" else -1]
            return "SpecialToken" in piece
    if name == "eos" or row is None:
        return False
    return settings.get("tokenizer_class") in _CLASSES_ADDING_BOS


def chat_templates(
    directory: Path, settings: Mapping[str, Any]
) -> tuple[str | None, dict[str, str]]:
    """(the default template, the named others); chat_template.jinja goes before the JSON's."""
    named: dict[str, str] = {}
    entry = settings.get("chat_template")
    if isinstance(entry, str):
        named["default"] = entry
    elif isinstance(entry, list):
        for item in entry:
            if isinstance(item, Mapping) and isinstance(item.get("template"), str):
                named[str(item.get("name", "default"))] = item["template"]
    path = directory / "chat_template.jinja"
    if path.is_file():
        named["default"] = read_text(path)
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = read_text(path)
    return named.pop("default", None), named

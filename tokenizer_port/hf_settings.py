"""The small files beside tokenizer.json: special ids, BOS and EOS rules, chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsq.errors import InputError
from dsq.tokenizer_port.definition import processors
from dsq.tokenizer_port.json_file import brief, expect, optional, read_object

# Tokenizer classes of transformers that add BOS unless told otherwise.
_CLASSES_ADDING_BOS = frozenset(
    ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
)


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # no newline translation
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def read_settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing; the types of what decides something are checked."""
    settings = read_json(path)
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space"):
        optional(settings.get(key), bool, f"{path}: {key}")
    optional(settings.get("tokenizer_class"), str, f"{path}: tokenizer_class")
    for key, entry in decoder_entries(path, settings).items():
        # ASCII only: isdigit() is true of "²", and nine digits are more than any vocabulary has.
        if token_text(entry) is None or not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InputError(
                f"{path}: added_tokens_decoder.{key} is {brief(entry)}; a row number and an "
                "object with the token's content are needed: correct the entry"
            )
        if isinstance(entry, dict):
            optional(entry.get("special"), bool, f"{path}: added_tokens_decoder.{key}.special")
    return settings


def decoder_entries(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    what = f"{path}: added_tokens_decoder"
    return optional(settings.get("added_tokens_decoder"), dict, what) or {}


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
        """The id of BOS, EOS, ...; unless `required`, what names no token is passed over."""
        token_map = self.directory / "special_tokens_map.json"
        for path, source in (
            (self.directory / "tokenizer_config.json", self.settings),
            (token_map, read_json(token_map)),
        ):
            entry = source.get(f"{name}_token")
            text = token_text(entry)
            if text is not None and text in self.index:
                return self.index[text]
            if required and entry is not None:
                raise InputError(
                    f"{path}: {name}_token is {brief(entry if text is None else text)}, which is "
                    "no token of tokenizer.json; correct the name or add the token"
                )
        for file, config in (
            ("config.json", self.config),
            ("generation_config.json", self.generation_config),
        ):
            said = config.get(f"{name}_token_id")
            # Several stop tokens: the first is the model's own.
            value = said[0] if isinstance(said, list) and said else said
            if type(value) is int and 0 <= value < len(self.index):
                return value
            if required and said is not None:  # else -1 is a common way to say "no pad token"
                raise InputError(
                    f"{file}: {name}_token_id is {brief(said)}, but must be the number of one of "
                    f"the embedding's {len(self.index)} rows; correct the id"
                )
        return None


def adds(
    directory: Path,
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
    for step in processors(tokenizer, str(directory / "tokenizer.json")):
        if step.get("type") == "TemplateProcessing" and len(step["single"]) > 1:
            return "SpecialToken" in step["single"][0 if name == "bos" else -1]
    if name == "eos" or row is None:
        return False
    return settings.get("tokenizer_class") in _CLASSES_ADDING_BOS


def chat_templates(
    directory: Path, settings: Mapping[str, Any]
) -> tuple[str | None, dict[str, str]]:
    """(the default template, the named others); chat_template.jinja goes before the JSON's."""
    named = _templates_of(directory / "tokenizer_config.json", settings.get("chat_template"))
    path = directory / "chat_template.jinja"
    if path.is_file():
        named["default"] = read_text(path)
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = read_text(path)
    return named.pop("default", None), named


def _templates_of(path: Path, entry: Any) -> dict[str, str]:
    """`chat_template`: one template, or a list of objects with name and template."""
    what = f"{path}: chat_template"
    remedy = "give one template as a string, or a list of objects with name and template"
    if not isinstance(entry, list):
        one = optional(entry, str, what, remedy)
        return {} if one is None else {"default": one}
    named: dict[str, str] = {}
    for i, item in enumerate(entry):
        expect(item, dict, f"{what}[{i}]", remedy)
        name = expect(item.get("name"), str, f"{what}[{i}].name", remedy)
        named[name] = expect(item.get("template"), str, f"{what}[{i}].template", remedy)
    return named

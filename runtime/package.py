"""A GGUF as Ollama and LM Studio take it in: templates, stops and context beside the file.

Sources: Ollama's docs/modelfile.mdx and docs/template.mdx, its parser/parser.go (what a Modelfile
may hold) and template/template.go (what a template gets); LM Studio's documentation of its models
directory, and `config-presets` files. The texts are tested; neither program was run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsq.convert.atomic import atomic_files, check_space, check_target, os_error
from dsq.convert.checkpoint import GgufCheckpoint
from dsq.errors import InputError, UnsupportedError
from dsq.runtime.chat_turns import Turns, chat_turns
from dsq.tokenizer_port.tokenizer import Tokenizer

Target = Literal["ollama", "lmstudio"]

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONTENT = "{{ .Content }}"


@dataclass(frozen=True)
class Package:
    """Decided before anything is written: texts and model files by their path in the folder."""

    target: Target
    name: str
    texts: dict[str, str]
    models: dict[str, Path]
    notes: tuple[str, ...]


def plan_package(
    checkpoint: GgufCheckpoint,
    tokenizer: Tokenizer,
    target: Target,
    *,
    n_ctx: int | None = None,
    publisher: str = "dsq",
    name: str | None = None,
) -> Package:
    """The package of a GGUF. `name` is the model's; None takes the file's.

    Raises InputError for a name or context that cannot be, UnsupportedError for what the target
    cannot take: shards (Ollama), a chat template that is no row of turns (Ollama).
    """
    spec, shards = checkpoint.spec, checkpoint.gguf.shards
    n_ctx = n_ctx or min(spec.n_ctx, 16384)
    if n_ctx > spec.n_ctx:
        raise InputError(
            f"--ctx {n_ctx}: the model was trained on {spec.n_ctx} tokens; give at most that"
        )
    name = name or re.sub(r"-00001-of-\d{5}$", "", shards[0].stem)
    for option, value in (("--name", name), ("--publisher", publisher)):
        if not _PLAIN.fullmatch(value):
            raise InputError(
                f"{option} {value!r}: letters, digits, '.', '_' and '-' only, as it names a folder"
            )
    if target == "ollama":
        if len(shards) > 1:
            raise UnsupportedError(
                f"{shards[0]}: Ollama takes no shards; make one file of the {len(shards)}: "
                f"dsq quantize copy {shards[0]} -o {name}.gguf"
            )
        text, notes = modelfile(tokenizer, f"./{name}.gguf", n_ctx)
        return Package(target, name, {"Modelfile": text}, {f"{name}.gguf": shards[0]}, notes)
    folder = f"{publisher}/{name}"
    preset = lmstudio_preset(tokenizer, name, n_ctx)
    return Package(
        target,
        name,
        {f"{name}.preset.json": json.dumps(preset, indent=2, ensure_ascii=False) + "\n"},
        {f"{folder}/{path.name}": path for path in shards},
        (),
    )


def write_package(package: Package, out: Path, *, force: bool = False) -> list[Path]:
    """Write it under `out`; the model is a hard link where the file system allows, else a copy."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; -o names the folder to make")
    paths = [out / name for name in (*package.models, *package.texts)]
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise os_error(error, path.parent) from error
        check_target(path, force=force)
    with atomic_files(paths) as temporary:
        for path, source in zip(temporary, package.models.values(), strict=False):
            _link(source.resolve(), path)
        for path, text in zip(
            temporary[len(package.models) :], package.texts.values(), strict=True
        ):
            path.write_text(text, encoding="utf-8")
    return paths


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)  # it is there, empty: see `atomic_files`
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        check_space(target, source.stat().st_size)
        shutil.copyfile(source, target)


# Ollama


def modelfile(tokenizer: Tokenizer, model: str, n_ctx: int) -> tuple[str, tuple[str, ...]]:
    """The Modelfile, and what its user should know."""
    template, notes = ollama_template(tokenizer)
    lines = [
        f"FROM {model}",
        f'TEMPLATE """{template}"""',
        f"PARAMETER num_ctx {n_ctx}",
        *(f'PARAMETER stop "{text}"' for text in stop_texts(tokenizer)),
    ]
    return "\n".join(lines) + "\n", notes


def stop_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts of the tokens that end an answer or a completion."""
    vocab = tokenizer.vocab
    ids = set(tokenizer.stop_ids("complete"))
    if vocab.chat_template is not None:
        ids |= tokenizer.stop_ids("chat")
    return [vocab.tokens[i] for i in sorted(ids)]


def ollama_template(tokenizer: Tokenizer) -> tuple[str, tuple[str, ...]]:
    """The Go template: chat as the model's own template writes it, and fill in the middle.

    BOS is left out: Ollama's runner adds it where the model wants one. Ollama itself joins
    messages of one role that follow each other, and hands over a suffix as `.Suffix`.
    """
    vocab = tokenizer.vocab
    notes: list[str] = []
    if vocab.chat_template is None:
        text = "{{ .Prompt }}"
    else:
        turns = chat_turns(tokenizer)
        text = _go_turns(turns)
        if turns.system is None:
            notes.append("the model takes no system message; one is left out")
        if turns.trims:
            notes.append("the model's own template strips messages; Ollama's cannot")
    markers = (vocab.fim_prefix, vocab.fim_suffix, vocab.fim_middle)
    if None not in markers:
        begin, hole, end = (_go_text(vocab.tokens[i]) for i in markers if i is not None)
        fim = f"{begin}{{{{ .Prompt }}}}{hole}{{{{ .Suffix }}}}{end}"
        text = f"{{{{ if .Suffix }}}}{fim}{{{{ else }}}}{text}{{{{ end }}}}"
    return text, tuple(notes)


def _go_turns(turns: Turns) -> str:
    default = f"{{{{ if not .System }}}}{_go_text(turns.default)}{{{{ end }}}}"
    branches = [
        (role, around)
        for role, around in (
            ("system", turns.system),
            ("user", turns.user),
            ("assistant", turns.assistant),
        )
        if around is not None
    ]
    body = "".join(
        f"{{{{ {'else ' if i else ''}if eq .Role {json.dumps(role)} }}}}"
        f"{_go_text(before)}{_CONTENT}{_go_text(after)}"
        for i, (role, (before, after)) in enumerate(branches)
    )
    return (
        f"{default if turns.default else ''}{{{{ range .Messages }}}}{body}{{{{ end }}}}"
        f"{{{{ end }}}}{_go_text(turns.opening)}"
    )


def _go_text(text: str) -> str:
    """As it is where both the template and the Modelfile leave it so, else as a Go string."""
    if (
        all(c == "\n" or c.isprintable() for c in text)
        and "{{" not in text
        and '"""' not in text
        and not text.endswith("{")  # it would run into the action behind it
        and '"' not in text[:1] + text[-1:]
    ):
        return text
    escapes = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
    quoted = "".join(escapes.get(c) or (c if " " <= c <= "~" else _go_escape(c)) for c in text)
    return f'{{{{ "{quoted}" }}}}'


def _go_escape(char: str) -> str:
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# LM Studio


def lmstudio_preset(tokenizer: Tokenizer, name: str, n_ctx: int) -> dict[str, Any]:
    """A preset for its `config-presets` folder: stops and context.

    LM Studio renders the chat template that the GGUF holds. Without one it would guess a chat
    format; the preset then hands the text through.
    """
    fields: list[dict[str, Any]] = [
        {"key": "llm.prediction.stopStrings", "value": stop_texts(tokenizer)}
    ]
    if tokenizer.vocab.chat_template is None:
        through = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        value = {"type": "jinja", "jinjaPromptTemplate": {"template": through}, "stopStrings": []}
        fields.append({"key": "llm.prediction.promptTemplate", "value": value})
    return {
        "identifier": f"@local:{name}",
        "name": name,
        "changed": False,
        "operation": {"fields": fields},
        "load": {"fields": [{"key": "llm.load.contextLength", "value": n_ctx}]},
    }


def next_step(target: Target, name: str, out: Path) -> str:
    """What the user does with the folder."""
    if target == "ollama":
        return f"ollama create {name.lower()} -f {shlex.quote(str(out / 'Modelfile'))}"
    return (
        f"move the folders in {out} to ~/.lmstudio/models, and the preset to "
        "~/.lmstudio/config-presets"
    )

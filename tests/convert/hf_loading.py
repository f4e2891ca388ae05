"""Hugging Face directories as dsq writes them, and beside each what must be loaded from it.

`hf_probe.py` does the loading, in whatever environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

from dsq.cli.main import main
from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.hf.writer import config_json
from dsq.quant.scheme import BF16
from dsq.tokenizer_port.chat import render_chat
from dsq.tokenizer_port.corpus import corpus
from dsq.tokenizer_port.to_hf import EMBEDDED, hf_files
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary
from tests.models import TINY_CODER
from tests.runtime.damage import rewrite

EOT = "<|EOT|>"
# An instruct model's templates, as DeepSeek's are built: line breaks that trim_blocks must eat.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] == 'assistant' %}\n"
    "{{ '### Answer:\\n' + message['content'] + '\\n<|EOT|>\\n' }}\n"
    "    {% else %}\n"
    "{{ '### ' + message['role'] + ':\\n' + message['content'] + '\\n' }}\n"
    "    {% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '### Answer:' }}{% endif %}"
)
ONE_LINE = (
    "{{ bos_token }}{% for m in messages %}<|User|>{{ m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
CONVERSATIONS = (
    [{"role": "user", "content": "Sort a list."}],
    [
        {"role": "system", "content": "Answer in code.  Two  spaces."},
        {"role": "user", "content": "def f(x):\n\treturn 'Führer'\n\n    # 你好 🙂\r\n"},
        {"role": "assistant", "content": " for i in range(10):\n        pass\n"},
        {"role": "user", "content": "Again"},
    ],
)
TEXTS = (
    "Führer",
    "  two  spaces , here .\n\n\tand a tab !",
    "for i in range(10):\n    if a[i] != 'b':\n        c += 1  # done\n",
)
PREFIX, SUFFIX = "def add(a, b):\n    ", "\n\n\nprint(add(1,  2))\n"


def write_directories(folder: Path) -> list[Path]:
    """One directory for each way in which dsq writes one, all made from tiny-coder."""
    gguf, gguf_eot = folder / "tiny.gguf", folder / "chat.gguf"
    chat = _instruct(folder / "instruct")
    _dsq("convert", TINY_CODER, "--to", "gguf", "-o", gguf)
    _dsq("convert", chat, "--to", "gguf", "-o", gguf_eot)
    base, instruct = (open_checkpoint(p).vocabulary() for p in (TINY_CODER, chat))
    no_bos = dataclasses.replace(base, add_bos=False)

    back = _back(gguf, folder / "back", base)
    # A file that was given its BOS step by us, and whose GGUF was told later to add none.
    again = folder / "again.gguf"
    _dsq("convert", back, "--to", "gguf", "-o", again)
    off = rewrite(again, folder / "off.gguf", metadata={"tokenizer.ggml.add_bos_token": False})
    return [
        back,
        _back(_without_json(gguf), folder / "rebuilt", base),
        write_directory(folder / "direct", base),
        _back(gguf_eot, folder / "chat", instruct),
        _back(_without_json(gguf_eot), folder / "chat-rebuilt", instruct),
        write_directory(folder / "direct-no-bos", no_bos),
        write_directory(folder / "idle-template", _with_idle_template(base)),
        _back(off, folder / "bos-off", no_bos),
    ]


def write_controls(folder: Path, good: Path) -> dict[str, Path]:
    """Copies of a good directory, each with what dsq avoids: the checks must find it."""
    llama = _copy(good, folder / "control-llama-class")
    _edit(llama / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    own = json.loads((TINY_CODER / "tokenizer.json").read_text(encoding="utf-8"))
    no_step = _copy(good, folder / "control-no-bos-step")
    _edit(no_step / "tokenizer.json", post_processor=own["post_processor"])
    return {"LlamaTokenizerFast": llama, "no BOS step": no_step}


def write_directory(
    directory: Path, vocab: Vocabulary, config: dict[str, Any] | None = None
) -> Path:
    """What an artifact that was no GGUF between holds: the tokenizer's files and config.json."""
    directory.mkdir()
    spec = open_checkpoint(TINY_CODER).spec
    for name, content in {
        **hf_files(vocab, spec.n_ctx),
        "config.json": config or config_json(spec, vocab, BF16),
    }.items():
        _write(directory / name, content)
    return _expect(directory, vocab)


def expected_of(vocab: Vocabulary) -> dict[str, Any]:
    """What dsq's own tokenizer says, for `hf_probe.py` to compare with."""
    tok = Tokenizer.from_vocabulary(vocab)
    bos = "" if vocab.bos is None else vocab.tokens[vocab.bos]
    # transformers puts a second BOS before a text that starts with one.
    texts = [t for t in (*corpus(vocab), *TEXTS) if not (bos and t.startswith(bos))]
    ids = {text: tok.encode(text, add_bos=False, parse_special=True) for text in texts}
    # HF's decoder takes DeepSeek's letter tokens for bytes, and skips what it knows as special.
    plain = {i for i, kind in enumerate(vocab.types) if kind == TokenType.NORMAL}
    markers = [vocab.fim_prefix, vocab.fim_suffix, vocab.fim_middle]
    begin, hole, end = ("" if i is None else vocab.tokens[i] for i in markers)
    added = vocab.ids_of_type(TokenType.CONTROL, TokenType.USER_DEFINED)
    return {
        "add_bos": vocab.add_bos,
        "special": {"bos": vocab.bos, "eos": vocab.eos, "pad": vocab.pad},
        "added": {vocab.tokens[i]: i for i in added},
        "n_tokens": len(vocab.tokens) - len(vocab.ids_of_type(TokenType.UNUSED)),
        "texts": [{"text": text, "ids": row} for text, row in ids.items()],
        "readable": [text for text, row in ids.items() if plain.issuperset(row)],
        "fim": {"text": begin + PREFIX + hole + SUFFIX + end, "ids": tok.fim(PREFIX, SUFFIX)},
        "chats": _chats(vocab),
    }


def _chats(vocab: Vocabulary) -> list[dict[str, Any]]:
    named: dict[str | None, str] = dict(vocab.chat_templates)
    if vocab.chat_template is not None:
        named[None] = vocab.chat_template
    return [
        {
            "template": name,
            "messages": messages,
            "add_generation_prompt": prompt,
            "text": render_chat(tok, messages, {"add_generation_prompt": prompt}),
            "ids": tok.chat(messages, add_generation_prompt=prompt),
        }
        for name, template in named.items()
        for tok in [Tokenizer.from_vocabulary(dataclasses.replace(vocab, chat_template=template))]
        for messages in CONVERSATIONS
        for prompt in (True, False)
    ]


def _instruct(directory: Path) -> Path:
    """tiny-coder as an instruct model: another EOS, and several chat templates."""
    shutil.copytree(TINY_CODER, directory)
    templates = {"default": TEMPLATE, "one_line": ONE_LINE}
    _edit(
        directory / "tokenizer_config.json",
        eos_token=EOT,
        chat_template=[{"name": n, "template": t} for n, t in templates.items()],
    )
    return directory


def _with_idle_template(vocab: Vocabulary) -> Vocabulary:
    """As some fine-tunes have it: a step that could add BOS and does not."""
    definition = json.loads(vocab.tokenizer_json or "")
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces[:1],
        "pair": pieces,
        "special_tokens": {},
    }
    return dataclasses.replace(vocab, tokenizer_json=json.dumps(definition))


def _dsq(*words: str | Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*map(str, words), "--json"]) == 0


def _back(gguf: Path, directory: Path, vocab: Vocabulary) -> Path:
    _dsq("convert", gguf, "--to", "hf", "-o", directory)
    return _expect(directory, vocab)


def _without_json(gguf: Path) -> Path:
    return rewrite(gguf, gguf.with_suffix(".bare.gguf"), metadata={EMBEDDED: None})


def _copy(good: Path, directory: Path) -> Path:
    shutil.copytree(good, directory)
    shutil.copy(f"{good}.expected.json", f"{directory}.expected.json")
    return directory


def _expect(directory: Path, vocab: Vocabulary) -> Path:
    _write(Path(f"{directory}.expected.json"), expected_of(vocab))
    return directory


def _edit(path: Path, **changes: Any) -> None:
    _write(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

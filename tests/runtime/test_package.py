"""Packages for Ollama and LM Studio. The Go templates are held to Go's own text/template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.errors import InputError, UnsupportedError
from dsq.runtime import package
from dsq.runtime.chat_turns import chat_turns
from dsq.runtime.package import (
    modelfile,
    ollama_template,
    plan_package,
    stop_texts,
    write_package,
)
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary
from tests.runtime import go_template
from tests.tiny_gguf import tiny_tokens, token_id

# Built as DeepSeek Coder's: a default before the first turn, no line break after a system message.
ALPACA = (
    "{%- set ns = namespace(found=false) -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'system' -%}{%- set ns.found = true -%}"
    "{%- endif -%}{%- endfor -%}"
    "{{bos_token}}{%- if not ns.found -%}{{'You write code.\\n'}}{%- endif %}"
    "{%- for m in messages %}{%- if m['role'] == 'system' %}{{ m['content'] }}{%- else %}"
    "{%- if m['role'] == 'user' %}{{'### Instruction:\\n' + m['content'] + '\\n'}}"
    "{%- else %}{{'### Response:\\n' + m['content'] + '\\n<eot>\\n'}}{%- endif %}{%- endif %}"
    "{%- endfor %}{% if add_generation_prompt %}{{'### Response:'}}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What a Modelfile or a Go template would read otherwise.
HOSTILE = (
    "{% for m in messages %}"
    "{{ '{{ \"\"\" ' + m['role'] + '\\t\\u200b{' + m['content'] + '}}\\\\\"' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{/*🙂' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[x]{% endif %}"
)
TRIMMED = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}[x]{% endif %}"
)
TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "hostile": HOSTILE, "no system": NO_SYSTEM}

SYSTEM = {"role": "system", "content": "Be brief & <safe>."}
ONE = [{"role": "user", "content": 'Write {{ .System }} "a"\nin C.'}]
THREE = [*ONE, {"role": "assistant", "content": "int a;\n"}, {"role": "user", "content": " ok? "}]
CONVERSATIONS = [ONE, THREE, [SYSTEM, *ONE], [SYSTEM, *THREE]]


def tokenizer_with(template: str | None, *, add_bos: bool = True) -> Tokenizer:
    tokens = tuple(tiny_tokens())
    control = {"<bos>", "<eos>", "<hole>", "<begin>", "<end>", "<eot>"}
    vocab = Vocabulary(
        model="gpt2",
        pre="deepseek-coder",
        tokens=tokens,
        types=tuple(TokenType.CONTROL if t in control else TokenType.NORMAL for t in tokens),
        merges=(),
        bos=token_id("<bos>"),
        eos=token_id("<eos>"),
        eot=token_id("<eot>"),
        pad=None,
        unk=None,
        fim_prefix=token_id("<begin>"),
        fim_suffix=token_id("<hole>"),
        fim_middle=token_id("<end>"),
        add_bos=add_bos,
        add_eos=False,
        add_space_prefix=None,
        chat_template=template,
    )
    return Tokenizer.from_vocabulary(vocab)


def values(messages: list[dict[str, str]]) -> dict[str, Any]:
    """As Ollama's `Template.Execute` and `collate` make them of a chat request."""
    return {
        "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
        "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
        "Response": "",
    }


def jobs_of(name: str) -> list[dict[str, Any]]:
    template, _ = ollama_template(tokenizer_with(TEMPLATES[name]))
    taken = [c for c in CONVERSATIONS if name != "no system" or SYSTEM not in c]
    return [{"template": template, "values": values(messages)} for messages in taken]


def fim_job(template: str | None) -> dict[str, Any]:
    text, _ = ollama_template(tokenizer_with(template))
    return {"template": text, "values": {"Prompt": "a <b>", "Suffix": "\n\nc", "Response": ""}}


def all_jobs() -> list[dict[str, Any]]:
    chats = [job for name in TEMPLATES for job in jobs_of(name)]
    plain, _ = ollama_template(tokenizer_with(None))
    base = {"template": plain, "values": {"Prompt": " x\n", "Response": ""}}
    return [*chats, fim_job(None), fim_job(ALPACA), base]


def rendered(jobs: list[dict[str, Any]]) -> list[str]:
    texts = go_template.recorded(jobs)
    if texts is None:
        pytest.fail(
            "the templates have changed; record what Go makes of them: "
            "python -m tests.runtime.go_template (needs golang-go)"
        )
    return texts


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_writes_what_the_models_own_template_writes(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    jobs = jobs_of(name)
    taken = [c for c in CONVERSATIONS if name != "no system" or SYSTEM not in c]
    for text, messages in zip(rendered(jobs), taken, strict=True):
        # Ollama's runner puts BOS before the text and reads control tokens in it.
        ids = tokenizer.encode(text, add_bos=True, parse_special=True)
        assert ids == tokenizer.chat(messages, add_bos=True, parse_special=True)


def test_go_writes_the_fill_in_the_middle_prompt() -> None:
    tokenizer = tokenizer_with(ALPACA)
    for text in rendered([fim_job(None), fim_job(ALPACA)]):
        ids = tokenizer.encode(text, add_bos=True, parse_special=True)
        assert ids == tokenizer.fim("a <b>", "\n\nc")


def test_a_base_model_gets_its_prompt_as_it_is() -> None:
    assert rendered(all_jobs()[-1:]) == [" x\n"]


@pytest.mark.slow
@pytest.mark.skipif(go_template.go() is None, reason="Go is not installed (golang-go)")
def test_the_record_is_what_go_renders_now() -> None:
    jobs = all_jobs()
    assert go_template.render(jobs) == rendered(jobs)


def test_what_is_no_row_of_turns_is_refused() -> None:
    last = "{{ messages[-1]['content'] }}"
    numbered = (
        "{% for m in messages %}{{ loop.index }}{{ m['role'] }}{{ m['content'] }}{% endfor %}"
    )
    for template in (
        last,
        numbered,
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    ):
        with pytest.raises(UnsupportedError, match="by hand"):
            chat_turns(tokenizer_with(template))


def test_what_go_cannot_do_is_said() -> None:
    assert ollama_template(tokenizer_with(ALPACA))[1] == ()
    assert "strips" in ollama_template(tokenizer_with(TRIMMED))[1][0]
    assert "no system message" in ollama_template(tokenizer_with(NO_SYSTEM))[1][0]


def test_modelfile_as_ollamas_parser_reads_it() -> None:
    tokenizer = tokenizer_with(HOSTILE)
    text, _ = modelfile(tokenizer, "./m.gguf", 4096)
    from_, rest = text.split("\n", 1)
    assert from_ == "FROM ./m.gguf"
    before, template, parameters = rest.split('"""')  # the first one closes it
    assert before == "TEMPLATE "
    assert template == ollama_template(tokenizer)[0]
    # The parser drops what Go does not call printable, but for white space.
    assert all(c.isprintable() or c == "\n" for c in template)
    assert parameters.splitlines()[1:] == [
        "PARAMETER num_ctx 4096",
        'PARAMETER stop "<eos>"',
        'PARAMETER stop "<eot>"',
    ]


def test_bos_is_written_only_where_the_runner_does_not() -> None:
    assert "<bos>" not in ollama_template(tokenizer_with(ALPACA))[0]
    assert "<bos>" in ollama_template(tokenizer_with(ALPACA, add_bos=False))[0]
    assert stop_texts(tokenizer_with(None)) == ["<eos>"]


def test_ollama_package(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    tokenizer = Tokenizer.from_vocabulary(checkpoint.vocabulary())
    plan = plan_package(checkpoint, tokenizer, "ollama", name="coder")
    out = tmp_path / "two words"
    paths = write_package(plan, out)
    assert [p.name for p in paths] == ["coder.gguf", "Modelfile"]
    assert (out / "coder.gguf").read_bytes() == tiny.read_bytes()
    assert "num_ctx 512" in (out / "Modelfile").read_text()
    assert "'" in package.next_step("ollama", "coder", out)
    with pytest.raises(InputError, match="--force"):
        write_package(plan, out)
    write_package(plan, out, force=True)
    assert sorted(p.name for p in out.iterdir()) == ["Modelfile", "coder.gguf"]


def test_lmstudio_package_is_copied_where_links_fail(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    checkpoint = open_checkpoint(tiny)
    tokenizer = Tokenizer.from_vocabulary(checkpoint.vocabulary())
    plan = plan_package(checkpoint, tokenizer, "lmstudio", publisher="me", n_ctx=256)
    write_package(plan, tmp_path)
    model = tmp_path / "me" / "tiny" / "tiny.gguf"
    assert model.read_bytes() == tiny.read_bytes()
    assert model.stat().st_nlink == 1
    preset = json.loads((tmp_path / "tiny.preset.json").read_text())
    fields = {f["key"]: f["value"] for f in preset["operation"]["fields"]}
    assert fields["llm.prediction.stopStrings"] == stop_texts(tokenizer)
    assert preset["load"]["fields"] == [{"key": "llm.load.contextLength", "value": 256}]


@pytest.mark.parametrize(
    ("how", "says"),
    [({"name": "../x"}, "--name"), ({"publisher": "a/b"}, "--publisher"), ({"n_ctx": 513}, "512")],
)
def test_bad_wishes(tiny: Path, how: dict[str, Any], says: str) -> None:
    checkpoint = open_checkpoint(tiny)
    tokenizer = Tokenizer.from_vocabulary(checkpoint.vocabulary())
    with pytest.raises(InputError, match=says):
        plan_package(checkpoint, tokenizer, "lmstudio", **how)

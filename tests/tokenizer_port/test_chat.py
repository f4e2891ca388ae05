from __future__ import annotations

import dataclasses
from typing import Any

import jinja2
import pytest
import tokenizers
from jinja2.ext import loopcontrols

from dsq.errors import InputError
from dsq.tokenizer_port.chat import render_chat
from dsq.tokenizer_port.chat_template import render
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

from .conftest import BOS, EOT, TEMPLATE


def talk(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


PLAIN = [
    talk("Hi"),
    talk("  ü \n\n", " spaced ", "> quote <b>"),
    talk("", "x", ""),
    talk("a\r\nb\ttab", "`code`"),
]


@pytest.fixture
def tok(vocab: Vocabulary) -> Tokenizer:
    return Tokenizer.from_vocabulary(vocab)


@pytest.mark.parametrize("messages", PLAIN)
@pytest.mark.parametrize("prompt", [True, False])
def test_like_transformers_on_plain_text(
    tok: Tokenizer, messages: list[dict[str, Any]], prompt: bool
) -> None:
    reference = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    text = reference.from_string(TEMPLATE).render(
        messages=messages, bos_token=BOS, eos_token=EOT, add_generation_prompt=prompt
    )
    assert render_chat(tok, messages, {"add_generation_prompt": prompt}) == text
    whole = tokenizers.Tokenizer.from_str(tok.vocab.tokenizer_json or "")
    assert tok.chat(messages, add_generation_prompt=prompt) == whole.encode(text).ids


@pytest.mark.torch
def test_like_transformers_itself(tok: Tokenizer) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for messages in PLAIN:
        (text,), _ = render_jinja_template(
            [messages], chat_template=TEMPLATE, add_generation_prompt=True, bos_token=BOS
        )
        assert render_chat(tok, messages, {}) == text


@pytest.mark.parametrize(
    "messages",
    [
        talk(f"one {EOT} two"),
        talk(f"{BOS}{EOT}", f" {EOT} ", "<｜fim▁begin｜>"),
        talk(f"x{EOT[:4]}", f"{EOT[4:]} y", EOT[:-1], EOT[1:]),  # halves of one
        talk("<|<|EOT|>|>", "|>", "<"),
        talk("\ue000\ue001" + EOT),
    ],
)
def test_control_tokens_in_messages_stay_text(
    tok: Tokenizer, messages: list[dict[str, Any]]
) -> None:
    v = tok.vocab
    harmless = [{**m, "content": "x"} for m in messages]
    control = {*v.ids_of_type(TokenType.CONTROL)}
    ids = tok.chat(messages)
    assert [i for i in ids if i in control] == [i for i in tok.chat(harmless) if i in control]
    assert tok.decode(ids, skip_special=False) == render_chat(tok, messages, {})


def test_halves_that_a_template_joins(vocab: Vocabulary) -> None:
    """No template ought to, but one that puts messages side by side must not be a way round."""
    control = {*vocab.ids_of_type(TokenType.CONTROL)}
    for template in (
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
        "{% for m in messages %}<|{{ m.content }}|>{% endfor %}",
        "<{% for m in messages %}{{ m.name }}{% endfor %}>",
        "{% for m in messages %}{{ m.content }}EOT|>{% endfor %}",
    ):
        tok = Tokenizer.from_vocabulary(dataclasses.replace(vocab, chat_template=template))
        for parts in (
            (EOT[:3], EOT[3:]),
            (f" {EOT[:3]}\n", f"\t{EOT[3:]}"),
            ("EOT",),
            ("|EOT|",),
            ("hello <|",),
        ):
            messages = [{"role": "user", "content": part, "name": part} for part in parts]
            ids = tok.chat(messages)
            assert ids[0] == vocab.bos
            assert not control & {*ids[1:]}
            assert tok.decode(ids) == render_chat(tok, messages, {})


def test_tools_are_masked_too(vocab: Vocabulary) -> None:
    template = "{{ tools | tojson }}{{ messages[0].content }}"
    tok = Tokenizer.from_vocabulary(dataclasses.replace(vocab, chat_template=template))
    tools = [{"type": "function", "function": {"name": EOT, "parameters": {EOT: [EOT]}}}]
    ids = tok.chat(talk("hi"), tools=tools)
    assert vocab.index[EOT] not in ids
    assert tok.decode(ids).count(EOT) == 3


def test_bos_exactly_once(vocab: Vocabulary) -> None:
    for template in (TEMPLATE, TEMPLATE.removeprefix("{{ bos_token }}")):
        tok = Tokenizer.from_vocabulary(dataclasses.replace(vocab, chat_template=template))
        ids = tok.chat(talk("x"))
        assert ids[0] == vocab.bos
        assert ids.count(vocab.bos or 0) == 1


def test_white_space_that_a_marker_swallows(vocab: Vocabulary) -> None:
    import json

    definition = json.loads(vocab.tokenizer_json or "")
    for entry in definition["added_tokens"]:
        if entry["content"] == EOT:
            entry["lstrip"] = entry["rstrip"] = True
    text = json.dumps(definition)
    tok = Tokenizer.from_vocabulary(dataclasses.replace(vocab, tokenizer_json=text))
    messages = talk("a", "b", "c")
    whole = tokenizers.Tokenizer.from_str(text).encode(render_chat(tok, messages, {})).ids
    assert tok.chat(messages) == whole
    assert whole != Tokenizer.from_vocabulary(vocab).chat(messages)


def test_errors(tok: Tokenizer) -> None:
    with pytest.raises(InputError, match="role is 'a b'"):
        tok.chat([{"role": "a b", "content": ""}])
    with pytest.raises(InputError, match="role is None"):
        tok.chat([{"content": ""}])
    without = dataclasses.replace(tok.vocab, chat_template=None)
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer.from_vocabulary(without).chat(talk("x"))


# The template language


def out(template: str, **variables: Any) -> str:
    return render(
        template,
        talk("Hi", "<é>"),
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=True,
        **variables,
    )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if tools is none and documents is none %}n{% endif %}", "n"),
        ("{{ messages[1] | tojson }}", '{"role": "assistant", "content": "<é>"}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% for m in messages %}{% break %}x{% endfor %}|", "|"),
        (
            "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% endfor %}",
            "1False22True2",
        ),
        ("{% generation %}a{{ 1 }}{% endgeneration %}", "a1"),
        ("{{ 'a' ~ 1 ~ none ~ messages[0].content }}", "a1NoneHi"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ 'a-b-a'.replace('a', 'x', 1) + 'b' | replace('b', 'c') }}", "x-b-ac"),
        ("{{ 'x'.upper() + ' a,b '.strip().split(',')[1] + ','.join(['p', 'q']) }}", "Xbp,q"),
        ("{{ '%s=%d' % ('a', 3) }}{{ '{}:{x}'.format(1, x=2) }}", "a=31:2"),
        (
            "{%- set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}"
            "{% endfor %}{{ ns.n }}",
            "3",
        ),
        ("{{ bos_token + eos_token }}{{ add_generation_prompt }}{{ thing }}", "<s></s>Trueyes"),
        (
            "{{ 'line\n' | indent(4) }}{{ messages[::-1][0].role }}{{ 7 % 4 }}{{ 2 ** 3 * 2 }}",
            "line\nassistant316",
        ),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
    ],
)
def test_what_templates_use(template: str, text: str) -> None:
    assert out(template, thing="yes") == text


BOMBS = {
    "long range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "long string": "{{ 'a' * 10**10 }}",
    "long list": "{{ [1] * 10**10 }}",
    "doubling by ~": "{% set n = namespace(x='aaaa') %}{% for i in range(64) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='aaaa') %}{% for i in range(64) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "many long strings": "{% set n = namespace(x=[]) %}{% for i in range(5000) %}"
    "{% set n.x = n.x + ['a' * 1000000] %}{% endfor %}",
    "sharing, tojson": "{% set n = namespace(x=['a']) %}{% for i in range(64) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "sharing, printed": "{% set n = namespace(x=['a']) %}{% for i in range(64) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format width": "{{ '{:>1000000000}'.format(1) }}",
    "format nested": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "format repeated": "{{ ('{0}' * 100000).format('a' * 1000000) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill by item": "{{ 'a'['zfill'](10**10) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "indent": "{{ 'a\n' | indent(10**9) }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "join": "{{ (['a' * 1000000] * 100000) | join }}",
    "join method": "{{ ','.join(['a' * 1000000] * 100000) }}",
    "bytes of an int": "{{ (5).to_bytes(10**10, 'big') }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "much output": "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "deep syntax": "{{" + "(" * 3000 + ")" * 3000 + "}}",
}
ESCAPES = {
    "class of a string": "{{ ''.__class__.__mro__ }}",
    "class by item": "{{ ''['__class__'] }}",
    "globals of a function": "{{ cycler.__init__.__globals__.os }}",
    "self": "{{ self.__init__.__globals__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "generator frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "changes the messages": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
}


@pytest.mark.parametrize("template", [*BOMBS.values(), *ESCAPES.values()], ids=[*BOMBS, *ESCAPES])
def test_hostile_templates_are_stopped(template: str) -> None:
    with pytest.raises(InputError, match=r"^chat_template: ") as caught:
        out(template)
    assert "\n" not in str(caught.value)
    # Stopped before it grew, neither by the allocator nor by the clock.
    assert "memory" not in str(caught.value)
    assert "seconds" not in str(caught.value)


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsq.tokenizer_port import sandbox

    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(sandbox, "MAX_STEPS", 10**12)
    with pytest.raises(InputError, match="more than 0 seconds"):
        out(BOMBS["nested loops"])


def test_a_long_conversation_is_no_bomb() -> None:
    messages = talk(*["def f(x):\n    return x\n" * 100] * 400)
    text = render(TEMPLATE, messages, bos_token="", eos_token="", add_generation_prompt=True)
    assert len(text) > 800_000


def test_a_refusal_is_the_templates_own_words() -> None:
    with pytest.raises(InputError, match="refuses these messages: Roles must alternate"):
        out("{{ raise_exception('Roles must\nalternate') }}")
    with pytest.raises(InputError, match="TemplateSyntaxError"):
        out("{% if %}")

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
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
from tests.models import ROOT

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


# The ways in which published templates of the family and its neighbours are written.
TEMPLATES = {
    "one line": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ 'User: ' + m['content'] + '\\n\\n' }}{% elif m['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + m['content'] + eos_token }}{% elif m['role'] == 'system' %}"
    "{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "lines": TEMPLATE,
    # DeepSeek Coder's own: a default system text, white space control here and there.
    "looks for a system message": """\
{% if not add_generation_prompt is defined %}
{% set add_generation_prompt = false %}
{% endif %}
{%- set ns = namespace(found=false) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set ns.found = true -%}
    {%- endif -%}
{%- endfor -%}
{{bos_token}}{%- if not ns.found -%}
{{'You write programs.\\n'}}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
{{ message['content'] }}
    {%- else %}
        {%- if message['role'] == 'user' %}
{{'### Instruction:\\n' + message['content'] + '\\n'}}
        {%- else %}
{{'### Response:\\n' + message['content'] + '\\n<|EOT|>\\n'}}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}
{{'### Response:'}}
{% endif %}""",
    "slices and loops": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ messages[0].content | trim }}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|User|>' if m.role == 'user' else '<|Assistant|>' }}{{ m.content }}"
    "{% if not loop.last or m.role != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] == 'user' %}<|Assistant|>{% endif %}",
    "no BOS, a macro": "{% macro turn(role, text) %}<|{{ role }}|>\n{{ text.strip() }}<|EOT|>\n"
    "{% endmacro %}{% for m in messages %}{{ turn(m['role'] | capitalize, m['content']) }}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>\n{% endif %}",
}
CODE = "```python\ndef f(x):\n\t{{ x }} {% if %}  # ü\r\n```"
CONVERSATIONS = {
    "one question": talk("Hi"),
    "system": [{"role": "system", "content": "Be brief. "}, *talk("Hi")],
    "several turns": talk("one", "two ", "\nthree", "four", "five"),
    "ends with an answer": talk("one", "two"),
    "Chinese": [
        {"role": "system", "content": "你是助手。"},
        *talk("写一个快速排序", "好的。", "谢谢！"),
    ],
    "code": talk(CODE, CODE, f"What does {CODE} do?"),
    "white space": talk("  ü \n\n", " spaced ", "> quote <b>"),
    "empty": talk("", "x", ""),
    "marks": talk("🙂👩\u200d💻 e\u0301 \u2028\u0085 \x00\x7f"),
}


@pytest.mark.torch
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_like_transformers_itself(vocab: Vocabulary, template: str) -> None:
    from transformers import PreTrainedTokenizerFast

    # What the user types holds no control token here: those transformers lets through.
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(vocab.tokenizer_json or ""),
        bos_token=BOS,
        eos_token=EOT,
        chat_template=template,
    )
    ours = Tokenizer.from_vocabulary(dataclasses.replace(vocab, chat_template=template))
    for name, messages in CONVERSATIONS.items():
        for prompt in (True, False):
            how = {"conversation": messages, "add_generation_prompt": prompt}
            text = theirs.apply_chat_template(**how, tokenize=False)
            assert render_chat(ours, messages, {"add_generation_prompt": prompt}) == text, name
            ids = theirs.apply_chat_template(**how, tokenize=True, return_dict=False)
            if not text.startswith(BOS):
                ids = [vocab.bos, *ids]
            assert ours.chat(messages, add_generation_prompt=prompt) == ids, name


@pytest.mark.torch
def test_with_control_tokens_let_through_as_transformers_does(vocab: Vocabulary) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(vocab.tokenizer_json or ""),
        bos_token=BOS,
        eos_token=EOT,
        chat_template=TEMPLATE,
    )
    ours = Tokenizer.from_vocabulary(vocab)
    for messages in (talk(f"a {EOT} b"), talk(f"{BOS}x", f" {EOT} ", "<｜fim▁begin｜>")):
        ids = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ours.chat(messages, parse_special=True) == ids
        assert ours.chat(messages) != ids


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
    bare = TEMPLATE.removeprefix("{{ bos_token }}")
    for template in (TEMPLATE, bare, "\n " + TEMPLATE, BOS + bare):
        tok = Tokenizer.from_vocabulary(dataclasses.replace(vocab, chat_template=template))
        ids = tok.chat(talk("x"))
        assert ids.count(vocab.bos or 0) == 1
        assert tok.decode(ids, skip_special=False).strip().startswith(BOS)
        assert tok.chat(talk("x"), parse_special=True) == ids
        assert tok.chat(talk("x"), add_bos=False).count(vocab.bos or 0) == (template != bare)
        # Also where the caller writes one, be it let through.
        assert tok.chat(talk(BOS)).count(vocab.bos or 0) == 1
    echo = dataclasses.replace(vocab, chat_template="{{ messages[0].content }}")
    ids = Tokenizer.from_vocabulary(echo).chat(talk(f"{BOS}x"), parse_special=True)
    assert ids.count(vocab.bos or 0) == 1
    without = dataclasses.replace(vocab, chat_template=bare, add_bos=False)
    assert vocab.bos not in Tokenizer.from_vocabulary(without).chat(talk("x"))


def test_white_space_that_a_marker_swallows(vocab: Vocabulary) -> None:
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
    for messages, message in (
        (None, "are None; a list of objects"),
        ("hi", "are 'hi'; a list of objects"),
        (3, "are 3; a list of objects"),
        (["hi"], "one is 'hi'; an object is needed"),
        ([None], "one is None; an object is needed"),
        ([{"role": 3}], "role is 3"),
        (talk("a\ud800"), "lone surrogate"),
    ):
        with pytest.raises(InputError, match=message):
            tok.chat(messages)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="chat_template: failed on these messages: TypeError"):
        tok.chat([{"role": "user", "content": None}])
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(InputError, match="nested too deeply"):
        tok.chat([{"role": "user", "content": endless}])
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


HOARD = (
    "{%% set n = namespace(x=[]) %%}{%% for i in range(99999) %%}{%% set n.x = [n.x, %s] %%}"
    "{%% endfor %%}"
)
LETTERS = "A" * 50000 + "{{ '' }}" + "B" * 50000
NESTED = (
    "{% set n = namespace(x=(1,), y=(1,)) %}{% for i in range(40) %}{% set n.x = (n.x, n.x) %}"
    "{% set n.y = (n.y, n.y) %}{% endfor %}"
)
DEEP = (
    "{% set n = namespace(x=1) %}{% for i in range(2) %}{% for j in range(90000) %}"
    "{% set n.x = (n.x,) %}{% endfor %}{% endfor %}"
)
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
    "long template": "a" * 10_000_000,
    "long template, code": "{{ a }}" * 1_500_000,
    "list of a range": HOARD % "range(99999) | list",
    "list of a lazy filter": HOARD % "range(9999) | map('string') | list",
    "sorted range": HOARD % "range(99999) | sort",
    "slices": "{% set s = 'a' * 4000000 %}" + HOARD % "s[1:]",
    "reversed": "{% set s = 'a' * 4000000 %}" + HOARD % "s | reverse",
    "copies": "{% set s = [1] * 400000 %}" + HOARD % "s.copy()",
    "copies by dict": "{% set d = dict(range(9999) | map('string') | zip) %}" + HOARD % "dict(d)",
    "long literal": HOARD % ("[" + "1," * 20000 + "]"),
    "long block": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set c %}"
    + LETTERS
    + "{% endset %}{% set n.x = [n.x, c] %}{% endfor %}",
    "long macro": "{% macro f() %}" + LETTERS + "{% endmacro %}" + HOARD % "f()",
    "compares nested": NESTED + "{{ n.x == n.y }}",
    "looks for nested": NESTED + "{{ n.x in [n.y] }}",
    "compares nested by a test": NESTED + "{{ n.x is eq(n.y) }}",
    "selects nested": NESTED + "{{ [n.x] | select('eq', n.y) | list }}",
    "counts nested": NESTED + "{{ [n.x].count(n.y) }}",
    "hashes nested": NESTED + "{{ {n.x: 1} }}",
    "finds nested": NESTED + "{{ {}[n.x] }}",
    "gets nested": NESTED + "{{ {}.get(n.x) }}",
    "hashes deep": DEEP + "{{ {n.x: 1} }}",
    "large numbers": "{% set n = namespace(x=7) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}{{ n.x // 3 }}",
    "long date": "{{ strftime_now('%c' * 100000) }}",
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


def stopped(template: str) -> str:
    with pytest.raises(InputError, match=r"^chat_template: ") as caught:
        out(template)
    return str(caught.value)


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_no_template_escapes(template: str) -> None:
    assert "\n" not in stopped(template)


# In a process of its own, for what would crash this one, or take its memory.
IN_512_MIB = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
from dsq.tokenizer_port import budget
budget.MAX_SECONDS = 600.0  # the other bounds come first, on a slow machine too
from tests.tokenizer_port.test_chat import BOMBS, stopped
for name in BOMBS:
    print(json.dumps([name, stopped(BOMBS[name])]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_hostile_templates_are_stopped_before_they_grow() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_512_MIB],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,  # were one not stopped
    )
    stops = dict(map(json.loads, done.stdout.splitlines()))
    assert [*stops] == [*BOMBS], f"the last but one ended it: {done.stderr[-300:]}"
    for name, message in stops.items():
        assert "memory" not in message, name
        assert "\n" not in message, name
        assert len(message) < 1000, name


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsq.tokenizer_port import budget

    monkeypatch.setattr(budget, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(budget, "MAX_STEPS", 10**12)
    with pytest.raises(InputError, match="more than 0 seconds"):
        out(BOMBS["nested loops"])


def test_a_long_conversation_is_no_bomb() -> None:
    messages = talk(*["def f(x):\n    return x\n" * 100] * 400)
    text = render(TEMPLATE, messages, bos_token="", eos_token="", add_generation_prompt=True)
    assert len(text) > 800_000


def test_a_refusal_is_the_templates_own_words() -> None:
    with pytest.raises(InputError, match="…$") as caught:
        out("{{ raise_exception('a' * 4000000) }}")
    assert len(str(caught.value)) < 1000
    with pytest.raises(InputError, match="refuses these messages: Roles must alternate"):
        out("{{ raise_exception('Roles must\nalternate') }}")
    with pytest.raises(InputError, match="TemplateSyntaxError"):
        out("{% if %}")


def test_a_bos_typed_in_a_message_is_no_reason_to_leave_out_the_first(vocab: Vocabulary) -> None:
    bare = dataclasses.replace(
        vocab, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tok = Tokenizer.from_vocabulary(bare)
    messages = [{"role": "user", "content": f"a{BOS}b"}]
    ids = tok.chat(messages, parse_special=True)
    assert ids[0] == vocab.bos
    assert ids.count(vocab.bos) == 2  # the typed one is what --special asks for
    assert tok.chat(messages)[1:].count(vocab.bos) == 0


def test_a_setting_cannot_complete_a_marker(vocab: Vocabulary) -> None:
    hostile = dataclasses.replace(vocab, chat_template="<|{{ name }}{{ messages[0].content }}")
    tok = Tokenizer.from_vocabulary(hostile)
    ids = tok.chat([{"role": "user", "content": "x"}], name="EOT|>")
    assert vocab.eot not in ids

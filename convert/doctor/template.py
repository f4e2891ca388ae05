"""The chat template: there where a model converses, and one that can be rendered."""

from __future__ import annotations

from collections.abc import Iterator

from dsq.convert.doctor.facts import TEMPLATE, Facts
from dsq.convert.doctor.family import EOT, Family, variant
from dsq.convert.doctor.findings import Finding
from dsq.convert.gguf.metadata import STRING, KeyValue
from dsq.errors import InputError
from dsq.tokenizer_port.json_file import brief

# As DeepSeek publishes it for its instruct models; also in llama.cpp's tests (MIT licence). Its
# missing newline after a given system message is the model's own.
CODER_TEMPLATE = """\
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
{{'You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek \
Company, and you only answer questions related to computer science. For politically sensitive \
questions, security and privacy issues, and other non-computer science questions, you will refuse \
to answer\\n'}}
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
{% endif %}"""


def check_template(facts: Facts, family: Family | None, *, render: bool) -> Iterator[Finding]:
    """`render` false: only whether there is one, which takes no time."""
    said = facts.metadata.get(TEMPLATE)
    known = family is not None and family.pre == "deepseek-coder" and EOT in facts.index
    kind = variant(facts)
    if said is None:
        if not known or not kind.instruct:
            return  # a base model needs none
        wrong = f"{TEMPLATE} is absent, but {kind.why}: an instruct model"
        effect = "a chat runs in a format that the model was not trained on, or not at all"
    elif render and (reason := _broken(facts)) is not None:
        wrong = f"{TEMPLATE} is broken: {reason}"
        effect = "a chat fails, or runs in a format that the model was not trained on"
        known = known and (kind.instruct or "### Instruction:" in str(said))
    else:
        return
    yield Finding(
        code="chat_template",
        wrong=wrong,
        effect=effect,
        mend="put in the template of DeepSeek Coder's instruct models"
        if known
        else "none by itself: the right template is not known; convert the model again with it",
        sure=kind.sure,
        set=(KeyValue(TEMPLATE, CODER_TEMPLATE, STRING),) if known else (),
    )


def _broken(facts: Facts) -> str | None:
    """Why the template cannot say one message of a user; None when it can."""
    template = facts.text(TEMPLATE)
    if template is None:
        return f"it is {brief(facts.metadata[TEMPLATE])}, not a text"
    if not template.strip():
        return "it is empty"
    from dsq.tokenizer_port.chat_template import render

    names = {}
    for name in ("bos", "eos"):
        row = facts.id(name)
        names[f"{name}_token"] = "" if row is None else facts.tokens[row]
    try:
        text = render(
            template, [{"role": "user", "content": "Hello"}], add_generation_prompt=True, **names
        )
    except InputError as error:
        return str(error).removeprefix("chat_template: ")
    return None if "Hello" in text else "it leaves out what the user says"

"""Request bodies, OpenAI's and llama.cpp's, and what they ask of the sampler.

`null` is the same as absent. Fields that dsq does not know are ignored, as both servers do; those
that it knows and cannot honour are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from dsq.errors import InputError, UnsupportedError
from dsq.runtime.server.backend import MAX_SEED, Sampling
from dsq.runtime.server.json_schema import ANY_OBJECT, schema_to_gbnf
from dsq.tokenizer_port.tokenizer import Tokenizer

MAX_ANSWERS = 32  # n × prompts of one request
MAX_STOPS = 16
MAX_GRAMMAR = 64 * 1024

StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=-1, le=2**31 - 1)]  # -1: no limit
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Bias = float | bool


class Body(BaseModel):
    """Types are taken as they are: "1" is no number, 1 is no truth value."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class SamplingBody(Body):
    """What every generating request may say about sampling. The defaults are llama.cpp's."""

    bias_by_text: ClassVar[bool] = False  # OpenAI's keys are token ids, llama.cpp's texts, too

    model: str | None = None
    stream: bool | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Count | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    repeat_last_n: Count | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    seed: Int64 | None = Field(None, description="-1 or absent: drawn")
    logit_bias: (
        dict[str, Bias] | list[Annotated[list[int | str | Bias], Field(min_length=2)]] | None
    ) = Field(
        None,
        description="token id (llama.cpp's endpoints: or text) → what is added to its logit; "
        "false forbids it",
    )
    grammar: Annotated[str, StringConstraints(max_length=MAX_GRAMMAR)] | None = Field(
        None, description="GBNF, with the start rule root"
    )
    json_schema: dict[str, Any] | bool | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    parse_special: bool | None = Field(
        None, description="control tokens' texts in the prompt become the tokens; default false"
    )
    repo: Annotated[str, StringConstraints(max_length=1024)] | bool | None = Field(
        None, description="files of this repository (--repo) stand before the prompt; true: the one"
    )
    path: Annotated[str, StringConstraints(max_length=1024)] | None = Field(
        None, description="the name, in the repository, of the file that is written: src/main.py"
    )

    # Known, and not to be had.
    mirostat: int | None = None
    dry_multiplier: float | None = None
    xtc_probability: float | None = None
    dynatemp_range: float | None = None
    typical_p: float | None = None
    lora: list[Any] | None = None

    def refuse_unsupported(self) -> None:
        for name, off in (
            *(("mirostat", 0), ("dry_multiplier", 0), ("xtc_probability", 0)),
            *(("dynatemp_range", 0), ("typical_p", 1), ("lora", [])),
        ):
            value = getattr(self, name)
            if value is not None and value != off:
                raise UnsupportedError(f"{name}: this server has no such thing; leave it out")

    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self) -> Sampling:
        def value(given: float | None, default: float) -> float:
            return default if given is None else float(given)

        seed = None if self.seed is None or self.seed == -1 else self.seed % (MAX_SEED + 1)
        return Sampling(
            temperature=value(self.temperature, 0.8),
            top_k=40 if self.top_k is None else max(0, self.top_k),
            top_p=value(self.top_p, 0.95),
            min_p=value(self.min_p, 0.05),
            repeat_penalty=value(self.repeat_penalty, 1.0),
            presence_penalty=value(self.presence_penalty, 0.0),
            frequency_penalty=value(self.frequency_penalty, 0.0),
            repeat_last_n=64 if self.repeat_last_n is None else self.repeat_last_n,
            seed=seed,
        )

    def gbnf(self) -> str | None:
        """The grammar of `grammar` or `json_schema`."""
        if self.grammar and self.json_schema is not None:
            raise InputError("grammar and json_schema are both given; give one of them")
        if self.grammar:
            return self.grammar
        return None if self.json_schema is None else schema_to_gbnf(self.json_schema)

    def biases(self, tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
        """Token id → what is added to its logit. A text stands for each of its tokens."""
        found: dict[int, float] = {}
        given = self.logit_bias or []
        pairs = list(given.items()) if isinstance(given, dict) else [(p[0], p[1]) for p in given]
        if len(pairs) > 1024:
            raise InputError(f"logit_bias: has {len(pairs)} entries; at most 1024 are taken")
        for token, bias in pairs:
            if bias is True or not isinstance(bias, (int, float)) or isinstance(token, bool):
                raise InputError(
                    f"logit_bias: {str(token)[:40]!r} has the bias {str(bias)[:20]}; a bias is a "
                    "number, or false"
                )
            if isinstance(token, float):
                raise InputError(f"logit_bias: {token} is no token id; give a whole number")
            if isinstance(token, str) and not re.fullmatch(r"-?[0-9]{1,10}", token):
                if not self.bias_by_text:
                    raise InputError(
                        f"logit_bias: {token[:40]!r} is no token id; give a number, which "
                        "/tokenize finds for a text"
                    )
                ids = tokenizer.encode(token, add_bos=False)
            else:
                ids = [int(token)]
            value = -math.inf if bias is False else max(-1e9, min(1e9, float(bias)))
            for i in ids:
                if not 0 <= i < len(tokenizer):
                    raise InputError(
                        f"logit_bias: there is no token {i}; ids go from 0 to {len(tokenizer) - 1}"
                    )
                found[i] = found.get(i, 0.0) + value
        return tuple(found.items())


class StreamOptions(Body):
    include_usage: bool | None = None


Prompt = (
    str
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[str | list[TokenId]], Field(min_length=1, max_length=MAX_ANSWERS)]
)


class CompletionBody(SamplingBody):
    """POST /v1/completions"""

    prompt: Prompt | None = None
    suffix: str | None = Field(None, description="what follows the hole: fill in the middle")
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    best_of: Int64 | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None


class TextPart(Body):
    type: str
    text: str | None = None


Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class ChatMessage(Body):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Role
    content: str | list[TextPart] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        called = self.role == "assistant" and (self.model_extra or {}).get("tool_calls")
        if self.content is None and not called:
            raise PydanticCustomError("content", "content is missing or null; give a text")
        return self

    def plain(self) -> dict[str, Any]:
        """For a chat template: the content as one text."""
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type not in ("text", "input_text") or part.text is None:
                    raise UnsupportedError(
                        f"messages: a part of type {part.type!r}; this server takes text only"
                    )
            content = "".join(part.text or "" for part in content)
        extra = {k: v for k, v in (self.model_extra or {}).items() if v is not None}
        role = "system" if self.role == "developer" else self.role  # OpenAI's newer word for it
        return {"role": role, "content": content or "", **extra}


NO_TOOLS = "tools: this server calls no tools; leave them out"


def check_roles(messages: Sequence[ChatMessage], template: str | None) -> None:
    """Raises UnsupportedError for a role that the model's template would take for another one."""
    for i, message in enumerate(messages):
        if message.role in ("tool", "function") and message.role not in (template or ""):
            raise UnsupportedError(
                f"messages.{i}.role: is {message.role!r}, which this model's chat template does "
                "not know; send the text as a user's message"
            )


class NamedSchema(Body):
    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)

    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(Body):
    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)

    type: str
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")  # llama.cpp's place for it


class ChatBody(SamplingBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if (self.tools or self.functions) and self.tool_choice != "none":
            raise UnsupportedError(NO_TOOLS)

    def gbnf(self) -> str | None:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return super().gbnf()
        if self.grammar or self.json_schema is not None:
            raise InputError("response_format and a grammar are both given; give one of them")
        if wanted.type == "json_object":
            return schema_to_gbnf(ANY_OBJECT if wanted.schema_ is None else wanted.schema_)
        if wanted.type != "json_schema":
            raise InputError(
                f"response_format: type is {wanted.type!r}; it is text, json_object or json_schema"
            )
        schema = wanted.json_schema.schema_ if wanted.json_schema else wanted.schema_
        if schema is None:
            raise InputError("response_format: json_schema has no schema; give one")
        return schema_to_gbnf(schema)


class NativeBody(SamplingBody):
    """What llama.cpp's /completion and /infill share."""

    bias_by_text = True

    n_predict: Count | None = None
    max_tokens: Count | None = None
    n_probs: Annotated[int, Field(ge=0, le=64)] | None = None
    return_tokens: bool | None = None
    response_fields: Annotated[list[str], Field(max_length=64)] | None = None
    t_max_predict_ms: Count | None = None
    n_indent: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        None, description="a new line with fewer characters of white space before it ends the text"
    )
    n_cmpl: Int64 | None = None
    post_sampling_probs: bool | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.n_cmpl not in (None, 1):
            raise UnsupportedError(f"n_cmpl is {self.n_cmpl}; take n of /v1/completions for that")
        if self.post_sampling_probs:
            raise UnsupportedError(
                "post_sampling_probs: this server has the model's own only; leave it out"
            )


class NativeCompletionBody(NativeBody):
    """POST /completion"""

    prompt: (
        str
        | dict[str, Any]
        | Annotated[list[str | TokenId | dict[str, Any] | list[TokenId | str]], Field(min_length=1)]
        | None
    ) = None


class ExtraFile(Body):
    filename: str | None = None
    text: str


class InfillBody(NativeBody):
    """POST /infill"""

    input_prefix: str | None = None
    input_suffix: str | None = None
    input_extra: Annotated[list[ExtraFile], Field(max_length=256)] | None = None
    prompt: str | None = Field(None, description="the beginning of the line that is being written")


class TemplateBody(Body):
    """POST /apply-template, /v1/chat/completions/input_tokens"""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    add_generation_prompt: bool | None = None
    tools: list[Any] | None = None


class TokenizeBody(Body):
    """POST /tokenize"""

    model: str | None = None
    content: str
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[TokenId]

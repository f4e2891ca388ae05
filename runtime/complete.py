"""Code completion: go on after a prefix, or fill the hole between a prefix and a suffix."""

from __future__ import annotations

from collections.abc import Sequence

from dsq.errors import InputError
from dsq.runtime.engine import Engine
from dsq.runtime.generate import Generation, generate
from dsq.runtime.sampling import GREEDY, SamplerSettings
from dsq.tokenizer_port.tokenizer import Tokenizer


def completion_ids(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str | None = None,
    *,
    parse_special: bool = False,
) -> list[int]:
    """The prompt's tokens. With a suffix (also an empty one): begin, prefix, hole, suffix, end."""
    if suffix is not None:
        return tokenizer.fim(prefix, suffix, parse_special=parse_special)
    ids = tokenizer.encode(prefix, parse_special=parse_special)
    if not ids:
        raise InputError("there is nothing to complete: the prefix is empty")
    return ids


def complete(
    engine: Engine,
    prefix: str,
    suffix: str | None = None,
    *,
    max_tokens: int = 256,
    stop_strings: Sequence[str] = (),
    sampler: SamplerSettings = GREEDY,
    reuse: bool = False,
    parse_special: bool = False,
) -> Generation:
    """Complete `prefix`; with `suffix`, write what belongs between the two.

    The prompt is plain text: nothing in it becomes a control token, unless `parse_special`. Raises
    InputError when the model has no fill-in-the-middle tokens, or the prompt does not fit the
    context.
    """
    return generate(
        engine,
        completion_ids(engine.tokenizer, prefix, suffix, parse_special=parse_special),
        max_tokens=max_tokens,
        stop_ids=engine.tokenizer.stop_ids("complete"),
        stop_strings=stop_strings,
        sampler=sampler,
        reuse=reuse,
    )

"""Code completion: go on after a prefix, or fill the hole between a prefix and a suffix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsq.errors import InputError
from dsq.runtime.engine import Engine
from dsq.runtime.generate import Generation, generate
from dsq.runtime.repo.context import ContextPlanner
from dsq.runtime.repo.index import RepoGraph
from dsq.runtime.sampling import GREEDY, SamplerSettings
from dsq.runtime.server.infill import Surroundings, infill, with_files
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


def repo_completion_ids(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str | None,
    graph: RepoGraph,
    path: str | None,
    *,
    n_ctx: int,
    n_predict: int,
    parse_special: bool = False,
) -> tuple[list[int], Mapping[str, Any]]:
    """As `completion_ids`, behind the files of a repository that the file at `path` needs.

    Also what went in and what was dropped, as the server reports it.
    """
    planner, text = ContextPlanner(tokenizer), prefix + (suffix or "")
    around = Surroundings(path, (), lambda room: planner.plan(graph, room, path=path, text=text))
    if suffix is None:
        ids, report = with_files(
            tokenizer,
            prefix,
            n_ctx=n_ctx,
            n_predict=n_predict,
            around=around,
            parse_special=parse_special,
        )
        return list(ids), report
    found = infill(
        tokenizer,
        prefix,
        suffix,
        n_ctx=n_ctx,
        n_predict=n_predict,
        around=around,
        parse_special=parse_special,
    )
    return list(found.ids), found.report()


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
    return complete_ids(
        engine,
        completion_ids(engine.tokenizer, prefix, suffix, parse_special=parse_special),
        max_tokens=max_tokens,
        stop_strings=stop_strings,
        sampler=sampler,
        reuse=reuse,
    )


def complete_ids(
    engine: Engine,
    ids: Sequence[int],
    *,
    max_tokens: int = 256,
    stop_strings: Sequence[str] = (),
    sampler: SamplerSettings = GREEDY,
    reuse: bool = False,
) -> Generation:
    """Complete a prompt of tokens, to where a text ends."""
    return generate(
        engine,
        ids,
        max_tokens=max_tokens,
        stop_ids=engine.tokenizer.stop_ids("complete"),
        stop_strings=stop_strings,
        sampler=sampler,
        reuse=reuse,
    )

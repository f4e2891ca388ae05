"""Whether a small model may guess for a large one: headers only, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.rope import describe
from dsq.errors import InputError
from dsq.runtime.source import Source
from dsq.tokenizer_port.vocabulary import TokenType

_NO_TOKEN = int(TokenType.UNUSED)


def check_draft(model: Path, draft: Path, n_ctx: int) -> None:
    """Raises InputError if the draft model's tokens or RoPE differ, or it knows less context.

    Other tokens would make every guess nonsense, another RoPE most of them, which shows in the
    speed alone. Rows without a token may differ in number.
    """
    if not draft.is_file():
        raise InputError(f"--draft {draft}: no such file; name the GGUF of a smaller model")
    ours, theirs = open_checkpoint(model).spec, open_checkpoint(draft).spec
    if ours.rope != theirs.rope:
        raise InputError(
            f"--draft {draft.name}: its RoPE is {describe(theirs.rope)}, but {model.name}'s is "
            f"{describe(ours.rope)}; take a smaller model of the same family, or mend the one that "
            "was converted wrongly: dsq doctor"
        )
    if theirs.n_ctx < n_ctx:
        raise InputError(
            f"--draft {draft.name}: was trained on {theirs.n_ctx} tokens, but {model.name} is "
            f"served with {n_ctx}; give -c {theirs.n_ctx}"
        )
    known, guessed = Source(model).vocabulary, Source(draft).vocabulary
    for i in range(max(len(known.tokens), len(guessed.tokens))):
        a, b = (
            v.tokens[i] if i < len(v.tokens) and v.types[i] != _NO_TOKEN else None
            for v in (known, guessed)
        )
        if a != b:
            raise InputError(
                f"--draft {draft.name}: its token {i} is {b!r}, but {model.name}'s is {a!r}; a "
                "draft model needs the same vocabulary: take a smaller model of the same family"
            )

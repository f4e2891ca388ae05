"""Does an artifact say of the model what the source says: shape, RoPE, tokens, template?

Each function returns what differs, in words; an empty list is agreement.
"""

from __future__ import annotations

import math

import numpy as np

from dsq.convert.rope import Rope, describe
from dsq.convert.spec import ModelSpec
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

_FLOAT_TOLERANCE = 1e-6  # GGUF keeps float32

_SIZES = {
    "n_layer": "layers",
    "n_embd": "hidden size",
    "n_ff": "feed-forward size",
    "n_head": "attention heads",
    "n_head_kv": "KV heads",
    "head_dim": "head size",
    "n_vocab": "vocabulary rows",
    "n_ctx": "context",
    "attention_bias": "attention biases",
    "mlp_bias": "feed-forward biases",
    "tied": "tied embeddings",
}
_IDS = ("bos", "eos", "eot", "pad", "unk", "fim_prefix", "fim_suffix", "fim_middle")


def hyperparameter_differences(artifact: ModelSpec, source: ModelSpec) -> list[str]:
    found = [
        f"{words} is {getattr(artifact, key)}, the source says {getattr(source, key)}"
        for key, words in _SIZES.items()
        if getattr(artifact, key) != getattr(source, key)
    ]
    if not math.isclose(artifact.rms_eps, source.rms_eps, rel_tol=_FLOAT_TOLERANCE):
        found.append(f"RMSNorm epsilon is {artifact.rms_eps:g}, the source says {source.rms_eps:g}")
    return found


def rope_differences(artifact: Rope, source: Rope, head_dim: int) -> list[str]:
    """Differences in what is computed: a factor of 1 and no factor are the same."""
    ours, our_scale = artifact.inv_freq(head_dim)
    theirs, their_scale = source.inv_freq(head_dim)
    same_scale = math.isclose(our_scale, their_scale, rel_tol=_FLOAT_TOLERANCE)
    if np.allclose(ours, theirs, rtol=1e-5, atol=0) and same_scale:
        return []
    found = []
    if not math.isclose(artifact.freq_base, source.freq_base, rel_tol=_FLOAT_TOLERANCE):
        found.append(f"base is {artifact.freq_base:g}, the source says {source.freq_base:g}")
    if artifact.kind != source.kind or not math.isclose(
        artifact.factor, source.factor, rel_tol=_FLOAT_TOLERANCE
    ):
        found.append(f"factor is {_factor(artifact)}, the source says {_factor(source)}")
    for key, words in {
        "n_ctx_orig": "original context",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "attention_factor": "attention factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    }.items():
        a, b = getattr(artifact, key), getattr(source, key)
        if artifact.kind == source.kind and a != b:
            found.append(f"{words} is {a}, the source says {b}")
    return found or [f"it is {describe(artifact)}, the source says {describe(source)}"]


def _factor(rope: Rope) -> str:
    return "1" if rope.kind == "none" else f"{rope.kind} {rope.factor:g}"


def vocabulary_differences(artifact: Vocabulary, source: Vocabulary) -> list[str]:
    """Tokens, types, merges, the pre-tokenizer and every special id."""
    found = _first_tokens(artifact, source)
    if artifact.model != source.model or artifact.pre != source.pre:
        found.append(
            f"tokenizer is {artifact.model}, pre-tokenizer {artifact.pre}, "
            f"the source's {source.model}, {source.pre}"
        )
    if artifact.merges != source.merges:
        pairs = enumerate(zip(artifact.merges, source.merges, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), None)
        found.append(
            f"{len(artifact.merges)} merges, the source has {len(source.merges)}"
            if first is None
            else f"merge {first} is {artifact.merges[first]!r}, "
            f"the source's is {source.merges[first]!r}"
        )
    for name in (*_IDS, "add_bos", "add_eos"):
        a, b = getattr(artifact, name), getattr(source, name)
        if a != b:
            what = name if name.startswith("add") else f"{name} id"
            found.append(f"{what} is {_id(a, artifact)}, the source says {_id(b, source)}")
    return found


def _first_tokens(artifact: Vocabulary, source: Vocabulary) -> list[str]:
    if len(artifact.tokens) != len(source.tokens):
        return [f"{len(artifact.tokens)} tokens, the source has {len(source.tokens)}"]
    found = []
    pairs = enumerate(zip(artifact.tokens, source.tokens, strict=True))
    different = [i for i, (a, b) in pairs if a != b]
    if different:
        i = different[0]
        more = f" ({len(different)} ids differ)" if len(different) > 1 else ""
        found.append(
            f"id {i} is {artifact.tokens[i]!r}, the source says {source.tokens[i]!r}{more}"
        )
    kinds = enumerate(zip(artifact.types, source.types, strict=True))
    types = [i for i, (a, b) in kinds if a != b]
    if types:
        i = types[0]
        found.append(
            f"id {i} ({source.tokens[i]!r}) is of type {_type(artifact.types[i])}, "
            f"the source says {_type(source.types[i])}"
        )
    return found


def _type(kind: int) -> str:
    return TokenType(kind).name if kind in set(TokenType) else str(kind)


def _id(value: int | bool | None, vocab: Vocabulary) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value} ({vocab.tokens[value]!r})"


def template_differences(artifact: Vocabulary, source: Vocabulary) -> list[str]:
    found = []
    ours = {"": artifact.chat_template, **artifact.chat_templates}
    theirs = {"": source.chat_template, **source.chat_templates}
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name), theirs.get(name)
        if (a or None) == (b or None):
            continue
        which = f"template {name!r}" if name else "the chat template"
        if not a or not b:
            found.append(
                f"{which} is {'missing' if not a else 'there'}, the source has "
                f"{'none' if not b else 'one'}"
            )
        else:
            at = next(
                (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)),
            )
            found.append(
                f"{which} differs from character {at} on: {a[at : at + 20]!r}, "
                f"the source's is {b[at : at + 20]!r}"
            )
    return found

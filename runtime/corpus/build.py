"""A corpus from repositories, or in the proportions that DeepSeek Coder was trained on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsq.errors import InputError
from dsq.runtime.corpus import duplicates, fim, machine
from dsq.runtime.corpus.corpus import Corpus
from dsq.runtime.corpus.named import Named, code_groups, open_repositories, tiers
from dsq.runtime.corpus.parts import Filler, Part
from dsq.runtime.corpus.samples import Cutter, Sample
from dsq.runtime.corpus.sources import Gate
from dsq.runtime.repo.syntax import require_parsers
from dsq.tokenizer_port.tokenizer import Tokenizer

# arXiv 2401.14196, section 2: code, English about code, Chinese.
MIX_CODE = {"code": 0.87, "english": 0.10, "chinese": 0.03}
MOST_TOKENS = 1 << 24  # they are held as Python lists

Advance = Callable[[int], None]  # called with the tokens that were added


@dataclass(frozen=True)
class Settings:
    """A corpus of `n_tokens` for windows of `n_ctx`.

    `fim_rate`: the share of code samples with a middle to fill in, if the model has the tokens.
    `strict`: a part that falls short is an error, not a warning in the record.
    """

    n_tokens: int
    n_ctx: int
    seed: int = 0
    fim_rate: float = fim.RATE
    strict: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.n_tokens <= MOST_TOKENS:
            raise InputError(f"{self.n_tokens} tokens asked for; give 1 to {MOST_TOKENS}")
        if self.n_ctx < 4:
            raise InputError(f"n_ctx is {self.n_ctx}; windows need at least 4 tokens")
        if not 0 <= self.fim_rate <= 1:
            raise InputError(f"the FIM rate is {self.fim_rate}; give a share from 0 to 1")


def from_repositories(
    tokenizer: Tokenizer,
    folders: Sequence[Path],
    settings: Settings,
    advance: Advance = lambda _: None,
) -> Corpus:
    """The source files in these folders, by DeepSeek Coder's data recipe.

    Raises InputError for a folder without any source file, and without the calibrate extra.
    """
    require_parsers()
    gate = Gate()
    groups = code_groups(open_repositories(folders, gate), settings.seed)
    builder = _Builder(tokenizer, [Part("code", 1.0, [groups])], settings, gate, advance)
    return builder.build({"kind": "repo"})


def mix_code(
    tokenizer: Tokenizer,
    settings: Settings,
    named: Named | None = None,
    places: machine.Places | None = None,
    advance: Advance = lambda _: None,
) -> Corpus:
    """87 % code, 10 % English about code, 3 % Chinese, by tokens.

    What is named comes first, the rest from the machine's `places`. When a part falls short, the
    other parts give its tokens; `record["warnings"]` says so and the real shares stand there too.
    With `settings.strict` that is an InputError.
    """
    require_parsers()
    places = places or machine.places()
    gate, seed = Gate(), settings.seed
    found = tiers(named or Named(), gate, seed)
    found["code"].append(machine.code_groups(places.code, seed, gate.dropped))
    for part, some in (("english", places.english), ("chinese", places.chinese)):
        # One place after the other, the best first: docstrings only when the rest is used up.
        found[part] += [[group] for group in machine.prose_groups(some, seed, part)]
    parts = [Part(name, share, found[name]) for name, share in MIX_CODE.items()]
    builder = _Builder(tokenizer, parts, settings, gate, advance)
    return builder.build({"kind": "mix code", "looked_for": places.to_json()})


class _Builder:
    def __init__(
        self,
        tokenizer: Tokenizer,
        parts: Sequence[Part],
        settings: Settings,
        gate: Gate,
        advance: Advance,
    ) -> None:
        self._settings = settings
        self._gate = gate
        self._cutter = Cutter(tokenizer, settings.n_ctx, settings.seed, settings.fim_rate)
        self._fillers = [Filler(part, self._cutter, gate, advance) for part in parts]

    def build(self, record: dict[str, Any]) -> Corpus:
        warnings = self._fill()
        samples = [sample for filler in self._fillers for sample in filler.samples]
        if not samples:
            raise InputError(
                "the corpus is empty: every file was left out "
                f"({_counts(self._gate.dropped)}); name other sources"
            )
        random.Random(self._settings.seed).shuffle(samples)
        documents = [sample.ids for sample in samples]
        return Corpus(
            documents,
            [sample.is_fim for sample in samples],
            {**record, **self._record(documents), "warnings": warnings},
        )

    def _fill(self) -> list[str]:
        n_tokens, n_ctx = self._settings.n_tokens, self._settings.n_ctx
        warnings = []
        quotas = _quotas([filler.part.share for filler in self._fillers], n_tokens)
        for filler, quota in zip(self._fillers, quotas, strict=True):
            filler.fill(quota, n_ctx)
            if filler.n_tokens < quota:
                warnings.append(_short(filler, quota))
        if warnings and self._settings.strict:
            raise InputError("; ".join(warnings))
        for filler in self._fillers:
            missing = n_tokens - sum(f.n_tokens for f in self._fillers)
            filler.fill(filler.n_tokens + missing, n_ctx)
        return warnings

    def _record(self, documents: list[list[int]]) -> dict[str, Any]:
        settings = self._settings
        total = sum(map(len, documents))
        ids = hashlib.sha256()
        for document in documents:
            ids.update(np.asarray(document, "<i4").tobytes())
        return {
            "seed": settings.seed,
            "n_ctx": settings.n_ctx,
            "tokens_asked": settings.n_tokens,
            "tokens": total,
            "documents": len(documents),
            "sha256": ids.hexdigest(),  # of the token ids in order, little-endian int32
            "parts": {
                filler.part.name: {
                    "share_asked": filler.part.share,
                    "share": filler.n_tokens / total,
                    "tokens": filler.n_tokens,
                    "documents": len(filler.samples),
                    "sources": {name: used.to_json() for name, used in filler.used.items()},
                }
                for filler in self._fillers
            },
            "fim": self._fim(self._fillers[0].samples),
            "dropped": dict(self._gate.dropped.most_common()),
            "near_duplicates": {
                "threshold": duplicates.THRESHOLD,
                "permutations": duplicates.PERMUTATIONS,
                "shingle_words": duplicates.SHINGLE,
                "dropped": len(self._gate.near_duplicates),
                "first": [list(pair) for pair in self._gate.near_duplicates[:20]],
            },
            "gave_up": [text for filler in self._fillers for text in filler.gave_up],
        }

    def _fim(self, code: list[Sample]) -> dict[str, Any]:
        """Of the code's samples only: text for people is never cut."""
        samples = [sample for sample in code if sample.is_fim]
        return {
            "mode": "prefix, suffix, middle",
            "rate": self._cutter.fim_rate,  # 0 when the model has no tokens for it
            "documents": len(samples),
            "tokens": sum(len(sample.ids) for sample in samples),
            "share_of_code_documents": len(samples) / max(1, len(code)),
        }


def _quotas(shares: Sequence[float], n_tokens: int) -> list[int]:
    """Whole tokens that sum to `n_tokens`; the first part takes what rounding leaves."""
    rest = [round(share * n_tokens) for share in shares[1:]]
    return [n_tokens - sum(rest), *rest]


def _short(filler: Filler, quota: int) -> str:
    name = filler.part.name
    origins = ", ".join(filler.used) or "no source"
    option = "--repo DIR" if name == "code" else f"--{name} FILE"
    return (
        f"{name}: {quota} tokens wanted, only {filler.n_tokens} found ({origins}); "
        f"name more with {option}"
    )


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items())) or "none found"

"""A finding is data: what is wrong, what it does, and the keys that mend it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsq.convert.gguf.metadata import ARRAY, I32, KeyValue

TOKEN_TYPE = "tokenizer.ggml.token_type"


@dataclass(frozen=True)
class Finding:
    """One fault of a file, with its mend. Of one diagnosis, no two findings touch one key.

    `serious` says that a current llama.cpp gives other tokens, logits or stops because of it;
    what is not serious misleads other runtimes, older ones or people.
    """

    code: str
    wrong: str
    effect: str
    mend: str  # what is done, or by hand must be done
    serious: bool = True
    sure: bool = True
    set: tuple[KeyValue, ...] = ()
    delete: tuple[str, ...] = ()
    token_types: tuple[tuple[int, int], ...] = ()  # (token id, its type)

    @property
    def mendable(self) -> bool:
        return bool(self.set or self.delete or self.token_types)

    def to_json(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "wrong": self.wrong,
            "effect": self.effect,
            "mend": self.mend,
            "serious": self.serious,
            "sure": self.sure,
            "mendable": self.mendable,
            "set": {e.key: e.value for e in self.set if e.type != ARRAY},
            "delete": list(self.delete),
            "token_types": {
                f"{first}-{last}" if last > first else str(first): kind
                for kind in dict.fromkeys(kind for _, kind in self.token_types)
                for first, last in spans(row for row, k in self.token_types if k == kind)
            },
        }


def spans(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of numbers that follow each other: (first, last) of each."""
    found: list[tuple[int, int]] = []
    for row in sorted(rows):
        if found and row == found[-1][1] + 1:
            found[-1] = found[-1][0], row
        else:
            found.append((row, row))
    return found


@dataclass(frozen=True)
class Diagnosis:
    """`family` is the pre-tokenizer's name of a known vocabulary; `evidence` says how it shows.

    No finding says something only of what was `examined`; `not_examined` has the reasons with it.
    """

    family: str | None
    evidence: str
    findings: tuple[Finding, ...]
    examined: tuple[str, ...]
    not_examined: tuple[str, ...]

    @property
    def mendable(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.mendable)

    @property
    def serious(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.serious)


def mended_entries(
    metadata: Mapping[str, Any],
    types: Mapping[str, tuple[int, int | None]],
    findings: Iterable[Finding],
) -> list[KeyValue]:
    """The metadata with the mends of `findings`: its keys in their order, new ones behind them.

    `types` has each key's GGUF value type, and for an array its elements'.
    """
    new: dict[str, KeyValue] = {}
    deleted: set[str] = set()
    kinds: dict[int, int] = {}
    for finding in findings:
        new.update((entry.key, entry) for entry in finding.set)
        deleted.update(finding.delete)
        kinds.update(finding.token_types)
    if kinds:
        array = list(new[TOKEN_TYPE].value if TOKEN_TYPE in new else metadata[TOKEN_TYPE])
        for row, kind in kinds.items():
            array[row] = kind
        new[TOKEN_TYPE] = KeyValue(TOKEN_TYPE, [int(kind) for kind in array], ARRAY, I32)
    kept = [
        new.pop(key) if key in new else KeyValue(key, value, *types[key])
        for key, value in metadata.items()
        if key not in deleted
    ]
    return kept + list(new.values())

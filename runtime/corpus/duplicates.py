"""Near-duplicates by MinHash, at the level of repositories (arXiv 2401.14196, section 2.3)."""

from __future__ import annotations

import re
import zlib
from typing import Any

THRESHOLD = 0.7  # Jaccard similarity of the shingle sets; StarCoder's
PERMUTATIONS = 256
SHINGLE = 5  # words
_SEED = 1
_WORD = re.compile(r"\w+")


class NearDuplicates:
    """Remembers texts; says which earlier one a new text nearly repeats."""

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._index: Any = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
        self._signatures: dict[str, Any] = {}
        # Drawing the permutations takes longer than a small text: they are drawn once.
        self._empty: Any = MinHash(PERMUTATIONS, seed=_SEED, hashfunc=zlib.crc32)

    def find_or_add(self, name: str, text: str) -> str | None:
        """The name of an earlier text that this one nearly repeats; else None, and it is kept.

        The index proposes and the signatures decide, so the threshold is not blurred by its bands.
        """
        words = _WORD.findall(text)
        shingles = {
            " ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))
        }
        signature = self._empty.copy()
        signature.update_batch([shingle.encode() for shingle in shingles])
        for other in sorted(self._index.query(signature)):
            if signature.jaccard(self._signatures[other]) >= THRESHOLD:
                return str(other)
        self._signatures[name] = signature
        self._index.insert(name, signature)
        return None

"""Fill-in-the-middle samples as DeepSeek Coder was trained on them.

arXiv 2401.14196, section 3.1.2: half of the documents are cut at two random characters and written
in the order prefix, suffix, middle (PSM), each part tokenized for itself.
"""

from __future__ import annotations

import random

from dsq.tokenizer_port.tokenizer import Tokenizer

RATE = 0.5  # of the code documents
MARKERS = 3  # begin, hole, end


def has_fim(tokenizer: Tokenizer) -> bool:
    v = tokenizer.vocab
    return None not in (v.fim_prefix, v.fim_suffix, v.fim_middle)


def sample(tokenizer: Tokenizer, text: str, rng: random.Random) -> list[int]:
    """begin, prefix, hole, suffix, end, middle; the cuts are drawn uniformly over characters."""
    first, second = sorted(rng.randint(0, len(text)) for _ in range(2))
    prompt = tokenizer.fim(text[:first], text[second:])
    if tokenizer.vocab.add_bos:
        prompt = prompt[1:]  # a window has one BOS, at its front
    return prompt + tokenizer.encode(text[first:second], add_bos=False)

"""Encoding source code: dsq beside the tokenizers library alone, and llama.cpp on its one thread.

`python -m benchmarks.tokenizer SIDE GGUF N_BYTES` measures one side and prints JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import run, settle
from benchmarks.results import Goal, Section, spread, table
from benchmarks.settings import Settings, say

N_BYTES, N_LONG = 100_000_000, 10_000_000
# How each side's row is called, and the goal for dsq's speed over its.
SIDES = {
    "dsq": ("dsq, a batch", None),
    "library": ("`tokenizers` alone, a batch", Goal(0.9, at_least=True)),
    "llama.cpp": ("llama.cpp, one text after another", Goal(5, at_least=True)),
    "dsq-long": ("dsq, one long text", None),
    "library-long": ("`tokenizers` alone, one long text", Goal(1, at_least=True)),
}


def benchmark(settings: Settings) -> Section:
    gguf = settings.peers.source / "models" / "ggml-vocab-deepseek-coder.gguf"
    shrink = 50 if settings.quick else 1
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(settings.repeat):
        for side, reports in found.items():
            n_bytes = (N_LONG if side.endswith("long") else N_BYTES) // shrink
            settle()
            module = [sys.executable, "-m", "benchmarks.tokenizer"]
            used = run([*module, side, str(gguf), str(n_bytes)])
            reports.append(json.loads(used.output.splitlines()[-1]))
            say(f"tokenizer {side}: {_speed(reports[-1]):.2f} MB/s")
    rows = [_row(side, found) for side in SIDES]
    header = ["", "MB/s", "dsq's speed ÷ its", "goal", "tokens"]
    batch, long = found["dsq"][0], found["dsq-long"][0]
    body = (
        f"{batch['n_bytes'] / 1e6:.0f} MB of Python source, none of it twice: the "
        f"{batch['n_texts']:,} first files (by path) of the standard library and site-packages; "
        f"the long text is {long['n_bytes'] / 1e6:.0f} MB of them joined. DeepSeek Coder's "
        "vocabulary, `ggml-vocab-deepseek-coder.gguf` of llama.cpp, rebuilt by dsq. Each side "
        "runs in a fresh process; reading the texts and loading the vocabulary are not counted. "
        f"tokenizers {version('tokenizers')}, `encode_batch_fast` on {settings.threads} cores and "
        f"`encode`, lists of ids included; llama.cpp is llama-cpp-python "
        f"{version('llama-cpp-python')}, `llama_tokenize`. dsq begins with nothing remembered; it "
        f"looks up pieces that came before, on one core. Control tokens are text to dsq's timed "
        "run; with them parsed, as the library does, its tokens are the library's: "
        f"{'identical' if _identical(found) else '**different**'}.\n\n" + table(header, rows)
    )
    return Section("tokenizer", "Tokenizing", body)


def _row(side: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    title, goal = SIDES[side]
    ours = found["dsq-long" if side.endswith("long") else "dsq"]
    speeds = list(map(_speed, found[side]))
    ratio = median(map(_speed, ours)) / median(speeds)
    figures = [f"**{ratio:.2f}**", goal.verdict(ratio)] if goal else ["", ""]
    return [title, spread(speeds), *figures, f"{found[side][0]['n_tokens']:,}"]


def _speed(report: dict[str, Any]) -> float:
    return float(report["n_bytes"] / 1e6 / report["seconds"])


def _identical(found: dict[str, list[dict[str, Any]]]) -> bool:
    return all(
        found[f"dsq{kind}"][0]["hash"] == found[f"library{kind}"][0]["hash"]
        for kind in ("", "-long")
    )


# One side, in a process of its own


def sources(n_bytes: int) -> list[str]:
    """Python files of this installation, sorted by path, of about so many bytes in all."""
    found: list[str] = []
    left = n_bytes
    for path in _paths():
        if left <= 0:
            break
        raw = path.read_bytes()
        try:
            found.append(raw.decode())
        except UnicodeDecodeError:
            continue
        left -= len(raw)
    return found


def _paths() -> Iterator[Path]:
    library, site = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    yield from (p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts)
    yield from sorted(site.rglob("*.py"))


def measure(side: str, gguf: Path, n_bytes: int) -> dict[str, Any]:
    from dsq.runtime.source import Source
    from dsq.tokenizer_port.to_hf import tokenizer_json
    from dsq.tokenizer_port.tokenizer import Tokenizer

    texts = sources(n_bytes)
    if side.endswith("long"):
        texts = ["".join(texts)]
    vocab = Source(gguf).vocabulary
    encode: Callable[[], list[list[int]]]
    checked: Callable[[], list[list[int]]] | None = None
    if side.startswith("dsq"):
        batch = partial(Tokenizer.from_vocabulary(vocab).encode_batch, texts, add_bos=False)
        encode, checked = batch, partial(batch, parse_special=True)
    elif side.startswith("library"):
        encode = _library(tokenizer_json(vocab), texts)
    else:
        from dsq.runtime.llama_vocab import LlamaVocab

        encode = partial(list, map(LlamaVocab(gguf).encode, texts))
    start = time.perf_counter()
    ids = encode()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "n_bytes": sum(len(text.encode()) for text in texts),
        "n_texts": len(texts),
        "n_tokens": sum(map(len, ids)),
        "hash": _hash(checked() if checked else ids),
    }


def _library(definition: dict[str, Any], texts: list[str]) -> Callable[[], list[list[int]]]:
    import tokenizers

    alone = tokenizers.Tokenizer.from_str(json.dumps(definition))
    if len(texts) == 1:
        return lambda: [alone.encode(texts[0], add_special_tokens=False).ids]
    return lambda: [e.ids for e in alone.encode_batch_fast(texts, add_special_tokens=False)]


def _hash(texts: Iterable[list[int]]) -> str:
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(array("i", [*ids, -1]).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))

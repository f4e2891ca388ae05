"""Measure a model: perplexity, and its drift from a reference on the same text and windows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from dsq.errors import InputError
from dsq.quant.drift import Accumulator, Drift, PackedRows, TokenScores, pack
from dsq.quant.threads import free_cores
from dsq.runtime import windows as protocol
from dsq.runtime.engine import Engine
from dsq.runtime.reference_cache import CorruptEntry, ReferenceCache, Shape
from dsq.runtime.source import EngineSettings, Source
from dsq.runtime.windows import Windows
from dsq.tokenizer_port.tokenizer import Tokenizer

Progress = Callable[[str, int, int, float], None]
"""Called with "reference" or "model", windows done, windows in all, perplexity so far (or nan)."""


@dataclass(frozen=True)
class Report:
    """What was measured, and how. The drift fields are None without a reference."""

    model: str
    ref: str | None
    drift: Drift
    n_ctx: int
    chunks: int
    text_sha256: str
    size_bytes: int
    bpw: float
    tokens_per_second: float  # tokens read, context included; loading and the reference are not
    n_threads: int
    protocol: str

    def to_json(self) -> dict[str, Any]:
        """One flat object; the keys are stable."""
        fields = asdict(self)
        drift = fields.pop("drift")
        return {"model": fields.pop("model"), "ref": fields.pop("ref"), **drift, **fields}


@dataclass(frozen=True)
class Measurement:
    """A report, and the scored tokens that it sums up: `scores` row by row of `windows`."""

    report: Report
    windows: Windows
    scores: TokenScores


def evaluate(model: str | Path, *, texts: Sequence[str], **options: Any) -> Report:
    """The report of `measure`, which has the options."""
    return measure(model, texts=texts, **options).report


def measure(
    model: str | Path,
    *,
    texts: Sequence[str],
    ref: str | Path | None = None,
    n_ctx: int = 512,
    chunks: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    kv_type: str = "f16",
    cache_dir: Path | None = None,
    use_cache: bool = True,
    progress: Progress | None = None,
) -> Measurement:
    """Score `model` (GGUF or Hugging Face directory) as llama-perplexity would.

    With `ref` also how far it drifts from that model. The reference's predictions are kept in
    `cache_dir` (default $DSQ_CACHE or ~/.cache/dsq) unless `use_cache` is false or they would not
    fit in it; the figures are the same either way. Raises InputError for texts too short and for
    two models that do not share a vocabulary.
    """
    threads = n_threads or free_cores()
    settings = EngineSettings(n_ctx, threads, n_gpu_layers, kv_type)
    candidate = Source(model)
    reference = None if ref is None else Source(ref)
    text = protocol.join(texts)
    cut = _windows(candidate, reference, text, n_ctx, chunks)
    cache = ReferenceCache(cache_dir) if use_cache else None
    with ThreadPoolExecutor(threads) as pool:
        run = _Run(candidate, reference, settings, cut, cache, pool, progress)
        try:
            total, seconds = run.measure()
        except CorruptEntry:  # it has been removed: the second time it is computed
            total, seconds = run.measure()
    report = Report(
        model=str(model),
        ref=None if ref is None else str(ref),
        drift=total.result(),
        n_ctx=n_ctx,
        chunks=len(cut),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        size_bytes=candidate.size_bytes,
        bpw=candidate.bpw,
        tokens_per_second=cut.ids.size / seconds,
        n_threads=threads,
        protocol=(
            f"windows of {n_ctx} tokens, the second half scored, "
            f"{'BOS first' if _bos(reference or candidate) is not None else 'no BOS'}, "
            f"KV cache {kv_type if candidate.is_gguf else 'f32'}"
        ),
    )
    return Measurement(report, cut, total.tokens())


def _windows(
    candidate: Source, reference: Source | None, text: str, n_ctx: int, chunks: int | None
) -> Windows:
    source = reference or candidate
    ids = Tokenizer.from_vocabulary(source.vocabulary).encode(text)
    if reference is not None:
        _check_vocabulary(candidate, reference)
        mine, theirs = candidate.vocabulary, reference.vocabulary
        if (mine.pre, mine.merges) != (theirs.pre, theirs.merges):
            other = Tokenizer.from_vocabulary(mine).encode(text, add_bos=theirs.add_bos)
            if other != ids:
                raise InputError(
                    f"{candidate.path} cuts the text into other tokens than {reference.path} "
                    f"(pre-tokenizer {mine.pre!r} and {theirs.pre!r}); convert the model again"
                )
    return protocol.cut(ids, n_ctx, bos=_bos(source), chunks=chunks)


def _bos(source: Source) -> int | None:
    return source.vocabulary.bos if source.vocabulary.add_bos else None


def _check_vocabulary(candidate: Source, reference: Source) -> None:
    mine, theirs = candidate.vocabulary.tokens, reference.vocabulary.tokens
    for i, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a != b:
            raise InputError(
                f"token {i} is {a!r} in {candidate.path} but {b!r} in {reference.path}; "
                "only models of one vocabulary can be compared"
            )
    if len(mine) != len(theirs):
        raise InputError(
            f"{candidate.path} has {len(mine)} tokens but {reference.path} has {len(theirs)}; "
            "only models of one vocabulary can be compared"
        )


class _Reference(Protocol):
    def window(self, i: int) -> PackedRows: ...


@dataclass(frozen=True)
class _Run:
    candidate: Source
    reference: Source | None
    settings: EngineSettings
    cut: Windows
    cache: ReferenceCache | None
    pool: ThreadPoolExecutor
    progress: Progress | None

    def measure(self) -> tuple[Accumulator, float]:
        """The statistics, and the seconds that the candidate took."""
        total, seconds = Accumulator(self.pool), 0.0
        with ExitStack() as stack:
            reference = None
            if self.reference is not None:
                reference = stack.enter_context(self._reference_rows(self.reference))
            engine = stack.enter_context(closing(self._engine(self.candidate)))
            per = self.cut.scored
            for start in range(0, len(self.cut), engine.max_windows):
                ids = self.cut.ids[start : start + engine.max_windows]
                rows = [reference.window(start + k) for k in range(len(ids))] if reference else []
                before = time.perf_counter()
                logits = engine.window_logits(ids, self.cut.first)
                for k in range(len(ids)):
                    part = logits[k * per : (k + 1) * per]
                    total.add(part, self.cut.targets[start + k], rows[k] if reference else None)
                seconds += time.perf_counter() - before
                self._tell("model", start + len(ids), total.ppl)
        return total, seconds

    @contextmanager
    def _reference_rows(self, source: Source) -> Iterator[_Reference]:
        """The reference's predictions: from the cache, through the cache, or computed beside."""
        shape = Shape(len(self.cut), self.cut.scored, len(source.vocabulary.tokens))
        if self.cache is None or not self.cache.accepts(shape):
            with closing(self._engine(source)) as engine:
                yield _Live(engine, self.cut, self.pool)
            return
        key = self._key(source)
        stored = self.cache.open(key, shape)
        if stored is None:
            with closing(self._engine(source)) as engine, self.cache.writer(key, shape) as writer:
                live = _Live(engine, self.cut, self.pool)
                for i in range(len(self.cut)):
                    writer.append(live.window(i))
                    self._tell("reference", i + 1, float("nan"))
            stored = self.cache.open(key, shape)
            if stored is None:
                raise InputError(f"{self.cache.folder}: the cache lost an entry just written")
        yield stored

    def _engine(self, source: Source) -> Engine:
        engine = source.window_engine(self.settings)
        if engine.n_vocab != len(source.vocabulary.tokens):
            engine.close()
            raise InputError(
                f"{source.path}: {engine.n_vocab} logits for "
                f"{len(source.vocabulary.tokens)} tokens; convert the model again"
            )
        return engine

    def _key(self, source: Source) -> str:
        parts = f"{protocol.VERSION}\0{source.identity}\0{self.settings.kv_type}\0{self.cut.first}"
        digest = hashlib.sha256(parts.encode())
        digest.update(repr(self.cut.ids.shape).encode() + self.cut.ids.tobytes())
        return digest.hexdigest()[:32]

    def _tell(self, what: str, done: int, ppl: float) -> None:
        if self.progress is not None:
            self.progress(what, done, len(self.cut), ppl)


class _Live:
    """A reference computed as its windows are asked for, in order, a batch of them at a time.

    Packed as the cache packs them, so that the figures do not depend on the cache.
    """

    def __init__(self, engine: Engine, cut: Windows, pool: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._cut = cut
        self._pool = pool
        self._start = 0
        self._rows: list[PackedRows] = []

    def window(self, i: int) -> PackedRows:
        if not self._start <= i < self._start + len(self._rows):
            ids = self._cut.ids[i : i + self._engine.max_windows]
            logits = self._engine.window_logits(ids, self._cut.first)
            per = self._cut.scored
            self._start = i
            self._rows = [
                pack(logits[k * per : (k + 1) * per], self._cut.targets[i + k], self._pool)
                for k in range(len(ids))
            ]
        return self._rows[i - self._start]

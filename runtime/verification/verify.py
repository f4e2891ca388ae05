"""Verification: is this artifact that source? One check a question, each with its reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsq.convert.checkpoint import GATHERED, GgufCheckpoint, HfCheckpoint, open_checkpoint
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.gguf.spec import spec_from_gguf
from dsq.convert.names import ROPE_FREQS
from dsq.convert.rope import describe
from dsq.convert.verify_metadata import (
    hyperparameter_differences,
    rope_differences,
    template_differences,
    vocabulary_differences,
)
from dsq.convert.verify_tensors import (
    METHOD,
    compare_tensors,
    named_tensors,
    rounded,
    unmatched,
)
from dsq.errors import DsqError
from dsq.quant.threads import default_threads
from dsq.runtime.llama_vocab import LlamaVocab
from dsq.runtime.verification import logits as verify_logits
from dsq.runtime.verification.logits import LogitsResult, compare_logits, mean_kld
from dsq.runtime.verification.receipt import Check, Verification, hash_side
from dsq.runtime.verification.twin import LlamaGraph
from dsq.tokenizer_port.corpus import corpus
from dsq.tokenizer_port.tokenizer import Tokenizer
from dsq.tokenizer_port.verify import parity
from dsq.tokenizer_port.vocabulary import Vocabulary

Progress = Callable[[str], None]
"""Called with the name of the check that begins."""

_LISTED = 3  # problems in one line; the receipt has them all
_NEEDS_GGUF = "not applicable: only a GGUF runs in llama.cpp"
_CHEAP_BYTES = 1 << 26  # below this, threads cost more at their barriers than they save


def verify(
    artifact: str | Path,
    source: str | Path,
    *,
    logits: bool = True,
    threads: int | None = None,
    progress: Progress = lambda name: None,
) -> Verification:
    """Compare an artifact (GGUF, or a Hugging Face directory) with its source (either).

    A check that fails, or cannot be made, does not stop the others. Raises InputError for files
    that cannot be read at all. Needs about two layers in float32 of memory, and one of disk.
    """
    start = time.perf_counter()
    run = _Run(open_artifact(artifact), open_checkpoint(source), threads or default_threads())
    _ = run.theirs  # a source that cannot be read is an error, not a failed check
    checks: list[Check] = []
    for name, check in (
        ("tensors", run.tensors),
        ("hyperparameters", run.hyperparameters),
        ("rope", run.rope),
        ("token_ids", run.token_ids),
        ("tokenizer_parity", run.tokenizer_parity),
        ("chat_template", run.chat_template),
    ):
        progress(name)
        checks.append(_guarded(name, check))
    progress("logits")
    checks += run.logits_checks() if logits else _not_asked()
    progress("hashes")
    ours, theirs = (hash_side(side, run.threads) for side in (run.artifact, run.source))
    options = {"logits": logits, "threads": run.threads}
    return Verification(ours, theirs, tuple(checks), options, time.perf_counter() - start)


def open_artifact(path: str | Path) -> HfCheckpoint | GgufCheckpoint:
    """As `open_checkpoint`, but a GGUF may lack tensors: saying so is what `verify` is for."""
    if not Path(path).is_file():
        return open_checkpoint(path)
    gguf = read_gguf(Path(path))
    return GgufCheckpoint(Path(path), spec_from_gguf(gguf), gguf)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except DsqError as error:
        return Check(name, False, str(error))


def _not_asked() -> list[Check]:
    names = ("logits_short", "logits_long", "runs")
    return [Check(name, None, "not run: --no-logits") for name in names]


def _answer(name: str, problems: list[str], agreed: str, **data: Any) -> Check:
    if not problems:
        return Check(name, True, agreed, data)
    more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    detail = "; ".join(problems[:_LISTED]) + more
    return Check(name, False, detail, {"problems": problems, **data})


def _method(artifact: HfCheckpoint | GgufCheckpoint) -> str:
    """What the artifact says was done to its weights on purpose (see `allowed`)."""
    if isinstance(artifact, GgufCheckpoint):
        return str(artifact.gguf.metadata.get(METHOD, ""))
    said = artifact.config.get("quantization_config")
    meta = said.get("meta") if isinstance(said, dict) else None
    return "distilled" if isinstance(meta, dict) and meta.get("distilled") else ""


@dataclass(frozen=True, eq=False)
class _Run:
    artifact: HfCheckpoint | GgufCheckpoint
    source: HfCheckpoint | GgufCheckpoint
    threads: int

    @cached_property
    def ours(self) -> Vocabulary:
        return self.artifact.vocabulary()

    @cached_property
    def theirs(self) -> Vocabulary:
        return self.source.vocabulary()

    def tensors(self) -> Check:
        spec, source, method = self.source.spec, self.source, _method(self.artifact)
        if method == GATHERED and isinstance(source, HfCheckpoint):
            source = source.gathered()
        ours, theirs = named_tensors(self.artifact, spec), named_tensors(source, spec)
        problems = unmatched(ours, theirs, spec)
        if self.artifact.format == "gguf":
            wanted = spec.rope.kind == "llama3"
            if (ROPE_FREQS in self.artifact.tensors) != wanted:
                problems.append(
                    f"{ROPE_FREQS} is {'missing' if wanted else 'too many'}: "
                    f"the source's RoPE is {describe(spec.rope)}"
                )
        reports = compare_tensors(ours, theirs, threads=self.threads, method=method)
        problems += [f"{r.name}: {r.reason}" for r in reports if not r.ok]
        worst = max(reports, key=lambda r: r.error, default=None)
        agreed = f"{len(reports)} tensors" + (
            f", each within what its type explains; largest relative error {worst.error:.2g} "
            f"({worst.name}, {worst.type})"
            if worst and worst.error
            else ", all exact"
        )
        if method == GATHERED:
            agreed += "; the feed-forward's channels are in another order, on purpose"
        elif method:
            agreed += f"; weights moved on purpose ({method}): wider bounds, no rows singled out"
        return _answer("tensors", problems, agreed, tensors=[r.to_json() for r in reports])

    def hyperparameters(self) -> Check:
        spec = self.source.spec
        return _answer(
            "hyperparameters",
            hyperparameter_differences(self.artifact.spec, spec),
            f"{spec.n_layer} layers, {spec.n_embd} wide, {spec.n_head} heads ({spec.n_head_kv} "
            f"KV), context {spec.n_ctx}, {spec.n_vocab} rows",
        )

    def rope(self) -> Check:
        ours, theirs = self.artifact.spec.rope, self.source.spec.rope
        problems = rope_differences(ours, theirs, self.source.spec.head_dim)
        return _answer("rope", problems, describe(theirs))

    def token_ids(self) -> Check:
        ours, theirs = self.ours, self.theirs
        return _answer(
            "token_ids",
            vocabulary_differences(ours, theirs),
            f"{len(theirs.tokens)} tokens, {len(theirs.merges)} merges, all special ids",
        )

    def chat_template(self) -> Check:
        ours, theirs = self.ours, self.theirs
        agreed = "the source's" if theirs.chat_template else "none, as in the source"
        return _answer("chat_template", template_differences(ours, theirs), agreed)

    def tokenizer_parity(self) -> Check:
        """llama.cpp reading the artifact, against the source's own tokenizer."""
        name = "tokenizer_parity"
        theirs = self.theirs
        texts = list(corpus(theirs))
        if isinstance(self.artifact, GgufCheckpoint):
            with self._llama_vocab(self.artifact) as vocab:
                found = parity(theirs, vocab.encode, texts)
        else:
            tokenizer = Tokenizer.from_vocabulary(self.ours)
            found = parity(
                theirs, lambda t: tokenizer.encode(t, add_bos=False, parse_special=True), texts
            )
        agreed = f"{len(texts)} texts give the source's tokens"
        return _answer(name, [str(mismatch) for mismatch in found], agreed, texts=len(texts))

    def _llama_vocab(self, artifact: GgufCheckpoint) -> LlamaVocab:
        _ = self.ours  # llama.cpp ends the process over some vocabularies that this refuses
        return LlamaVocab(artifact.path)

    def logits_checks(self) -> list[Check]:
        names = ("logits_short", "logits_long", "runs")
        if not isinstance(self.artifact, GgufCheckpoint):
            return [Check(name, None, _NEEDS_GGUF) for name in names]
        try:
            ours, theirs = self._probe_ids(self.artifact)
            results = compare_logits(
                self.artifact, self.source.spec, theirs, ours, threads=self._compute_threads
            )
        except DsqError as error:
            return [Check(name, False, str(error)) for name in names[:2]] + [
                _guarded("runs", lambda: self.runs(self.artifact.path, None, None))
            ]
        checks = [_logits_check(r, ours, theirs) for r in results]
        path, short = self.artifact.path, results[0]
        return [*checks, _guarded("runs", lambda: self.runs(path, ours, short))]

    @property
    def _compute_threads(self) -> int:
        n_bytes = 4 * sum(t.n_elements for t in self.artifact.tensors.values())
        return self.threads if n_bytes > _CHEAP_BYTES else 1

    def _probe_ids(self, artifact: GgufCheckpoint) -> tuple[Any, Any]:
        """The probe as llama.cpp reads it with the artifact, and as the source reads it."""
        text = verify_logits.PROBE_TEXT
        theirs = Tokenizer.from_vocabulary(self.theirs).encode(text)
        with self._llama_vocab(artifact) as vocab:
            ours = vocab.encode(text, add_special=True)
        if len(ours) != len(theirs):
            first = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0
            )
            raise DsqError(
                f"llama.cpp reads the probe as {len(ours)} tokens, the source as {len(theirs)}; "
                f"they part at token {first}"
            )
        return np.array(ours, np.int32), np.array(theirs, np.int32)

    def runs(self, path: Path, ids: Any, short: LogitsResult | None) -> Check:
        """The artifact as it is, quantized, loads in llama.cpp and gives finite logits."""
        _ = self.ours  # see _llama_vocab
        if ids is None:
            ids = np.zeros(1, np.int32)
        ids = ids[: verify_logits.N_SHORT]
        with LlamaGraph(path, n_tokens=len(ids), threads=self._compute_threads) as graph:
            logits, _ = graph.decode(ids, 0)
        if not np.isfinite(logits).all():
            return Check("runs", False, "llama.cpp's logits hold NaN or Inf")
        if short is None:
            return Check("runs", True, "loads in llama.cpp and gives finite logits")
        kld = mean_kld(short.logits, logits)
        detail = f"{len(ids)} tokens in llama.cpp; rounded activations cost {kld:.2g} nats (KLD)"
        return Check("runs", True, detail, {"kld_to_float32_twin": float(f"{kld:.6g}")})


def _logits_check(result: LogitsResult, ours: Any, theirs: Any) -> Check:
    first, last = result.positions
    tolerance = verify_logits.TOLERANCE[result.name]
    detail = (
        f"positions {first} to {last}: largest difference {result.difference:.2g} σ "
        f"(allowed {tolerance:g} σ)"
    )
    n = len(result.logits)
    different = np.flatnonzero(ours[:n] != theirs[:n])
    if not result.ok and len(different):
        i = int(different[0])
        detail += (
            f"; llama.cpp reads token {i} of the probe as {ours[i]}, the source as {theirs[i]}"
        )
    elif not result.ok:
        layer = result.first_wrong_layer
        where = "in the final norm or the head" if layer is None else f"by layer {layer}"
        detail += f"; llama.cpp and the source's graph part {where}"
    data = {
        "difference": rounded(result.difference),
        "mean_difference": rounded(result.mean_difference),
        "tolerance": tolerance,
        "same_top_token": rounded(result.same_top),
        "hidden_state_error": {str(i): rounded(e) for i, e in result.hidden},
    }
    return Check(result.name, result.ok, detail, data)

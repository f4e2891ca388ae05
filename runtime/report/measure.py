"""What a drift report says of each model, as data: one ruler for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.inspect import memory_at
from dsq.errors import InputError
from dsq.quant.drift import mean_and_stderr
from dsq.runtime.evaluate import Measurement, Progress, measure
from dsq.runtime.source import Source
from dsq.tokenizer_port.tokenizer import Tokenizer

MEMORY_AT = (4096, 16384)  # the contexts whose memory is stated
N_WORST = 8
_CONTEXT = 24  # tokens shown before a bad one
_CURVE = 200  # points of a distribution's curve


@dataclass(frozen=True)
class Worst:
    """A token that the model predicts much worse than the reference, in its context."""

    position: int  # among the scored tokens
    kld: float
    before: str
    target: str
    top: str  # what the model holds likeliest
    ref_top: str
    p: float  # probability of the target
    ref_p: float


@dataclass(frozen=True)
class Entry:
    """One model of the report."""

    name: str
    path: str
    measured: dict[str, Any]  # `evaluate.Report.to_json`
    ppl_ratio: float  # perplexity over the reference's
    ppl_ratio_stderr: float  # paired: how hard the text is cancels out
    curve: tuple[tuple[float, float], ...]  # KLD of a token, share of tokens above it
    worst: tuple[Worst, ...]
    layer_error: tuple[float, ...] | None  # relative error of each layer's output
    memory: dict[int, dict[str, int]]  # context → bytes

    @property
    def bpw(self) -> float:
        return float(self.measured["bpw"])

    @property
    def kld(self) -> float:
        return float(self.measured["kld_mean"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Report:
    """Entries from the largest to the smallest, all measured on the same windows."""

    ref: str
    texts: tuple[str, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    @property
    def front(self) -> list[Entry]:
        """The Pareto front: no other model is both as small and as close to the reference."""
        best: list[Entry] = []
        for entry in sorted(self.entries, key=lambda e: (e.bpw, e.kld)):
            if not best or entry.kld < best[-1].kld:
                best.append(entry)
        return best

    def to_json(self) -> dict[str, Any]:
        return {
            "ref": self.ref,
            "texts": list(self.texts),
            "notes": list(self.notes),
            "pareto_front": [entry.path for entry in self.front],
            "models": [entry.to_json() for entry in self.entries],
        }


def report(
    models: Sequence[str | Path],
    ref: str | Path,
    *,
    texts: Sequence[str],
    text_names: Sequence[str],
    n_ctx: int = 512,
    chunks: int | None = None,
    n_threads: int | None = None,
    layers: bool = True,
    progress: Callable[[Path], Progress] | None = None,
) -> Report:
    """Measure every model against `ref`. Raises InputError for what `evaluate` refuses.

    `layers` asks for each layer's error, which needs torch.
    """
    paths = [Path(model) for model in models]
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise InputError(f"{paths[i]} is named twice; name each model once")
    measurements = []
    for path in paths:
        tell = progress(path) if progress else None
        measurements.append(
            measure(
                path,
                texts=texts,
                ref=ref,
                n_ctx=n_ctx,
                chunks=chunks,
                n_threads=n_threads,
                progress=tell,
            )
        )
    errors: list[tuple[float, ...] | None] = [None] * len(paths)
    notes = []
    if layers and not _has_torch():
        notes.append("Errors of single layers need torch, which is not installed.")
    elif layers:
        ids = measurements[0].windows.ids[:1]
        reference = _hidden_states(Path(ref), ids)
        errors = [_relative(_hidden_states(path, ids), reference) for path in paths]
    notes += _engines(paths)
    names = _names(paths)
    entries = [_entry(*row) for row in zip(names, paths, measurements, errors, strict=True)]
    entries.sort(key=lambda entry: -entry.bpw)
    return Report(str(ref), tuple(text_names), tuple(entries), tuple(notes))


def _engines(paths: Sequence[Path]) -> list[str]:
    """What to know where files of several formats are compared."""
    sources = [Source(path) for path in paths]
    packed = sorted({s.packed_method.upper() for s in sources if s.packed_method})
    if not packed or not any(source.is_gguf for source in sources):
        return []
    return [
        f"{' and '.join(packed)} ran in torch, their exact codes in float32; GGUF ran in "
        f"llama.cpp, which also rounds activations and the KV cache."
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names; what all file names begin with is left out."""
    resolved = [path.resolve() for path in paths]
    stems = [path.name.removesuffix(".gguf") for path in resolved]
    if len(set(stems)) < len(stems):  # a directory and the GGUF made of it have one stem
        whole = [path.name for path in resolved]
        return whole if len(set(whole)) == len(whole) else [str(path) for path in paths]
    common = 0
    if len(stems) > 1:
        while all(len(s) > common and s[common] == stems[0][common] for s in stems):
            common += 1
        # Back to a border, so that q4_0 and q4_k_m do not become 0 and k_m.
        while common and stems[0][common - 1] not in "-.":
            common -= 1
    return [stem[common:] or stem for stem in stems]


def _entry(
    name: str, path: Path, measured: Measurement, layer_error: tuple[float, ...] | None
) -> Entry:
    spec = open_checkpoint(path).spec
    size = measured.report.size_bytes
    scores = measured.scores
    assert scores.ref_nll is not None, "a report has a reference"
    mean, stderr = mean_and_stderr(scores.nll - scores.ref_nll)
    ratio = float(np.exp(mean))
    return Entry(
        name=name,
        path=str(path),
        measured=measured.report.to_json(),
        ppl_ratio=ratio,
        ppl_ratio_stderr=ratio * stderr,
        curve=_curve(measured.scores.kld),
        worst=_worst(path, measured),
        layer_error=layer_error,
        memory={n: memory_at(spec, size, n).to_json() for n in MEMORY_AT},
    )


def _curve(kld: npt.NDArray[np.float64] | None) -> tuple[tuple[float, float], ...]:
    """Share of tokens whose divergence is above a value, at values spaced evenly in ranks."""
    assert kld is not None, "a report has a reference"
    ordered = np.sort(kld)
    n = len(ordered)
    # Even steps in the logarithm of the share, so that the worst thousandth is seen too.
    ranks = np.unique((n - np.geomspace(n, 1, min(_CURVE, n))).astype(int))
    return tuple((float(ordered[i]), float((n - i) / n)) for i in ranks)


def _worst(path: Path, measured: Measurement) -> tuple[Worst, ...]:
    scores, windows = measured.scores, measured.windows
    assert scores.kld is not None, "a report has a reference"
    assert scores.ref_nll is not None, "a report has a reference"
    assert scores.ref_top is not None, "a report has a reference"
    tokenizer = Tokenizer.from_vocabulary(Source(path).vocabulary)

    def text(ids: Iterable[Any]) -> str:
        return tokenizer.decode([int(i) for i in ids], skip_special=False)

    found = []
    for i in np.argsort(-scores.kld, kind="stable")[:N_WORST]:
        window, k = divmod(int(i), windows.scored)
        at = windows.first + 1 + k  # where the target stands in its window
        found.append(
            Worst(
                position=int(i),
                kld=float(scores.kld[i]),
                before=text(windows.ids[window, max(0, at - _CONTEXT) : at]),
                target=text([windows.targets[window, k]]),
                top=text([scores.top[i]]),
                ref_top=text([scores.ref_top[i]]),
                p=float(np.exp(-scores.nll[i])),
                ref_p=float(np.exp(-scores.ref_nll[i])),
            )
        )
    return tuple(found)


def _has_torch() -> bool:
    from importlib.util import find_spec

    return find_spec("torch") is not None


def _hidden_states(path: Path, ids: npt.NDArray[np.int32]) -> list[npt.NDArray[np.float32]]:
    """Every layer's output (n_ctx, n_embd) on the first window, one layer in memory at a time."""
    import torch

    from dsq.runtime import decoder

    checkpoint = open_checkpoint(path)
    graph = decoder.Decoder(checkpoint.spec, ids.shape[1])
    with torch.inference_mode():
        embedding = decoder.read_tensor(checkpoint, "model.embed_tokens.weight")
        hidden = embedding[torch.from_numpy(ids.astype(np.int64))]
        states = []
        for i in range(checkpoint.spec.n_layer):
            hidden = graph.layer(decoder.read_layer(checkpoint, i), hidden)
            states.append(hidden[0].numpy())
    return states


def _relative(
    states: Sequence[npt.NDArray[np.float32]], reference: Sequence[npt.NDArray[np.float32]]
) -> tuple[float, ...]:
    """‖ours - theirs‖ / ‖theirs‖ per layer, the median over tokens: first tokens are outliers."""
    return tuple(
        float(np.median(np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)))
        for ours, theirs in zip(states, reference, strict=True)
    )

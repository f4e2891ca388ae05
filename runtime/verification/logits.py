"""Logits: the artifact in llama.cpp against the source's graph with the artifact's weights.

The source gives its config, its tokens and its RoPE; the artifact gives metadata, tokenizer and
weights, dequantized on both sides. What is left to differ is what a conversion can get wrong,
and not how coarse the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import GgufCheckpoint
from dsq.convert.gguf.reader import GgufFile
from dsq.convert.names import ROPE_FREQS, expected_tensors, gguf_name, hf_name, permuted_heads
from dsq.convert.spec import ModelSpec
from dsq.convert.tensor_plan import half_split_rows
from dsq.convert.verify_tensors import release
from dsq.errors import InputError
from dsq.runtime import reference
from dsq.runtime.verification.twin import LlamaGraph, embedding_rows, slices, twin

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

# Largest |difference of two logits| allowed, in standard deviations of the position's logits.
# Measured over f32 … q2_k on tiny-coder, on SmolLM2 (30 layers) and on random models of 24 layers
# with every kind of RoPE: at most 4.4e-5 at short positions and 5.9e-4 at long ones, where
# llama.cpp's float32 angles are off by 3e-4 radians. A lost factor is off by 2 and more.
TOLERANCE = {"logits_short": 1e-3, "logits_long": 1e-2}
HIDDEN_TOLERANCE = 1e-3  # relative error of a layer's output; measured: at most 2e-5

N_SHORT = 64  # positions 0 … 63
N_NEAR, N_FAR = 16, 16  # a long probe: 0 … 15, then on from FAR
FAR = 4352  # so that each of the last tokens is more than 4,096 behind the first ones

PROBE_TEXT = (
    'def binary_search(items: list[int], wanted: int) -> int | None:\n    """Where it is."""\n'
    "    low, high = 0, len(items) - 1\n    while low <= high:\n"
    "        middle = (low + high) // 2\n"
    "        if items[middle] == wanted:\n            return middle\n"
    "        if items[middle] < wanted:\n            low = middle + 1\n        else:\n"
    "            high = middle - 1\n    return None\n\n\n#include <stdio.h>\n\nint main(void) {\n"
    '    for (int i = 0; i < 10; i++) printf("%d, ", i * i);\n    return 0;\n}\n'
)


@dataclass(frozen=True)
class Probe:
    """Tokens, their positions, and which token sees which."""

    name: str
    ids: Ints
    positions: Ints
    sees: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LogitsResult:
    """How far llama.cpp is from the reference on one probe."""

    name: str
    positions: tuple[int, int]  # first and last
    difference: float  # the largest, in standard deviations
    mean_difference: float
    hidden: tuple[tuple[int, float], ...]  # after layer i: relative error of the hidden states
    same_top: float  # share of positions whose most likely token is the same
    logits: Floats  # llama.cpp's, (n, n_vocab)

    @property
    def ok(self) -> bool:
        return self.difference <= TOLERANCE[self.name]  # NaN is not

    @property
    def first_wrong_layer(self) -> int | None:
        return next((i for i, error in self.hidden if not error <= HIDDEN_TOLERANCE), None)


def short_probe(ids: Ints) -> Probe:
    n = min(N_SHORT, len(ids))
    return Probe("logits_short", ids[:n], np.arange(n, dtype=np.int32), reference.causal(n))


def long_probe(ids: Ints) -> Probe:
    """Positions 0 … 15 and FAR … FAR + 15, the latter seeing the former.

    llama.cpp wants consecutive positions, but lets a sequence begin anywhere: the token at FAR - 1
    is computed alone, as the first of a second sequence, and then joined to the first one, which
    may go on at FAR. No key is moved or turned again: all are computed at their own positions.
    """
    near = min(N_NEAR, len(ids) // 2)
    far = min(N_FAR, len(ids) - near - 1)
    positions = np.concatenate([np.arange(near), np.arange(FAR - 1, FAR + far)]).astype(np.int32)
    sees = reference.causal(near + 1 + far)
    sees[near, :near] = False
    return Probe("logits_long", ids[: len(positions)], positions, sees)


def compare_logits(
    artifact: GgufCheckpoint,
    spec: ModelSpec,
    source_ids: Ints,
    artifact_ids: Ints,
    *,
    threads: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[LogitsResult]:
    """Run both probes through both graphs, slice by slice; `spec` is the source's.

    `artifact_ids` are the artifact's tokens of the same text, as llama.cpp makes them; as many.
    `progress` is told the layers done. Raises InputError or DsqError when it cannot be run.
    """
    _check_shapes(artifact, spec)
    probes = [short_probe(source_ids), long_probe(source_ids)]
    ours = [embedding_rows(artifact, artifact_ids[: len(p.ids)]) for p in probes]
    theirs = [embedding_rows(artifact, p.ids) for p in probes]
    turned = [reference.rotation(spec, p.positions) for p in probes]
    hidden: list[list[tuple[int, float]]] = [[] for _ in probes]
    layer_bytes = 4 * sum(
        t.n_elements for name, t in artifact.tensors.items() if name.startswith("blk.0.")
    )
    for part in slices(layer_bytes, spec.n_layer, 4 * spec.n_vocab * spec.n_embd):
        with twin(artifact, part, threads) as gguf:
            tap = part.stop - part.first - 1
            longest = max(len(p.ids) for p in probes)
            with LlamaGraph(gguf.path, n_tokens=longest, threads=threads, tap=tap) as graph:
                outputs = [_run(graph, p, h) for p, h in zip(probes, ours, strict=True)]
            weights = TwinWeights(gguf, spec, part.first)
            for i, probe in enumerate(probes):
                for layer in range(part.first, part.stop):
                    theirs[i] = reference.layer_forward(
                        spec, layer, weights, theirs[i], turned[i], probe.sees
                    )
                ours[i] = outputs[i][1]
                hidden[i].append((part.stop - 1, _relative(ours[i], theirs[i])))
                if part.head:
                    norm, head = weights[reference.NORM], weights[reference.EMBEDDING]
                    theirs[i] = reference.head_forward(spec, norm, head, theirs[i])
                    ours[i] = outputs[i][0]
            del weights
        for layer in range(part.first, part.stop):
            for name in artifact.tensors:
                if name.startswith(f"blk.{layer}."):
                    release(artifact.data(name))
        progress(part.stop - part.first)
    return [_result(*r) for r in zip(probes, ours, theirs, hidden, strict=True)]


def _run(graph: LlamaGraph, probe: Probe, inputs: Floats) -> tuple[Floats, Floats]:
    """The probe in llama.cpp: logits (n, n_vocab) and the tapped layer's output (n, n_embd)."""
    graph.clear()
    jumps = np.flatnonzero(np.diff(probe.positions) != 1) + 1
    if not len(jumps):
        return graph.decode(inputs, int(probe.positions[0]))
    at = int(jumps[0])  # the token that is computed alone
    parts = [graph.decode(inputs[:at], 0), graph.decode(inputs[at : at + 1], FAR - 1, sequence=1)]
    graph.join(1, 0)
    parts.append(graph.decode(inputs[at + 1 :], FAR))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


class TwinWeights(Mapping[str, Floats]):
    """A twin's weights by their Hugging Face names, Q and K rows back in half-split order."""

    def __init__(self, gguf: GgufFile, spec: ModelSpec, first: int) -> None:
        self._gguf, self._spec = gguf, spec
        self._names: dict[str, str] = {}
        for name in gguf.tensors:
            if name.startswith("blk."):
                _, layer, rest = name.split(".", 2)
                self._names[hf_name(f"blk.{int(layer) + first}.{rest}")] = name
            elif name != ROPE_FREQS:
                self._names[hf_name(name)] = name

    def __getitem__(self, name: str) -> Floats:
        own = self._names[name]
        info = self._gguf.tensors[own]
        values: Floats = self._gguf.data(own).view(np.float32).reshape(info.shape)
        heads = permuted_heads(own, self._spec)
        return values[half_split_rows(len(values), heads)] if heads else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_shapes(artifact: GgufCheckpoint, spec: ModelSpec) -> None:
    for name, shape in expected_tensors(spec).items():
        info = artifact.tensors.get(gguf_name(name))
        if info is None or info.shape != shape:
            found = "is missing" if info is None else f"has shape {list(info.shape)}"
            raise InputError(
                f"not run: {gguf_name(name)} {found}, the source's graph needs {list(shape)}"
            )


def _result(
    probe: Probe, ours: Floats, theirs: Floats, hidden: Sequence[tuple[int, float]]
) -> LogitsResult:
    spread = theirs.std(axis=1, keepdims=True)
    difference = np.abs(ours - theirs) / np.maximum(spread, np.finfo(np.float32).tiny)
    return LogitsResult(
        name=probe.name,
        positions=(int(probe.positions[0]), int(probe.positions[-1])),
        difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        hidden=tuple(hidden),
        same_top=float(np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1))),
        logits=ours,
    )


def _relative(ours: Floats, theirs: Floats) -> float:
    return float(np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(theirs)), 1e-30))


def mean_kld(p: Floats, q: Floats) -> float:
    """Mean Kullback-Leibler divergence in nats of logits `q` from logits `p`, both (n, n_vocab)."""

    def log_softmax(x: Floats) -> npt.NDArray[np.float64]:
        shifted = x.astype(np.float64) - x.max(axis=1, keepdims=True)
        normal: npt.NDArray[np.float64] = shifted - np.log(
            np.exp(shifted).sum(axis=1, keepdims=True)
        )
        return normal

    a, b = log_softmax(p), log_softmax(q)
    return float((np.exp(a) * (a - b)).sum(axis=1).mean())

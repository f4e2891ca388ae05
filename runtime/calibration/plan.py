"""What a calibration will do: its windows, its record, its needs; decided before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.identity import model_identity
from dsq.errors import InputError
from dsq.quant.stats import input_sizes
from dsq.quant.threads import default_threads
from dsq.runtime import windows as protocol
from dsq.runtime.calibration.workdir import settings_hash
from dsq.runtime.decoder import chosen_device
from dsq.runtime.fidelity.source_check import source_identity
from dsq.runtime.torch_setup import need_torch
from dsq.tokenizer_port.tokenizer import Tokenizer

Checkpoint = HfCheckpoint | GgufCheckpoint


@dataclass(frozen=True)
class Options:
    """What to gather, and from how much: `n_tokens` and `n_gradient_tokens` are upper bounds.

    The first two are for `choose_windows`.
    """

    n_ctx: int = 2048
    n_tokens: int = 128 << 10
    hessians: bool = False
    gradients: bool = False
    n_gradient_tokens: int = 16 << 10
    seed: int = 0
    device: str = "auto"  # or "cpu", "cuda"
    n_threads: int | None = None


def choose_windows(
    checkpoint: Checkpoint, texts: Sequence[str], options: Options, *, parse_special: bool = False
) -> npt.NDArray[np.int32]:
    """Windows of n_ctx tokens (windows, n_ctx), cut as llama-imatrix cuts them: BOS first in each.

    Of a text longer than `n_tokens` as many as fit are drawn by the seed, in the text's order.
    `parse_special` makes control tokens of their texts. Raises InputError for a text shorter than a
    window.
    """
    n_ctx = options.n_ctx
    if n_ctx > checkpoint.spec.n_ctx:
        raise InputError(
            f"--ctx {n_ctx}: the model was trained on {checkpoint.spec.n_ctx} tokens; give less"
        )
    if options.n_tokens < n_ctx:
        raise InputError(f"--tokens {options.n_tokens} is less than a window of {n_ctx}")
    text = protocol.join(texts)
    if not text.strip():
        raise InputError("the text is empty; give one with more than white space in it")
    tokenizer = Tokenizer.from_vocabulary(checkpoint.vocabulary())
    ids = tokenizer.encode(text, parse_special=parse_special)
    bos = tokenizer.vocab.bos if tokenizer.vocab.add_bos else None
    windows = protocol.cut(ids, n_ctx, bos=bos).ids
    n = options.n_tokens // n_ctx
    if n < len(windows):
        chosen = np.random.default_rng(options.seed).choice(len(windows), n, replace=False)
        windows = windows[np.sort(chosen)]
    return windows


@dataclass(frozen=True, eq=False)
class Plan:
    """A run, decided: the rest is carrying it out."""

    checkpoint: Checkpoint
    ids: npt.NDArray[np.int32]  # (windows, n_ctx)
    options: Options
    model: dict[str, Any]
    record: dict[str, Any]
    device: str
    n_threads: int
    n_gradient: int  # windows that are gone through backwards

    @property
    def n_ctx(self) -> int:
        return self.ids.shape[1]

    @property
    def fingerprint(self) -> str:
        """The same for two runs that must give the same bytes."""
        return settings_hash(
            source_identity(self.checkpoint), self.record, self.options.hessians, self.ids
        )

    @property
    def border_bytes(self) -> int:
        return 4 * self.ids.size * self.checkpoint.spec.n_embd

    @property
    def disk_bytes(self) -> int:
        """Needed while it runs: the statistics, two borders, and those kept for the gradients."""
        kept = (self.checkpoint.spec.n_layer + 1) * self.n_gradient * self.border_bytes
        sizes = input_sizes(self.model).values()
        stats = sum(4 * n + (4 * n * n if self.options.hessians else 0) for n in sizes)
        return stats + 2 * self.border_bytes + kept // len(self.ids)


def plan_run(
    checkpoint: Checkpoint,
    ids: npt.NDArray[np.int32],
    options: Options,
    about_text: Mapping[str, Any],
) -> Plan:
    need_torch("calibration")
    device = chosen_device(options.device)
    n_threads = options.n_threads or default_threads()
    n_gradient = 0
    if options.gradients:
        n_gradient = min(len(ids), max(1, options.n_gradient_tokens // ids.shape[1]))
    record = {
        "text": dict(about_text),
        "seed": options.seed,
        "gradient_windows": n_gradient,
        "device": device,
        "threads": n_threads,
        **{name: version(name) for name in ("dsq", "torch")},
    }
    return Plan(
        checkpoint, ids, options, model_identity(checkpoint), record, device, n_threads, n_gradient
    )

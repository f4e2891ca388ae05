"""Distillation: tune a quantized file's continuous numbers until it predicts as the original does.

The codes are left alone. Block scales, minima and norm gains, which every file has anyway, are
learned end to end: the KL divergence of the file's predictions from the original's falls, over the
full vocabulary, by Adam (Kingma & Ba, arXiv 1412.6980). Format, size and speed stay the same.

Memory is the packed model, its optimizer state (12 bytes a run of 16 or 32 weights) and one layer:
the layers' inputs are kept, each layer is computed again on the way back. Where all of it fits
(`Options.keep_bytes`), the layers are kept instead, which saves that computation. The original is
run once, layer by layer, and its predictions lie on disk at 2 bytes a logit.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import check_target, sync
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint, open_checkpoint
from dsq.errors import DsqError, InputError
from dsq.quant.threads import default_threads, torch_threads
from dsq.runtime.calibration.workdir import WorkDir, settings_hash
from dsq.runtime.decoder import Decoder
from dsq.runtime.fidelity.gguf_student import GgufStudent, check_pair
from dsq.runtime.fidelity.source_check import source_identity
from dsq.runtime.fidelity.student import Parts, Student
from dsq.runtime.fidelity.teacher import Teacher
from dsq.runtime.fidelity.teacher import kld as divergence
from dsq.runtime.torch_setup import need_torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Adam

Ids = npt.NDArray[np.int32]
Progress = Callable[[str, int, int, float], None]
"""Called with "original" or "distilling", steps done, steps in all, held-out KLD over its start."""

# Files of an unfinished run; a name with a dot is not gone on with.
_RESULT, _TRAINING, _UNFINISHED = "distilled.gguf", "training.pt", ".training.pt"
_STATE = (
    *("step", "best_step", "looks", "pace"),
    *("kld_before", "kld_best", "seconds_in_steps", "best"),
)
# A look this much above the best: the steps are too large, and the way since the best is undone.
_WORSE, _SLOWER = 1.02, 0.3

LEAST_WINDOWS = 4


@dataclass(frozen=True)
class Options:
    """`lr`: the largest relative change of a scale in a step, at first."""

    lr: float = 5e-4
    epochs: int = 2
    batch_tokens: int = 512
    held_out: float = 0.125  # of the windows, never trained on
    check_every: int = 16  # steps between looks at the held-out windows
    patience: int = 6  # looks without an improvement before it stops
    seed: int = 0
    n_threads: int | None = None
    device: str = "cpu"
    keep_bytes: int | None = None  # activations may take so much; None: half of what is free


@dataclass(frozen=True)
class Report:
    """Mean KLD in nats on the held-out windows, before and after."""

    steps: int
    best_step: int
    n_train_tokens: int
    n_held_out_tokens: int
    kld_before: float
    kld_after: float
    seconds: float
    seconds_original: float
    seconds_per_step: float
    layers_kept: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def distill(
    original: str | Path,
    quantized: Path,
    out: Path,
    windows: Ids,
    options: Options | None = None,
    *,
    force: bool = False,
    progress: Progress = lambda what, done, total, ratio: None,
) -> Report:
    """Write to `out` the GGUF `quantized` with numbers tuned on `windows` (n, n_ctx) of tokens.

    Nothing is changed when the held-out windows show no gain: `out` is then a copy. Raises
    InputError for fewer than four windows and for two models of different shapes.
    """
    need_torch("--distill")
    options = options or Options()
    check_target(out, force=force or WorkDir.owns(out), n_bytes=quantized.stat().st_size)
    source, file = open_checkpoint(original), open_checkpoint(quantized)
    if not isinstance(file, GgufCheckpoint):
        raise InputError(f"{quantized}: only a GGUF can be distilled; quantize first")
    if len(file.gguf.shards) > 1:
        raise InputError(f"{quantized}: a split GGUF cannot be distilled; distill one file")
    check_pair(source, file)
    split(windows, options)
    student = GgufStudent(file, options.device)
    settings = _settings(source, quantized, windows, options)
    with WorkDir(out, settings) as work, torch_threads(options.n_threads or default_threads()):
        report = train(work, source, student.parts, windows, options, progress)
        student.write(work.path / _RESULT)
        work.finish(_RESULT, out, force=force)
    return report


def train(
    work: WorkDir,
    source: HfCheckpoint | GgufCheckpoint,
    parts: Parts,
    windows: Ids,
    options: Options,
    progress: Progress = lambda what, done, total, ratio: None,
) -> Report:
    """Tune the numbers of `parts` in place; what is left to do is to write them.

    The original's predictions, and the state at each look at the held-out windows, are kept in
    `work`. The caller sets the number of threads.
    """
    start = time.perf_counter()
    learned, held = split(windows, options)
    graph = Decoder(source.spec, windows.shape[1], options.device)
    teacher = Teacher(source, graph, np.concatenate([held, learned]), work.path)
    work.once(
        "original",
        lambda: teacher.run(lambda done, total: progress("original", done, total, math.nan)),
    )
    seconds_original = time.perf_counter() - start
    student = Student(parts, graph, options.batch_tokens, options.keep_bytes)
    run = _Run(student, teacher, held, learned, options, progress)
    run.go(work.path)
    return Report(
        steps=run.step,
        best_step=run.best_step,
        n_train_tokens=int(learned.size),
        n_held_out_tokens=int(held.size),
        kld_before=run.kld_before,
        kld_after=run.kld_best,
        seconds=time.perf_counter() - start,
        seconds_original=seconds_original,
        seconds_per_step=run.seconds_in_steps / max(run.step, 1),
        layers_kept=student.keep,
    )


def _settings(
    source: HfCheckpoint | GgufCheckpoint, quantized: Path, windows: Ids, options: Options
) -> str:
    digest = hashlib.sha256()
    with open(quantized, "rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return settings_hash(
        source_identity(source), digest.hexdigest(), windows, options, version("dsq")
    )


def split(windows: Ids, options: Options) -> tuple[Ids, Ids]:
    """(train, held out), by the seed; at least one window is held out."""
    if len(windows) < LEAST_WINDOWS:
        raise InputError(
            f"{len(windows)} windows of {windows.shape[1]} tokens are too few to distill on; give "
            "more text"
        )
    order = np.random.default_rng(options.seed).permutation(len(windows))
    n_held = min(max(1, round(options.held_out * len(windows))), len(windows) // 2)
    return windows[np.sort(order[n_held:])], windows[np.sort(order[:n_held])]


class _Run:
    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        held: Ids,
        train: Ids,
        options: Options,
        progress: Progress,
    ) -> None:
        import torch

        self.student, self.teacher, self.options = student, teacher, options
        ids = np.concatenate([held, train]).astype(np.int64)
        self.ids = torch.from_numpy(ids).to(options.device)
        self.held = list(range(len(held)))
        self.train = np.arange(len(held), len(ids))
        self.progress = progress
        self.best: list[Tensor] = []
        self.pace = 1.0
        self.step = self.best_step = self.looks = 0
        self.kld_before = self.kld_best = math.inf
        self.seconds_in_steps = 0.0

    def go(self, folder: Path) -> None:
        """Train; the student ends with the numbers that were best on the held-out windows.

        At each look at them everything is kept in `folder`, from where a killed run goes on.
        """
        import torch

        options, student = self.options, self.student
        n = max(1, options.batch_tokens // self.ids.shape[1])
        batches = self._batches(n)
        optimizer = torch.optim.Adam(student.groups(options.lr), betas=(0.9, 0.99))
        if not self._load(folder, optimizer):
            self.kld_before = self.kld_best = self._held_out_kld(n)
            if not math.isfinite(self.kld_before):
                raise DsqError(
                    "distilling: the quantized model's predictions, or the original's, are not "
                    "finite before anything is tuned; dsq verify tells which weights are damaged"
                )
            self.best = student.snapshot()
        while self.step < len(batches) and self.looks < options.patience:
            batch = batches[self.step]
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = self.pace * options.lr * _schedule(self.step, len(batches))
            optimizer.zero_grad()
            student.backward(self.ids[batch], partial(self._loss, batch))
            optimizer.step()
            self.step += 1
            self.seconds_in_steps += time.perf_counter() - start
            if self.step % options.check_every and self.step < len(batches):
                continue
            self._look(n, optimizer)
            self.progress("distilling", self.step, len(batches), self.kld_best / self.kld_before)
            self._save(folder, optimizer)
        student.restore(self.best)

    def _look(self, n: int, optimizer: Adam) -> None:
        """Judge by the held-out windows; take smaller steps from the best when they led away.

        How large a step may be differs a hundredfold between models and files: what error feedback
        has made is near a minimum already.
        """
        kld = self._held_out_kld(n)
        self.looks += 1
        if kld < self.kld_best:
            self.best, self.looks = self.student.snapshot(), 0
            self.kld_best, self.best_step = kld, self.step
        elif not kld <= _WORSE * self.kld_best:  # NaN too
            self.student.restore(self.best)
            optimizer.state.clear()
            self.pace *= _SLOWER

    def _save(self, folder: Path, optimizer: Adam) -> None:
        import torch

        state = {name: getattr(self, name) for name in _STATE}
        state |= {"now": self.student.snapshot(), "optimizer": optimizer.state_dict()}
        torch.save(state, folder / _UNFINISHED)
        sync(folder / _UNFINISHED)
        (folder / _UNFINISHED).replace(folder / _TRAINING)

    def _load(self, folder: Path, optimizer: Adam) -> bool:
        import torch

        if not (folder / _TRAINING).exists():
            return False
        state = torch.load(folder / _TRAINING, map_location=self.ids.device, weights_only=True)
        for name in _STATE:
            setattr(self, name, state[name])
        self.student.restore(state["now"])
        optimizer.load_state_dict(state["optimizer"])
        return True

    def _batches(self, n: int) -> list[list[int]]:
        rng = np.random.default_rng(self.options.seed + 1)
        found = []
        for _ in range(self.options.epochs):
            order = rng.permutation(self.train)
            found += [sorted(order[i : i + n].tolist()) for i in range(0, len(order), n)]
        return found

    def _held_out_kld(self, n: int) -> float:
        import torch

        total = 0.0
        with torch.inference_mode():
            for i in range(0, len(self.held), n):
                batch = self.held[i : i + n]
                hidden = self.student.forward(self.ids[batch])
                norm, head = self.student.head()
                total += sum(self._klds(batch, norm, head, hidden.flatten(0, 1)))
        return total / (len(self.held) * self.ids.shape[1])

    def _klds(self, batch: list[int], norm: Tensor, head: Tensor, rows: Tensor) -> Iterator[float]:
        for part, wanted in self.teacher.parts(batch):
            logits = self.student.graph.logits(norm, head, rows[part])
            yield divergence(wanted, logits).item()

    def _loss(self, batch: list[int], hidden: Tensor) -> tuple[float, Tensor]:
        """Mean KLD and its gradient; the head's part of the graph lives for some rows at a time."""
        import torch

        rows = hidden.flatten(0, 1).requires_grad_()
        total = 0.0
        for part, wanted in self.teacher.parts(batch):
            with torch.enable_grad():
                norm, head = self.student.head()
                loss = divergence(wanted, self.student.graph.logits(norm, head, rows[part])) / len(
                    rows
                )
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        assert rows.grad is not None, "every row has a loss"
        return total, rows.grad.reshape(hidden.shape)


def _schedule(step: int, total: int) -> float:
    """A short warm-up, then half a cosine."""
    warm = min(1.0, (step + 1) / max(1, total // 20))
    return warm * 0.5 * (1 + math.cos(math.pi * step / total))

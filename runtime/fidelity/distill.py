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

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import atomic_files, check_target
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint, open_checkpoint
from dsq.convert.names import expected_tensors, gguf_name, permuted_heads
from dsq.convert.tensor_plan import half_split_rows, interleaved_rows
from dsq.errors import DsqError, InputError
from dsq.quant.grids import GRIDS
from dsq.quant.threads import default_threads
from dsq.quant.tunable import Tunable
from dsq.runtime.decoder import Decoder, read_tensor
from dsq.runtime.fidelity.teacher import Teacher
from dsq.runtime.fidelity.teacher import kld as divergence

if TYPE_CHECKING:
    from torch import Tensor

Ids = npt.NDArray[np.int32]
Progress = Callable[[str, int, int, float], None]
"""Called with "original" or "distilling", steps done, steps in all, held-out KLD over its start."""

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Options:
    """`lr` is the largest relative change of a scale in a step."""

    lr: float = 2e-3
    epochs: int = 2
    batch_tokens: int = 2048
    held_out: float = 0.125  # of the windows, never trained on
    check_every: int = 8  # steps between looks at the held-out windows
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
    import torch

    options = options or Options()
    check_target(out, force=force, n_bytes=quantized.stat().st_size)
    torch.set_num_threads(options.n_threads or default_threads())
    source, file = open_checkpoint(original), open_checkpoint(quantized)
    if not isinstance(file, GgufCheckpoint):
        raise InputError(f"{quantized}: only a GGUF can be distilled; quantize first")
    _check_pair(source, file)
    train, held = _split(windows, options)
    start = time.perf_counter()
    with TemporaryDirectory(prefix=".dsq-distill-", dir=out.parent) as folder:
        graph = Decoder(source.spec, windows.shape[1], options.device)
        teacher = Teacher(source, graph, np.concatenate([held, train]), Path(folder))
        teacher.run(lambda done, total: progress("original", done, total, math.nan))
        seconds_original = time.perf_counter() - start
        student = Student(file, graph, options)
        run = _Run(student, teacher, held, train, options, progress)
        best = run.go()
        _write(file, best, out, force=force)
    return Report(
        steps=run.step,
        best_step=run.best_step,
        n_train_tokens=int(train.size),
        n_held_out_tokens=int(held.size),
        kld_before=run.kld_before,
        kld_after=run.kld_best,
        seconds=time.perf_counter() - start,
        seconds_original=seconds_original,
        seconds_per_step=run.seconds_in_steps / max(run.step, 1),
        layers_kept=student.keep,
    )


def _check_pair(source: HfCheckpoint | GgufCheckpoint, file: GgufCheckpoint) -> None:
    for key in ("n_layer", "n_embd", "n_ff", "n_head", "n_head_kv", "head_dim", "n_vocab"):
        mine, theirs = getattr(file.spec, key), getattr(source.spec, key)
        if mine != theirs:
            raise InputError(
                f"{file.path}: {key} is {mine}, but {theirs} in {source.path}; give the model "
                "that the file was quantized from"
            )


def _split(windows: Ids, options: Options) -> tuple[Ids, Ids]:
    """(train, held out), by the seed; at least one window is held out."""
    if len(windows) < 4:
        raise InputError(
            f"{len(windows)} windows of {windows.shape[1]} tokens are too few to distill on; give "
            "more text"
        )
    order = np.random.default_rng(options.seed).permutation(len(windows))
    n_held = min(max(1, round(options.held_out * len(windows))), len(windows) // 2)
    return windows[np.sort(order[n_held:])], windows[np.sort(order[:n_held])]


class Gain:
    """A norm's gains, times what is learned."""

    def __init__(self, values: Tensor) -> None:
        import torch

        self._values = values
        self.change = torch.zeros_like(values, requires_grad=True)

    def weight(self) -> Tensor:
        return self._values * (1 + self.change)


class Student:
    """The quantized model: what is learned, and one layer's weights at a time."""

    def __init__(self, file: GgufCheckpoint, graph: Decoder, options: Options) -> None:
        self.spec, self.graph = file.spec, graph
        self.tunables: dict[str, Tunable] = {}
        self.gains: dict[str, Gain] = {}
        self._fixed: dict[str, Tensor] = {}
        for name, shape in expected_tensors(self.spec).items():
            info = file.tensors[gguf_name(name)]
            if len(shape) == 2 and info.type.name in GRIDS and name not in (EMBEDDING, HEAD):
                data = file.data(info.name).reshape(shape[0], -1)
                heads = permuted_heads(info.name, self.spec)
                rows = data[half_split_rows(len(data), heads)] if heads else data
                self.tunables[name] = Tunable(rows, info.type, shape[1], options.device)
            elif name.endswith("norm.weight"):
                self.gains[name] = Gain(read_tensor(file, name, options.device))
            else:
                self._fixed[name] = read_tensor(file, name, options.device)
        if not self.tunables:
            raise InputError(
                f"{file.path}: no tensor of a type whose scales dsq can tune ({', '.join(GRIDS)})"
            )
        self.keep = self._activation_bytes(options.batch_tokens) <= (
            _free_bytes() // 2 if options.keep_bytes is None else options.keep_bytes
        )

    def _activation_bytes(self, n_tokens: int) -> int:
        """What autograd keeps of all layers: activations and unpacked weights, in float32."""
        spec = self.spec
        a_token = 12 * spec.n_embd + 6 * spec.n_ff
        weights = sum(t.weight().numel() for t in self._layer_tunables(0))
        return 4 * spec.n_layer * (n_tokens * a_token + weights)

    def _layer_tunables(self, layer: int) -> Iterator[Tunable]:
        prefix = f"model.layers.{layer}."
        return (t for name, t in self.tunables.items() if name.startswith(prefix))

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Adam's parameter groups."""
        scales = [p for t in self.tunables.values() for p in t.parameters]
        return [{"params": [*scales, *(g.change for g in self.gains.values())], "lr": lr}]

    def parameters(self) -> list[Tensor]:
        return [p for group in self.groups(0) for p in group["params"]]

    def embed(self, ids: Tensor) -> Tensor:
        return self._fixed[EMBEDDING][ids]

    def layer(self, i: int, hidden: Tensor) -> Tensor:
        prefix = f"model.layers.{i}."
        parts: dict[str, Any] = {**self.tunables, **self.gains}
        weights = {
            name.removeprefix(prefix): part.weight()
            for name, part in parts.items()
            if name.startswith(prefix)
        }
        weights |= {
            name.removeprefix(prefix): values
            for name, values in self._fixed.items()
            if name.startswith(prefix)
        }
        return self.graph.layer(weights, hidden)

    def head(self) -> tuple[Tensor, Tensor]:
        """Final norm's gains, and the head's matrix."""
        return self.gains[NORM].weight(), self._fixed[EMBEDDING if self.spec.tied else HEAD]

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters()]

    def restore(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.data.copy_(value)

    def forward(self, ids: Tensor) -> Tensor:
        """The last hidden state, nothing kept."""
        hidden = self.embed(ids)
        for i in range(self.spec.n_layer):
            hidden = self.layer(i, hidden)
        return hidden

    def backward(self, ids: Tensor, loss: Callable[[Tensor], tuple[float, Tensor]]) -> float:
        """Accumulate gradients; `loss` takes the last hidden state, gives its value and gradient.

        Between the layers the graph is cut, so that one layer's part is freed before the next.
        """
        import torch

        inputs: list[Tensor] = []
        outputs: list[Tensor | None] = []
        hidden = self.embed(ids)
        for i in range(self.spec.n_layer):
            inputs.append(hidden.detach().requires_grad_())
            with torch.set_grad_enabled(self.keep):
                hidden = self.layer(i, inputs[-1])
            outputs.append(hidden if self.keep else None)
            hidden = hidden.detach()
        value, gradient = loss(hidden)
        for i in reversed(range(self.spec.n_layer)):
            kept = outputs.pop()
            with torch.enable_grad():
                output = self.layer(i, inputs[-1]) if kept is None else kept
            torch.autograd.backward(output, gradient)
            below = inputs.pop().grad
            assert below is not None, "the layer's input requires a gradient"
            gradient = below
        return value


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
        self.step = self.best_step = 0
        self.kld_before = self.kld_best = math.inf
        self.seconds_in_steps = 0.0

    def go(self) -> Student:
        """Train; the student ends with the numbers that were best on the held-out windows."""
        import torch

        options, student = self.options, self.student
        n = max(1, options.batch_tokens // self.ids.shape[1])
        batches = self._batches(n)
        optimizer = torch.optim.Adam(student.groups(options.lr), betas=(0.9, 0.99))
        self.kld_before = self.kld_best = self._held_out_kld(n)
        best, looks = student.snapshot(), 0
        for batch in batches:
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = options.lr * _schedule(self.step, len(batches))
            optimizer.zero_grad()
            student.backward(self.ids[batch], partial(self._loss, batch))
            optimizer.step()
            self.step += 1
            self.seconds_in_steps += time.perf_counter() - start
            if self.step % options.check_every and self.step < len(batches):
                continue
            kld = self._held_out_kld(n)
            if kld < self.kld_best:
                best, looks = student.snapshot(), 0
                self.kld_best, self.best_step = kld, self.step
            else:
                looks += 1
            self.progress("distilling", self.step, len(batches), kld / self.kld_before)
            if looks >= options.patience:
                break
        student.restore(best)
        return student

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
        kld = total / (len(self.held) * self.ids.shape[1])
        if not math.isfinite(kld):
            raise DsqError(
                "distilling: the model's predictions are not finite; use a smaller --distill-lr"
            )
        return kld

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


def _write(file: GgufCheckpoint, student: Student, out: Path, *, force: bool) -> None:
    """A copy of the file with the learned numbers in it."""
    import shutil

    check_target(out, force=force)
    if len(file.gguf.shards) > 1:
        raise InputError(f"{file.path}: a split GGUF cannot be distilled; distill one file")
    with atomic_files([out]) as (temporary,):
        shutil.copyfile(file.path, temporary)
        with open(temporary, "r+b") as target:
            for name, data in _changed(file, student):
                info = file.tensors[name]
                if len(data) != info.n_bytes:
                    raise DsqError(f"{name}: {len(data)} bytes where {info.n_bytes} are stored")
                target.seek(info.offset)
                target.write(data)


def _changed(file: GgufCheckpoint, student: Student) -> Iterator[tuple[str, bytes]]:
    for name, tensor in student.tunables.items():
        gguf, packed = gguf_name(name), tensor.packed()
        heads = permuted_heads(gguf, file.spec)
        yield gguf, (packed[interleaved_rows(len(packed), heads)] if heads else packed).tobytes()
    for name, gain in student.gains.items():
        yield gguf_name(name), gain.weight().detach().cpu().numpy().astype("<f4").tobytes()


def _free_bytes() -> int:
    """Memory that can be had without swapping (Linux); else 2 GiB."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 2 << 30

"""The steps of a calibration: the embedding, each layer, the head's input; then backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsq.convert.names import gguf_name, permuted_heads
from dsq.convert.tensor_plan import interleaved_rows
from dsq.errors import DsqError
from dsq.quant.stats import OUTPUT, StatsWriter, input_sizes
from dsq.quant.threads import torch_threads
from dsq.runtime.calibration.borders import Border
from dsq.runtime.calibration.moments import Moments, WatchedDecoder
from dsq.runtime.calibration.plan import Plan
from dsq.runtime.calibration.workdir import WorkDir
from dsq.runtime.decoder import STAGES, read_layer, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from dsq.runtime.calibration.fisher import RecordingDecoder

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all; a step is a layer, forwards or backwards."""

BATCH_TOKENS = 2048  # what passes a layer at once
FILE = "stats.safetensors"


class Steps:
    """The steps, in order. Each reads what the one before it left on disk."""

    def __init__(self, plan: Plan, work: WorkDir) -> None:
        self.plan, self.work = plan, work
        self.spec = plan.checkpoint.spec
        n = self.spec.n_layer
        self.steps: list[Callable[[], None]] = [
            self._embed,
            *(partial(self._forward, i) for i in range(n)),
            self._output,
        ]
        if plan.n_gradient:
            self.steps += [self._head, *(partial(self._backward, i) for i in reversed(range(n)))]

    def go(self, progress: Progress) -> None:
        options = self.plan.options
        with (
            torch_threads(self.plan.n_threads),
            StatsWriter(
                self.work.path / FILE,
                model=self.plan.model,
                n_ctx=self.plan.n_ctx,
                tokens=self.plan.ids,
                hessians=options.hessians,
                gradients=options.gradients,
                record=self.plan.record,
            ) as self.stats,
        ):
            for i in range(self.work.done, len(self.steps)):
                progress(i, len(self.steps))
                self.steps[i]()
                self.stats.sync()
                self.work.save(i + 1)
                self._drop(i)
            progress(len(self.steps), len(self.steps))

    # The steps

    def _embed(self) -> None:
        import torch

        embedding = self._tensor("model.embed_tokens.weight")
        with self._border("hidden-0", create=True) as out:
            for start, n in self._batches():
                ids = torch.from_numpy(self.plan.ids[start : start + n].astype(np.int64))
                out.write(start, embedding[ids.to(embedding.device)])
            out.sync()

    def _forward(self, layer: int) -> None:
        import torch

        seen = {stage: self._moments(f"blk.{layer}.{stage}") for stage in STAGES}
        weights = read_layer(self.plan.checkpoint, layer, self.plan.device)
        graph = WatchedDecoder(
            self.spec, self.plan.n_ctx, self.plan.device, lambda s, x: seen[s].add(x)
        )
        with (
            torch.inference_mode(),
            self._border(f"hidden-{layer}") as source,
            self._border(f"hidden-{layer + 1}", create=True) as out,
        ):
            for start, n in self._batches():
                hidden = source.read(start, n).to(self.plan.device)
                out.write(start, graph.layer(weights, hidden))
            out.sync()
        del weights
        for stage in STAGES:
            self._put(f"blk.{layer}.{stage}", seen.pop(stage))

    def _output(self) -> None:
        import torch

        moments = self._moments(OUTPUT)
        norm = self._tensor("model.norm.weight")
        graph = WatchedDecoder(self.spec, 1, self.plan.device, lambda s, x: None)
        with torch.inference_mode(), self._border(f"hidden-{self.spec.n_layer}") as source:
            for start, n in self._batches():
                moments.add(graph.output_in(norm, source.read(start, n).to(self.plan.device)))
        self._put(OUTPUT, moments)

    def _head(self) -> None:
        import torch

        from dsq.runtime.calibration.fisher import head_gradient

        norm = self._tensor("model.norm.weight")
        head = self._tensor("model.embed_tokens.weight" if self.spec.tied else "lm_head.weight")
        total = torch.zeros(self.spec.n_vocab, dtype=torch.float64, device=self.plan.device)
        graph, n_layer = self._recorder(), self.spec.n_layer
        with (
            self._border(f"hidden-{n_layer}") as source,
            self._border(f"gradient-{n_layer}", create=True, gradient=True) as out,
        ):
            for start, n in self._batches(gradient=True):
                draws = [
                    np.random.default_rng([self.plan.options.seed, start + i]).random(graph.n_ctx)
                    for i in range(n)
                ]
                hidden = source.read(start, n).to(self.plan.device)
                by_hidden, squares = head_gradient(graph, norm, head, hidden, np.stack(draws))
                out.write(start, by_hidden)
                total += squares
            out.sync()
        self._put_gradient("lm_head.weight", total)

    def _backward(self, layer: int) -> None:
        import torch

        from dsq.runtime.calibration.fisher import layer_gradient

        weights = read_layer(self.plan.checkpoint, layer, self.plan.device)
        graph = self._recorder()
        totals: dict[str, Tensor] = {}
        with (
            self._border(f"hidden-{layer}") as hidden,
            self._border(f"gradient-{layer + 1}", gradient=True) as source,
            self._border(f"gradient-{layer}", create=True, gradient=True) as out,
        ):
            for start, n in self._batches(gradient=True):
                by_hidden, squares = layer_gradient(
                    graph,
                    weights,
                    hidden.read(start, n).to(self.plan.device),
                    source.read(start, n).to(self.plan.device),
                )
                out.write(start, by_hidden)
                for name, values in squares.items():
                    zero = torch.zeros_like(values, dtype=torch.float64)
                    totals[name] = totals.get(name, zero) + values
            out.sync()
        for name, values in totals.items():
            self._put_gradient(f"model.layers.{layer}.{name}.weight", values)

    def _drop(self, step: int) -> None:
        """Delete what no step after `step` reads."""
        n = self.spec.n_layer
        if 1 <= step <= n + 1:  # the border that a layer, or the output, has read
            path = self.work.path / f"hidden-{step - 1}"
            self._shorten(path)
        elif step > n + 1:
            layer = 2 * n + 2 - step  # n at the head, then the layer that was gone through
            for name in (f"hidden-{layer}", f"gradient-{layer + 1}"):
                with suppress(FileNotFoundError):
                    (self.work.path / name).unlink()

    def _shorten(self, path: Path) -> None:
        """Keep of a border what the way back needs."""
        n_bytes = self.plan.border_bytes // len(self.plan.ids) * self.plan.n_gradient
        with suppress(FileNotFoundError):
            if n_bytes:
                with open(path, "r+b") as file:
                    file.truncate(n_bytes)
            else:
                path.unlink()

    # What they share

    def _batches(self, *, gradient: bool = False) -> Iterator[tuple[int, int]]:
        """First window and number of windows."""
        total = self.plan.n_gradient if gradient else len(self.plan.ids)
        size = max(1, BATCH_TOKENS // self.plan.n_ctx)
        for start in range(0, total, size):
            yield start, min(size, total - start)

    def _border(self, name: str, *, create: bool = False, gradient: bool = False) -> Border:
        n = self.plan.n_gradient if gradient else len(self.plan.ids)
        shape = (n, self.plan.n_ctx, self.spec.n_embd)
        return Border(self.work.path / name, shape, create=create)

    def _tensor(self, name: str) -> Tensor:
        return read_tensor(self.plan.checkpoint, name, self.plan.device)

    def _moments(self, name: str) -> Moments:
        n = input_sizes(self.plan.model)[name]
        return Moments(n, self.plan.device, hessian=self.plan.options.hessians)

    def _recorder(self) -> RecordingDecoder:
        from dsq.runtime.calibration.fisher import RecordingDecoder

        return RecordingDecoder(self.spec, self.plan.n_ctx, self.plan.device)

    def _put(self, name: str, moments: Moments) -> None:
        if not moments.finite:
            raise DsqError(
                f"{self.plan.checkpoint.path}: the activations at {name} are NaN or Inf; "
                "the weights before it are damaged (dsq verify tells which), or overflow float32"
            )
        self.stats.put_input(name, moments.mean_sq(), moments.hessian())

    def _put_gradient(self, hf_name: str, squares: Tensor) -> None:
        """The mean over tokens, rows in GGUF's order."""
        name = gguf_name(hf_name)
        mean = (squares / (self.plan.n_gradient * self.plan.n_ctx)).float().cpu().numpy()
        heads = permuted_heads(name, self.spec)
        if heads:
            mean = mean[interleaved_rows(len(mean), heads)]
        if not np.isfinite(mean).all():
            raise DsqError(
                f"{self.plan.checkpoint.path}: the gradients at {name} are NaN or Inf; "
                "leave out --gradients"
            )
        self.stats.put_gradient(name, mean)

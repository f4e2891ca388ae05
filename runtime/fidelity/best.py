"""`best-N`: the closest file of N bits a weight, each step kept only if held-out text confirms it.

Calibrate, choose a mix, quantize with error feedback, distill. An eighth of the windows takes no
part in any of it: the mean KL divergence there decides whether a step stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint, open_checkpoint
from dsq.convert.imatrix import Imatrix, sums_of_stats
from dsq.convert.pipeline import GgufPlan, plan_gguf, run_gguf_plan
from dsq.errors import InputError
from dsq.quant.mix import Recipe
from dsq.quant.presets import PRESETS
from dsq.quant.stats import Stats, read_stats
from dsq.runtime.calibration import calibrate
from dsq.runtime.decoder import Decoder
from dsq.runtime.fidelity import compensate, distill
from dsq.runtime.fidelity.mix import Budget, Table, choose_recipe, measure_table
from dsq.runtime.fidelity.teacher import Teacher

Checkpoint = HfCheckpoint | GgufCheckpoint
Ids = npt.NDArray[np.int32]
Tell = Callable[[str], None]

HELD_OUT = 8  # one window of so many

# What a mix is compared with: the stock presets, largest first.
_STOCK = (
    *("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0"),
    *("iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)


@dataclass(frozen=True)
class Step:
    """One candidate file, and its mean KLD in nats on the held-out windows."""

    name: str
    bpw: float
    kld: float
    kept: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Report:
    steps: tuple[Step, ...]
    recipe: Recipe
    predicted_kld: float
    n_train_tokens: int
    n_held_out_tokens: int

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": [step.to_json() for step in self.steps],
            "predicted_kld": self.predicted_kld,
            "n_train_tokens": self.n_train_tokens,
            "n_held_out_tokens": self.n_held_out_tokens,
        }


@dataclass(frozen=True)
class Options:
    n_threads: int | None = None
    seed: int = 0
    device: str = "auto"
    distill: distill.Options = field(default_factory=distill.Options)


def best(
    source: str | Path,
    out: Path,
    windows: Ids,
    budget: Budget,
    options: Options | None = None,
    *,
    force: bool = False,
    pre: str | None = None,
    tell: Tell = lambda line: None,
) -> Report:
    """Write to `out` the best file within `budget`, by calibrating on `windows` (n, n_ctx).

    Raises InputError for fewer than 16 windows and for a budget that nothing fits.
    """
    options = options or Options()
    if len(windows) < 2 * HELD_OUT:
        raise InputError(
            f"{len(windows)} windows of {windows.shape[1]} tokens are too few: an eighth is held "
            f"out to judge by; give text for {2 * HELD_OUT} or more"
        )
    order = np.random.default_rng(options.seed).permutation(len(windows))
    n_held = len(windows) // HELD_OUT
    held, train = windows[np.sort(order[:n_held])], windows[np.sort(order[n_held:])]
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        run = _Best(open_checkpoint(source), Path(folder), train, held, options, pre, tell)
        file, report = run.go(budget)
        from dsq.convert.atomic import atomic_files, check_target

        check_target(out, force=force)
        with atomic_files([out]) as (temporary,):
            shutil.move(file, temporary)
    return report


class _Best:
    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        train: Ids,
        held: Ids,
        options: Options,
        pre: str | None,
        tell: Tell,
    ) -> None:
        self.checkpoint, self.folder, self.options = checkpoint, folder, options
        self.train, self.held, self.pre, self.tell = train, held, pre, tell
        self.steps: list[tuple[Step, Path]] = []
        device = "cpu"
        graph = Decoder(checkpoint.spec, held.shape[1], device)
        judge = folder / "judge"
        judge.mkdir()
        self.judge = Teacher(checkpoint, graph, held, judge)

    def go(self, budget: Budget) -> tuple[Path, Report]:
        stats = self._calibrate()
        imatrix = sums_of_stats(stats).means()
        self.tell("reading the original on the held-out windows")
        self.judge.run()
        self.tell("measuring every matrix in every type")
        table = measure_table(self.checkpoint, stats, n_threads=self.options.n_threads)
        recipe, predicted = choose_recipe(table, budget)
        plan = self._plan(recipe, table, imatrix)
        stock = self._stock(plan, imatrix)
        if stock is not None:
            self._try(f"stock {stock.preset.name}", stock)
        self._try("mix", plan)
        # What comes next starts from the better of the two.
        base = plan if self._best_name() == "mix" or stock is None else stock
        self._try("compensated", base, compensated=True)
        self._distill()
        file = next(path for step, path in reversed(self.steps) if step.kept)
        report = Report(
            tuple(step for step, _ in self.steps),
            recipe,
            predicted,
            int(self.train.size),
            int(self.held.size),
        )
        return file, report

    def _calibrate(self) -> Stats:
        self.tell(f"calibrating on {self.train.size:,} tokens")
        path = self.folder / "stats.safetensors"
        calibrate.calibrate(
            self.checkpoint.path,
            path,
            self.train,
            options=calibrate.Options(
                n_ctx=self.train.shape[1],
                n_tokens=int(self.train.size),
                hessians=True,
                gradients=True,
                seed=self.options.seed,
                device=self.options.device,
                n_threads=self.options.n_threads,
            ),
        )
        return read_stats(path)

    def _plan(self, recipe: Recipe, table: Table, imatrix: Imatrix) -> GgufPlan:
        return plan_gguf(
            self.checkpoint,
            table.preset(recipe),
            options=table.options(recipe),
            imatrix=imatrix,
            pre=self.pre,
            allow_requantize=True,
        )

    def _stock(self, plan: GgufPlan, imatrix: Imatrix) -> GgufPlan | None:
        """llama-quantize's largest preset that is no larger than the mix."""
        found = None
        for preset in (PRESETS[name] for name in _STOCK):
            stock = plan_gguf(
                self.checkpoint, preset, imatrix=imatrix, pre=self.pre, allow_requantize=True
            )
            fits = stock.layout.data_bytes <= 1.001 * plan.layout.data_bytes
            if fits and (found is None or stock.bpw > found.bpw):
                found = stock
        return found

    def _try(self, name: str, plan: GgufPlan, *, compensated: bool = False) -> None:
        self.tell(f"quantizing: {name}")
        path = self.folder / f"{len(self.steps)}.gguf"
        threads = self.options.n_threads
        if compensated:
            how = compensate.Options(n_threads=threads, device=self.options.device)
            with compensate.opened(self.checkpoint, plan.steps, self.train, path, how) as made:
                run_gguf_plan(self.checkpoint, plan, path, threads=threads, made=made.take)
        else:
            run_gguf_plan(self.checkpoint, plan, path, threads=threads)
        self._judge(name, plan.bpw, path)

    def _distill(self) -> None:
        self.tell("distilling")
        before = next((s, p) for s, p in reversed(self.steps) if s.kept)
        path = self.folder / f"{len(self.steps)}.gguf"
        distill.distill(self.checkpoint.path, before[1], path, self.train, self.options.distill)
        self._judge("distilled", before[0].bpw, path)

    def _judge(self, name: str, bpw: float, path: Path) -> None:
        file = open_checkpoint(path)
        kld = self.judge.kld(file)
        kept = all(kld < step.kld for step, _ in self.steps)
        self.steps.append((Step(name, round(bpw, 4), kld, kept), path))
        self.tell(f"{name}: {bpw:.3f} bpw, KLD {kld:.6f}{'' if kept else ' (not kept)'}")

    def _best_name(self) -> str:
        return min(self.steps, key=lambda s: s[0].kld)[0].name

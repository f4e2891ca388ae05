"""`best-N`: the closest file of N bits a weight, each step kept only if held-out text confirms it.

Calibrate, choose a mix, quantize with error feedback, distill. An eighth of the windows takes no
part in any of it: the mean KL divergence there decides whether a step stays. What is done lies in
`OUT.partial`, so that a run which was killed goes on with the step that it was at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.convert.atomic import check_target, sync
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint, open_checkpoint
from dsq.convert.gguf.metadata import KeyValue
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.gguf.rewrite import rewrite_gguf
from dsq.convert.imatrix import Imatrix, sums_of_stats
from dsq.convert.pipeline import GgufPlan, method_entries, plan_gguf, run_gguf_plan, with_method
from dsq.convert.verify_tensors import METHOD
from dsq.errors import InputError
from dsq.quant.mix import Recipe
from dsq.quant.presets import PRESETS
from dsq.quant.solver import DAMP
from dsq.quant.stats import Stats, read_stats
from dsq.quant.threads import default_threads, torch_threads
from dsq.runtime.calibration import calibrate
from dsq.runtime.calibration.workdir import WorkDir, settings_hash
from dsq.runtime.decoder import Decoder, chosen_device
from dsq.runtime.fidelity import compensate, distill
from dsq.runtime.fidelity.mix import (
    Budget,
    check_budget,
    choose_recipe,
    chosen_once,
    measure_table,
    plan_recipe,
)
from dsq.runtime.fidelity.source_check import check_not_source, source_identity
from dsq.runtime.fidelity.teacher import Teacher
from dsq.runtime.torch_setup import need_torch

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
    """`text` names the windows' text in the file's metadata."""

    n_threads: int | None = None
    seed: int = 0
    device: str = "auto"
    text: str = ""
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
    keep: Callable[[Recipe], None] = lambda recipe: None,
    tell: Tell = lambda line: None,
) -> Report:
    """Write to `out` the best file within `budget`, by calibrating on `windows` (n, n_ctx).

    A run that was killed goes on where it was, and ends with the same bytes. `keep` gets the mix
    just before `out` has its name, once more after a kill between the two. Raises InputError for
    fewer than 16 windows, a budget that nothing fits, an output that exists (unless `force`) or is
    being written, and an unfinished run with other settings.
    """
    options = options or Options()
    check_target(out, force=force or WorkDir.owns(out))
    if len(windows) < 2 * HELD_OUT:
        raise InputError(
            f"{len(windows)} windows of {windows.shape[1]} tokens are too few: an eighth is held "
            f"out to judge by; give text for {2 * HELD_OUT} or more"
        )
    order = np.random.default_rng(options.seed).permutation(len(windows))
    n_held = len(windows) // HELD_OUT
    held, train = windows[np.sort(order[:n_held])], windows[np.sort(order[n_held:])]
    checkpoint = open_checkpoint(source)
    check_not_source(checkpoint, out)
    check_budget(checkpoint, budget)  # before hours of work
    need_torch("best-N")
    threads = options.n_threads or default_threads()
    options = replace(
        options, n_threads=threads, distill=replace(options.distill, n_threads=threads)
    )
    settings = settings_hash(
        source_identity(checkpoint),
        (budget, options, pre, chosen_device(options.device)),
        [version(name) for name in ("dsq", "torch")],
        windows,
    )
    with WorkDir(out, settings) as work, torch_threads(threads):
        run = _Best(checkpoint, work, train, held, options, pre, tell)
        file, report = run.go(budget)
        keep(report.recipe)
        work.finish(file, out, force=force)
    return report


class _Best:
    """The steps, in order; what each has left in `work` is used again."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        work: WorkDir,
        train: Ids,
        held: Ids,
        options: Options,
        pre: str | None,
        tell: Tell,
    ) -> None:
        self.checkpoint, self.work, self.folder = checkpoint, work, work.path
        self.options, self.pre, self.tell = options, pre, tell
        self.train, self.held = train, held
        self.steps: list[tuple[Step, Path]] = []
        judge = self.folder / "judge"
        judge.mkdir(exist_ok=True)
        graph = Decoder(checkpoint.spec, held.shape[1], "cpu")
        self.judge = Teacher(checkpoint, graph, held, judge)

    def go(self, budget: Budget) -> tuple[str, Report]:
        """The best file's name in `work`, and the report."""
        stats = self._calibrate()
        imatrix = replace(sums_of_stats(stats).means(), path=Path(stats.path.name))
        self.work.once("judge", self._read_original)
        recipe, predicted = self._recipe(stats, budget)
        plan = plan_recipe(
            self.checkpoint,
            recipe,
            "the mix",
            imatrix=imatrix,
            pre=self.pre,
            allow_requantize=True,
        )
        stock = self._stock(plan, imatrix)
        if stock is not None:
            self._try(f"stock {stock.preset.name}", stock)
        self._try("mix", plan)
        self._try("compensated", plan, compensated=True)  # what the mix was chosen for
        self._distill()
        file = next(path for step, path in reversed(self.steps) if step.kept)
        report = Report(
            tuple(step for step, _ in self.steps),
            recipe,
            predicted,
            int(self.train.size),
            int(self.held.size),
        )
        return file.name, report

    def _calibrate(self) -> Stats:
        path = self.folder / "stats.safetensors"

        def gather() -> None:
            self.tell(f"calibrating on {self.train.size:,} tokens")
            options = calibrate.Options(
                n_ctx=self.train.shape[1],
                n_tokens=int(self.train.size),
                hessians=True,
                gradients=True,
                seed=self.options.seed,
                device=self.options.device,
                n_threads=self.options.n_threads,
            )
            about = {"name": self.options.text} if self.options.text else {}
            calibrate.calibrate(
                self.checkpoint.path,
                path,
                self.train,
                about_text=about,
                options=options,
                force=True,
            )

        self.work.once("stats", gather)
        return read_stats(path)

    def _read_original(self) -> None:
        self.tell("reading the original on the held-out windows")
        self.judge.run()
        sync(self.folder / "judge" / "logits")

    def _recipe(self, stats: Stats, budget: Budget) -> tuple[Recipe, float]:
        def choose() -> tuple[Recipe, float]:
            self.tell("measuring every matrix in every type")
            threads = self.options.n_threads
            table = measure_table(self.checkpoint, stats, damp=DAMP, n_threads=threads)
            return choose_recipe(table, budget)

        return chosen_once(self.work, choose)

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
        threads = self.options.n_threads

        def quantize(path: Path) -> None:
            self.tell(f"quantizing: {name}")
            if not compensated:
                run_gguf_plan(self.checkpoint, plan, path, force=True, threads=threads)
                return
            how = compensate.Options(n_threads=threads, device=self.options.device)
            n_tokens = int(self.train.size)
            called = with_method(plan, name, text=self.options.text, n_tokens=n_tokens)
            compensate.quantize(self.checkpoint, called, self.train, path, how, force=True)

        self._step(name, plan.bpw, quantize)

    def _distill(self) -> None:
        before, file = next((s, p) for s, p in reversed(self.steps) if s.kept)

        def tune(path: Path) -> None:
            self.tell("distilling")
            tuned = self.folder / "tuned.gguf"
            options = self.options.distill
            distill.distill(self.checkpoint.path, file, tuned, self.train, options, force=True)
            self._call_distilled(tuned, path)
            tuned.unlink()

        self._step("distilled", before.bpw, tune)

    def _call_distilled(self, file: Path, out: Path) -> None:
        """A copy whose metadata tell how its weights came to be."""
        gguf = read_gguf(file)
        method = "+".join([*filter(None, [gguf.metadata.get(METHOD)]), "distilled"])
        new = {e.key: e for e in method_entries(method, self.options.text, int(self.train.size))}
        kept = [
            KeyValue(key, value, *gguf.metadata_types[key])
            for key, value in gguf.metadata.items()
            if key not in new
        ]
        rewrite_gguf(gguf, [*kept, *new.values()], out, force=True)

    def _step(self, name: str, bpw: float, write: Callable[[Path], None]) -> None:
        """Write a candidate, and keep it if it is closer than all before it."""
        path = self.folder / f"{len(self.steps)}.gguf"

        def judged() -> float:
            write(path)
            return self.judge.kld(open_checkpoint(path))

        kld: float = self.work.once(name, judged)
        kept = all(kld < step.kld for step, _ in self.steps)
        self.steps.append((Step(name, round(bpw, 4), kld, kept), path))
        self.tell(f"{name}: {bpw:.3f} bpw, KLD {kld:.6f}{'' if kept else ' (not kept)'}")

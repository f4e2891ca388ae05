"""From a target that a user names to a recipe: what the matrices may take, and the choice."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dsq.convert.atomic import write_text
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.names import ROPE_FREQS
from dsq.convert.pipeline import GgufPlan, plan_gguf
from dsq.errors import InputError
from dsq.quant import mix
from dsq.quant.mix import Choice, Recipe, read_recipe
from dsq.quant.plan import Options
from dsq.quant.presets import PRESETS, Preset
from dsq.quant.scheme import BY_NAME, GgmlType
from dsq.quant.stats import Stats
from dsq.runtime.calibration.workdir import WorkDir
from dsq.runtime.fidelity.after_feedback import after_feedback
from dsq.runtime.fidelity.sensitivity import EMBEDDING, matrices, sensitivities

Checkpoint = HfCheckpoint | GgufCheckpoint


@dataclass(frozen=True)
class Budget:
    """One target: bits a weight over all tensors, bytes of tensor data, or a mean KLD in nats."""

    kind: Literal["bpw", "bytes", "kld"]
    value: float

    def __str__(self) -> str:
        if self.kind == "bytes":
            return f"{self.value / 2**20:,.1f} MiB"
        return f"{self.value:g} bpw" if self.kind == "bpw" else f"a mean KLD of {self.value:g}"


@dataclass(frozen=True)
class Table:
    """Every choice of every matrix, and what the tensors beside them take."""

    choices: Mapping[str, Sequence[Choice]]
    shapes: Mapping[str, tuple[int, int]]
    n_params: int
    fixed: Mapping[str, int]  # elements of the tensors that stay float32: norms, biases
    embedding: tuple[int, int] | None  # (n_vocab, n_embd) when it is no head

    def embedding_type(self, bpw: float) -> GgmlType:
        """Rows that are looked up, not multiplied: llama-quantize gives them the base type."""
        assert self.embedding is not None, "only of an untied model"
        names = ["q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"]
        if self.embedding[1] % 256:
            names = ["q8_0", "q5_1", "q5_0", "q4_0"]
        found = [BY_NAME[name] for name in names]
        return next((of for of in found if of.bpw <= bpw + 0.5), found[-1])

    def others(self, bpw: float) -> int:
        """Bytes of all that the mix does not decide."""
        total = 4 * sum(self.fixed.values())
        if self.embedding is not None:
            n_vocab, n_embd = self.embedding
            total += n_vocab * self.embedding_type(bpw).row_bytes(n_embd)
        return total

    def options(self, recipe: Recipe) -> Options:
        embedding = recipe.types.get(EMBEDDING) if self.embedding else None
        return Options(
            tensor_types=recipe.tensor_types(),
            output_tensor_type=recipe.types.get("output.weight"),
            token_embedding_type=embedding or recipe.types.get(EMBEDDING),
        )

    def preset(self, recipe: Recipe) -> Preset:
        """What the file is called by: the preset of the type that holds most of it."""
        sizes = (
            (of, self.shapes[name][0] * of.row_bytes(self.shapes[name][1]))
            for name, of in recipe.types.items()
            if name in self.shapes
        )
        return preset_of(mix.main_type(sizes))


def measure_table(
    checkpoint: Checkpoint,
    stats: Stats,
    *,
    damp: float | None = None,
    n_threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """See `sensitivity.sensitivities`. With the `damp` of error feedback, which is to follow, the
    divergences are those that it leaves: see `after_feedback`."""
    choices: Mapping[str, Sequence[Choice]]
    choices = sensitivities(checkpoint, stats, n_threads=n_threads, progress=progress)
    if damp is not None:
        choices = after_feedback(checkpoint, stats, choices, damp=damp, n_threads=n_threads)
    return _table(checkpoint, choices)


def _table(checkpoint: Checkpoint, choices: Mapping[str, Sequence[Choice]]) -> Table:
    from dsq.convert.names import gguf_name

    shapes = matrices(checkpoint)
    is_gguf = checkpoint.format == "gguf"
    tensors = {
        (name if is_gguf else gguf_name(name)): info
        for name, info in checkpoint.tensors.items()
        if name != ROPE_FREQS
    }
    embedding = None
    if EMBEDDING not in shapes:
        n_vocab, n_embd = tensors[EMBEDDING].shape
        embedding = (n_vocab, n_embd)
    fixed = {
        name: info.n_elements
        for name, info in tensors.items()
        if name not in shapes and name != EMBEDDING
    }
    n_params = sum(info.n_elements for info in tensors.values())
    return Table(choices, shapes, n_params, fixed, embedding)


def choose_recipe(table: Table, budget: Budget) -> tuple[Recipe, float]:
    """The recipe for a budget, and the mean KLD that it is predicted to have."""
    if budget.kind == "kld":
        found = mix.under_divergence(table.choices, budget.value)
        bpw = 8 * found.n_bytes / sum(a * b for a, b in table.shapes.values())
    else:
        total = budget.value if budget.kind == "bytes" else budget.value * table.n_params / 8
        bpw = 8 * total / table.n_params
        left = int(total) - table.others(bpw) - 32 * (len(table.shapes) + len(table.fixed))
        if left <= 0:
            raise InputError(
                f"{budget}: norms and embedding alone take {table.others(bpw):,} bytes; raise it"
            )
        found = mix.under_budget(table.choices, left)
    types = dict(found.types)
    if table.embedding is not None:
        types[EMBEDDING] = table.embedding_type(bpw)
    about = {"target": str(budget), "predicted_kld": float(f"{found.kld:.6g}")}
    return Recipe(types, about), found.kld


def check_budget(checkpoint: Checkpoint, budget: Budget) -> None:
    """Refuse, before anything is measured, a size that no choice of types fits."""
    if budget.kind == "kld":
        return
    choices = {
        name: [Choice(of, n_out * of.row_bytes(n_in), 0.0) for of in mix.candidates(n_in)]
        for name, (n_out, n_in) in matrices(checkpoint).items()
    }
    choose_recipe(_table(checkpoint, choices), budget)


def check_recipe(checkpoint: Checkpoint, recipe: Recipe, where: str) -> Table:
    """The model's table without choices. Raises InputError for a recipe of another shape."""
    table = _table(checkpoint, {})
    shapes: dict[str, tuple[int, ...]] = dict(table.shapes)
    if table.embedding is not None:
        shapes[EMBEDDING] = table.embedding
    recipe.check(shapes, where)
    return table


def chosen_once(work: WorkDir, choose: Callable[[], tuple[Recipe, float]]) -> tuple[Recipe, float]:
    """What `choose` (see `choose_recipe`) gives: now, or in the run that this one goes on with."""
    path = work.path / "recipe.json"

    def chosen() -> float:
        recipe, predicted = choose()
        write_text(path, json.dumps(recipe.to_json()))
        return predicted

    predicted = work.once("recipe", chosen)
    return read_recipe(path), predicted


def plan_recipe(checkpoint: Checkpoint, recipe: Recipe, where: str, **settings: object) -> GgufPlan:
    """The plan of a recipe for this model. Raises InputError when it is for another shape."""
    table = check_recipe(checkpoint, recipe, where)
    return plan_gguf(
        checkpoint,
        table.preset(recipe),
        options=table.options(recipe),
        **settings,  # type: ignore[arg-type]
    )


def preset_of(of: GgmlType) -> Preset:
    """The preset that llama.cpp calls a file of mostly this type."""
    by_base = {p.base.name: p for p in reversed(PRESETS.values())}
    by_base |= {PRESETS[n].base.name: PRESETS[n] for n in ("q4_k_m", "q5_k_m", "q3_k_m", "q2_k")}
    return by_base[of.name]

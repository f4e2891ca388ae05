"""The measurement pass of `--to exl2`: what each matrix's candidate schemes cost the output.

Errors are second-order estimates of the output's mean KL divergence (see `sensitivity`): of each
row, ½ g_o δw_o H δw_oᵀ after error feedback. The original model passes the text layer by layer for
the Hessians, and a few windows backwards for the gradients, unless statistics hold both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.identity import model_identity
from dsq.convert.names import gguf_name, permuted_heads
from dsq.convert.tensor_plan import half_split_rows
from dsq.quant.exl2 import Order, ordered
from dsq.quant.exl2_measurement import Measurement
from dsq.quant.exl2_search import Option, candidates
from dsq.quant.stats import Stats, read_stats
from dsq.runtime.calibration.borders import Border
from dsq.runtime.calibration.calibrate import Options as CalibrateOptions
from dsq.runtime.calibration.calibrate import calibrate
from dsq.runtime.calibration.moments import Moments, WatchedDecoder
from dsq.runtime.calibration.workdir import WorkDir
from dsq.runtime.decoder import STAGES, read_layer, read_tensor
from dsq.runtime.fidelity.two_ways import BATCH_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

Checkpoint = HfCheckpoint | GgufCheckpoint
GRADIENT_TOKENS = 8 << 10  # gone through backwards, at most
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, eq=False)
class Setup:
    """What a measurement is made of: windows `ids` (windows, n_ctx), and statistics, if any."""

    checkpoint: Checkpoint
    ids: npt.NDArray[np.int32]
    stats: Stats | None
    damp: float
    device: str
    n_threads: int


def measure(
    setup: Setup, work: WorkDir, calibration: Mapping[str, Any], tell: Callable[[], None]
) -> Measurement:
    """Measure every matrix of the layers; `tell` is called after each layer.

    What is done stays in `work`: a run that was killed goes on. Raises InputError for damaged
    weights, OSError.
    """
    stats = setup.stats
    if stats is None or not stats.gradients:
        work.once("gradients", partial(_gradients, setup, work.path / "gradients"))
        gradients = read_stats(work.path / "gradients").gradients
    else:
        gradients = stats.gradients
    hessians: Callable[[int], Mapping[str, Tensor]]
    if stats is not None and stats.has_hessians:
        hessians = partial(_of_stats, stats, setup.device)
    else:
        hessians = _Pass(setup, work.path)
    found: dict[str, list[Option]] = {}
    for layer in range(setup.checkpoint.spec.n_layer):
        made = work.once(f"measure {layer}", partial(_layer, setup, hessians, gradients, layer))
        found.update({name: [Option.from_json(o) for o in made[name]] for name in made})
        tell()
    return Measurement(model_identity(setup.checkpoint), found, dict(calibration))


def _gradients(setup: Setup, out: Path) -> None:
    n = max(1, GRADIENT_TOKENS // setup.ids.shape[1])
    options = CalibrateOptions(
        gradients=True,
        n_gradient_tokens=GRADIENT_TOKENS,
        device=setup.device,
        n_threads=setup.n_threads,
    )
    calibrate(setup.checkpoint.path, out, setup.ids[:n], options=options, force=True)


def _layer(
    setup: Setup,
    hessians: Callable[[int], Mapping[str, Tensor]],
    gradients: Mapping[str, npt.NDArray[np.float32]],
    layer: int,
) -> dict[str, Any]:
    """The candidates of a layer's matrices by name, as JSON."""
    import torch

    seen = hessians(layer)
    made: dict[str, Any] = {}
    for stage, names in STAGES.items():
        prefix = f"model.layers.{layer}."
        order: Order = ordered(seen[stage], prefix + names[0], setup.damp)
        for name in (prefix + name for name in names):
            weight = read_tensor(setup.checkpoint, f"{name}.weight", setup.device)
            gguf = gguf_name(f"{name}.weight")
            costs = gradients[gguf]
            heads = permuted_heads(gguf, setup.checkpoint.spec)
            if heads:  # gradients are in GGUF's row order
                costs = costs[half_split_rows(len(costs), heads)]
            weights = torch.from_numpy(costs / 2).to(weight.device)
            bias = _has_bias(setup.checkpoint, name)
            made[name] = [
                option.to_json() for option in candidates(name, weight, order, weights, bias=bias)
            ]
    return made


def _has_bias(checkpoint: Checkpoint, name: str) -> bool:
    spec = checkpoint.spec
    return spec.attention_bias if ".self_attn." in name else spec.mlp_bias


def _of_stats(stats: Stats, device: str, layer: int) -> dict[str, Tensor]:
    import torch

    found = {}
    for stage in STAGES:
        hessian = stats.inputs[f"blk.{layer}.{stage}"].hessian
        assert hessian is not None, "has_hessians"
        found[stage] = torch.from_numpy(hessian).to(device)
    return found


class _Pass:
    """The original model's way through the windows; called with each layer in turn.

    A layer's input stays on disk until the layer after it is done, so that it can be run again.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder = setup, folder
        self.spec = setup.checkpoint.spec

    def __call__(self, layer: int) -> dict[str, Tensor]:
        import torch

        setup, device = self.setup, self.setup.device
        if layer == 0:
            self.embed()
        weights = read_layer(setup.checkpoint, layer, device)
        n_in = {stage: weights[f"{names[0]}.weight"].shape[1] for stage, names in STAGES.items()}
        seen = {stage: Moments(n, device, hessian=True) for stage, n in n_in.items()}
        graph = WatchedDecoder(
            self.spec, setup.ids.shape[1], device, lambda stage, x: seen[stage].add(x)
        )
        with (
            torch.inference_mode(),
            self.border(layer) as source,
            self.border(layer + 1, create=True) as out,
        ):
            for start, n in self.batches():
                out.write(start, graph.layer(weights, source.read(start, n).to(device)))
            out.sync()
        found = {}
        for stage, moments in seen.items():
            hessian = moments.hessian()
            assert hessian is not None, "asked for"
            found[stage] = torch.from_numpy(hessian).to(device)
        return found

    def embed(self) -> None:
        import torch

        embedding = read_tensor(self.setup.checkpoint, _EMBEDDING)
        with self.border(0, create=True) as out:
            for start, n in self.batches():
                ids = torch.from_numpy(self.setup.ids[start : start + n].astype(np.int64))
                out.write(start, embedding[ids])
            out.sync()

    def batches(self) -> Iterator[tuple[int, int]]:
        size = max(1, BATCH_TOKENS // self.setup.ids.shape[1])
        for start in range(0, len(self.setup.ids), size):
            yield start, min(size, len(self.setup.ids) - start)

    def border(self, layer: int, *, create: bool = False) -> Border:
        ids = self.setup.ids
        shape = (len(ids), ids.shape[1], self.spec.n_embd)
        # Three by turns: a step that is run again finds its input, whatever was begun after it.
        return Border(self.folder / f"measured-{layer % 3}", shape, create=create)

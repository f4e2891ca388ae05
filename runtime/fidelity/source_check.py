"""The source of a long quantization: its weights are sound, and still the same after a kill."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.convert.hf.quantized_dir import dense_data
from dsq.convert.identity import model_identity
from dsq.convert.names import expected_tensors, gguf_name
from dsq.convert.pipeline import source_files
from dsq.convert.verify_tensors import release
from dsq.errors import InputError
from dsq.quant.scheme import GgmlType
from dsq.runtime.decoder import read_tensor
from dsq.runtime.reference_cache import file_identity

Checkpoint = HfCheckpoint | GgufCheckpoint


def source_identity(checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    """For the settings of a resumable run: `model_identity`, of which most rows are no part, and
    the size and time of change of every weight file."""
    return model_identity(checkpoint), file_identity(list(source_files(checkpoint)))


def check_not_source(checkpoint: Checkpoint, out: Path) -> None:
    """Raise InputError for an output that is a file of the source, --force or not."""
    if out.resolve() in {path.resolve() for path in source_files(checkpoint)}:
        raise InputError(f"{out} is the source itself; give another output")


def check_weights(checkpoint: Checkpoint, dense: Collection[str], to: GgmlType) -> None:
    """Read every tensor once, before hours of work: all are finite, and those of `dense` (Hugging
    Face's names), which are stored in `to`, fit it. Raises InputError naming the tensor."""
    for name in expected_tensors(checkpoint.spec):
        if not bool(read_tensor(checkpoint, name).isfinite().all()):
            raise InputError(
                f"{checkpoint.path}: {name}: weights are NaN or Inf; the checkpoint is damaged, "
                "and cannot be calibrated: download it again"
            )
        if name in dense:
            dense_data(checkpoint, name, to)
        release(checkpoint.data(gguf_name(name) if checkpoint.format == "gguf" else name))

"""A model with one weight changed."""

from __future__ import annotations

import shutil
from pathlib import Path


def changed(model: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of `model` at `folder`, the last value of the tensor `name` another; its file is
    written anew, in the same size."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

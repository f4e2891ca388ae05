"""Quantize with GPTQModel itself: `python gptqmodel_quantize.py MODEL OUT SETTINGS.json TEXT.txt`.

SETTINGS go to its QuantizeConfig. Writes the directory OUT, and in OUT.npz the weights that
GPTQModel reads back from it, by module name, (n_out, n_in), as float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear


def main(model: str, out: str, settings: str, text: str) -> None:
    torch.set_num_threads(1)
    config = QuantizeConfig(**json.loads(Path(settings).read_text()))
    quantizer = GPTQModel.load(model, config, device="cpu")
    words = Path(text).read_text().split()
    samples = [" ".join(words[i : i + 64]) for i in range(0, 1024, 64)]
    quantizer.quantize(samples, batch_size=4)
    quantizer.save(out)
    loaded = GPTQModel.load(out, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    weights = {
        name.removeprefix("model.model.").join(["model.", ""]): module.dequantize_weight()
        for name, module in loaded.named_modules()
        if isinstance(module, TorchLinear)
    }
    np.savez(f"{out}.npz", **{name: w.float().T.numpy() for name, w in weights.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Run by `test_gptq_export` in a process of its own: logits of a directory by a real peer.

    python -m tests.runtime.gptq_probe PEER DIR IDS.npy OUT.npz

PEER is `gptqmodel:BACKEND:DTYPE` or `transformers:DTYPE`. GPTQModel warns, logs, compiles and
changes torch's settings on import, which no test should have to live with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(peer: str, folder: str, ids_path: str, out: str) -> None:
    os.environ.update(GPTQMODEL_CPU_WORKERS="2", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    import torch

    torch.set_num_threads(1)
    program, *settings = peer.split(":")
    dtype = getattr(torch, settings[-1])
    if program == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        backend = BACKEND(settings[0])
        # GPTQModel's torch kernel loads in 16 bits only; in float32 it computes all the same.
        loaded = torch.float16 if dtype is torch.float32 else dtype
        model: Any = GPTQModel.load(folder, backend=backend, device="cpu", dtype=loaded).model
        model.to(dtype)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=dtype)
    model.eval()
    kernels = {type(m).__name__ for m in model.modules() if hasattr(m, "qweight")}
    kernels |= {type(m).__name__ for m in model.modules() if hasattr(m, "g_idx")}
    rotary = model.model.rotary_emb
    ids = torch.from_numpy(np.load(ids_path).astype(np.int64))
    with torch.inference_mode():
        logits = model(ids).logits.float().numpy()
    about = {
        "kernels": sorted(kernels),
        "first_inv_freq": float(rotary.inv_freq[0]),
        "last_inv_freq": float(rotary.inv_freq[-1]),
        "dtype": str(next(model.parameters()).dtype),
    }
    np.savez(out, logits=logits)
    Path(out).with_suffix(".json").write_text(json.dumps(about))


if __name__ == "__main__":
    main(*sys.argv[1:])

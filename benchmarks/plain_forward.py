"""Tokens a second of transformers over windows, logits included: what calibration is held against.

`python -m benchmarks.plain_forward MODEL TEXT N_CTX TOKENS THREADS [AT_ONCE]` prints JSON. The
windows are those of `dsq calibrate`, 2,048 tokens at once; loading and tokenizing are left out.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from dsq.convert.checkpoint import open_checkpoint
from dsq.runtime.calibration.calibrate import Options, choose_windows
from dsq.runtime.calibration.steps import BATCH_TOKENS
from dsq.runtime.torch_engine import TorchEngine


def main(
    model: str, text: str, n_ctx: str, n_tokens: str, threads: str, at_once: str = str(BATCH_TOKENS)
) -> None:
    options = Options(n_ctx=int(n_ctx), n_tokens=int(n_tokens))
    texts = [Path(text).read_text(encoding="utf-8")]
    windows = choose_windows(open_checkpoint(model), texts, options)
    size = max(1, int(at_once) // options.n_ctx)
    with TorchEngine(model, n_ctx=options.n_ctx, n_threads=int(threads)) as engine:
        start = time.perf_counter()
        for i in range(0, len(windows), size):
            ids = torch.from_numpy(windows[i : i + size].astype("int64"))
            with torch.inference_mode():
                engine._model(ids, use_cache=False)
        seconds = time.perf_counter() - start
    print(json.dumps({"tokens_per_second": windows.size / seconds, "n_tokens": windows.size}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What compensating a model cannot do without, timed: `… SOURCE TEXT… N_TOKENS THREADS`.

Prints JSON: seconds of the bare forward passes of both ways, of the products that Hessians and aims
are made of, and of the Cholesky factors. Everything is in memory, and nothing is quantized.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from dsq.convert.checkpoint import open_checkpoint
from dsq.runtime.calibration.calibrate import Options, choose_windows
from dsq.runtime.calibration.moments import Moments
from dsq.runtime.decoder import Decoder, read_layer, read_tensor

BATCH_TOKENS, N_CTX = 2048, 512


def main(source: Path, texts: list[Path], n_tokens: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(source)
    spec, options = checkpoint.spec, Options(N_CTX, n_tokens)
    ids = torch.from_numpy(
        choose_windows(checkpoint, [p.read_text() for p in texts], options)
    ).long()
    graph = Decoder(spec, N_CTX)
    hidden = read_tensor(checkpoint, "model.embed_tokens.weight")[ids]
    spent = {"forward passes": 0.0, "products": 0.0, "Cholesky factors": 0.0}

    def timed(name: str, start: float) -> None:
        spent[name] += time.perf_counter() - start

    size = BATCH_TOKENS // N_CTX
    with torch.inference_mode():
        for i in range(spec.n_layer):
            weights = read_layer(checkpoint, i)
            widths = (spec.n_embd, spec.n_head * spec.head_dim, spec.n_embd, spec.n_ff)
            seen = [Moments(n, "cpu", hessian=True) for n in widths]
            others = [torch.zeros(spec.n_embd, n) for n in widths]
            for start in range(0, len(ids), size):
                batch = hidden[start : start + size]
                for _ in range(2):
                    begin = time.perf_counter()
                    x = [graph.attn_in(weights, batch), graph.mixed(weights, batch)]
                    between = graph.add_attention(weights, batch, x[1])
                    x += [graph.ffn_in(weights, between), graph.gated(weights, between)]
                    after = graph.add_ffn(weights, between, x[3])
                    timed("forward passes", begin)
                begin = time.perf_counter()
                for moments, other, inputs in zip(seen, others, x, strict=True):
                    moments.add(inputs)
                    other.addmm_(after.flatten(0, -2).T, inputs.flatten(0, -2))
                timed("products", begin)
                hidden[start : start + size] = after
            for moments in seen:
                hessian = torch.tensor(moments.hessian())
                hessian.diagonal().add_(0.1 * hessian.diagonal().mean())
                begin = time.perf_counter()
                torch.linalg.cholesky(hessian)
                timed("Cholesky factors", begin)
    print(json.dumps(spent))


if __name__ == "__main__":
    *first, n, t = sys.argv[1:]
    main(Path(first[0]), [Path(p) for p in first[1:]], int(n), int(t))

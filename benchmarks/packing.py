"""Packing and unpacking GPTQ and EXL2 matrices: MB of weights per second of processor time.

A weight counts as one byte, the code that goes in. GPTQModel packs the same GPTQ matrix in a
process of its own: its default on a CPU, `pack_block`, which also finds the codes from floats.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measure import run
from benchmarks.results import Goal, Section, spread, table
from benchmarks.settings import Settings, say
from dsq.quant import exl2_layout, gptq_layout
from dsq.quant.exl2_layout import EXL2_BITS, Exl2Tensor
from dsq.quant.gptq_layout import GPTQ_BITS, GptqTensor

SHAPE, QUICK_SHAPE, GROUP = (4096, 11008), (512, 1408), 128  # inputs, outputs
GOAL = Goal(300, at_least=True, unit="MB/s")
MIXED = ((8, 1), (6, 2), (5, 4), (4, 16), (3, 7), (2, 2))  # bits, shares of 32: 4.0 in all
MIXED_ROWS = 32


def benchmark(settings: Settings) -> Section:
    shape = QUICK_SHAPE if settings.quick else SHAPE
    rows = []
    for bits in GPTQ_BITS:
        tensor = gptq(shape, bits)
        packed = gptq_layout.pack(tensor)
        theirs = _their_speed(shape, bits, settings)
        rows.append(
            [
                f"GPTQ, {bits} bits",
                *_row(
                    settings.repeat,
                    shape,
                    lambda t=tensor: gptq_layout.pack(t),
                    lambda p=packed, b=bits: gptq_layout.unpack(p, b),
                    tensor.dequantized,
                ),
                f"{theirs:.0f}",
            ]
        )
    widths = {f"EXL2, {bits} bits": ((bits, 32),) for bits in EXL2_BITS}
    for name, groups in {**widths, "EXL2, 8 to 2 bits": MIXED}.items():
        mixed = exl2(shape, groups)
        parts = exl2_layout.pack(mixed)
        times = _row(
            settings.repeat,
            shape,
            lambda t=mixed: exl2_layout.pack(t),
            lambda p=parts: exl2_layout.unpack(p, shape[1]),
            mixed.dequantized,
        )
        rows.append([name, *times, ""])
    header = ["", "packing", "goal", "unpacking", "to float32", "GPTQModel's packing"]
    body = (
        f"A matrix of {shape[1]:,} × {shape[0]:,} weights in groups of {GROUP}; MB of weights (one "
        "byte each, the code) per second of processor time, so a core's speed whatever else runs. "
        "GPTQModel 7.6.0: `pack_block` with one thread, which finds the codes from floats as well."
        f"\n\n{table(header, rows)}"
    )
    return Section("packing", "Packing GPTQ and EXL2", body)


def gptq(shape: tuple[int, int], bits: int) -> GptqTensor:
    n_in, n_out = shape
    rng, groups = np.random.default_rng(bits), n_in // GROUP
    return GptqTensor(
        rng.integers(0, 1 << bits, shape, dtype=np.uint8),
        np.full((groups, n_out), 1 << (bits - 1), dtype=np.uint8),
        (rng.random((groups, n_out)) + 0.5).astype(np.float16),
        (np.arange(n_in) // GROUP).astype(np.int32),
        bits,
    )


def exl2(shape: tuple[int, int], groups: tuple[tuple[int, int], ...]) -> Exl2Tensor:
    """`groups`: bits, and their share of the rows in 32nds."""
    n_in, n_out = shape
    rng, size = np.random.default_rng(0), GROUP if len(groups) == 1 else MIXED_ROWS
    bits = np.repeat([b for b, _ in groups], [n_in // 32 * n // size for _, n in groups])
    bits = np.append(bits, np.full(n_in // size - len(bits), groups[-1][0]))
    rows = np.full(len(bits), size)
    most = np.repeat(1 << bits, rows)[:, None]
    return Exl2Tensor(
        rng.integers(0, most, shape, dtype=np.uint8),
        bits,
        rows,
        rng.integers(0, 16, (len(bits), n_out), dtype=np.uint8),
        (rng.random(len(bits)) + 0.5).astype(np.float16),
        rng.permutation(n_in).astype(np.int32),
    )


def _row(
    repeat: int,
    shape: tuple[int, int],
    pack: Callable[[], object],
    unpack: Callable[[], object],
    dequantize: Callable[[], npt.NDArray[np.float32]],
) -> list[str]:
    packing, unpacking, floats = (_speeds(repeat, shape, f) for f in (pack, unpack, dequantize))
    say(f"packing: {spread(packing, 0)} MB/s")
    verdict = GOAL.verdict(sorted(packing)[len(packing) // 2])
    return [f"**{spread(packing, 0)}**", verdict, spread(unpacking, 0), spread(floats, 0)]


def _speeds(repeat: int, shape: tuple[int, int], work: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        found.append(shape[0] * shape[1] / 1e6 / (time.process_time() - start))
    return found


def _their_speed(shape: tuple[int, int], bits: int, settings: Settings) -> float:
    script = [sys.executable, "-m", "benchmarks.packing", *map(str, shape), str(bits)]
    done = run([*script, str(settings.repeat)])
    return float(json.loads(done.output.splitlines()[-1])["speed"])


def theirs(n_in: int, n_out: int, bits: int, repeat: int) -> dict[str, Any]:
    """The median speed of GPTQModel's packing."""
    os.environ.update(GPTQMODEL_CPU_WORKERS="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    torch.set_num_threads(1)
    tensor = gptq((n_in, n_out), bits)
    linear = torch.nn.Linear(n_in, n_out, bias=False)
    linear.weight.data = torch.from_numpy(tensor.dequantized())
    scales, zeros = (
        torch.from_numpy(v.astype(np.float32)).T for v in (tensor.scales, tensor.zeros)
    )
    g_idx = torch.from_numpy(tensor.g_idx)

    def work() -> object:
        module = TorchLinear(
            bits=bits,
            group_size=GROUP,
            sym=True,
            desc_act=False,
            in_features=n_in,
            out_features=n_out,
        )
        return module.pack_block(linear, scales, zeros, g_idx)

    work()  # compiles its extension, the first time
    return {"speed": float(np.median(_speeds(repeat, (n_in, n_out), work)))}


if __name__ == "__main__":
    print("\n" + json.dumps(theirs(*map(int, sys.argv[1:]))))

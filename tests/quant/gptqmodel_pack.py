"""Pack and read linears with GPTQModel's own code: `python gptqmodel_pack.py IN.npz OUT.npz`.

IN holds, for each linear N: N.bits, N.codes, N.zeros, N.scales, N.g_idx (as `GptqTensor` has
them). OUT holds what GPTQModel packs of them, N.v1.* and N.v2.*, and the weights that it reads
back, N.weight, shape (n_out, n_in).
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module


def main(source: str, target: str) -> None:
    torch.set_num_threads(1)
    given = np.load(source)
    out: dict[str, np.ndarray] = {}
    for name in sorted({key.split(".")[0] for key in given}):
        bits = int(given[f"{name}.bits"])
        codes, zeros, scales, g_idx = (
            torch.from_numpy(given[f"{name}.{part}"])
            for part in ("codes", "zeros", "scales", "g_idx")
        )
        n_in, n_out = codes.shape
        linear = torch.nn.Linear(n_in, n_out, bias=False)
        rows = g_idx.long()
        linear.weight.data = ((codes.float() - zeros[rows].float()) * scales[rows].float()).T
        module = TorchLinear(
            bits=bits, group_size=n_in // len(scales), sym=False, desc_act=True,
            in_features=n_in, out_features=n_out,
        )  # fmt: skip
        module.pack_original(linear, scales.float().T, zeros.float().T, g_idx)
        module.post_init()
        out[f"{name}.weight"] = module.dequantize_weight().float().T.numpy()
        out |= {f"{name}.v2.{part}": tensor for part, tensor in _parts(module).items()}
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits))
        out |= {f"{name}.v1.{part}": tensor for part, tensor in _parts(module).items()}
    np.savez(target, **out)


def _parts(module: TorchLinear) -> dict[str, np.ndarray]:
    return {
        part: getattr(module, part).clone().numpy()
        for part in ("qweight", "qzeros", "scales", "g_idx")
    }


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A GPTQ or EXL2 directory in transformers: its codes stay packed, and each matrix is dequantized
when a product asks for it.

The graph and the KV cache are transformers'; only where a matrix comes from is ours. What is packed
stays in the mapped files, so memory is the quantized size, the unpacked codes of one matrix (a byte
a weight) and, for each thread, a slice of it in float32. The numbers are those of the same model
unpacked to float32: nothing is rounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import HfCheckpoint
from dsq.convert.packed import Codes
from dsq.errors import DsqError
from dsq.quant import ggml

if TYPE_CHECKING:
    from torch import Tensor

_SLICE = 1 << 21  # weights that one thread dequantizes at a time


class Rows:
    """One matrix (n_out, n_in) of a checkpoint, read from the files whenever it is asked for."""

    def __init__(self, checkpoint: HfCheckpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name
        self._info = checkpoint.tensors[name]
        self.n_out, self.n_in = self._info.shape

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows in float32, some at a time; a slice is valid until the next."""
        import torch

        step = max(1, _SLICE // self.n_in)
        spans = [slice(a, min(a + step, self.n_out)) for a in range(0, self.n_out, step)]
        # torch's memory, not numpy's: it is aligned the same way in every run
        buffer = torch.empty(min(step, self.n_out), self.n_in)
        codes = self._checkpoint.codes(self._name)
        if codes is None:
            stored = self._stored()
            for rows in spans:
                out = buffer[: rows.stop - rows.start]
                ggml.dequantize_into(stored[rows].reshape(-1), self._info.type, out.numpy())
                yield rows, out
            return
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, thread_name_prefix="dsq-dequantize") as pool:
            pending: deque[Future[npt.NDArray[np.float32]]] = deque()
            for i, rows in enumerate(spans):
                for ahead in spans[i + len(pending) : i + threads]:
                    pending.append(pool.submit(_dequantized, codes, ahead))
                out = buffer[: rows.stop - rows.start]
                out.numpy()[:] = pending.popleft().result()
                yield rows, out

    def some(self, ids: Tensor) -> Tensor:
        """The rows `ids` of a matrix that is stored dense: (…, n_in) float32."""
        import torch

        which, inverse = np.unique(ids.numpy().reshape(-1), return_inverse=True)
        found = torch.empty(len(which), self.n_in)
        raw = np.ascontiguousarray(self._stored()[which])
        ggml.dequantize_into(raw.reshape(-1), self._info.type, found.numpy())
        return found[torch.from_numpy(inverse.reshape(ids.shape))]

    def _stored(self) -> Any:
        return self._checkpoint.data(self._name).reshape(self.n_out, -1)


def _dequantized(codes: Codes, rows: slice) -> npt.NDArray[np.float32]:
    return codes.columns(rows).dequantized()


def load_packed(checkpoint: HfCheckpoint, config: Any) -> Any:
    """A LlamaForCausalLM in float32 whose matrices are `Rows`; `config` is `llama_config`'s.

    Takes no longer than opening the files. Raises InputError, at first use, for damaged contents.
    """
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    linear, embedding = _modules()
    checkpoint.check_tied()
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.float32)
    model.set_attn_implementation("sdpa")
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies are no weights
    for name, info in checkpoint.tensors.items():
        module = name.rpartition(".")[0]
        if len(info.shape) == 2:
            rows = Rows(checkpoint, name)
            is_embedding = module == "model.embed_tokens"
            bias = getattr(model.get_submodule(module), "bias", None)
            model.set_submodule(module, embedding(rows) if is_embedding else linear(rows, bias))
    for name, info in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        if len(info.shape) == 1:
            value = torch.empty(info.shape)
            ggml.dequantize_into(checkpoint.data(name), info.type, value.numpy())
            setattr(model.get_submodule(module), kind, torch.nn.Parameter(value, False))
    if checkpoint.spec.tied:
        model.lm_head = linear(Rows(checkpoint, "model.embed_tokens.weight"))
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if left:
        raise DsqError(
            f"{checkpoint.path}: transformers' Llama has {left[0]}, which the files lack; use "
            f"transformers 5.23"
        )
    return model.eval()


def _modules() -> tuple[Any, Any]:
    """The two kinds of module; they need torch to be defined."""
    import torch

    class Linear(torch.nn.Module):
        bias: Any

        def __init__(self, rows: Rows, bias: Any = None) -> None:
            super().__init__()
            self.rows = rows
            self.register_parameter("bias", bias)

        def forward(self, inputs: Tensor) -> Tensor:
            out = inputs.new_empty(*inputs.shape[:-1], self.rows.n_out)
            for rows, weight in self.rows.slices():
                bias = None if self.bias is None else self.bias[rows]
                out[..., rows] = torch.nn.functional.linear(inputs, weight, bias)
            return out

    class Embedding(torch.nn.Module):
        def __init__(self, rows: Rows) -> None:
            super().__init__()
            self.rows = rows

        def forward(self, ids: Tensor) -> Tensor:
            return self.rows.some(ids)

    return Linear, Embedding

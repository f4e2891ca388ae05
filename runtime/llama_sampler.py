"""llama.cpp's own samplers in its order, over logits that lie in numpy's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from dsq.runtime.engine import Floats

RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: llama.cpp draws one
_ROW = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])  # struct llama_token_data


class Candidates:
    """A llama_token_data_array: token ids with their logits, for a sampler to narrow down."""

    def __init__(self, ids: npt.NDArray[np.int32], logits: Floats) -> None:
        self._rows = np.zeros(len(ids), _ROW)
        self._rows["id"], self._rows["logit"] = ids, logits
        self._array = llama_cpp.llama_token_data_array(
            data=ctypes.cast(self._rows.ctypes.data, ctypes.POINTER(llama_cpp.llama_token_data)),
            size=len(ids),
            selected=-1,
            sorted=False,
        )

    def apply(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(self._array))

    @property
    def selected(self) -> int:
        """The token that the chain's last sampler chose."""
        return int(self._array.data[self._array.selected].id)

    @property
    def left(self) -> tuple[npt.NDArray[np.int32], Floats]:
        """Ids and logits of those that the samplers have kept; a view."""
        data = ctypes.cast(self._array.data, ctypes.POINTER(ctypes.c_char * _ROW.itemsize))
        rows = np.ctypeslib.as_array(data, (self._array.size,)).view(_ROW)[:, 0]
        return rows["id"], rows["logit"]


def make_chain(
    n_vocab: int,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    last_n: int = 64,
    logit_bias: Sequence[tuple[int, float]] = (),
    seed: int | None = None,
    draws: bool = True,
) -> Any:
    """A llama_sampler: logit bias, penalties over `last_n` tokens, top_k, top_p, min_p, temperature
    and the draw.

    Temperature 0 takes the likeliest. `top_k` 0, `top_p` 1, `min_p` 0, `repeat_penalty` 1 and the
    other penalties 0 leave their step out; so does `draws` False with the last. `seed` None draws
    one. The caller frees it, and its steps with it, by llama_sampler_free.
    """
    lib = llama_cpp

    def steps() -> Iterator[Any]:
        if logit_bias:
            biases = (lib.llama_logit_bias * len(logit_bias))()
            for entry, (token, bias) in zip(biases, logit_bias, strict=True):
                entry.token, entry.bias = token, bias
            yield lib.llama_sampler_init_logit_bias(n_vocab, len(biases), biases)
        if last_n and (repeat_penalty != 1 or frequency_penalty or presence_penalty):
            yield lib.llama_sampler_init_penalties(
                n_vocab, last_n, repeat_penalty, frequency_penalty, presence_penalty
            )
        if temperature == 0:
            yield lib.llama_sampler_init_greedy()
            return
        if top_k > 0:
            yield lib.llama_sampler_init_top_k(top_k)
        if top_p < 1:
            yield lib.llama_sampler_init_top_p(top_p, 1)
        if min_p > 0:
            yield lib.llama_sampler_init_min_p(min_p, 1)
        yield lib.llama_sampler_init_temp(temperature)
        if draws:
            yield lib.llama_sampler_init_dist(RANDOM_SEED if seed is None else seed)

    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for step in steps():
        lib.llama_sampler_chain_add(chain, step)
    return chain

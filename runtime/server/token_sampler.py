"""Choosing a request's tokens: plain arg-max where that is all, else llama.cpp's samplers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from dsq.errors import InputError
from dsq.runtime import llama_log
from dsq.runtime.engine import Floats
from dsq.runtime.server.backend import GenerateRequest, TokenLogprobs

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: llama.cpp draws one


class TokenSampler:
    """One request's sampler: it remembers tokens (penalties, grammar) and its random state.

    Raises InputError for a grammar that llama.cpp does not understand.
    """

    def __init__(self, request: GenerateRequest, vocab: Any, n_vocab: int) -> None:
        self._chain = self._grammar = None
        self._n_vocab, self._vocab = n_vocab, vocab
        sampling = request.sampling
        self._bias = dict(request.logit_bias)
        self.is_argmax = (
            sampling.temperature == 0
            and not sampling.penalizes
            and not self._bias
            and request.grammar is None
        )
        if self.is_argmax:
            return
        if request.grammar is not None:
            self._grammar = _grammar(vocab, request.grammar)
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        self._chain = chain
        for step in _steps(request, n_vocab):
            llama_cpp.llama_sampler_chain_add(chain, step)
        if sampling.penalizes:
            for token in request.prompt_ids[-max(sampling.repeat_last_n, 0) :]:
                llama_cpp.llama_sampler_accept(chain, token)

    def sample(self, logits: Floats, context: Any, index: int) -> int | None:
        """The next token, or None if the grammar allows none.

        `logits` (n_vocab,) are those of the token at `index` in the context's last batch.
        """
        if self.is_argmax:
            return int(logits.argmax())
        if self._grammar is None:
            return int(llama_cpp.llama_sampler_sample(self._chain, context, index))
        return self._sample_by_grammar(logits)

    def _sample_by_grammar(self, logits: Floats) -> int | None:
        """As llama.cpp's tools do: only if the free choice breaks the grammar, apply it to all."""
        token = self._choose(logits, by_grammar=False)
        one = _Candidates(np.array([token], np.int32), np.zeros(1, np.float32))
        llama_cpp.llama_sampler_apply(self._grammar, ctypes.byref(one.array))
        if one.rows["logit"][0] == -np.inf:
            token = self._choose(logits, by_grammar=True)
        if token is not None:
            llama_cpp.llama_sampler_accept(self._chain, token)
            if not llama_cpp.llama_vocab_is_eog(self._vocab, token):
                llama_cpp.llama_sampler_accept(self._grammar, token)
        return token

    def _choose(self, logits: Floats, *, by_grammar: bool) -> int | None:
        all_ = _Candidates(np.arange(self._n_vocab, dtype=np.int32), logits)
        if by_grammar:
            llama_cpp.llama_sampler_apply(self._grammar, ctypes.byref(all_.array))
            if all_.rows["logit"].max() == -np.inf:
                return None
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(all_.array))
        return int(all_.array.data[all_.array.selected].id)

    def ends(self, token: int) -> bool:
        """Whether a grammar is over with this token: nothing may follow it."""
        return self._grammar is not None and bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        for sampler in (self._chain, self._grammar):
            if sampler is not None:
                llama_cpp.llama_sampler_free(sampler)  # a chain frees its steps as well
        self._chain = self._grammar = None


class _Candidates:
    """A llama_token_data_array over numpy memory."""

    def __init__(self, ids: npt.NDArray[np.int32], logits: Floats) -> None:
        self.rows = np.zeros(len(ids), [("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
        self.rows["id"], self.rows["logit"] = ids, logits
        self.array = llama_cpp.llama_token_data_array(
            data=ctypes.cast(self.rows.ctypes.data, ctypes.POINTER(llama_cpp.llama_token_data)),
            size=len(ids),
            selected=-1,
            sorted=False,
        )


def _steps(request: GenerateRequest, n_vocab: int) -> Iterator[Any]:
    lib, s = llama_cpp, request.sampling
    if request.logit_bias:
        biases = (lib.llama_logit_bias * len(request.logit_bias))()
        for entry, (token, bias) in zip(biases, request.logit_bias, strict=True):
            entry.token, entry.bias = token, bias
        yield lib.llama_sampler_init_logit_bias(n_vocab, len(biases), biases)
    if s.penalizes:
        last_n = s.repeat_last_n if s.repeat_last_n >= 0 else 2**20
        yield lib.llama_sampler_init_penalties(
            n_vocab, last_n, s.repeat_penalty, s.frequency_penalty, s.presence_penalty
        )
    if s.temperature == 0:
        yield lib.llama_sampler_init_greedy()
        return
    if s.top_k > 0:
        yield lib.llama_sampler_init_top_k(s.top_k)
    if s.top_p < 1:
        yield lib.llama_sampler_init_top_p(s.top_p, 1)
    if s.min_p > 0:
        yield lib.llama_sampler_init_min_p(s.min_p, 1)
    yield lib.llama_sampler_init_temp(s.temperature)
    yield lib.llama_sampler_init_dist(_RANDOM_SEED if s.seed is None else s.seed)


def _grammar(vocab: Any, text: str) -> Any:
    llama_log.install(verbose=False)  # forgets earlier errors
    made = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), b"root")
    if not made:
        raise InputError(f"the grammar is not valid GBNF: {llama_log.last_errors() or 'no reason'}")
    return made


def logprobs(logits: Floats, tokens: Sequence[int], n_top: int) -> list[TokenLogprobs]:
    """Of each row's token and the row's `n_top` most likely; logits (n, n_vocab)."""
    result = []
    for row, token in zip(logits, tokens, strict=True):
        top = np.argpartition(row, -n_top)[-n_top:]
        top = top[np.lexsort((top, -row[top]))]
        peak = row[top[0]]
        norm = float(peak) + float(np.log(np.exp(row - peak, dtype=np.float32).sum()))
        best = tuple((int(i), float(row[i]) - norm) for i in top)
        result.append(TokenLogprobs(float(row[token]) - norm, best))
    return result

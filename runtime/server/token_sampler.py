"""Choosing a request's tokens: plain arg-max where that is all, else llama.cpp's samplers.

Beside a draft model the draw itself is ours. Both models' choices at one position add the same
random numbers to their logits (Gumbel noise: the largest sum is then a draw from the softmax), so
that models which agree draw the same token: with probability (1 - d) / (1 + d) or more, d being the
total variation distance of the two distributions. The larger model's token stands whatever the
smaller one guessed, so a draft changes neither the distribution nor what a seed gives. Leviathan et
al. (2211.17192) accept 1 - d, but there a seed's text depends on how long each draft was; Daliri et
al. (2408.07978) have the coupling and its bound.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from dsq.errors import InputError
from dsq.runtime import llama_log
from dsq.runtime.engine import Floats
from dsq.runtime.llama_sampler import Candidates, make_chain
from dsq.runtime.server.backend import MAX_SEED, GenerateRequest, TokenLogprobs

_MASK = (1 << 64) - 1


class TokenSampler:
    """One request's sampler: it remembers tokens (penalties, grammar) and its random state.

    `coupled` draws by shared noise, for use beside a draft model. Raises InputError for a grammar
    that llama.cpp does not understand.
    """

    def __init__(
        self, request: GenerateRequest, vocab: Any, n_vocab: int, *, coupled: bool = False
    ) -> None:
        self._chain = self._grammar = None
        self._noise: _Noise | None = None
        self._forbidden = [token for token, bias in request.logit_bias if bias == -np.inf]
        self._vocab = vocab
        sampling = request.sampling
        self.is_argmax = (
            sampling.temperature == 0
            and not sampling.penalizes
            and not request.logit_bias
            and request.grammar is None
        )
        if self.is_argmax:
            return
        if coupled and sampling.temperature > 0:
            seed = sampling.seed
            self._noise = _Noise(secrets.randbelow(MAX_SEED + 1) if seed is None else seed)
        if request.grammar is not None:
            self._grammar = _grammar(vocab, request.grammar)
        self._chain = make_chain(
            n_vocab,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repeat_penalty=sampling.repeat_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            last_n=sampling.repeat_last_n if sampling.repeat_last_n >= 0 else 2**20,
            logit_bias=request.logit_bias,
            seed=sampling.seed,
            draws=self._noise is None,
        )
        if sampling.penalizes:
            for token in request.prompt_ids[-max(sampling.repeat_last_n, 0) :]:
                llama_cpp.llama_sampler_accept(self._chain, token)

    def sample(self, logits: Floats, context: Any, index: int) -> int | None:
        """The next token, or None if the grammar allows none, or none that is not forbidden.

        `logits` (n_vocab,) are those of the token at `index` in the context's last batch; without
        a context of llama.cpp the samplers run on them.
        """
        if self.is_argmax:
            return int(logits.argmax())
        if self._grammar is None and self._noise is None and context is not None:
            return int(llama_cpp.llama_sampler_sample(self._chain, context, index))
        return self._sample_here(logits)

    def _sample_here(self, logits: Floats) -> int | None:
        """As llama.cpp's tools do: only if the free choice breaks the grammar, apply it to all."""
        token = self._choose(logits, by_grammar=False)
        if self._grammar is not None and not self._allows(token):
            token = self._choose(logits, by_grammar=True)
            # What llama.cpp's grammar is told to accept and does not allow ends the process.
            if token is not None and not self._allows(token):
                token = None
        if token is not None:
            llama_cpp.llama_sampler_accept(self._chain, token)
            if self._grammar is not None and not llama_cpp.llama_vocab_is_eog(self._vocab, token):
                llama_cpp.llama_sampler_accept(self._grammar, token)
        if self._noise is not None:
            self._noise.next_position()
        return token

    def _allows(self, token: int | None) -> bool:
        one = Candidates(np.array([token], np.int32), np.zeros(1, np.float32))
        one.apply(self._grammar)
        return bool(one.left[1][0] != -np.inf)

    def _choose(self, logits: Floats, *, by_grammar: bool) -> int | None:
        all_ = Candidates(np.arange(len(logits), dtype=np.int32), logits)
        if by_grammar:
            all_.apply(self._grammar)
            all_.left[1][self._forbidden] = -np.inf  # in the order of the ids until now
            if all_.left[1].max() == -np.inf:
                return None
        all_.apply(self._chain)
        if self._noise is None:
            return all_.selected
        ids, left = all_.left
        return int(ids[(left + self._noise.of(ids)).argmax()])

    def fork(self) -> TokenSampler:
        """What this sampler would choose from another model's logits, from here on: for drafts.

        Its grammar stays behind. To be closed as well.
        """
        made = copy.copy(self)
        if not self.is_argmax:
            made._grammar = None
            made._chain = llama_cpp.llama_sampler_clone(self._chain)
            made._noise = copy.copy(self._noise)
        return made

    def ends(self, token: int) -> bool:
        """Whether a grammar is over with this token: nothing may follow it."""
        return self._grammar is not None and bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        for sampler in (self._chain, self._grammar):
            if sampler is not None:
                llama_cpp.llama_sampler_free(sampler)  # a chain frees its steps as well
        self._chain = self._grammar = None


class _Noise:
    """Gumbel noise for each token at each position: a function of the seed, so that two models get
    the same without a word between them."""

    def __init__(self, seed: int) -> None:
        self._seed, self._position = seed, 0

    def next_position(self) -> None:
        self._position += 1

    def of(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        key = (_mixed(self._seed) + self._position) & _MASK
        bits = _mix(ids.astype(np.uint64) + np.uint64(_mixed(key)))
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
        return noise


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's output function; sums and products wrap."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mixed(x: int) -> int:
    return int(_mix(np.array([x], np.uint64))[0])


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

"""The dynamic generator's interface: jobs in a queue, one token of each per `iterate`."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch

from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Tokenizer

PAGE = 256


class ExLlamaV2DynamicGenerator:
    def __init__(
        self,
        model: ExLlamaV2,
        cache: ExLlamaV2Cache,
        tokenizer: ExLlamaV2Tokenizer,
        max_batch_size: int | None = None,
        max_seq_len: int | None = None,
        max_chunk_size: int | None = None,
        max_q_size: int = 8,
        draft_model: Any = None,
        draft_cache: Any = None,
        num_draft_tokens: int = 4,
        use_ngram_draft: bool = False,
        max_ngram: int = 4,
        max_sampling_threads: int = 16,
        min_sampling_threads: int = 3,
        paged: bool = True,
        filter_background_eval: bool = True,
        **kwargs: Any,
    ) -> None:
        config = model.config
        assert not kwargs
        assert max_batch_size
        assert max_q_size * max_batch_size <= config.max_batch_size * config.max_input_len
        assert max_seq_len
        assert max_seq_len <= config.max_seq_len
        assert cache.batch_size == 1
        assert cache.max_seq_len % PAGE == 0
        assert max_chunk_size
        assert max_chunk_size <= config.max_input_len
        assert max_chunk_size % PAGE == 0
        self.model, self.tokenizer, self.max_batch_size = model, tokenizer, max_batch_size
        self.padded_vocab_size = -(-config.vocab_size // 32) * 32
        self.max_pages, self.max_total_tokens = cache.max_seq_len // PAGE, cache.max_seq_len
        self.all_pages = [SimpleNamespace(kv_position=0) for _ in range(self.max_pages)]
        self.pending_jobs: list[ExLlamaV2DynamicJob] = []
        self.active_jobs: list[ExLlamaV2DynamicJob] = []
        self.known: set[tuple[int, ...]] = set()  # whole pages that were evaluated

    def enqueue(self, job: ExLlamaV2DynamicJob) -> int:
        pages = -(-(len(job.tokens) + job.max_new_tokens) // PAGE)
        assert pages <= self.max_pages, f"Job requires {pages} pages"
        job.generator = self
        self.pending_jobs.append(job)
        return 0

    def cancel(self, job: ExLlamaV2DynamicJob) -> None:
        for jobs in (self.pending_jobs, self.active_jobs):
            if job in jobs:
                jobs.remove(job)

    def iterate(self) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = []
        while self.pending_jobs and len(self.active_jobs) < self.max_batch_size:
            job = self.pending_jobs.pop(0)
            self.active_jobs.append(job)
            results.append({"job": job, "stage": "started", "eos": False})
        for job in list(self.active_jobs):
            if job.time_first_prefill is None:
                self._prefill(job)
                results.append({"job": job, "stage": "prefill", "eos": False})
            logits = torch.zeros(1, 1, self.padded_vocab_size)
            row = self.model.engine.logits(job.tokens, all=False)[0]
            logits[0, 0, : len(row)] = torch.from_numpy(row)
            logits[0, 0, len(row) :] = 1e9  # padding, never to be chosen
            token, _, _, _, filter_eos = job.receive_logits(logits)
            assert token.shape == (1, 1)
            assert token.dtype == torch.long
            assert not filter_eos
            self.tokenizer.get_id_to_piece_list(job.decode_special_tokens)[token.item()]
            job.tokens.append(token.item())
            job.new_tokens += 1
            job.is_finished = job.new_tokens >= job.max_new_tokens
            results.append({"job": job, "stage": "streaming", "eos": job.is_finished})
            if job.is_finished:
                self.active_jobs.remove(job)
        return results

    def _prefill(self, job: ExLlamaV2DynamicJob) -> None:
        job.time_first_prefill = time.time()
        for end in range(PAGE, len(job.tokens), PAGE):
            page = tuple(job.tokens[:end])
            job.cached_pages += page in self.known
            self.known.add(page)


class ExLlamaV2DynamicJob:
    def __init__(
        self,
        input_ids: torch.Tensor | list[torch.Tensor],
        max_new_tokens: int,
        min_new_tokens: int = 0,
        max_skips: int | None = 4,
        gen_settings: Any = None,
        seed: int | None = None,
        stop_conditions: list[Any] | tuple[Any, ...] | set[Any] | None = None,
        decode_special_tokens: bool = False,
        return_top_tokens: int = 0,
        return_logits: bool = False,
        return_probs: bool = False,
        filters: list[Any] | None = None,
        filter_prefer_eos: bool = False,
        token_healing: bool = False,
        identifier: object | None = None,
        banned_strings: list[str] | None = None,
        embeddings: list[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        assert not kwargs
        assert isinstance(input_ids, torch.Tensor)
        assert input_ids.device.type == "cpu"
        assert input_ids.shape[0] == 1
        assert input_ids.shape[1] > 0
        self.tokens: list[int] = input_ids[0].tolist()
        self.max_new_tokens, self.new_tokens = max_new_tokens, 0
        self.decode_special_tokens = decode_special_tokens
        self.time_first_prefill: float | None = None
        self.cached_pages = self.cached_tokens = 0
        self.is_finished = False
        self.generator: ExLlamaV2DynamicGenerator | None = None

    def receive_logits(self, logits: torch.Tensor) -> tuple[Any, Any, Any, Any, bool]:
        raise NotImplementedError("exllamav2's own sampler needs its extension")

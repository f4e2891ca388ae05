"""exllamav2's dynamic generator (paged cache, CUDA) behind the worker: EXL2 and GPTQ directories.

The generator batches, pages and reuses prefixes; which token comes next is llama.cpp's samplers'
to say, as in every engine: a job's `receive_logits` is where exllamav2 asks. Written from the
source of exllamav2 0.3.2 (generator/dynamic.py) and untested on a GPU: docs/gpu.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib import import_module
from math import isclose
from pathlib import Path
from typing import Any

from dsq.convert.spec import ModelSpec
from dsq.errors import DsqError, InputError, UnsupportedError
from dsq.runtime.server.backend import (
    Finish,
    GenerateRequest,
    ModelInfo,
    PromptTooLong,
    Step,
    TokenLogprobs,
    Usage,
)
from dsq.runtime.server.engines import EngineOptions
from dsq.runtime.server.llama_cpp_vocab import LlamaCppVocab
from dsq.runtime.server.loop import Counters
from dsq.runtime.server.token_sampler import TokenSampler, logprobs

PAGE = 256  # tokens; exllamav2's PAGED_PAGE_SIZE
_CACHES = {"f16": "ExLlamaV2Cache", "q8_0": "ExLlamaV2Cache_Q8", "q4_0": "ExLlamaV2Cache_Q4"}


@dataclass(frozen=True)
class ExllamaSettings:
    """How to run a directory for many requests; see `LlamaSettings`."""

    path: str
    n_ctx: int = 0
    kv_size: int = 0
    kv_type: str = "f16"
    n_parallel: int = 4
    n_batch: int = 512
    n_threads: int | None = None

    def __post_init__(self) -> None:
        if self.kv_type not in _CACHES:
            raise InputError(f"kv_type is {self.kv_type}; choose one of {', '.join(_CACHES)}")


def exllama_settings(path: Path, options: EngineOptions) -> ExllamaSettings:
    return ExllamaSettings(
        str(path),
        n_ctx=options.n_ctx,
        kv_size=options.kv_size,
        kv_type=options.kv_type or "f16",
        n_parallel=options.n_parallel or ExllamaSettings.n_parallel,
        n_threads=options.n_threads,
    )


@dataclass
class _Run:
    """A request on its way; the first five are what its job has sampled since the last step."""

    request: GenerateRequest
    sampler: TokenSampler
    new: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None
    job: Any = None
    began: float | None = None
    first: float | None = None
    n_cached: int = 0
    n_generated: int = 0


class ExllamaLoop:
    """What the worker drives: see `dsq.runtime.server.loop.Loop`.

    Raises InputError where exllamav2 is not installed or reads the directory otherwise than dsq.
    """

    def __init__(self, settings: ExllamaSettings) -> None:
        from dsq.runtime.torch_engine import open_directory

        self._settings = settings
        self._path = settings.path
        checkpoint = open_directory(Path(settings.path))
        self._spec = checkpoint.spec
        self._n_parameters = sum(t.n_elements for t in checkpoint.tensors.values())
        self._size_bytes = sum(checkpoint.stored_as(name)[1] for name in checkpoint.tensors)
        self._n_ctx = settings.n_ctx or self._spec.n_ctx
        self._torch = _module("torch")
        self._vocab = LlamaCppVocab(checkpoint.vocabulary())
        self._runs: dict[int, _Run] = {}
        self.counters = Counters()
        try:
            self._model, self._generator = self._load()
        except DsqError:
            raise
        except Exception as error:  # CUDA, assertions, missing kernels: all of it ends the loading
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise DsqError(f"{self._path}: exllamav2 cannot load it: {why}") from error

    def _load(self) -> tuple[Any, Any]:
        exllamav2, generator = _module("exllamav2"), _module("exllamav2.generator")
        settings = self._settings
        n_ctx = _padded(self._n_ctx)
        config = exllamav2.ExLlamaV2Config(self._path)
        check_rope(config, self._spec, self._path)
        config.max_seq_len = n_ctx
        model = exllamav2.ExLlamaV2(config)
        cache = getattr(exllamav2, _CACHES[settings.kv_type])(
            model, max_seq_len=max(n_ctx, _padded(settings.kv_size)), lazy=True
        )
        model.load_autosplit(cache)
        return model, generator.ExLlamaV2DynamicGenerator(
            model=model,
            cache=cache,
            tokenizer=exllamav2.ExLlamaV2Tokenizer(config),
            max_batch_size=settings.n_parallel,
            max_seq_len=n_ctx,
            max_chunk_size=min(settings.n_batch // PAGE * PAGE, n_ctx),
            max_q_size=1,  # no drafts
            max_sampling_threads=1,
        )

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            path=self._path,
            n_ctx=self._n_ctx,
            n_ctx_train=self._spec.n_ctx,
            n_vocab=self._spec.n_vocab,
            n_slots=self._settings.n_parallel,
            n_parameters=self._n_parameters,
            size_bytes=self._size_bytes,
            kv_type=self._settings.kv_type,
        )

    @property
    def idle(self) -> bool:
        return not self._runs

    @property
    def n_running(self) -> int:
        return len(self._generator.active_jobs)

    @property
    def n_waiting(self) -> int:
        return len(self._generator.pending_jobs)

    @property
    def kv_used(self) -> int:
        return sum(page.kv_position for page in self._generator.all_pages)

    @property
    def kv_size(self) -> int:
        return int(self._generator.max_total_tokens)

    def submit(self, id: int, request: GenerateRequest) -> None:
        n_prompt, n_vocab = len(request.prompt_ids), self._spec.n_vocab
        if n_prompt >= self._n_ctx:
            raise PromptTooLong(n_prompt, self._n_ctx)
        for token in (*request.prompt_ids, *(token for token, _ in request.logit_bias)):
            if not 0 <= token < n_vocab:
                raise InputError(f"token {token} is outside the model's {n_vocab} tokens")
        if request.prompt_logprobs:
            raise UnsupportedError(
                "echo with logprobs: exllamav2 gives no logits of a prompt; ask without, or serve "
                "by --engine torch"
            )
        run = _Run(request, TokenSampler(request, self._vocab.pointer, n_vocab))
        job_class = _module("exllamav2.generator").ExLlamaV2DynamicJob
        run.job = job_class(
            input_ids=self._torch.tensor([list(request.prompt_ids)], dtype=self._torch.long),
            max_new_tokens=min(request.max_tokens, self._n_ctx - n_prompt),
            decode_special_tokens=True,
        )
        run.job.receive_logits = lambda logits: self._sample(run, logits)
        self._generator.enqueue(run.job)
        self._runs[id] = run

    def _sample(self, run: _Run, logits: Any) -> tuple[Any, Any, Any, Any, bool]:
        """In the place of ExLlamaV2DynamicJob.receive_logits; logits (1, 1, n_vocab or more)."""
        request, row = run.request, logits[0, :, : self._spec.n_vocab].float().numpy()
        token = run.sampler.sample(row[0], None, 0)
        if token is None or token in request.stop_ids or run.sampler.ends(token):
            run.finish = "stop"
            token = 0 if token is None else token
        else:
            run.new.append(token)
            if request.n_logprobs:
                run.logprobs += logprobs(row, [token], request.n_logprobs)
        torch = self._torch
        none = torch.empty((1, 1), device="meta")  # exllamav2's none_tensor
        return torch.tensor([[token]], dtype=torch.long), none, none, torch.ones((1, 1)), False

    def cancel(self, id: int) -> None:
        """End a request without a word; unknown ones are ignored."""
        run = self._runs.pop(id, None)
        if run is not None:
            self._generator.cancel(run.job)
            run.sampler.close()

    def step(self) -> list[tuple[int, Step | DsqError]]:
        """One iteration of the generator. What came of it, by request."""
        began = time.perf_counter()
        results = self._generator.iterate()
        now = time.perf_counter()
        prompts = any(result["stage"] == "prefill" for result in results)
        if prompts:
            self.counters.prompt_seconds += now - began
        else:
            self.counters.predict_seconds += now - began
        steps: list[tuple[int, Step | DsqError]] = []
        for id, run in list(self._runs.items()):
            if run.began is None and run.job.time_first_prefill is not None:
                run.began = began
            if run.finish is None and run.job.is_finished:
                run.finish = "length"
            if run.new or run.finish is not None:
                steps.append((id, self._step(id, run, now)))
        return steps

    def _step(self, id: int, run: _Run, now: float) -> Step:
        tokens, run.new = tuple(run.new), []
        chosen, run.logprobs = tuple(run.logprobs), []
        is_first = run.first is None
        if is_first:
            run.first = now
            run.n_cached = run.job.cached_pages * PAGE + run.job.cached_tokens
            self.counters.cached_tokens += run.n_cached
            self.counters.prompt_tokens += len(run.request.prompt_ids) - run.n_cached
        run.n_generated += len(tokens)
        self.counters.generated_tokens += len(tokens)
        usage = _usage(run, now) if is_first or run.finish is not None else None
        if run.finish is not None:
            self.cancel(id)
        return Step(
            tokens, chosen if run.request.n_logprobs else None, finish=run.finish, usage=usage
        )

    def close(self) -> None:
        for id in list(self._runs):
            self.cancel(id)
        self._model.unload()
        self._vocab.close()


def _usage(run: _Run, now: float) -> Usage:
    assert run.began is not None
    assert run.first is not None
    return Usage(
        n_prompt=len(run.request.prompt_ids),
        n_cached=run.n_cached,
        n_generated=run.n_generated,
        prompt_ms=1e3 * (run.first - run.began),
        predict_ms=1e3 * (now - run.first),
    )


def check_rope(config: Any, spec: ModelSpec, path: str) -> None:
    """Raise UnsupportedError unless exllamav2 has read the same RoPE from config.json.

    It knows the key `rope_scaling` alone, and passes over the newer `rope_parameters`.
    """
    rope = spec.rope
    method = {"linear": None, "none": None}.get(rope.kind, rope.kind)
    factor = rope.factor if rope.kind == "linear" else 1.0
    same = (
        isclose(config.rotary_embedding_base, rope.freq_base)
        and isclose(config.scale_pos_emb, factor)
        and config.alt_rope_method == method
    )
    if not same:
        raise UnsupportedError(
            f"{path}: exllamav2 reads other rotary frequencies from config.json than are meant "
            f"({rope.kind}, factor {rope.factor:g}): it looks for rope_theta and rope_scaling; "
            "write them so, or leave --engine out"
        )


def _padded(n_tokens: int) -> int:
    return -(-n_tokens // PAGE) * PAGE


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(
            f"--engine exllamav2: {name} cannot be imported ({error}): "
            "pip install exllamav2 flash-attn"
        ) from error

"""What vLLM is started with: the options of `dsq serve`, checked before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsq.convert.checkpoint import HfCheckpoint, open_checkpoint
from dsq.errors import InputError
from dsq.runtime.server.engines import EngineOptions
from dsq.runtime.server.vllm_process import (
    DEFAULT_PARALLEL,
    VllmSettings,
    extra_arguments,
    find_vllm,
)


def plan_vllm(path: Path, options: EngineOptions) -> tuple[EngineOptions, int]:
    """The options with the executable found; no memory is estimated, which is vLLM's business.

    Raises InputError for options that vLLM does not have and where there is no vLLM.
    """
    for given, name, remedy in (
        (options.n_gpu_layers, "-ngl", "it takes whole cards: --tensor-parallel-size"),
        (options.n_threads, "-t", "it chooses its threads itself"),
        (options.kv_size, "--kv-size", "its cache takes what memory is left: --vllm-args="
         "'--gpu-memory-utilization 0.8'"),
        (options.kv_type not in (None, "f16"), f"--kv-type {options.kv_type}", "its cache has the "
         "model's type, or 8 bits: --vllm-args='--kv-cache-dtype fp8'"),
    ):  # fmt: skip
        if given:
            raise InputError(f"{name}: not for --engine vllm; {remedy}")
    extra_arguments(options.vllm_args)
    if options.vllm_url is not None:
        if options.vllm or options.vllm_args or options.n_cards > 1:
            raise InputError(
                f"--vllm-url {options.vllm_url}: that vLLM runs already; --vllm, --vllm-args and "
                "--tensor-parallel-size are for one that dsq starts"
            )
        if not options.vllm_url.startswith(("http://", "https://")):
            raise InputError(f"--vllm-url {options.vllm_url}: is no http:// or https:// address")
        return options, 0
    trained = open_checkpoint(path).spec.n_ctx
    if options.n_ctx > trained:
        raise InputError(f"-c {options.n_ctx}: {path} was trained on {trained} tokens; give fewer")
    return replace(options, vllm=find_vllm(options.vllm)), 0


def vllm_settings(path: Path, options: EngineOptions) -> VllmSettings:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, HfCheckpoint), "the engine takes directories"
    return VllmSettings(
        path=str(path),
        command=None if options.vllm_url else options.vllm,
        url=options.vllm_url,
        n_ctx=options.n_ctx,
        n_parallel=options.n_parallel or DEFAULT_PARALLEL,
        tensor_parallel=options.n_cards,
        extra=extra_arguments(options.vllm_args),
        n_ctx_train=checkpoint.spec.n_ctx,
        n_vocab=checkpoint.spec.n_vocab,
        n_parameters=sum(tensor.n_elements for tensor in checkpoint.tensors.values()),
        size_bytes=sum(file.stat().st_size for file in checkpoint.files),
    )

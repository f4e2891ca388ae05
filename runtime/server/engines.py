"""The engines that serve, and which one takes a model: by its format and the machine.

An entry of `ENGINES` maps a name to what makes a Backend. A new engine is one entry and one module,
imported only when it is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsq.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from dsq.runtime.server.backend import Backend

Format = Literal["gguf", "gptq", "exl2", "hf"]
FORMATS: dict[Format, str] = {
    "gguf": "GGUF",
    "gptq": "GPTQ directory",
    "exl2": "EXL2 directory",
    "hf": "Hugging Face directory",
}


@dataclass(frozen=True)
class EngineOptions:
    """What `dsq serve` was asked for. 0 and None: the engine chooses.

    A request may have `n_ctx` tokens, all together `kv_size`; `n_parallel` run at once and
    `max_queued` more wait. `n_gpu_layers` (with `auto_layers` as many as fit) and `draft`, a
    smaller GGUF that guesses ahead, are llama.cpp's. `n_cards` are those that vLLM spreads a model
    over, `vllm` its executable, `vllm_url` one that runs already, `vllm_args` more of its options
    (see `vllm_plan`). `lookup`: drafts from the prompt's own n-grams.
    """

    n_ctx: int = 0
    kv_size: int = 0
    kv_type: str | None = None
    n_parallel: int = 0
    n_threads: int | None = None
    n_gpu_layers: int = 0
    auto_layers: bool = False
    draft: Path | None = None
    n_cards: int = 1
    vllm: str | None = None
    vllm_url: str | None = None
    vllm_args: str | None = None
    lookup: bool = True
    max_queued: int = 64


Factory = Callable[[Path, EngineOptions], "Backend"]
# The options with a context, and the bytes of memory that the worker will take (0: not estimated).
Plan = Callable[[Path, EngineOptions, int], tuple[EngineOptions, int]]


@dataclass(frozen=True)
class ServerEngine:
    """`formats` are those it runs. `packages` must be installed; `install` is the command."""

    name: str
    formats: tuple[Format, ...]
    packages: tuple[str, ...]
    install: str
    plan: Plan
    make: Factory
    needs_card: bool = False


@dataclass(frozen=True)
class Machine:
    """`has_card`: NVIDIA's tools know one. `installed`: packages that engines need."""

    has_card: bool
    installed: frozenset[str]


@dataclass(frozen=True)
class Choice:
    """`repack`: the directory is served through a GGUF of it that is kept in the cache."""

    engine: ServerEngine
    reason: str
    repack: bool = False


def _plan_llama(path: Path, options: EngineOptions, free: int) -> tuple[EngineOptions, int]:
    from dsq.runtime.server.plan import plan_llama

    return plan_llama(path, options, free)


def _make_llama(path: Path, options: EngineOptions) -> Backend:
    from dsq.runtime.server.client import WorkerBackend
    from dsq.runtime.server.plan import llama_settings

    return WorkerBackend(llama_settings(path, options), max_queued=options.max_queued)


def _plan_torch(path: Path, options: EngineOptions, free: int) -> tuple[EngineOptions, int]:
    from dsq.runtime.server.plan import plan_torch

    return plan_torch(path, options, free)


def _make_torch(path: Path, options: EngineOptions) -> Backend:
    from dsq.runtime.server.client import WorkerBackend
    from dsq.runtime.server.torch_batch import torch_settings

    return WorkerBackend(torch_settings(path, options), "torch", max_queued=options.max_queued)


def _plan_card(path: Path, options: EngineOptions, free: int) -> tuple[EngineOptions, int]:
    from dsq.runtime.server.plan import plan_card

    return plan_card(path, options)


def _make_exllama(path: Path, options: EngineOptions) -> Backend:
    from dsq.runtime.server.client import WorkerBackend
    from dsq.runtime.server.exllama_backend import exllama_settings

    return WorkerBackend(
        exllama_settings(path, options), "exllamav2", max_queued=options.max_queued
    )


def _plan_vllm(path: Path, options: EngineOptions, free: int) -> tuple[EngineOptions, int]:
    from dsq.runtime.server.vllm_plan import plan_vllm

    return plan_vllm(path, options)


def _make_vllm(path: Path, options: EngineOptions) -> Backend:
    from dsq.runtime.server.vllm_backend import VllmBackend
    from dsq.runtime.server.vllm_plan import vllm_settings

    return VllmBackend(vllm_settings(path, options), max_queued=options.max_queued)


ENGINES: dict[str, ServerEngine] = {
    engine.name: engine
    for engine in (
        ServerEngine(
            "llama.cpp",
            formats=("gguf", "gptq", "exl2"),
            packages=("llama-cpp-python",),
            install="pip install llama-cpp-python",
            plan=_plan_llama,
            make=_make_llama,
        ),
        ServerEngine(
            "torch",
            formats=("gptq", "exl2", "hf"),
            packages=("torch", "transformers"),
            install="pip install 'dsq[torch]'",
            plan=_plan_torch,
            make=_make_torch,
        ),
        ServerEngine(
            "exllamav2",
            formats=("exl2", "gptq"),
            packages=("exllamav2", "flash-attn"),
            install="pip install exllamav2 flash-attn",
            plan=_plan_card,
            make=_make_exllama,
            needs_card=True,
        ),
        ServerEngine(
            "vllm",
            formats=("hf", "gptq"),
            packages=(),  # it is an executable in an environment of its own, or a URL
            install="",
            plan=_plan_vllm,
            make=_make_vllm,
        ),
    )
}


def machine(vllm: str | None = None) -> Machine:
    """This one. No engine is imported for it. `vllm`: the executable that was named."""
    from dsq.runtime.devices import cards, installed_version
    from dsq.runtime.server.vllm_process import find_vllm

    packages = {package for engine in ENGINES.values() for package in engine.packages}
    installed = {package for package in packages if installed_version(package)}
    with suppress(InputError):
        find_vllm(vllm)
        installed.add("vllm")
    return Machine(bool(cards()), frozenset(installed))


def format_of(path: Path) -> Format:
    """Of a GGUF or a directory; headers only. Raises InputError for what is neither."""
    if path.is_file():
        return "gguf"
    from dsq.runtime.source import Source

    source = Source(path)
    if source.is_gguf:
        return "gguf"
    method = source.packed_method
    return "gptq" if method == "gptq" else "exl2" if method == "exl2" else "hf"


def choose(asked: str, format: Format, name: str, machine: Machine) -> Choice:
    """The engine for a model of `format` called `name`, and why, in one sentence.

    Raises InputError for an engine that is unknown or not installed, UnsupportedError for one that
    does not run the format.
    """
    if asked == "auto":
        chosen, reason = _by_itself(format, machine)
    else:
        chosen, reason = asked, f"{FORMATS[format]}: {asked}, as asked"
    engine = ENGINES.get(chosen)
    if engine is None:
        raise InputError(f"--engine {asked}: no such engine; give auto or {', '.join(ENGINES)}")
    if format not in engine.formats:
        raise UnsupportedError(_misfit(engine, format, name))
    missing = [package for package in engine.packages if package not in machine.installed]
    if missing:
        raise InputError(
            f"{name}: {FORMATS[format]}, served by {engine.name}, which needs "
            f"{' and '.join(missing)}: {engine.install}"
        )
    if engine.needs_card and not machine.has_card:
        raise InputError(
            f"--engine {engine.name}: it runs on a CUDA card, and nvidia-smi knows of none here; "
            "leave --engine out"
        )
    repack = engine.name == "llama.cpp" and format != "gguf"
    return Choice(engine, reason, repack)


def _by_itself(format: Format, machine: Machine) -> tuple[str, str]:
    title = FORMATS[format]
    if format == "gguf":
        return "llama.cpp", "GGUF: llama.cpp"
    if format == "hf":
        if machine.has_card and "vllm" in ENGINES and "vllm" in machine.installed:
            return "vllm", f"{title} and a CUDA card: vLLM"
        return "torch", f"{title}: torch"
    if not machine.has_card:
        return "llama.cpp", f"{title} without a CUDA card: llama.cpp on a cached repack"
    if set(ENGINES["exllamav2"].packages) <= machine.installed:
        return "exllamav2", f"{title} and a CUDA card: exllamav2"
    return "llama.cpp", f"{title}, exllamav2 not installed: llama.cpp on a cached repack"


def _misfit(engine: ServerEngine, format: Format, name: str) -> str:
    runs = " and ".join(FORMATS[f] for f in engine.formats)
    if format == "gguf":
        remedy = "leave --engine out"
    elif engine.name == "llama.cpp":
        remedy = f"convert it, dsq convert {name} --to gguf, or take --engine torch"
    else:
        remedy = "leave --engine out"
    return f"--engine {engine.name}: runs {runs}, and {name} is a {FORMATS[format]}; {remedy}"

"""What each engine sees on this machine, and how to install what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dsq.errors import InputError
from dsq.quant.threads import default_threads, free_cores

LLAMA_CPP_CUDA = (
    "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir llama-cpp-python"
)


@dataclass(frozen=True)
class EngineState:
    """One engine: `install` is the command for what is missing, None when nothing is."""

    name: str
    version: str | None
    runs: str  # formats
    sees: str  # one line
    gpu: bool
    install: str | None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        return self.version is not None


@dataclass(frozen=True)
class GraphicsCard:
    """As nvidia-smi names it; bytes."""

    name: str
    vram: int
    vram_free: int


def engines() -> list[EngineState]:
    found = cards()
    return [_llama_cpp(), _torch(), _exllamav2(found), _vllm(found)]


def report() -> dict[str, Any]:
    """The report of `dsq devices`, with stable keys."""
    return {
        "cpu": {
            "physical_cores": default_threads(),
            "threads": free_cores(),
            "memory_available_bytes": available_memory(),
        },
        "cards": [asdict(card) for card in cards()],
        "engines": [{**asdict(e), "installed": e.installed} for e in engines()],
    }


def installed_version(package: str) -> str | None:
    """None where the package is not installed; nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _broken(name: str, found: str, runs: str, error: Exception, install: str) -> EngineState:
    why = " ".join(str(error).split())[:200]
    return EngineState(name, found, runs, f"does not import: {why}", False, install)


def _llama_cpp() -> EngineState:
    name, runs, package = "llama.cpp", "GGUF; GPTQ, EXL2 repacked", "llama-cpp-python"
    found = installed_version(package)
    if found is None:
        return EngineState(name, None, runs, "not installed", False, f"pip install {package}")
    try:
        import llama_cpp

        offload = bool(llama_cpp.llama_supports_gpu_offload())
        info = llama_cpp.llama_print_system_info().decode("utf-8", "replace")
    except Exception as error:  # a shared library fails to load in many ways
        return _broken(name, found, runs, error, f"pip install --force-reinstall {package}")
    features = system_features(info)
    where = "CPU and GPU" if offload else "CPU only"
    sees = f"{where}: {' '.join(features)}"
    return EngineState(
        name, found, runs, sees, offload, None if offload else LLAMA_CPP_CUDA, {"cpu": features}
    )


def system_features(info: str) -> list[str]:
    """The features that are on in `llama_print_system_info`: `AVX2 = 1 | FMA = 1 | …`."""
    return re.findall(r"(\w+) = [1-9]\d*", info)


def _torch() -> EngineState:
    name, runs = "torch", "GPTQ, EXL2, Hugging Face directories"
    found = installed_version("torch")
    if found is None:
        return EngineState(name, None, runs, "not installed", False, "pip install 'dsq[torch]'")
    try:
        torch: Any = importlib.import_module("torch")
        cuda = bool(torch.cuda.is_available())
        built = torch.version.cuda
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception as error:
        return _broken(name, found, runs, error, "pip install --force-reinstall torch")
    if installed_version("transformers") is None:
        sees = "lacks transformers, whose Llama it runs"
        return EngineState(name, found, runs, sees, False, "pip install 'dsq[torch]'")
    if cuda:
        return EngineState(name, found, runs, f"CUDA {built}: {', '.join(names)}", True, None)
    why = "built without CUDA" if built is None else f"built for CUDA {built}, finds no card"
    install = "pip install --force-reinstall torch" if built is None else None
    return EngineState(name, found, runs, f"CPU only: {why}", False, install)


def _exllamav2(found: Sequence[GraphicsCard]) -> EngineState:
    """Its version only: importing it compiles its CUDA extension."""
    name, runs, install = "exllamav2", "EXL2, GPTQ; CUDA only", "pip install exllamav2 flash-attn"
    version = installed_version(name)
    if version is None:
        return EngineState(name, None, runs, "not installed", False, install)
    if installed_version("flash-attn") is None:
        sees = "lacks flash-attn, which its paged cache needs"
        return EngineState(name, version, runs, sees, False, "pip install flash-attn")
    return EngineState(name, version, runs, _card_names(found), bool(found), None)


def _vllm(found: Sequence[GraphicsCard]) -> EngineState:
    """It lives in an environment of its own: what counts is its command."""
    from dsq.runtime.server.vllm_process import INSTALL, find_vllm

    name, runs = "vllm", "GPTQ, Hugging Face directories; many cards"
    try:
        command = find_vllm(None)
    except InputError:
        return EngineState(name, None, runs, "no vllm command found", False, INSTALL)
    sees = f"{command}; {_card_names(found)}"
    return EngineState(name, installed_version(name) or "installed", runs, sees, bool(found), None)


def _card_names(found: Sequence[GraphicsCard]) -> str:
    return ", ".join(card.name for card in found) or "no CUDA card"


def cards(run: Callable[[], str] | None = None) -> list[GraphicsCard]:
    """NVIDIA's cards, by nvidia-smi; none where there is no such tool."""
    try:
        text = (run or _nvidia_smi)()
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
            found.append(GraphicsCard(parts[0], int(parts[1]) << 20, int(parts[2]) << 20))
    return found


def _nvidia_smi() -> str:
    query = "--query-gpu=name,memory.total,memory.free"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that a new process can take: MemAvailable, and what a cgroup's limit leaves.

    Where there is no /proc (macOS): half of the physical memory.
    """
    try:
        text = meminfo.read_text()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    free = (int(match[1]) if match else 0) << 10
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = (cgroup / "memory.current").read_text().strip()
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):
        return free

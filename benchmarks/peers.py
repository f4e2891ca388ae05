"""llama.cpp's own tools, from the sources that `make peers` fetched: the other side of each run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".cache" / "peers"
BUILD = ROOT / ".cache" / "llama.cpp-build"
SMOLLM2_GGUF = PEERS / "SmolLM2-135M-Instruct.Q4_1.gguf"
TOOLS = ("llama-quantize", "llama-perplexity")
SERVER = "llama-server"

# llama-cpp-python's own settings (its CMakeLists.txt), with the tools on. What is not named here
# has llama.cpp's default on both sides: Release, GGML_NATIVE, OpenMP.
_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_UI=OFF",  # its web page would be downloaded
    "-DLLAMA_BUILD_APP=OFF",
    # Else llama.cpp prints the commit of the repository around it, which is dsq's.
    "-DLLAMA_BUILD_NUMBER=0",
)


@dataclass(frozen=True)
class Peers:
    """Where the tools are. Each method returns a command line."""

    source: Path  # vendor/llama.cpp
    bin: Path

    @property
    def package(self) -> str:
        name, _, version = self.source.parents[1].name.rpartition("-")
        return f"{name.replace('_', '-')} {version}"

    @property
    def version(self) -> str:
        """As the tool names itself, and the package that it came in."""
        done = subprocess.run(
            [self.bin / "llama-perplexity", "--version"], capture_output=True, text=True, check=True
        )
        found = re.search(r"version: (\S+)", done.stdout + done.stderr)
        ggml = (self.source / "ggml" / "CMakeLists.txt").read_text()
        parts = [
            re.search(rf"GGML_VERSION_{k}\s+(\d+)\)", ggml) for k in ("MAJOR", "MINOR", "PATCH")
        ]
        number = ".".join(m[1] for m in parts if m)
        return f"llama.cpp {found[1] if found else '?'} (ggml {number}) from {self.package}"

    def convert(self, checkpoint: Path, outtype: str, out: Path) -> list[str | Path]:
        """convert_hf_to_gguf.py, in this Python, with the gguf package that it ships."""
        script = self.source / "convert_hf_to_gguf.py"
        return [sys.executable, script, checkpoint, "--outtype", outtype, "--outfile", out]

    def quantize(self, gguf: Path, out: Path, preset: str, threads: int) -> list[str | Path]:
        return [self.bin / "llama-quantize", gguf, out, preset.upper(), str(threads)]

    def perplexity(
        self, gguf: Path, text: Path, *, n_ctx: int, chunks: int, threads: int
    ) -> list[str | Path]:
        numbers = ["-c", str(n_ctx), "--chunks", str(chunks), "-t", str(threads)]
        return [self.bin / "llama-perplexity", "-m", gguf, "-f", text, *numbers, "--log-timestamps"]

    @property
    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.source / "gguf-py")}


def find_peers() -> Peers:
    """The peer's tools, built if they are not there. DSQ_PEER_BIN names a folder with a build."""
    found = sorted(PEERS.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not found or not SMOLLM2_GGUF.is_file():
        sys.exit(f"{PEERS} lacks llama.cpp's sources or SmolLM2: run `make peers` first")
    source = found[-1]
    folder = Path(os.environ.get("DSQ_PEER_BIN") or BUILD / "bin")
    if not all((folder / tool).is_file() for tool in TOOLS):
        if os.environ.get("DSQ_PEER_BIN"):
            sys.exit(f"DSQ_PEER_BIN={folder} lacks {' or '.join(TOOLS)}")
        build(source)
    elif folder == BUILD / "bin" and not _built_from(source):
        build(source)
    return Peers(source, folder)


def find_server() -> Path:
    """llama-server, built if it is not there. LLAMA_SERVER names another one."""
    named = os.environ.get("LLAMA_SERVER")
    if named:
        if not Path(named).is_file():
            sys.exit(f"LLAMA_SERVER={named}: no such file")
        return Path(named)
    peers = find_peers()
    if not (peers.bin / SERVER).is_file():
        if os.environ.get("DSQ_PEER_BIN"):
            sys.exit(f"DSQ_PEER_BIN={peers.bin} lacks {SERVER}; name one with LLAMA_SERVER")
        build(peers.source, (SERVER,))
    return peers.bin / SERVER


def _built_from(source: Path) -> bool:
    cache = BUILD / "CMakeCache.txt"
    return cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={source}\n" in cache.read_text()


def build(source: Path, targets: Sequence[str] = TOOLS) -> None:
    """Compile tools: the two take about 5 minutes on 2 cores."""
    if shutil.which("cmake") is None:
        sys.exit("building llama.cpp's tools needs cmake and a C++ compiler")
    print(f"Building {' and '.join(targets)} in {BUILD} (5 minutes on 2 cores).", flush=True)
    start = time.perf_counter()
    if BUILD.exists() and not _built_from(source):
        shutil.rmtree(BUILD)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    commit = f"-DLLAMA_BUILD_COMMIT={source.parents[1].name}"
    jobs = str(len(os.sched_getaffinity(0)))
    for command in (
        ["cmake", "-S", str(source), "-B", str(BUILD), *generator, *extra, *_FLAGS, commit],
        ["cmake", "--build", str(BUILD), "--target", *targets, "--parallel", jobs],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{shlex.join(command)} failed:\n{done.stdout[-4000:]}")
    print(f"Built in {time.perf_counter() - start:.0f} s.", flush=True)

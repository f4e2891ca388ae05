"""llama.cpp's own server tests, run against `dsq serve`: see llama_cpp_plugin."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.models import ROOT

FILES = (
    *("basic", "tokenize", "completion", "infill", "chat_completion", "security", "ctx_shift"),
    *("ignore_eos", "metrics"),
)


@pytest.mark.slow
def test_llama_cpps_own_server_tests(llama_cpp_source: Path, tmp_path: Path) -> None:
    tests = llama_cpp_source / "tools" / "server" / "tests"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-c", str(tests / "pytest.ini"), "--noconftest"),
            *("-p", "tests.runtime.server.llama_cpp_plugin", "-p", "no:cacheprovider"),
            *("-q", "-rsx", "--tb=short", "-W", "ignore"),
            *(str(tests / "unit" / f"test_{name}.py") for name in FILES),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{tests}",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # with its servers
    )
    try:
        output, _ = process.communicate(timeout=1500)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    print(output[-20000:])
    assert process.returncode == 0

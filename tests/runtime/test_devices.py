"""What the engines see, read from what the tools print."""

from __future__ import annotations

import subprocess
from pathlib import Path

import llama_cpp
import pytest

from dsq.runtime import devices
from dsq.runtime.devices import available_memory, cards, engines, system_features


def test_llama_cpp_says_what_its_library_says() -> None:
    state = next(e for e in engines() if e.name == "llama.cpp")
    assert state.version == llama_cpp.__version__
    assert state.gpu == llama_cpp.llama_supports_gpu_offload()
    info = llama_cpp.llama_print_system_info().decode()
    assert state.details["cpu"] == system_features(info)
    for feature in state.details["cpu"]:
        assert f"{feature} = 1" in info
    assert state.gpu or "GGML_CUDA" in str(state.install)


def test_features_that_are_off_are_left_out() -> None:
    assert system_features("CPU : AVX2 = 1 | AVX512 = 0 | VNNI = 10 | ") == ["AVX2", "VNNI"]


def test_what_is_missing_has_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "installed_version", lambda package: None)
    monkeypatch.setenv("PATH", "")
    for state in engines():
        assert not state.installed
        assert "pip install " in str(state.install)


def test_an_engine_that_does_not_import_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise ImportError(f"{name}: libcudart.so.12:\ncannot open shared object file")

    monkeypatch.setattr(devices, "installed_version", lambda package: "9.9")
    monkeypatch.setattr(devices.importlib, "import_module", broken)
    state = next(e for e in engines() if e.name == "torch")
    assert "does not import: torch: libcudart.so.12: cannot" in state.sees
    assert "force-reinstall" in str(state.install)


def test_engines_on_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """exllamav2 is not imported (that compiles its extension), and vLLM has its own environment."""
    (tmp_path / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    there = {"exllamav2": "0.3.2", "flash-attn": "2.8"}
    monkeypatch.setattr(devices, "installed_version", there.get)
    card = devices.GraphicsCard("NVIDIA H100", 80 << 30, 79 << 30)
    for found, sees in (([card], "NVIDIA H100"), ([], "no CUDA card")):
        monkeypatch.setattr(devices, "cards", lambda found=found: found)
        states = {e.name: e for e in engines()}
        assert states["exllamav2"].sees == sees
        assert states["vllm"].sees == f"{tmp_path / 'vllm'}; {sees}"
        for name in ("exllamav2", "vllm"):
            assert (states[name].gpu, states[name].install) == (bool(found), None)
    del there["flash-attn"]
    states = {e.name: e for e in engines()}
    assert "lacks flash-attn" in states["exllamav2"].sees
    assert states["exllamav2"].install == "pip install flash-attn"


def test_cards_as_nvidia_smi_prints_them() -> None:
    text = "NVIDIA RTX A6000, 49140, 48000\nNVIDIA H100, [N/A], [N/A]\n"
    (card,) = cards(lambda: text)
    assert (card.name, card.vram, card.vram_free) == ("NVIDIA RTX A6000", 49140 << 20, 48000 << 20)

    def absent() -> str:
        raise FileNotFoundError("nvidia-smi")

    def fails() -> str:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    assert cards(absent) == cards(fails) == []


def test_memory_and_the_cgroups_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    4096 kB\n")
    assert available_memory(meminfo, tmp_path) == 4 << 20
    (tmp_path / "memory.current").write_text("1048576\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(meminfo, tmp_path) == 4 << 20
    (tmp_path / "memory.max").write_text("3145728\n")
    assert available_memory(meminfo, tmp_path) == 2 << 20

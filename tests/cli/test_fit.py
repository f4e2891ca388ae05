"""`dsq fit`, `dsq devices` and `dsq package` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsq.cli.main import main
from dsq.convert.model_shapes import SHAPES
from tests.tiny_gguf import write_tiny_gguf

GIVEN = ["--ram", "16GiB", "--ram-bandwidth", "40"]


def report(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*args, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(list(args)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_the_four_sizes_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "fit", *GIVEN, "--vram", "8GiB", "--bandwidth", "504GB/s")
    assert [model["model"] for model in found["models"]] == list(SHAPES)
    assert found["limits"]["vram_bandwidth"] == 504e9
    for model in found["models"]:
        chosen = next(r for r in model["rows"] if r["type"] == model["recommended"])
        assert chosen["vram_bytes"] <= 8 << 30
        assert chosen["ram_bytes"] <= 16 << 30


def test_one_size_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "deepseek-coder-6.7b", *GIVEN, "--card", "rtx-4090"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "GiB" in line and " → " in line]
    assert len(rows) == 11
    assert [line.split()[0] for line in rows if "recommended" in line] == ["q8_0"]
    assert "at 1,008 GB/s" in out


def test_columns_are_those_that_say_something(capsys: pytest.CaptureFixture[str]) -> None:
    def table(*args: str) -> tuple[list[str], str]:
        assert main(["fit", "6.7b", "--ram", "16GiB", "--ram-bandwidth", "40", *args]) == 0
        out = capsys.readouterr().out
        assert "?" not in out
        return [" ".join(line.split()) for line in out.splitlines()], out

    lines, _ = table("--vram", "0")
    assert lines[1] == "type file KV type KV cache in memory tokens/s"
    lines, out = table("--vram", "8GiB")
    assert lines[1] == "type file KV type KV cache on card layers in memory"
    assert "give --card NAME or --bandwidth" in out
    lines, _ = table("--vram", "3GiB", "--bandwidth", "504")
    assert lines[1] == "type file KV type KV cache on card layers in memory tokens/s"
    assert any(" of 33 " in line for line in lines)
    assert main(["fit", "33b", "--ram", "1GiB", "--ram-bandwidth", "40", "--vram", "0"]) == 0
    out = capsys.readouterr().out
    assert "nothing fits" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_quantized_file_is_one_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "a.gguf", n_embd=256, n_ff=512)
    small = tmp_path / "b.gguf"
    assert main(["quantize", "q4_k_m", str(source), "-o", str(small)]) == 0
    for path, n_rows in ((source, 11), (small, 1)):
        found = report(capsys, "fit", str(path), *GIVEN, "--vram", "0")
        (model,) = found["models"]
        assert len(model["rows"]) == n_rows
        row = next(r for r in model["rows"] if r["type"] == "q4_k_m")
        # From the float file the header is its own: the few bytes that quantizing adds are off.
        assert row["file_bytes"] == pytest.approx(small.stat().st_size, abs=256)
    assert model["rows"][0]["file_bytes"] == small.stat().st_size


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "16384" in error(capsys, "fit", "6.7b", *GIVEN, "-c", "20000")
    assert "no bandwidth" in error(capsys, "fit", "6.7b", "--bandwidth", "fast")
    for size in ("-1", "1e30", "nan", "9999999T", "0.001"):
        for flag in ("--vram", "--ram"):
            assert f"argument {flag}: {size!r}" in error(capsys, "fit", "6.7b", f"{flag}={size}")
    assert "rtx-4090" in error(capsys, "fit", "6.7b", "--card", "abacus")
    both = ["--ram-bandwidth", "3", "--bandwidth", "3", "--vram", "0"]
    assert "give one" in error(capsys, "fit", "6.7b", *both)


def test_devices(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "devices")
    assert [e["name"] for e in found["engines"]] == ["llama.cpp", "torch", "exllamav2", "vllm"]
    assert main(["devices"]) == 0
    assert "llama.cpp" in capsys.readouterr().out


def test_package(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "a.gguf")
    out = tmp_path / "out"
    found = report(capsys, "package", str(source), "--to", "ollama", "-o", str(out))
    assert found["files"] == [str(out / "a.gguf"), str(out / "Modelfile")]
    assert "ollama create a -f" in found["next"]
    assert "--force" in error(capsys, "package", str(source), "--to", "ollama", "-o", str(out))
    assert "is no GGUF" not in error(capsys, "package", str(source), "--to", "x", "-o", str(out))

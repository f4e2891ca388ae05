"""Which engine serves what: by format and machine, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsq.errors import InputError, UnsupportedError
from dsq.runtime.server.engines import ENGINES, Format, Machine, choose, format_of
from tests.models import write_hf
from tests.packed_models import write_exl2, write_gptq

ALL = frozenset(p for engine in ENGINES.values() for p in engine.packages) | {"vllm"}
NO_CARD, CARD = Machine(False, ALL), Machine(True, ALL)
ONLY_LLAMA = Machine(True, frozenset({"llama-cpp-python"}))


@pytest.mark.parametrize(
    ("format", "machine", "engine", "reason"),
    [
        ("gguf", NO_CARD, "llama.cpp", "GGUF: llama.cpp"),
        ("gguf", CARD, "llama.cpp", "GGUF: llama.cpp"),
        ("gptq", NO_CARD, "llama.cpp", "GPTQ directory without a CUDA card: llama.cpp on a cached"),
        ("exl2", NO_CARD, "llama.cpp", "EXL2 directory without a CUDA card: llama.cpp on a cached"),
        ("exl2", CARD, "exllamav2", "EXL2 directory and a CUDA card: exllamav2"),
        ("gptq", CARD, "exllamav2", "GPTQ directory and a CUDA card: exllamav2"),
        ("gptq", ONLY_LLAMA, "llama.cpp", "GPTQ directory, exllamav2 not installed: llama.cpp on"),
        ("hf", NO_CARD, "torch", "Hugging Face directory: torch"),
        ("hf", CARD, "vllm", "Hugging Face directory and a CUDA card: vLLM"),
    ],
)
def test_auto(format: Format, machine: Machine, engine: str, reason: str) -> None:
    chosen = choose("auto", format, "m", machine)
    assert chosen.engine.name == engine
    assert chosen.reason.startswith(reason)
    assert chosen.repack == (engine == "llama.cpp" and format != "gguf")


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_runs_its_formats_and_no_other(name: str) -> None:
    every: tuple[Format, ...] = ("gguf", "gptq", "exl2", "hf")
    for format in every:
        if format in ENGINES[name].formats:
            assert choose(name, format, "m", CARD).engine is ENGINES[name]
        else:
            with pytest.raises(UnsupportedError, match=f"--engine {name}: runs .*, and m is a"):
                choose(name, format, "m", CARD)


def test_what_is_not_installed_has_its_command() -> None:
    with pytest.raises(InputError, match=r"needs torch and transformers: pip install 'dsq\[torch"):
        choose("auto", "hf", "m", Machine(False, frozenset({"llama-cpp-python"})))
    with pytest.raises(InputError, match="needs exllamav2 and flash-attn: pip install exllamav2 f"):
        choose("exllamav2", "exl2", "m", ONLY_LLAMA)


def test_an_engine_that_wants_a_card_and_one_that_is_none() -> None:
    with pytest.raises(InputError, match="runs on a CUDA card, and nvidia-smi knows of none here"):
        choose("exllamav2", "exl2", "m", NO_CARD)
    with pytest.raises(InputError, match=r"--engine x: no such engine; give auto or llama\.cpp, t"):
        choose("x", "gguf", "m", CARD)


def test_formats_are_told_by_the_files(tiny: Path, tmp_path: Path) -> None:
    write_gptq(tmp_path / "gptq")
    write_exl2(tmp_path / "exl2")
    write_hf(tmp_path / "hf")
    assert format_of(tiny) == "gguf"
    for name in ("gptq", "exl2", "hf"):
        assert format_of(tmp_path / name) == name

"""`vllm serve` as a child, played by the stand-in, and what it is started with."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import tokenizers

from dsq.cli.main import main
from dsq.errors import DsqError, InputError
from dsq.runtime.server.backend import (
    GenerateRequest,
    WorkerDied,
)
from dsq.runtime.server.engines import EngineOptions
from dsq.runtime.server.vllm_backend import VllmBackend
from dsq.runtime.server.vllm_plan import plan_vllm, vllm_settings
from dsq.runtime.server.vllm_process import (
    VllmSettings,
    environment,
    extra_arguments,
    find_vllm,
    resident_bytes,
    root_cause,
    serve_command,
)
from dsq.runtime.server.vllm_tokenizer import write_padded_tokenizer
from tests.models import llama_config, write_hf
from tests.runtime.server import vllm_standin
from tests.runtime.server.scripted_backend import wait_until
from tests.runtime.server.vllm_helpers import PROMPT, REQUEST, ask, greedy, run, tokens_of

# vLLM as a child


@pytest.fixture
def child(tmp_path: Path) -> VllmSettings:
    """Settings whose `vllm` is the stand-in, as a process."""
    command = tmp_path / "vllm"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {vllm_standin.__file__} "$@"\n')
    command.chmod(0o755)
    return VllmSettings(
        str(tmp_path), str(command), n_ctx=80, n_parallel=3, tensor_parallel=4, n_vocab=292
    )


def engine_pid(settings: VllmSettings) -> int:
    return int((Path(settings.path) / "engine.pid").read_text())


def lives(pid: int) -> bool:
    """A process that ended and that nobody has asked about yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_child_serves_and_ends_with_its_server(child: VllmSettings) -> None:
    pids: list[int] = []

    async def test(backend: VllmBackend) -> None:
        assert backend.info.n_ctx == 80
        assert tokens_of(await ask(backend, REQUEST)) == greedy(PROMPT, 10)
        assert backend.worker_pid is not None
        pids.extend((backend.worker_pid, engine_pid(child)))
        assert all(map(lives, pids))
        assert (await backend.stats()).memory_bytes > 20e6

    run(child, test)
    given = (Path(child.path) / "arguments").read_text().split("\n")
    assert given[given.index("--tensor-parallel-size") + 1] == "4"
    assert given[given.index("--max-num-seqs") + 1] == "3"
    wait_until(lambda: not any(map(lives, pids)))


@pytest.mark.parametrize("killed", ["vllm", pytest.param("guard", marks=pytest.mark.slow)])
def test_a_killed_child_is_replaced(child: VllmSettings, killed: str) -> None:
    request = GenerateRequest(PROMPT, 70)
    hold = Path(child.path) / "hold"
    hold.write_text("3")

    async def test(backend: VllmBackend) -> None:
        hold.unlink()  # the next one does not
        assert backend.worker_pid is not None
        before, engine = backend.worker_pid, engine_pid(child)
        guard = int(Path(f"/proc/{before}/stat").read_text().rpartition(")")[2].split()[1])
        async with aclosing(backend.generate(request)) as stream:
            await anext(stream)
            os.kill(before if killed == "vllm" else guard, signal.SIGKILL)
            with pytest.raises(WorkerDied, match="was lost.*send the request again"):
                async for _ in stream:
                    pass
        while backend.healthy:
            await asyncio.sleep(0.005)
        assert tokens_of(await ask(backend, request)) == greedy(PROMPT, 70)
        assert backend.worker_pid != before
        assert not lives(before)
        assert not lives(engine), "its helper processes are gone too"
        assert (await backend.stats()).restarts == 1

    run(child, test)


def test_a_child_that_cannot_load(child: VllmSettings) -> None:
    (Path(child.path) / "fault").touch()

    async def test(backend: VllmBackend) -> None: ...

    with pytest.raises(DsqError) as caught:
        run(child, test)
    assert str(caught.value) == (
        f"{child.path}: vLLM ended while loading (exit code 1): ValueError: no such kernel"
    )


def test_a_command_that_is_none(child: VllmSettings) -> None:
    async def test(backend: VllmBackend) -> None: ...

    with pytest.raises(DsqError, match="nothing: No such file or directory"):
        run(replace(child, command="/dsq/nothing"), test)


# Planning


def test_vllm_is_found_or_the_way_to_it_told(child: VllmSettings, tmp_path: Path) -> None:
    assert child.command is not None
    nowhere = {"PATH": str(tmp_path / "empty")}
    assert find_vllm(child.command, nowhere) == child.command
    assert find_vllm(None, {**nowhere, "DSQ_VLLM": child.command}) == child.command
    assert find_vllm(None, {"PATH": str(tmp_path)}) == child.command
    with pytest.raises(InputError, match=r"no vllm command.*pip install vllm.*--vllm"):
        find_vllm(None, nowhere)
    with pytest.raises(InputError, match=r"--vllm /no/vllm: no such executable"):
        find_vllm("/no/vllm", nowhere)


def test_extra_arguments() -> None:
    text = '--dtype float32 --speculative-config \'{"method": "ngram"}\''
    words = extra_arguments(text)
    assert words == ("--dtype", "float32", "--speculative-config", '{"method": "ngram"}')
    assert tuple(serve_command(VllmSettings("m", "vllm", extra=words), "s")[-4:]) == words
    for taken in ("--port 1", "--uds=x", "--max_model_len 5"):
        with pytest.raises(InputError, match=f"--vllm-args {taken[:5]}"):
            extra_arguments(taken)
    with pytest.raises(InputError, match="quote it"):
        extra_arguments("--dtype 'float")


def test_environment(child: VllmSettings) -> None:
    made = environment(child, {"PATH": "/bin", "PYTHONPATH": "/mine", "HF_HUB_OFFLINE": "0"})
    assert made == {
        "PATH": f"{Path(child.path)}:/bin",
        "HF_HUB_OFFLINE": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


def test_root_cause() -> None:
    assert root_cause([]) == ""
    assert root_cause(["usage: vllm", "vllm: error: no such option"]) == (
        "vllm: error: no such option"
    )
    lines = [
        "(EngineCore pid=1) ERROR [core.py:1] torch.OutOfMemoryError: CUDA out of memory",
        "RuntimeError: Engine core initialization failed. See root cause above.",
        "[rank0]: nothing",
    ]
    assert root_cause(lines) == "torch.OutOfMemoryError: CUDA out of memory"


def test_memory_of_a_session() -> None:
    assert resident_bytes(os.getsid(0)) > 10e6
    assert resident_bytes(-5) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    return write_hf(tmp_path_factory.mktemp("hf") / "small", config)


def test_plan(model: Path, child: VllmSettings) -> None:
    options = EngineOptions(vllm=child.command, n_cards=4, vllm_args="--dtype half", n_ctx=100)
    planned, n_bytes = plan_vllm(model, options)
    made = vllm_settings(model, planned)
    assert n_bytes == 0
    assert (made.command, made.tensor_parallel, made.n_ctx) == (child.command, 4, 100)
    assert (made.n_parallel, made.extra) == (256, ("--dtype", "half"))
    assert (made.n_ctx_train, made.n_vocab) == (16384, spec_vocabulary(model))
    assert made.size_bytes == (model / "model.safetensors").stat().st_size
    assert 2 * made.n_parameters < made.size_bytes < 2.1 * made.n_parameters


def spec_vocabulary(model: Path) -> int:
    found: int = json.loads((model / "config.json").read_text())["vocab_size"]
    return found


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (EngineOptions(n_gpu_layers=3), "-ngl: not for.*--tensor-parallel-size"),
        (EngineOptions(n_threads=3), "-t: not for"),
        (EngineOptions(kv_size=3), "--kv-size.*gpu-memory-utilization"),
        (EngineOptions(kv_type="q8_0"), "--kv-type q8_0.*fp8"),
        (EngineOptions(n_ctx=20000), "-c 20000.*16384"),
        (EngineOptions(vllm_args="--port=3"), "--vllm-args --port"),
        (EngineOptions(vllm_url="localhost:8000"), "no http:// or https://"),
        (EngineOptions(vllm_url="http://a", n_cards=2), "runs already"),
        (EngineOptions(vllm="/no/such"), "no such executable"),
    ],
)
def test_options_that_vllm_does_not_have(model: Path, options: EngineOptions, match: str) -> None:
    with pytest.raises(InputError, match=match):
        plan_vllm(model, options)


def test_vllm_gets_a_token_for_every_row(model: Path, tmp_path: Path) -> None:
    """`id_to_token` of a padding row is None otherwise, and vLLM dies of it."""
    n_rows = spec_vocabulary(model)
    plain = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    assert plain.get_vocab_size() < n_rows
    assert write_padded_tokenizer(model, n_rows, tmp_path / "padded")
    padded = tokenizers.Tokenizer.from_file(str(tmp_path / "padded" / "tokenizer.json"))
    assert None not in map(padded.id_to_token, range(n_rows))
    text = "def f(a):\n    return [PAD1]"
    assert padded.encode(text).ids == plain.encode(text).ids
    assert padded.decode([n_rows - 1]) == ""
    assert not write_padded_tokenizer(model, plain.get_vocab_size(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_its_options_go_with_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(model), "--engine", "torch", "--tensor-parallel-size", "2"]) == 2
    assert "--tensor-parallel-size go with --engine vllm" in capsys.readouterr().err


# From the command line


def test_the_command_line(model: Path, child: VllmSettings) -> None:
    assert child.command is not None
    given = ("--engine", "vllm", "--vllm", child.command, "--port", "0", "-c", "90")
    copy = Path(child.path) / "small"
    copy.symlink_to(model)
    with subprocess.Popen(
        [sys.executable, "-m", "dsq.cli.main", "serve", str(copy), *given],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        found = re.search(r"small, Hugging Face directory: vllm, as asked.* on (http://\S+)", said)
        assert found, said
        engine = int((model / "engine.pid").read_text())
        with httpx.Client(base_url=found[1], trust_env=False) as client:
            asked = {"prompt": list(PROMPT), "n_predict": 5, "temperature": 0}
            answer = client.post("/completion", json={**asked, "return_tokens": True}).json()
            assert answer["tokens"] == greedy(PROMPT, 5)
            (state,) = client.get("/stats").json()["models"]
            assert (state["n_slots"], state["kv_size"]) == (256, 800)
        assert lives(engine)
        assert "--tokenizer" in (model / "arguments").read_text(), "it has padding rows"
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    wait_until(lambda: not lives(engine))

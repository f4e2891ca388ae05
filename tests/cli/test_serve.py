"""`dsq serve` as a process: a real model, OpenAI's client, signals."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from dsq.cli.main import main
from dsq.runtime.complete import complete
from dsq.runtime.llamacpp import LlamaCppEngine
from tests.packed_models import write_gptq
from tests.tiny_gguf import write_tiny_gguf, write_tiny_hf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("serve") / "tiny.gguf")


@contextmanager
def served(*args: str, says: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, once it says that it listens, and `says` on the same line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dsq.cli.main", "serve", *args, "--port", "0", "-t", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " on http://" in line, process.communicate()
        assert says in line
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def url(tiny: Path) -> Iterator[str]:
    with served(str(tiny), "-c", "256") as (_, found):
        yield found


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(verify=False) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, http_client=http) as made,
    ):
        yield made


@pytest.mark.parametrize("suffix", [None, "return"])
def test_the_server_says_what_the_engine_says(
    client: openai.OpenAI, tiny: Path, suffix: str | None
) -> None:
    """Greedy, so that the two can be compared."""
    found = client.completions.create(
        model="x", prompt="def f(self):", suffix=suffix, max_tokens=20, temperature=0
    )
    with LlamaCppEngine(tiny, n_ctx=256, n_threads=1) as engine:
        wanted = complete(engine, "def f(self):", suffix, max_tokens=20).result
    assert found.choices[0].text == wanted.text
    assert found.usage is not None
    assert found.usage.completion_tokens == len(wanted.tokens)
    stream = client.completions.create(
        model="x", prompt="def f(self):", suffix=suffix, max_tokens=20, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted.text


def test_an_answer_cut_by_a_stop_string_says_what_was_cached(client: openai.OpenAI) -> None:
    prompt = "def cached(self): pass # " * 3
    plain = client.completions.create(model="x", prompt=prompt, max_tokens=20, temperature=0)
    stop = plain.choices[0].text[4:6]
    cut = client.completions.create(
        model="x", prompt=prompt, max_tokens=20, temperature=0, stop=stop
    )
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == plain.choices[0].text.partition(stop)[0]
    assert plain.usage is not None
    assert cut.usage is not None
    assert cut.usage.prompt_tokens_details is not None
    assert cut.usage.prompt_tokens_details.cached_tokens == plain.usage.prompt_tokens - 1
    assert cut.usage.completion_tokens < plain.usage.completion_tokens


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}
    found = client.chat.completions.create(
        model="x",
        messages=[{"role": "user", "content": "hello"}],
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        temperature=1,
        seed=1,
        max_tokens=200,
    )
    text = found.choices[0].message.content or ""
    assert "".join(text.split()) in {f'["{x}","{y}"]' for x in "ab" for y in "ab"}


def test_a_grammar_that_is_none(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="x", prompt="x", extra_body={"grammar": "root ::= ((("})
    assert client.completions.create(model="x", prompt="x", max_tokens=1).choices


def test_sigterm_lets_what_runs_come_to_its_end(tiny: Path) -> None:
    with served(str(tiny), "-c", "256") as (process, url):
        sent = {"prompt": "x", "n_predict": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/completion", json=sent) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert any('"stop":true' in line for line in lines)
        assert process.wait(20) == 0
        assert process.stderr is not None
        log = process.stderr.read()
    assert "Traceback" not in log
    assert "POST /completion 200" in log


def test_a_folder_of_models(tiny: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copy(tiny, tmp_path / f"{name}.gguf")
    with served(str(tmp_path), "-c", "128") as (_, url):
        assert [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]] == ["one", "two"]
        for name in ("one", "two"):
            answer = httpx.post(f"{url}/v1/completions", json={"model": name, "prompt": "x"})
            assert answer.json()["model"] == name
        loaded = [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"] if m["loaded"]]
        assert loaded == ["two"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--host", "0.0.0.0"], "give --api-key"),
        (["--api-key", "short"], "shorter than 8"),
        (["--port", "70000"], "no port"),
        (["--engine", "torch"], "--engine torch: runs GPTQ directory and EXL2 directory and Hug"),
        (["--engine", "x"], "no such engine; give auto or llama.cpp"),
        (["-ngl", "all"], "built without a GPU"),
        (["-c", "100000"], "was trained on 512 tokens"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(
    tiny: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tiny), *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--engine", "llama.cpp"], "llama.cpp: runs GGUF and GPTQ directory and EXL2 directory"),
        (["--engine", "exllamav2"], "exllamav2: runs EXL2 directory and GPTQ directory, and hf is"),
        (["-ngl", "3"], "-ngl 3: layers are counted by llama.cpp alone"),
        (["--draft", "TINY"], "draft models run in llama.cpp alone"),
        (["--kv-type", "q8_0"], "--kv-type q8_0: torch keeps its cache in the type that it comp"),
        (["-c", "100000"], "was trained on 512 tokens"),
    ],
)
def test_what_a_directory_is_refused(
    tiny: Path, tmp_path: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(tiny) if arg == "TINY" else arg for arg in args]
    assert main(["serve", str(write_tiny_hf(tmp_path / "hf")), *args]) == 2
    assert message in capsys.readouterr().err


def test_a_gptq_directory_is_repacked_and_says_what_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSQ_CACHE", str(tmp_path / "cache"))
    write_gptq(tmp_path / "packed", desc_act=True)  # scattered groups have no exact GGUF
    with served(str(tmp_path / "packed"), "-c", "128") as (process, url):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 3}).json()
        assert answer["model"] == "packed"
        assert answer["usage"]["completion_tokens"] == 3
        process.terminate()
        assert process.wait(20) == 0
        assert process.stderr is not None
        said = process.stderr.read()
    assert "repacking" in said
    assert "packed runs as a GGUF that is not lossless: 12 of 14 matrices were rounded" in said


def test_a_draft_model_changes_no_answer(tiny: Path, url: str) -> None:
    asked = {"prompt": "def f(self):", "max_tokens": 40, "temperature": 0, "lookup": False}
    with served(str(tiny), "-c", "256", "--draft", str(tiny)) as (_, drafting):
        found, wanted = (httpx.post(f"{u}/v1/completions", json=asked) for u in (drafting, url))
    assert found.json()["choices"][0]["text"] == wanted.json()["choices"][0]["text"]


@pytest.mark.torch
def test_a_directory_is_served_by_torch(tiny: Path, url: str, tmp_path: Path) -> None:
    """The same model as GGUF in llama.cpp and as directory in torch: the same text."""
    asked = {"prompt": "def f(self):", "max_tokens": 16, "temperature": 0}
    with served(str(write_tiny_hf(tmp_path / "hf")), "-c", "256", says="directory: torch") as (
        _,
        torch_url,
    ):
        ours = httpx.post(f"{torch_url}/v1/completions", json=asked, timeout=60).json()
    theirs = httpx.post(f"{url}/v1/completions", json=asked).json()
    assert ours["choices"][0]["text"] == theirs["choices"][0]["text"]
    assert ours["model"] == "hf"


def test_a_port_that_is_taken(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tiny), "--port", str(port)]) == 2
    assert f"port {port}" in capsys.readouterr().err
    assert threading.active_count() == before


def test_a_folder_without_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path)]) == 2
    assert "no .gguf in this folder" in capsys.readouterr().err

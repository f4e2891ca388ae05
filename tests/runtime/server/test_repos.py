"""Repositories that the operator names, and requests that name one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from dsq.cli.main import main
from dsq.errors import InputError
from dsq.runtime.server.app import build_app
from dsq.runtime.server.repos import Repositories, named_folders
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.cli.test_serve import served
from tests.runtime.corpus.conftest import write_files
from tests.runtime.server.scripted_backend import ScriptedBackend, pool_of
from tests.tiny_gguf import BEGIN, BOS, END, HOLE, token_id

Post = Callable[[str, dict[str, Any]], httpx.Response]


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(lambda request: [token_id("a")], n_ctx=400)


@pytest.fixture
def app(backend: ScriptedBackend, tokenizer: Tokenizer, tmp_path: Path) -> ASGIApp:
    files = {"main.py": "import util\n", "util.py": "def help(): ...\n", ".env": "KEY=1\n"}
    repos = Repositories({"work": write_files(tmp_path / "r", files)})
    return build_app(pool_of(backend, tokenizer), repos=repos)


@pytest.fixture
def post(app: ASGIApp) -> Post:
    def send(path: str, body: dict[str, Any]) -> httpx.Response:
        async def one() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as c:
                return await c.post(path, json=body)

        return asyncio.run(one())

    return send


UTIL = "#util.py\ndef help(): ...\n\n"
LIVE = {"repo": "work", "path": "main.py"}


def test_infill_in_a_repository(post: Post, backend: ScriptedBackend, tokenizer: Tokenizer) -> None:
    body = {"input_prefix": "import util\nx = ", "input_suffix": "\n", "n_predict": 4, **LIVE}
    answer = post("/infill", body).json()
    ids = backend.requests[0].prompt_ids
    begin, hole = ids.index(token_id(BEGIN)), ids.index(token_id(HOLE))
    assert ids[0] == token_id(BOS)
    assert ids[-1] == token_id(END)
    assert tokenizer.decode(ids[begin + 1 : hole]) == f"{UTIL}#main.py\nimport util\nx = "
    assert answer["dsq"]["repo"]["files"] == ["util.py"]
    assert answer["dsq"]["repo"]["n_dropped_files"] == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
def test_a_prompt_behind_a_repository(
    post: Post, backend: ScriptedBackend, tokenizer: Tokenizer, path: str
) -> None:
    answer = post(path, {"prompt": "import util\n", "repo": True, "path": "main.py"}).json()
    shown = tokenizer.decode(backend.requests[0].prompt_ids, skip_special=False)
    assert shown == f"{BOS}{UTIL}#main.py\nimport util\n"
    assert answer["dsq"]["repo"]["name"] == "work"


def test_a_conversation_about_a_repository(
    post: Post, backend: ScriptedBackend, tokenizer: Tokenizer
) -> None:
    messages = [{"role": "user", "content": "why?"}]
    answer = post("/v1/chat/completions", {"messages": messages, **LIVE}).json()
    shown = tokenizer.decode(backend.requests[0].prompt_ids)
    assert f"{UTIL}#main.py\nimport util\n\n---\n\nwhy?" in shown
    assert answer["dsq"]["repo"]["files"] == ["util.py", "main.py"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"repo": "other"}, "no repository 'other' here; repositories: work"),
        ({"repo": "/etc"}, "no repository '/etc' here"),
        ({"repo": True, "path": "../r/.env"}, "no file's path inside the repository"),
        ({"repo": True, "prompt": [1, 2]}, "go with one prompt that is a string"),
        ({"repo": True, "echo": True}, "echo: does not go with repo"),
        ({"repo": 1}, "repo"),
    ],
)
def test_what_is_refused(
    post: Post, backend: ScriptedBackend, asked: dict[str, Any], message: str
) -> None:
    answer = post("/v1/completions", {"prompt": "x", **asked})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert not backend.requests


def test_naming_a_file_of_secrets_shows_nothing_of_it(
    post: Post, backend: ScriptedBackend, tokenizer: Tokenizer
) -> None:
    messages = [{"role": "user", "content": "why?"}]
    post("/v1/chat/completions", {"messages": messages, "repo": True, "path": ".env"})
    assert "KEY" not in tokenizer.decode(backend.requests[0].prompt_ids)


def test_a_server_without_repositories(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="start it with --repo DIR"):
        Repositories()._index(True)


def test_names_of_folders(tmp_path: Path) -> None:
    for name in ("one", "a=b"):
        (tmp_path / name).mkdir()
    given = [str(tmp_path / "one"), f"two={tmp_path / 'one'}", str(tmp_path / "a=b")]
    assert set(named_folders(given)) == {"one", "two", "a=b"}
    with pytest.raises(InputError, match="is named already"):
        named_folders([str(tmp_path / "one"), str(tmp_path / "one")])
    for bad in ("", "x=", "=y"):
        with pytest.raises(InputError, match="give DIR, or NAME=DIR"):
            named_folders([bad])


def test_dsq_serve_offers_what_the_operator_names(tiny: Path, tmp_path: Path) -> None:
    root = write_files(tmp_path / "app", {"main.py": "import util\n", "util.py": "x = 1\n"})
    says = "repository app (2 files)"
    with served(str(tiny), "-c", "256", "--repo", str(root), says=says) as (_, url):
        body = {"prompt": "import util\n", "repo": True, "path": "main.py", "max_tokens": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.json()["dsq"]["repo"]["files"] == ["util.py"]


def test_what_dsq_serve_refuses_before_a_model_is_loaded(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve", str(tiny), "--repo", "no/such/folder"]) == 2
    assert "no/such/folder: no such folder" in capsys.readouterr().err
    monkeypatch.setenv("DSQ_API_KEY", "short")
    assert main(["serve", str(tiny)]) == 2
    assert "DSQ_API_KEY is shorter than 8 characters" in capsys.readouterr().err

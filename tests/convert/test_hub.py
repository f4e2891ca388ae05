"""Hub ids, against a small hub that the test serves on loopback: what is fetched, and errors.

huggingface_hub reads its environment when imported, so each resolve runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from dsq.convert.hub import HubId, parse_id, resolve
from dsq.errors import InputError

SHA = "a" * 40
HF_FILES = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "model.safetensors": b"weights",
    "consolidated.safetensors": b"weights again",
    "pytorch_model.bin": b"pickle",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"sp",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"# a model",
    "onnx/model.onnx": b"onnx",
    "original/params.json": b"{}",
}
BIN_FILES = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "training_args.bin": b"x"}
GGUF_FILES = {
    "config.json": b"{}",
    "m-Q4_K_M.gguf": b"4",
    "m-Q4_K_S.gguf": b"4s",
    "m.q8_0.gguf": b"8",
    "big/m-F16-00001-of-00002.gguf": b"f1",
    "big/m-F16-00002-of-00002.gguf": b"f2",
}
REPOS = {
    "org/hf": HF_FILES,
    "org/bin": BIN_FILES,
    "org/gguf": GGUF_FILES,
    "org/one": {"a.gguf": b"a", "README.md": b""},
    "org/empty": {"README.md": b""},
}


@dataclass
class Hub:
    """`requests` holds the paths asked for; `tokens` the authorizations sent."""

    url: str = ""
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(path)
            hub.tokens.add(self.headers.get("Authorization"))
            api = path.startswith("/api/models/")
            parts = path.removeprefix("/api/models").strip("/").split("/")
            repo, rest = "/".join(parts[:2]), parts[2:] or ["revision", "main"]
            what, revision, *file = rest
            if repo == "org/gated":
                return self.answer(403, {}, {"X-Error-Code": "GatedRepo"})
            if repo == "org/denied":
                return self.answer(403, {"error": "Forbidden"})
            if repo == "org/broken":
                return self.answer(500, {})
            if repo not in REPOS:
                return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            if revision not in ("main", "v1", SHA):
                return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
            files = REPOS[repo]
            if api and what == "revision":
                siblings = [{"rfilename": name} for name in files]
                return self.answer(200, {"id": repo, "sha": SHA, "siblings": siblings})
            if api and what == "tree":
                return self.answer(200, [entry(name, data) for name, data in files.items()])
            data = files["/".join(file)]
            headers = {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": SHA}
            return self.send(200, data, headers, "application/octet-stream")

        do_HEAD = do_GET

        def answer(self, code: int, value: object, headers: dict[str, str] | None = None) -> None:
            self.send(code, json.dumps(value).encode(), headers or {}, "application/json")

        def send(self, code: int, body: bytes, headers: dict[str, str], kind: str) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Type": kind}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


CODE = """
import sys
from dsq.convert.hub import resolve
from dsq.errors import DsqError
source, revision, offline = sys.argv[1:]
try:
    print(resolve(source, revision=revision or None, offline=offline == "offline"))
except DsqError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def run(
    home: Path,
    hub: Hub,
    source: str,
    *,
    revision: str = "",
    offline: bool = False,
    cwd: Path | None = None,
    **env: str,
) -> tuple[int, str]:
    """Exit code and output: the path, or the error."""
    environ = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        **env,
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE, source, revision, "offline" if offline else ""],
        env=environ,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("\n") == 1
    return done.returncode, done.stdout.strip()


def files_in(folder: str) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_directory_then_offline(hub: Hub, tmp_path: Path) -> None:
    code, path = run(tmp_path, hub, "org/hf", HF_TOKEN="hf_secret")
    assert code == 0, path
    assert files_in(path) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    }
    assert (Path(path) / "model.safetensors").read_bytes() == b"weights"
    assert path.startswith(str(tmp_path / "hf"))
    assert "Bearer hf_secret" in hub.tokens
    hub.requests.clear()
    assert run(tmp_path, hub, "org/hf", offline=True) == (0, path)
    assert run(tmp_path, hub, "https://huggingface.co/org/hf/", HF_HUB_OFFLINE="1") == (0, path)
    assert hub.requests == []


def test_bin_only_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    code, path = run(tmp_path, hub, "org/bin", revision="v1")
    assert code == 0, path
    assert files_in(path) == {"config.json", "pytorch_model.bin"}


def test_gguf_by_quant_file_and_alone(hub: Hub, tmp_path: Path) -> None:
    code, path = run(tmp_path, hub, "org/gguf:q4_k_m")
    assert (code, Path(path).name) == (0, "m-Q4_K_M.gguf")
    assert Path(path).read_bytes() == b"4"
    assert files_in(str(Path(path).parent)) == {"m-Q4_K_M.gguf"}
    code, path = run(tmp_path, hub, "org/gguf/big/m-F16-00001-of-00002.gguf")
    assert code == 0, path
    assert files_in(str(Path(path).parents[1])) == {
        "m-Q4_K_M.gguf",
        "big/m-F16-00001-of-00002.gguf",
        "big/m-F16-00002-of-00002.gguf",
    }
    assert run(tmp_path, hub, "org/gguf:F16", offline=True) == (0, path)
    code, path = run(tmp_path, hub, "org/one")
    assert (code, Path(path).name) == (0, "a.gguf")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/none", "no such path here, and no model org/none at http://127.0.0.1"),
        ("org/gated", "the model is gated: accept its terms at http://127.0.0.1"),
        ("org/denied", "the hub refuses access (403); check that HF_TOKEN is valid"),
        ("org/gguf", "org/gguf has 4 such GGUFs; give one of org/gguf/big/m-F16-00001-of-00002.g"),
        ("org/gguf:q5_0", "org/gguf has no GGUF named after q5_0; give one of org/gguf/big/m-F16"),
        ("org/gguf/x.gguf", "org/gguf has no file x.gguf; give one of"),
        ("org/empty", "org/empty has no weights (*.safetensors, *.bin or *.gguf); check the name"),
        ("none/a/b", "none/a/b: there is no such file or directory, and a hub id is written"),
    ],
)
def test_input_errors(hub: Hub, source: str, message: str, tmp_path: Path) -> None:
    code, text = run(tmp_path, hub, source)
    assert code == 2
    assert text.startswith(f"{source}: ") or "has" in text
    assert message in text


def test_revision_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    code, text = run(tmp_path, hub, "org/hf", revision="v2")
    assert code == 2
    assert "there is no revision 'v2'; see http://127.0.0.1" in text


def test_offline_and_not_cached(hub: Hub, tmp_path: Path) -> None:
    for offline, env in ((True, {}), (False, {"HF_HUB_OFFLINE": "1"})):
        code, text = run(tmp_path, hub, "org/hf", offline=offline, **env)
        assert code == 2
        assert "not downloaded yet, and the network is not to be used" in text
    assert hub.requests == []


def test_network_failure(tmp_path: Path) -> None:
    code, text = run(tmp_path, Hub("http://127.0.0.1:1"), "org/hf")
    assert code == 1
    assert "no such path here, and the download failed (" in text
    assert "check the name, or the network and the disk" in text


def test_server_error(hub: Hub, tmp_path: Path) -> None:
    code, text = run(tmp_path, hub, "org/broken")
    assert code == 1
    assert "the hub answers 500" in text


def test_local_paths_are_returned_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "hf").mkdir(parents=True)
    assert resolve("org/hf", offline=True) == Path("org/hf")
    for typo in ("none.gguf", "./org/none", "/org/hf", "../x/y", "none/", "org/hf:", "C:\\m.gguf"):
        with pytest.raises(InputError, match="no such file or directory"):
            resolve(typo)


@pytest.mark.parametrize("typo", ["w/x.gguf", "w/x.safetensors", "here/x", "here/a/b.gguf", "~/x"])
def test_what_can_only_be_a_path_is_not_asked_for(
    typo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match="no such file or directory") as error:
        resolve(typo)
    assert ("https://hf.co/here" in str(error.value)) == typo.startswith("here/")


def test_a_folder_of_the_organizations_name_does_not_hide_the_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    code, text = run(tmp_path, hub, "org/one", cwd=tmp_path)
    assert (code, hub.requests) == (2, [])
    assert text.endswith("https://hf.co/org/one")
    code, path = run(tmp_path, hub, "https://hf.co/org/one", cwd=tmp_path)
    assert (code, Path(path).name) == (0, "a.gguf")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("deepseek-ai/deepseek-coder-1.3b-base", HubId("deepseek-ai/deepseek-coder-1.3b-base")),
        ("org/name:Q4_K_M", HubId("org/name", quant="Q4_K_M")),
        ("org/name/sub/m.gguf", HubId("org/name", file="sub/m.gguf")),
        ("hf.co/org/name:q8_0", HubId("org/name", quant="q8_0")),
        ("https://huggingface.co/org/name/", HubId("org/name")),
        ("name", None),
        ("a/b/c", None),
        ("~/models/x", None),
    ],
)
def test_parse_id(source: str, expected: HubId | None) -> None:
    assert parse_id(source) == expected

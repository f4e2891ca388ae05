"""`dsq serve`: models over HTTP, for editors and OpenAI clients."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsq.cli import common
from dsq.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from dsq.runtime.server.llama_batch import LlamaSettings
    from dsq.runtime.server.models import ModelPool

DESCRIPTION = (
    "Serve a GGUF, or every GGUF of a folder, over HTTP: OpenAI's /v1/completions (with suffix:\n"
    "fill in the middle) and /v1/chat/completions, llama.cpp's /completion, /infill, /tokenize,\n"
    "/detokenize, and /v1/models, /health, /metrics. A web page at /."
)
EXAMPLE = "dsq serve coder-q4.gguf -c 8192"

ENGINES = ("auto", "llama.cpp")
PLANNED_ENGINES = ("torch", "exllamav2", "vllm")
MAX_MODELS = 200  # of one folder
MOST_PORTS = 65535


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, "model", ".gguf, a folder of them, or hub id")
    where = parser.add_argument_group("who may come in")
    where.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    where.add_argument("--port", type=_port, default=8080, help="default 8080; 0 chooses one")
    where.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="what clients must send; may be repeated; also from DSQ_API_KEY, which `ps` hides",
    )
    where.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages of this origin may use the server, such as http://localhost:3000",
    )
    parser.add_argument(
        "--engine", default="auto", metavar="E", help="auto or llama.cpp, the one that serves"
    )
    parser.add_argument("--alias", metavar="NAME", help="the model's name (default: its file's)")
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=common.positive,
        help="of one request (default: 4096 or the model's own, less where memory is short)",
    )
    parser.add_argument(
        "--parallel", type=_parallel, default=4, metavar="N", help="requests at once (default 4)"
    )
    parser.add_argument(
        "--kv-size",
        type=common.positive,
        metavar="N",
        help="tokens that all requests together keep in the cache (default: one context)",
    )
    parser.add_argument("--kv-type", default="f16", choices=("f16", "q8_0", "q4_0"))
    common.add_gpu(parser)
    common.add_threads(parser)
    parser.add_argument(
        "--no-lookup", action="store_true", help="no drafts from the prompt's own n-grams"
    )
    several = parser.add_argument_group("a folder of models")
    several.add_argument(
        "--max-models", type=_parallel, default=1, metavar="N", help="loaded at once (default 1)"
    )
    several.add_argument(
        "--idle", type=common.positive, metavar="S", help="unload a model after S idle seconds"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--queue", type=common.positive, default=64, help="waiting requests (default 64), then 429"
    )
    limits.add_argument(
        "--timeout", type=common.positive, default=600, metavar="S", help="of one answer (600)"
    )
    limits.add_argument("--log-prompts", action="store_true", help="write prompts to the log")
    common.add_hub(parser)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > MOST_PORTS:
        raise argparse.ArgumentTypeError(f"{text} is no port from 0 to {MOST_PORTS}")
    return int(text)


def _parallel(text: str) -> int:
    return common.positive(text, 128)


def run(args: argparse.Namespace) -> int:
    _check_engine(args.engine)
    keys = _api_keys(args)
    _require_server()
    from dsq.runtime.server.limits import LOCAL_HOSTS, Limits, check_binding
    from dsq.runtime.server.listen import listen

    local = check_binding(args.host, keys)
    files = _model_files(args)
    with listen(args.host, args.port) as where:
        pool, about = _pool(files, args)
        _log_to_stderr()
        from dsq.runtime.server.app import build_app
        from dsq.runtime.server.listen import serve
        from dsq.runtime.server.transport import TimeLimits

        limits = Limits(
            api_keys=keys,
            cors=tuple(args.cors),
            hosts=LOCAL_HOSTS | {args.host} if local and not keys else None,
            log_prompts=args.log_prompts,
        )
        app = build_app(pool, limits, TimeLimits(answer=args.timeout))
        port = where.getsockname()[1]

        async def load() -> None:
            if len(files) == 1:
                async with pool.use(None):
                    pass
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"dsq serve: {about} on http://{host}:{port}", flush=True)

        serve(app, where, before=load, after=pool.close)
    return 0


def _check_engine(name: str) -> None:
    if name in PLANNED_ENGINES:
        raise UnsupportedError(
            f"--engine {name}: dsq serve has no {name} engine yet; leave it out to serve a GGUF by "
            "llama.cpp"
        )
    if name not in ENGINES:
        raise InputError(f"--engine {name}: no such engine; give {' or '.join(ENGINES)}")


def _api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    from_environment = os.environ.get("DSQ_API_KEY", "")
    return tuple(key for key in (*args.api_key, from_environment) if key)


def _require_server() -> None:
    try:
        import fastapi
        import prometheus_client
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"dsq serve needs {error.name}, which is not installed: pip install 'dsq[serve]'"
        ) from None
    del fastapi, prometheus_client


def _model_files(args: argparse.Namespace) -> dict[str, Path]:
    """Name → GGUF, of one file or of every file in a folder."""
    given = Path(args.model) if args.model is not None else None
    if given is not None and given.is_dir() and not (given / "config.json").is_file():
        found = [p for p in sorted(given.glob("*.gguf")) if _first_shard(p)]
    else:
        found = [common.local_model(args.model, args)]
    if not found:
        raise InputError(f"{given}: no .gguf in this folder; name a model, or a folder of them")
    if len(found) > MAX_MODELS:
        raise InputError(f"{given}: {len(found)} models; a server offers {MAX_MODELS} at most")
    if found[0].is_dir():
        raise UnsupportedError(
            f"{found[0]}: is a Hugging Face directory, and dsq serve runs GGUF; make one: "
            f"dsq convert {found[0]} --to gguf"
        )
    if args.alias is None:
        return {re.sub(r"-\d{5}-of-\d{5}$", "", path.stem): path for path in found}
    if len(found) > 1:
        raise InputError(f"--alias {args.alias}: goes with one model, and there are {len(found)}")
    return {args.alias: found[0]}


def _first_shard(path: Path) -> bool:
    return not re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name) or "-00001-of-" in path.name


def _pool(files: dict[str, Path], args: argparse.Namespace) -> tuple[ModelPool, str]:
    """The models, and what the server says of them when it starts."""
    from dsq.convert.gguf.reader import read_gguf
    from dsq.convert.inspect import check_has_weights
    from dsq.runtime.devices import available_memory
    from dsq.runtime.server.client import LlamaBackend
    from dsq.runtime.server.models import ModelPool, Offer
    from dsq.runtime.server.plan import plan_server
    from dsq.runtime.source import Source
    from dsq.tokenizer_port.tokenizer import Tokenizer

    asked, free = _settings(args), available_memory()
    for path in files.values():
        check_has_weights(read_gguf(path))
    planned = {path: plan_server(path, asked, free) for path in files.values()}
    pool = ModelPool(
        {
            name: Offer(path, int(path.stat().st_mtime), planned[path][1])
            for name, path in files.items()
        },
        lambda path: LlamaBackend(planned[path][0], max_queued=args.queue),
        lambda path: Tokenizer.from_vocabulary(Source(path).vocabulary),
        most_loaded=args.max_models,
        idle_s=args.idle,
        free_memory=available_memory,
    )
    about = ", ".join(files)
    if len(files) == 1:
        settings, n_bytes = next(iter(planned.values()))
        about += (
            f", llama.cpp, context {settings.n_ctx:,}, {settings.kv_type} cache"
            + f", about {n_bytes >> 20:,} of {free >> 20:,} MiB free memory" * (n_bytes > 0)
        )
    return pool, about


def _settings(args: argparse.Namespace) -> LlamaSettings:
    """As asked; n_ctx 0 is for the plan to choose. Raises InputError for layers on no GPU."""
    import llama_cpp

    from dsq.runtime.devices import LLAMA_CPP_CUDA
    from dsq.runtime.server.llama_batch import LlamaSettings

    n_gpu_layers = common.gpu_layers(args)
    if n_gpu_layers and not llama_cpp.llama_supports_gpu_offload():
        raise InputError(
            f"-ngl {args.n_gpu_layers}: llama-cpp-python was built without a GPU; leave -ngl out, "
            f"or build it with one: {LLAMA_CPP_CUDA}"
        )
    settings = LlamaSettings(
        path="",
        n_ctx=args.ctx_size or 0,
        kv_size=args.kv_size or 0,
        n_parallel=args.parallel,
        n_threads=args.threads,
        n_gpu_layers=n_gpu_layers,
        kv_type=args.kv_type,
    )
    return replace(settings, n_draft=0) if args.no_lookup else settings


def _log_to_stderr() -> None:
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("dsq.server")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    log.propagate = False

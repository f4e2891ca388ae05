"""`dsq serve`: models over HTTP, for editors and OpenAI clients."""

from __future__ import annotations

import argparse
import os
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsq.cli import common
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.runtime.server.engines import Choice, EngineOptions
    from dsq.runtime.server.models import ModelPool

DESCRIPTION = (
    "Serve a model, or every GGUF of a folder, over HTTP: OpenAI's /v1/completions (with suffix:\n"
    "fill in the middle) and /v1/chat/completions, llama.cpp's /completion, /infill, /tokenize,\n"
    "/detokenize, and /v1/models, /health, /metrics. A web page at /."
)
EXAMPLE = "dsq serve coder-q4.gguf -c 8192"

MAX_MODELS = 200  # of one folder
MOST_PORTS = 65535
MIN_KEY = 8  # characters; limits.check_binding says so of --api-key


Group = argparse._ArgumentGroup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(
        parser, "model", ".gguf, directory (Hugging Face, GPTQ, EXL2), folder of .gguf, or hub id"
    )
    _add_access(parser.add_argument_group("who may come in"))
    _add_engine(parser)
    _add_vllm(parser.add_argument_group("engine vllm"))
    several = parser.add_argument_group("a folder of models")
    several.add_argument(
        "--max-models", type=_parallel, default=1, metavar="N", help="loaded at once (default 1)"
    )
    several.add_argument(
        "--idle", type=common.positive, metavar="S", help="unload a model after S idle seconds"
    )
    _add_limits(parser.add_argument_group("limits"))
    common.add_hub(parser)


def _add_access(where: Group) -> None:
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


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        default="auto",
        metavar="E",
        help="auto (by format and machine), llama.cpp, torch, exllamav2 or vllm",
    )
    parser.add_argument("--alias", metavar="NAME", help="the model's name (default: its file's)")
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=common.positive,
        help="of one request (default: 4096 or the model's own, less where memory is short)",
    )
    parser.add_argument(
        "--parallel", type=_parallel, metavar="N", help="requests at once (default 4; vllm 256)"
    )
    parser.add_argument(
        "--kv-size",
        type=common.positive,
        metavar="N",
        help="tokens that all requests together keep in the cache (default: one context)",
    )
    parser.add_argument("--kv-type", choices=("f16", "q8_0", "q4_0"), help="default f16")
    parser.add_argument(
        "-ngl",
        "--n-gpu-layers",
        default="auto",
        metavar="N",
        help="llama.cpp's layers on the GPU: a number, all, or as many as fit (default auto)",
    )
    common.add_threads(parser)
    parser.add_argument(
        "--draft", metavar="GGUF", help="a smaller model of the same vocabulary, to guess ahead"
    )
    parser.add_argument(
        "--no-lookup", action="store_true", help="no drafts from the prompt's own n-grams"
    )
    parser.add_argument(
        "--repo",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a repository that requests may name; whoever may use the server can then read it",
    )


def _add_vllm(vllm: Group) -> None:
    vllm.add_argument(
        "--tensor-parallel-size",
        type=_parallel,
        default=1,
        metavar="N",
        help="cards to spread over",
    )
    vllm.add_argument(
        "--vllm", metavar="FILE", help="its executable (default: the one on the PATH)"
    )
    vllm.add_argument("--vllm-url", metavar="URL", help="one that runs already, anywhere")
    vllm.add_argument("--vllm-args", metavar="ARGS", help="more of its options: --vllm-args='…'")


def _add_limits(limits: Group) -> None:
    limits.add_argument(
        "--queue", type=common.positive, default=64, help="waiting requests (default 64), then 429"
    )
    limits.add_argument(
        "--timeout", type=common.positive, default=600, metavar="S", help="of one answer (600)"
    )
    limits.add_argument("--log-prompts", action="store_true", help="write prompts to the log")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > MOST_PORTS:
        raise argparse.ArgumentTypeError(f"{text} is no port from 0 to {MOST_PORTS}")
    return int(text)


def _parallel(text: str) -> int:
    return common.positive(text, 4096)


def run(args: argparse.Namespace) -> int:
    keys = _api_keys(args)
    _require_server()
    from dsq.runtime.server.limits import LOCAL_HOSTS, Limits, check_binding
    from dsq.runtime.server.listen import listen
    from dsq.runtime.server.repos import Repositories, named_folders

    local = check_binding(args.host, keys)
    files = _model_files(args)
    repos = Repositories(named_folders(args.repo))
    options = _options(args)
    models = _choose_engines(files, args)
    with ExitStack() as stack:
        where = stack.enter_context(listen(args.host, args.port))
        pool, about = _pool(models, options, args, stack)
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
        app = build_app(pool, limits, TimeLimits(answer=args.timeout), repos)
        port = where.getsockname()[1]

        async def load() -> None:
            if len(models) == 1:
                async with pool.use(None):
                    pass
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"dsq serve: {about}{repos.about()} on http://{host}:{port}", flush=True)

        serve(app, where, before=load, after=pool.close)
    return 0


def _api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    from_environment = os.environ.get("DSQ_API_KEY", "")
    if 0 < len(from_environment) < MIN_KEY:
        raise InputError(f"DSQ_API_KEY is shorter than {MIN_KEY} characters; take a longer one")
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
    """Name → one model's path, or that of every GGUF in a folder."""
    given = Path(args.model) if args.model is not None else None
    if given is not None and given.is_dir() and not (given / "config.json").is_file():
        found = [p for p in sorted(given.glob("*.gguf")) if _first_shard(p)]
    else:
        found = [common.local_model(args.model, args)]
    if not found:
        raise InputError(f"{given}: no .gguf in this folder; name a model, or a folder of them")
    if len(found) > MAX_MODELS:
        raise InputError(f"{given}: {len(found)} models; a server offers {MAX_MODELS} at most")
    if args.alias is None:
        return {_name(path): path for path in found}
    if len(found) > 1:
        raise InputError(f"--alias {args.alias}: goes with one model, and there are {len(found)}")
    return {args.alias: found[0]}


def _first_shard(path: Path) -> bool:
    return not re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name) or "-00001-of-" in path.name


def _name(path: Path) -> str:
    if path.is_dir():
        return path.resolve().name
    return re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)


@dataclass
class _Model:
    """One that is offered; `path` becomes its GGUF in the cache where that is what runs."""

    name: str
    path: Path
    choice: Choice


def _choose_engines(files: dict[str, Path], args: argparse.Namespace) -> list[_Model]:
    from dsq.runtime.server.engines import choose, format_of, machine

    here = machine(args.vllm)
    models = [
        _Model(name, path, choose(args.engine, format_of(path), path.name, here))
        for name, path in files.items()
    ]
    given = args.vllm or args.vllm_url or args.vllm_args or args.tensor_parallel_size > 1
    if given and not any(model.choice.engine.name == "vllm" for model in models):
        raise InputError(
            "--vllm, --vllm-url, --vllm-args and --tensor-parallel-size go with --engine vllm; "
            "add it, or leave them out"
        )
    return models


def _pool(
    models: list[_Model], options: EngineOptions, args: argparse.Namespace, stack: ExitStack
) -> tuple[ModelPool, str]:
    """The models, and what the server says of them when it starts.

    `stack` holds the GGUFs of GPTQ and EXL2 directories in the cache while the server runs.
    """
    from dsq.convert.gguf.reader import read_gguf
    from dsq.convert.inspect import check_has_weights
    from dsq.runtime.devices import available_memory
    from dsq.runtime.server.models import ModelPool, Offer
    from dsq.runtime.source import Source
    from dsq.tokenizer_port.tokenizer import Tokenizer

    free = available_memory()
    for model in models:
        if model.choice.repack:
            model.path = _repacked(model.path, args, stack)
        if model.path.is_file():
            check_has_weights(read_gguf(model.path))
    engines = {model.path: model.choice.engine for model in models}
    planned = {path: engine.plan(path, options, free) for path, engine in engines.items()}
    pool = ModelPool(
        {
            model.name: Offer(model.path, int(model.path.stat().st_mtime), planned[model.path][1])
            for model in models
        },
        lambda path: engines[path].make(path, planned[path][0]),
        lambda path: Tokenizer.from_vocabulary(Source(path).vocabulary),
        most_loaded=args.max_models,
        idle_s=args.idle,
        free_memory=available_memory,
    )
    about = ", ".join(model.name for model in models)
    if len(models) == 1:
        chosen, n_bytes = planned[models[0].path]
        about += (
            f", {models[0].choice.reason}"
            + f", context {chosen.n_ctx:,}" * (chosen.n_ctx > 0)
            + f", {chosen.n_gpu_layers} layers on the GPU" * (chosen.n_gpu_layers > 0)
            + f", about {n_bytes >> 20:,} of {free >> 20:,} MiB free memory" * (n_bytes > 0)
        )
    return pool, about


def _repacked(path: Path, args: argparse.Namespace, stack: ExitStack) -> Path:
    """The GGUF of a packed directory, in the cache; says what takes time and what is lost."""
    from dsq.convert.checkpoint import HfCheckpoint, open_checkpoint
    from dsq.runtime.repack_cache import RepackCache

    def tell(text: str) -> None:
        print(f"dsq serve: {text}", file=sys.stderr, flush=True)

    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, HfCheckpoint), "the engine was chosen for a packed directory"
    entry = RepackCache().open(checkpoint, threads=args.threads, tell=tell)
    gguf, record = stack.enter_context(entry)
    if record.loss:
        tell(
            f"{path} runs as a GGUF that is not lossless: {record.loss}; --engine torch runs its "
            f"exact codes, slower"
        )
    return gguf


def _options(args: argparse.Namespace) -> EngineOptions:
    from dsq.runtime.server.engines import EngineOptions

    auto = args.n_gpu_layers == "auto"
    return EngineOptions(
        n_ctx=args.ctx_size or 0,
        kv_size=args.kv_size or 0,
        kv_type=args.kv_type,
        n_parallel=args.parallel or 0,
        n_threads=args.threads,
        n_gpu_layers=0 if auto else common.gpu_layers(args),
        auto_layers=auto,
        draft=common.local_model(args.draft, args) if args.draft is not None else None,
        n_cards=args.tensor_parallel_size,
        vllm=args.vllm,
        vllm_url=args.vllm_url,
        vllm_args=args.vllm_args,
        lookup=not args.no_lookup,
        max_queued=args.queue,
    )


def _log_to_stderr() -> None:
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("dsq.server")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    log.propagate = False

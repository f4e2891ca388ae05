"""`dsq complete`: go on with code, or fill the hole between a prefix and a suffix."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import common
from dsq.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsq.runtime.repo.index import RepoGraph
    from dsq.runtime.source import Source

DESCRIPTION = (
    "Complete code. With a suffix, fill in the middle. With --repo, behind the repository's files\n"
    "that this one needs. Streams to standard output; stops at the model's end of text, also with\n"
    "an instruct model."
)
EXAMPLE = (
    'dsq complete coder-q4_0.gguf -p "def quicksort(" -n 64\n'
    "  dsq complete coder-q4_0.gguf --repo . --file src/main.py"
)

REPO_CTX = 4096  # with --repo: so many tokens, or what the prompt needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, "model", ".gguf, directory or hub id")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", help="the text to go on with")
    source.add_argument("--prefix-file", type=Path, metavar="F", help="or a file (- for stdin)")
    suffix = parser.add_mutually_exclusive_group()
    suffix.add_argument("--suffix-file", type=Path, metavar="G", help="what comes after the hole")
    suffix.add_argument("--suffix", help="or its text")
    parser.add_argument("--repo", type=Path, metavar="DIR", help="the repository it belongs to")
    parser.add_argument(
        "--file",
        type=Path,
        metavar="PATH",
        help="which of its files this is; without -p and --prefix-file, go on at its end",
    )
    parser.add_argument(
        "--special", action="store_true", help="control tokens' texts in the prompt become tokens"
    )
    parser.add_argument("-n", "--n-predict", type=common.positive, default=128, metavar="N")
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=common.positive,
        help=f"default: what is needed; with --repo at least {REPO_CTX} or the model's own",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "llama.cpp", "torch"),
        default="auto",
        help="torch runs the exact codes of a GPTQ or EXL2 directory; auto runs it in llama.cpp, "
        "as a GGUF that is kept in the cache",
    )
    common.add_sampling(parser, temp=0.0)
    common.add_gpu(parser)
    common.add_threads(parser)
    common.add_hub(parser)
    common.add_json(parser)


def _read(path: Path) -> str:
    try:
        if str(path) != "-":
            return path.read_bytes().decode("utf-8")
        if sys.stdin is None:
            raise InputError("standard input is closed; give a file")
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        name = "standard input" if str(path) == "-" else path
        raise InputError(f"{name}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from error


def run(args: argparse.Namespace) -> int:
    if str(args.prefix_file) == str(args.suffix_file) == "-":
        raise InputError("--prefix-file - --suffix-file -: standard input can be read only once")
    file = _file_in_repo(args)
    prefix = _prefix(args, file)
    suffix = args.suffix if args.suffix_file is None else _read(args.suffix_file)
    sampler = common.sampler(args)
    graph = None if args.repo is None else _graph(args.repo)
    model = common.local_model(args.model, args)
    from dsq.runtime.complete import complete_ids
    from dsq.runtime.repack_cache import generation_engine
    from dsq.runtime.source import EngineSettings, Source

    source = Source(model)
    path = None if file is None else file.relative_to(args.repo.resolve()).as_posix()
    ids, n_ctx, report = _prompt(args, source, prefix, suffix, graph, path)
    settings = EngineSettings(n_ctx, args.threads, common.gpu_layers(args))
    engine = generation_engine(source, settings, name=args.engine, tell=_tell)
    try:
        generation = complete_ids(engine, ids, max_tokens=args.n_predict, sampler=sampler)
        if not args.json:
            _tell_of(report)
            if suffix is None:
                print(prefix, end="", flush=True)
            for piece in generation:
                print(piece, end="", flush=True)
            print()
        result = generation.result
    finally:
        engine.close()
    if args.json:
        common.print_json(
            {
                "text": result.text,
                "tokens": len(result.tokens),
                "prompt_tokens": result.prompt_tokens,
                "stop_reason": result.stop_reason,
                "tokens_per_second": round(result.tokens_per_second, 2),
                **({"dsq": report} if report else {}),
            }
        )
    return 0


def _tell(text: str) -> None:
    print(f"dsq: {text}", file=sys.stderr)


def _prompt(
    args: argparse.Namespace,
    source: Source,
    prefix: str,
    suffix: str | None,
    graph: RepoGraph | None,
    path: str | None,
) -> tuple[list[int], int, Mapping[str, Any]]:
    """Its tokens, the context to run it in, and what of a repository is in it."""
    from dsq.runtime.complete import completion_ids, repo_completion_ids
    from dsq.tokenizer_port.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_vocabulary(source.vocabulary)
    ids = completion_ids(tokenizer, prefix, suffix, parse_special=args.special)
    needed = -(-(len(ids) + args.n_predict) // 256) * 256
    if graph is None:
        return ids, args.ctx_size or needed, {}
    n_ctx = args.ctx_size or max(needed, min(REPO_CTX, _trained_on(source.path)))
    ids, report = repo_completion_ids(
        tokenizer,
        prefix,
        suffix,
        graph,
        path,
        n_ctx=n_ctx,
        n_predict=args.n_predict,
        parse_special=args.special,
    )
    return ids, n_ctx, report


def _trained_on(path: Path) -> int:
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.errors import UnsupportedError

    try:
        return open_checkpoint(path).spec.n_ctx
    except UnsupportedError:  # of an architecture that dsq runs and does not convert
        return REPO_CTX


def _graph(folder: Path) -> RepoGraph:
    from dsq.runtime.repo.index import RepoIndex

    return RepoIndex(folder).graph()


def _file_in_repo(args: argparse.Namespace) -> Path | None:
    """The file that is completed, resolved: `--file`, or a `--prefix-file` in the repository."""
    if args.repo is None:
        if args.file is not None:
            raise InputError("--file: goes with --repo, which says where it belongs")
        return None
    root = args.repo.resolve()
    if args.file is None:
        given = args.prefix_file
        inside = given is not None and given.resolve().is_relative_to(root)
        return given.resolve() if inside and given.is_file() else None
    for path in (root / args.file, args.file):
        if path.exists() and path.resolve().is_relative_to(root):
            return Path(path.resolve())
    found = Path((root / args.file).resolve())  # one that is still to be written
    if not found.is_relative_to(root):
        raise InputError(f"--file {args.file}: is not inside {args.repo}")
    return found


def _prefix(args: argparse.Namespace, file: Path | None) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    if args.prefix_file is not None:
        return _read(args.prefix_file)
    if args.file is None or file is None:
        raise InputError(
            "there is nothing to complete: give -p, --prefix-file, or --repo and --file"
        )
    return _read(file)


def _tell_of(report: Mapping[str, Any]) -> None:
    if not report:
        return
    from dsq.runtime.repo.context import summary

    _tell(summary(report["repo"]))
    dropped = [
        f"{report[f'dropped_{side}_tokens']} tokens of the {side}"
        for side in ("prefix", "suffix")
        if report[f"dropped_{side}_tokens"]
    ]
    if dropped:
        _tell(f"no room for {' and '.join(dropped)}; raise -c")

"""`dsq complete`: go on with code, or fill the hole between a prefix and a suffix."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsq.cli import common
from dsq.errors import InputError

DESCRIPTION = (
    "Complete code. With a suffix, fill in the middle. Streams to standard output; stops at the\n"
    "model's end of text, also with an instruct model."
)
EXAMPLE = 'dsq complete coder-q4_0.gguf -p "def quicksort(" -n 64'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, "model", ".gguf, directory or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", help="the text to go on with")
    source.add_argument("--prefix-file", type=Path, metavar="F", help="or a file (- for stdin)")
    suffix = parser.add_mutually_exclusive_group()
    suffix.add_argument("--suffix-file", type=Path, metavar="G", help="what comes after the hole")
    suffix.add_argument("--suffix", help="or its text")
    parser.add_argument(
        "--special", action="store_true", help="control tokens' texts in the prompt become tokens"
    )
    parser.add_argument("-n", "--n-predict", type=common.positive, default=128, metavar="N")
    parser.add_argument("-c", "--ctx-size", type=common.positive, help="default: what is needed")
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
    prefix = args.prompt if args.prompt is not None else _read(args.prefix_file)
    suffix = args.suffix if args.suffix_file is None else _read(args.suffix_file)
    sampler = common.sampler(args)
    model = common.local_model(args.model, args)
    from dsq.runtime.complete import complete, completion_ids
    from dsq.runtime.repack_cache import generation_engine
    from dsq.runtime.source import EngineSettings, Source
    from dsq.tokenizer_port.tokenizer import Tokenizer

    source = Source(model)
    tokenizer = Tokenizer.from_vocabulary(source.vocabulary)
    n_prompt = len(completion_ids(tokenizer, prefix, suffix, parse_special=args.special))
    n_ctx = args.ctx_size or -(-(n_prompt + args.n_predict) // 256) * 256
    settings = EngineSettings(n_ctx, args.threads, common.gpu_layers(args))
    engine = generation_engine(
        source, settings, name=args.engine, tell=lambda text: print(f"dsq: {text}", file=sys.stderr)
    )
    try:
        generation = complete(
            engine,
            prefix,
            suffix,
            max_tokens=args.n_predict,
            sampler=sampler,
            parse_special=args.special,
        )
        if not args.json:
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
            }
        )
    return 0

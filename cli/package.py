"""`dsq package`: a folder that Ollama or LM Studio takes in."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsq.cli import common
from dsq.errors import InputError

DESCRIPTION = (
    "Lay a GGUF out for another program. ollama: a Modelfile with the model's chat template and\n"
    "fill in the middle as a Go template, stops and context. lmstudio: publisher/model/file.gguf\n"
    "and a preset. The model is a hard link, not a copy, where the file system allows."
)
EXAMPLE = "dsq package coder-q4_k_m.gguf --to ollama -o coder-ollama"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, "model", ".gguf")
    parser.add_argument("--to", required=True, choices=("ollama", "lmstudio"))
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "-c",
        "--ctx",
        "--ctx-size",
        type=common.positive,
        metavar="N",
        help="tokens of context (default: the model's, 16384 at most)",
    )
    parser.add_argument("--name", help="the model's name (default: the file's)")
    parser.add_argument("--publisher", default="dsq", help="LM Studio's outer folder")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    common.add_hub(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from dsq.convert.checkpoint import GgufCheckpoint
    from dsq.convert.inspect import open_model
    from dsq.runtime.package import next_step, plan_package, write_package
    from dsq.tokenizer_port.tokenizer import Tokenizer

    checkpoint = open_model(common.local_model(args.model, args))
    if not isinstance(checkpoint, GgufCheckpoint):
        raise InputError(
            f"{checkpoint.path}: is no GGUF; make one first: dsq quantize q4_k_m {checkpoint.path}"
        )
    package = plan_package(
        checkpoint,
        Tokenizer.from_vocabulary(checkpoint.vocabulary()),
        args.to,
        n_ctx=args.ctx,
        publisher=args.publisher,
        name=args.name,
    )
    paths = write_package(package, args.output, force=args.force)
    step = next_step(args.to, package.name, args.output)
    if args.json:
        common.print_json(
            {
                "output": str(args.output),
                "files": [str(path) for path in paths],
                "notes": list(package.notes),
                "next": step,
            }
        )
        return 0
    for path in paths:
        print(path)
    for note in package.notes:
        common.warn(note)
    print(f"next: {step}")
    return 0

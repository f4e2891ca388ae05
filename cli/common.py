"""What several verbs share: finding the model, output names, sizes, JSON."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.convert.files import human as human
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.runtime.sampling import SamplerSettings


def add_source(parser: argparse.ArgumentParser, name: str, help_: str) -> None:
    parser.add_argument(
        name,
        nargs="?",
        help=f"{help_} (default: the one model in this folder)",
        metavar=name.upper(),
    )


def add_hub(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model hub")
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument("--offline", action="store_true", help="use only what the cache holds")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-t", "--threads", type=thread_count, help="CPU threads (default: all cores)"
    )


def add_gpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-ngl",
        "--n-gpu-layers",
        default="0",
        metavar="N",
        help="layers on the GPU, or all (needs a CUDA build of llama-cpp-python)",
    )


def gpu_layers(args: argparse.Namespace) -> int:
    """`-ngl`: a number, or `all`."""
    text = args.n_gpu_layers
    if text == "all":
        return 999
    if not text.isdecimal():
        raise InputError(f"-ngl {text}: give a number of layers, or all")
    return int(text)


def add_sampling(parser: argparse.ArgumentParser, *, temp: float) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--temp", type=float, default=temp, help=f"0 is greedy (default {temp:g})")
    group.add_argument("--top-k", type=int, default=40)
    group.add_argument("--top-p", type=float, default=0.95)
    group.add_argument("--min-p", type=float, default=0.05)
    group.add_argument("--repeat-penalty", type=float, default=1.0)
    group.add_argument("--seed", type=int, help="default: drawn")


def sampler(args: argparse.Namespace) -> SamplerSettings:
    """Checked at once, before a model is loaded."""
    from dsq.runtime.sampling import SamplerSettings

    return SamplerSettings(
        temp=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        repeat_penalty=args.repeat_penalty,
    )


MOST = 1 << 24  # tokens: beyond any context, and far below what overflows llama.cpp's int32
MOST_THREADS = 512  # GGML_MAX_N_THREADS


def positive(text: str, most: int = MOST) -> int:
    """argparse type: an integer from 1 to `most`."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 0 < value <= most:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 to {most}")
    return value


def thread_count(text: str) -> int:
    """argparse type: what ggml can start."""
    return positive(text, MOST_THREADS)


def local_model(source: str | None, args: argparse.Namespace) -> Path:
    """The path of SRC: as given, from the hub, or the one model in the current folder."""
    if source is None:
        return only_model(Path())
    if not source:
        raise InputError("the model's name is empty; give a .gguf, a directory or a hub id")
    if Path(source).exists():
        return Path(source)
    from dsq.convert.hub import resolve

    return resolve(source, revision=args.revision, offline=args.offline)


def only_model(folder: Path) -> Path:
    """The one model in `folder`: itself, one subdirectory, or one GGUF."""
    if (folder / "config.json").is_file():
        return folder
    found = [p.parent for p in sorted(folder.glob("*/config.json"))]
    found += [
        p
        for p in sorted(folder.glob("*.gguf"))
        if not re.search(r"-\d{5}-of-\d{5}\.gguf$", p.name) or "-00001-of-" in p.name
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError("no model in this folder; name one: a .gguf, a directory or a hub id")
    names = ", ".join(str(p) for p in found[:6])
    raise InputError(f"{len(found)} models in this folder ({names}); name one")


def output_path(source: Path, encoding: str) -> Path:
    """`Base-Q4_K_M.gguf` in the current folder, from the source's name."""
    from dsq.convert.pipeline import model_name

    base = model_name(source)
    base = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", base)
    base = re.sub(r"[-.](f32|f16|bf16|i?q\d\w*|tq\d_0|mxfp4\w*)$", "", base, flags=re.IGNORECASE)
    return Path(f"{base or 'model'}-{encoding.upper()}.gguf")


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str) -> int:
    """argparse type: `4G`, `500M`, `3.9GiB`; powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match.group(1)) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500M or 4G")
    n_bytes = int(float(match.group(1)) * _UNITS[match.group(2).upper()])
    if n_bytes < 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1M")
    return n_bytes


def print_json(content: Any) -> None:
    json.dump(content, sys.stdout, indent=2, ensure_ascii=False)
    print()


def warn(message: str) -> None:
    print(f"dsq: warning: {message}", file=sys.stderr)

"""Options that name what a calibration corpus is made of, and the corpus itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsq.cli import common
from dsq.cli.progress import progress_bar
from dsq.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dsq.runtime.corpus.build import Settings
    from dsq.runtime.corpus.corpus import Corpus
    from dsq.tokenizer_port.tokenizer import Tokenizer

_FILES = ("text", "english", "chinese")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration text")
    group.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text files")
    group.add_argument(
        "--repo",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="source code, read by DeepSeek Coder's recipe: filtered, in order of dependency, "
        "near-duplicates removed, half of it with a middle to fill in",
    )
    group.add_argument(
        "--mix",
        choices=("code",),
        help="code: 87 %% code, 10 %% English about code, 3 %% Chinese; from --repo, --text, "
        "--english and --chinese first, the rest from this machine's libraries and manuals",
    )
    group.add_argument("--english", type=Path, nargs="+", metavar="FILE", help="for --mix")
    group.add_argument("--chinese", type=Path, nargs="+", metavar="FILE", help="for --mix")
    group.add_argument(
        "--fim-rate",
        type=float,
        metavar="SHARE",
        help="of the code with a middle to fill in (default 0.5, as the model was trained)",
    )
    group.add_argument(
        "--strict", action="store_true", help="with --mix: fail when a part falls short"
    )


def take_model(args: argparse.Namespace) -> None:
    """`--text a.txt model.gguf`: such an option takes all it can get, the model as well."""
    if args.model is not None:
        return
    for name in (*_FILES, "repo"):
        paths = getattr(args, name)
        if not paths:
            continue
        last = paths[-1]
        is_model = (last / "config.json").is_file() and (name != "repo" or len(paths) > 1)
        if is_model or last.suffix == ".gguf" or (name != "repo" and last.is_dir()):
            args.model = str(paths.pop())
            return


def is_asked_for(args: argparse.Namespace) -> bool:
    """Whether a corpus is to be built; False for plain --text. Raises InputError for a muddle."""
    if args.mix:
        return True
    wrong = [f"--{name}" for name in ("english", "chinese") if getattr(args, name)]
    wrong += ["--text"] if args.repo and args.text else []
    wrong += ["--strict"] if args.strict else []
    if not args.repo and args.fim_rate is not None:
        wrong.append("--fim-rate")
    if wrong:
        raise InputError(f"{', '.join(wrong)}: add --mix code, or leave it out")
    if not args.repo and not args.text:
        raise InputError("which text? give --text FILE…, --repo DIR… or --mix code")
    return bool(args.repo)


def windows(args: argparse.Namespace, model: Path) -> tuple[npt.NDArray[np.int32], dict[str, Any]]:
    """(windows, n_ctx) token ids of `model`, and the record of what they are from."""
    from dsq.convert.checkpoint import open_checkpoint
    from dsq.runtime.corpus.build import Settings
    from dsq.tokenizer_port.tokenizer import Tokenizer

    rate = {} if args.fim_rate is None else {"fim_rate": args.fim_rate}
    settings = Settings(args.tokens, args.ctx, seed=args.seed, strict=args.strict, **rate)
    checkpoint = open_checkpoint(model)
    if args.ctx > checkpoint.spec.n_ctx:  # before the reading, which takes a while
        raise InputError(
            f"--ctx {args.ctx}: the model was trained on {checkpoint.spec.n_ctx} tokens; give less"
        )
    tokenizer = Tokenizer.from_vocabulary(checkpoint.vocabulary())
    corpus = _build(args, tokenizer, settings)
    for warning in corpus.record["warnings"]:
        common.warn(warning)
    bos = tokenizer.vocab.bos if tokenizer.vocab.add_bos else None
    name = "mix code" if args.mix else ", ".join(str(folder) for folder in args.repo)
    return corpus.windows(args.ctx, args.tokens, bos), {"name": name, **corpus.record}


def _build(args: argparse.Namespace, tokenizer: Tokenizer, settings: Settings) -> Corpus:
    from dsq.runtime.corpus.build import from_repositories, mix_code
    from dsq.runtime.corpus.named import Named

    with progress_bar("reading", settings.n_tokens, quiet=args.json) as advance:
        if not args.mix:
            return from_repositories(tokenizer, args.repo, settings, advance)
        named = Named(args.repo or (), *(getattr(args, name) or () for name in _FILES))
        return mix_code(tokenizer, settings, named, advance=advance)

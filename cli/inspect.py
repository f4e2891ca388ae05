"""`dsq inspect`: what is in a model, and the memory it needs."""

from __future__ import annotations

import argparse
from typing import Any

from dsq.cli import common

DESCRIPTION = (
    "Show architecture, RoPE, tokenizer, tensor types, bits per weight and the memory at a\n"
    "context. Reads headers only."
)
EXAMPLE = "dsq inspect coder-q4_k_m.gguf -c 16384"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_source(parser, "model", ".gguf, directory or hub id")
    parser.add_argument(
        "-c", "--ctx-size", type=common.positive, help="context for the memory (default: all)"
    )
    common.add_hub(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from dsq.convert.inspect import inspect_checkpoint, open_model

    checkpoint = open_model(common.local_model(args.model, args))
    packed = getattr(checkpoint, "packed", None)
    report = inspect_checkpoint(checkpoint, args.ctx_size)
    report["quantization"] = None if packed is None else packed.method
    if args.json:
        common.print_json(report)
    else:
        _print(report)
    return 0


def _print(report: dict[str, Any]) -> None:
    rope, tokenizer, memory = report["rope"], report["tokenizer"], report["memory_at_ctx"]
    fim = tokenizer["fim"]
    heads = f"{report['n_head']} heads, {report['n_head_kv']} for K and V"
    kind = report["quantization"]
    rows = [
        ("model", f"{report['path']} ({report['format']}{f', {kind}' if kind else ''})"),
        ("architecture", f"{report['architecture']}, {report['n_params'] / 1e6:,.1f} M weights"),
        ("layers", f"{report['n_layer']} × {report['n_embd']}, ffn {report['n_ff']}, {heads}"),
        ("RoPE", f"{rope['kind']}, factor {rope['factor']:g}, base {rope['freq_base']:g}"),
        ("context", f"{report['n_ctx']:,}"),
        (
            "tokenizer",
            f"{tokenizer['kind']}, pre-tokenizer {tokenizer['pre']}, {tokenizer['n_tokens']:,} "
            f"tokens in {report['n_vocab']:,} rows",
        ),
        (
            "special ids",
            f"bos {tokenizer['bos']} ({'' if tokenizer['add_bos'] else 'not '}added), "
            f"eos {tokenizer['eos']}, eot {tokenizer['eot']}",
        ),
        (
            "fill in the middle",
            "none"
            if fim["prefix"] is None
            else f"prefix {fim['prefix']}, suffix {fim['suffix']}, middle {fim['middle']}",
        ),
        (
            "tensors",
            ", ".join(
                f"{v['count']} × {k} ({common.human(v['bytes'])})"
                for k, v in report["tensors_by_type"].items()
            ),
        ),
        ("size", f"{common.human(report['size_bytes'])}, {report['bpw']:.2f} bits per weight"),
        (
            f"memory at {memory['n_ctx']:,}",
            f"{common.human(memory['total_bytes'])}: weights "
            f"{common.human(memory['weights_bytes'])}, KV cache (f16) "
            f"{common.human(memory['kv_cache_bytes'])}, compute about "
            f"{common.human(memory['compute_bytes'])}",
        ),
    ]
    for label, text in rows:
        print(f"{label:<20} {text}")

"""The report's figures, by matplotlib; each function draws one and knows nothing of files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dsq.errors import InputError
from dsq.runtime.report.measure import MEMORY_AT, Entry, Report

INK, SOFT, GRID, FRONT = "#1f2328", "#59636e", "#e3e6ea", "#b35900"
COLORS = ("#0969da", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#0a7b83", "#cf222e", "#57606a")

# Any: matplotlib's own type lists every key there is.
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "svg.hashsalt": "dsq",  # the same report is the same bytes
}


def colors(report: Report) -> dict[str, str]:
    """A model keeps its colour through all figures."""
    return {e.path: COLORS[i % len(COLORS)] for i, e in enumerate(report.entries)}


@contextmanager
def _figure(width: float, height: float, columns: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise InputError(
            f"a report needs matplotlib, which is not installed ({error}); "
            "pip install 'dsq[report]'"
        ) from error
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            1, columns, figsize=(width, height), layout="constrained", squeeze=False
        )
        try:
            yield figure, list(axes[0])
        finally:
            pyplot.close(figure)


def quality(report: Report, kind: str) -> bytes:
    """Mean KLD and perplexity against bits per weight, with standard errors and the front.

    The errors of perplexity are of the paired difference: what the text adds cancels out.
    """
    with _figure(10, 4.2, 2) as (figure, (left, right)):
        _against_bpw(report, left, lambda e: (e.kld, e.measured["kld_stderr"]))
        front = report.front
        left.plot([e.bpw for e in front], [e.kld for e in front], color=FRONT, zorder=1, lw=1.2)
        left.set_yscale("log")
        left.set_title("Mean KL divergence from the reference")
        left.set_ylabel("nats per token (log)")
        _against_bpw(report, right, lambda e: (100 * (e.ppl_ratio - 1), 100 * e.ppl_ratio_stderr))
        right.axhline(0, color=SOFT, lw=1, ls="--")
        right.set_title("Perplexity above the reference's")
        right.set_ylabel("%")
        return _bytes(figure, kind)


def _against_bpw(report: Report, axes: Any, value: Callable[[Entry], tuple[float, float]]) -> None:
    for entry in report.entries:
        y, error = value(entry)
        color = colors(report)[entry.path]
        # On a logarithmic axis a bar that reaches zero would have no end.
        low = min(error, 0.95 * y) if y > 0 else error
        axes.errorbar(
            entry.bpw, y, yerr=[[low], [error]], fmt="o", color=color, capsize=3, ms=6, zorder=2
        )
        axes.annotate(
            entry.name, (entry.bpw, y), xytext=(6, 5), textcoords="offset points", color=INK, size=9
        )
    axes.margins(x=0.15, y=0.12)
    axes.set_xlabel("bits per weight")


def distribution(report: Report, kind: str) -> bytes:
    """How many tokens diverge by more than a value: the tail that a mean hides."""
    with _figure(6, 4) as (figure, (axes,)):
        for entry in report.entries:
            x = [max(value, 1e-7) for value, _ in entry.curve]
            y = [share for _, share in entry.curve]
            axes.plot(x, y, color=colors(report)[entry.path], label=entry.name, lw=1.6)
        axes.set(xscale="log", yscale="log", xlabel="KL divergence of one token, nats (log)")
        axes.set_ylabel("share of tokens above it (log)")
        axes.set_title("Distribution over tokens")
        axes.set_xlim(left=max(1e-7, min(x for x in axes.get_xlim() if x > 0)))
        axes.legend(loc="lower left")
        return _bytes(figure, kind)


def layers(report: Report, kind: str) -> bytes:
    """Relative error of each layer's output."""
    with _figure(6, 4) as (figure, (axes,)):
        for entry in report.entries:
            if entry.layer_error:
                x = range(len(entry.layer_error))
                color = colors(report)[entry.path]
                axes.plot(x, entry.layer_error, color=color, label=entry.name, lw=1.6, marker=".")
        axes.set(xlabel="layer", ylabel="relative error of its output", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title("Error, layer by layer")
        axes.margins(y=0.25)
        axes.legend(loc="upper center", ncols=4)
        return _bytes(figure, kind)


def memory(report: Report, kind: str) -> bytes:
    """Weights, KV cache and buffers at the stated contexts."""
    parts = {"weights_bytes": "weights", "kv_cache_bytes": "KV cache", "compute_bytes": "buffers"}
    shades = ("#0969da", "#54aeff", "#b6d7ff")
    height = 1.2 + 0.3 * len(MEMORY_AT) * len(report.entries)
    with _figure(10, height) as (figure, (axes,)):
        labels = []
        for row, (entry, n_ctx) in enumerate((e, n) for e in report.entries for n in MEMORY_AT):
            start = 0.0
            for (key, name), shade in zip(parts.items(), shades, strict=True):
                size = entry.memory[n_ctx][key] / 2**30
                label = name if row == 0 else None
                axes.barh(row, size, left=start, color=shade, height=0.7, label=label)
                start += size
            axes.annotate(
                f"{start:.2f}",
                (start, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                size=9,
            )
            labels.append(f"{entry.name} at {n_ctx // 1024}k")
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        axes.set_xlabel("GiB, KV cache in f16")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
        return _bytes(figure, kind)


def _bytes(figure: Any, kind: str) -> bytes:
    out = io.BytesIO()
    stamp = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(out, format=kind, dpi=160, metadata=stamp)
    return out.getvalue()

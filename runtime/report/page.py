"""The report as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from html import escape

from dsq.runtime.report import figures
from dsq.runtime.report.measure import Entry, Report, Worst

_CSS = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --tint: #f6f8fa; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); margin: 0; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; }
p { margin: 6px 0; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child { text-align: left; }
tr.front td:first-child::after { content: " ◆"; color: #b35900; }
i.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 7px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px; }
svg { width: 100%; height: auto; }
.token { background: var(--tint); border-radius: 6px; padding: 10px 12px; margin: 8px 0; }
.token pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 6px;
  font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
mark { background: #ffd8b5; border-radius: 3px; padding: 0 2px; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; }
details summary { cursor: pointer; font-weight: 600; margin: 10px 0; }
"""


def html(report: Report) -> str:
    """The whole page."""
    first = report.entries[0].measured
    text = ", ".join(report.texts)
    notes = "".join(f"<p class=soft>{escape(note)}</p>" for note in report.notes)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Drift from {escape(report.ref)}</title><style>{_CSS}</style>
<main>
<h1>What quantization cost</h1>
<p>Every model against <code>{escape(report.ref)}</code>, on the same text and windows.</p>
<p class=soft>{first["tokens"]:,} scored tokens of {escape(text)} (SHA-256
<code>{first["text_sha256"][:16]}</code>); {escape(first["protocol"])}. ± is one standard error.</p>
{notes}
<div class=scroll>{_table(report)}</div>
<p class=soft>◆ on the Pareto front: no other model here is as small and as close.</p>
{_svg(figures.quality(report, "svg"))}
<div class=figures>{_svg(figures.distribution(report, "svg"))}{_layers(report)}</div>
<h2>Memory it needs</h2>
{_svg(figures.memory(report, "svg"))}
<h2>The worst tokens</h2>
<p class=soft>Where a model's prediction went furthest from the reference's. Marked: the token that
the text has there.</p>
{"".join(_worst(entry, shown=entry is report.entries[-1]) for entry in report.entries)}
</main></html>
"""


def _table(report: Report) -> str:
    front = {entry.path for entry in report.front}
    palette = figures.colors(report)
    head = (
        "model",
        "MiB",
        "bits/weight",
        "perplexity",
        "over ref",
        "mean KLD",
        "99 %",
        "max",
        "same top",
    )
    rows = "".join(
        f"<tr{' class=front' if e.path in front else ''}>"
        f'<td><i class=dot style="background:{palette[e.path]}"></i>{escape(e.name)}</td>'
        + "".join(f"<td>{cell}</td>" for cell in _cells(e))
        + "</tr>"
        for e in report.entries
    )
    return f"<table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{rows}</table>"


def _cells(entry: Entry) -> tuple[str, ...]:
    m = entry.measured
    return (
        f"{m['size_bytes'] / 2**20:,.1f}",
        f"{m['bpw']:.2f}",
        f"{m['ppl']:.4f} ± {m['ppl_stderr']:.4f}",
        f"{100 * (entry.ppl_ratio - 1):+.2f} ± {100 * entry.ppl_ratio_stderr:.2f} %",
        f"{m['kld_mean']:.5f} ± {m['kld_stderr']:.5f}",
        f"{m['kld_p99']:.3f}",
        f"{m['kld_max']:.2f}",
        f"{100 * m['top1_agreement']:.2f} %",
    )


def _layers(report: Report) -> str:
    if not any(entry.layer_error for entry in report.entries):
        return ""
    return _svg(figures.layers(report, "svg"))


def _worst(entry: Entry, *, shown: bool) -> str:
    tokens = "".join(_token(worst) for worst in entry.worst)
    state = " open" if shown else ""
    return f"<details{state}><summary>{escape(entry.name)}</summary>{tokens}</details>"


def _token(worst: Worst) -> str:
    return (
        f"<div class=token><pre>{escape(worst.before)}<mark>{_shown(worst.target)}</mark></pre>"
        f"KLD {worst.kld:.2f}. The reference gave the token {_percent(worst.ref_p)} and preferred "
        f"<code>{_shown(worst.ref_top)}</code>; this model {_percent(worst.p)}, preferring "
        f"<code>{_shown(worst.top)}</code>.</div>"
    )


def _percent(p: float) -> str:
    return f"{100 * p:.1f} %" if p >= 0.001 else f"{100 * p:.1g} %"


def _shown(text: str) -> str:
    """White space as visible signs; a line break keeps its place."""
    visible = escape(text).replace(" ", "·").replace("\t", "⇥").replace("\r", "␍")
    return visible.replace("\n", "⏎") or "∅"


def _svg(data: bytes) -> str:
    """The drawing without its XML prolog, to stand inside HTML."""
    text = data.decode("utf-8")
    return text[text.index("<svg") :]

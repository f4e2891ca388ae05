"""`dsq report`: the figures are those of `evaluate`, the page needs nothing else."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dsq.cli.main import main
from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.errors import InputError
from dsq.quant.presets import preset
from dsq.runtime.evaluate import evaluate
from dsq.runtime.report import page
from dsq.runtime.report.measure import Entry, Report, report
from tests.models import TINY_CODER

TYPES = ("bf16", "q8_0", "q4_0", "q2_k")
HELDOUT = TINY_CODER / "heldout.txt"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    source = open_checkpoint(TINY_CODER)
    made = {}
    for name in TYPES:
        made[name] = folder / f"tiny-{name}.gguf"
        run_gguf_plan(source, plan_gguf(source, preset(name)), made[name])
    return made


@pytest.fixture(scope="module")
def measured(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        return report(
            [files[name] for name in ("q2_k", "q8_0", "q4_0")],
            files["bf16"],
            texts=[HELDOUT.read_text(encoding="utf-8")],
            text_names=["heldout.txt"],
            n_ctx=128,
            chunks=4,
        )


def test_the_figures_are_those_of_eval(files: dict[str, Path], measured: Report) -> None:
    alone = evaluate(
        files["q4_0"],
        texts=[HELDOUT.read_text(encoding="utf-8")],
        ref=files["bf16"],
        n_ctx=128,
        chunks=4,
        use_cache=False,
    ).to_json()
    mine = next(e for e in measured.entries if e.name == "q4_0").measured
    for key in ("ppl", "kld_mean", "kld_max", "top1_agreement", "tokens", "size_bytes", "bpw"):
        assert mine[key] == pytest.approx(alone[key], rel=1e-6), key


def test_the_ratio_of_perplexities_is_paired(measured: Report) -> None:
    for entry in measured.entries:
        m = entry.measured
        assert entry.ppl_ratio == pytest.approx(m["ppl"] / m["ref_ppl"], rel=1e-6)
        assert entry.ppl_ratio_stderr < m["ppl_stderr"] / m["ppl"]


def test_largest_first_with_short_names(measured: Report) -> None:
    assert [e.name for e in measured.entries] == ["q8_0", "q4_0", "q2_k"]


def test_the_curve_ends_at_the_worst_token(measured: Report) -> None:
    for entry in measured.entries:
        values, shares = np.array(entry.curve).T
        assert values[-1] == pytest.approx(entry.measured["kld_max"])
        assert shares[-1] == pytest.approx(1 / entry.measured["tokens"])
        assert (np.diff(values) >= 0).all()
        assert (np.diff(shares) < 0).all()


def test_the_worst_tokens_stand_in_the_text(measured: Report) -> None:
    text = HELDOUT.read_text(encoding="utf-8")
    for worst in measured.entries[-1].worst:
        assert worst.before.removeprefix("<｜begin▁of▁sentence｜>") + worst.target in text
        assert worst.kld <= measured.entries[-1].measured["kld_max"] + 1e-6


@pytest.mark.torch
def test_layer_errors_grow_as_bits_shrink(measured: Report) -> None:
    q8, q4, q2 = (entry.layer_error for entry in measured.entries)
    assert q8
    assert q4
    assert q2
    assert all(a < b < c for a, b, c in zip(q8, q4, q2, strict=True))


def entry(path: str, bpw: float, kld: float) -> Entry:
    return Entry(path, path, {"bpw": bpw, "kld_mean": kld}, 1.0, 0.0, (), (), None, {})


def test_pareto_front() -> None:
    a, b, c, d = entry("a", 8, 0.01), entry("b", 4, 0.1), entry("c", 5, 0.2), entry("d", 4, 0.05)
    assert Report("ref", (), (a, b, c, d), ()).front == [d, a]


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.outside.append(value)


def test_the_page_needs_nothing_else(measured: Report) -> None:
    links = _Links()
    text = page.html(measured)
    links.feed(text)
    assert links.outside == []
    assert "script" not in links.tags
    assert links.tags.count("svg") == 4
    assert page.html(measured) == text  # the same report is the same bytes


def test_what_the_text_holds_is_no_markup(measured: Report) -> None:
    hostile = "<script>alert(1)</script>"
    named = Report(hostile, (hostile,), measured.entries, (hostile,))
    assert "<script" not in page.html(named)


def test_the_verb(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.html"
    command = ["report", str(files["q4_0"]), "--ref", str(files["bf16"]), "--text", str(HELDOUT)]
    command += ["-c", "64", "--chunks", "2", "-o", str(out), "--no-layers"]
    assert main(command) == 0
    assert "q4_0" in capsys.readouterr().out
    assert (tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert content["models"][0]["measured"]["tokens"] == 62
    assert main(command) == 2  # does not replace what is there
    assert "--force" in capsys.readouterr().err


def test_a_model_named_twice(files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="named twice"):
        report([files["q4_0"], files["q4_0"]], files["bf16"], texts=["x"], text_names=["x"])

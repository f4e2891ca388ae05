"""Evaluation: the protocol, the cache, and what cannot be compared."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from dsq.errors import InputError
from dsq.runtime.evaluate import Report, evaluate
from dsq.runtime.llamacpp import LlamaCppEngine
from dsq.runtime.source import Source
from tests.tiny_gguf import tiny_tokens, write_tiny_gguf, write_tiny_hf

WORDS = ["the", "return", "self", "def", " in", "\n", "(x)", "= 3", "on", "ü", "日本"]
TEXT = " ".join(random.Random(0).choice(WORDS) for _ in range(600))


def run(model: Path, tmp_path: Path, **options: object) -> Report:
    settings: dict = {"texts": [TEXT], "n_ctx": 64, "chunks": 6, "n_threads": 1}
    settings["cache_dir"] = tmp_path / "cache"
    return evaluate(model, **{**settings, **options})


def log_probabilities(model: Path, n_ctx: int, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """The protocol written out, one window at a time, in float64."""
    rows, targets = [], []
    with LlamaCppEngine(model, n_ctx=n_ctx, n_threads=1) as engine:
        ids = engine.tokenizer.encode(TEXT)
        assert ids[0] == engine.tokenizer.vocab.bos
        for start in range(0, chunks * n_ctx, n_ctx):
            window = [engine.tokenizer.vocab.bos, *ids[start + 1 : start + n_ctx]]
            logits = engine.logits(window).astype(np.float64)
            for position in range(n_ctx // 2, n_ctx - 1):
                row = logits[position] - logits[position].max()
                rows.append(row - math.log(np.exp(row).sum()))
                targets.append(window[position + 1])
    return np.array(rows), np.array(targets)


@pytest.mark.parametrize("n_ctx", [64, 100])
def test_the_figures_follow_the_protocol(
    tiny: Path, other: Path, tmp_path: Path, n_ctx: int
) -> None:
    q, targets = log_probabilities(tiny, n_ctx, 3)
    p, _ = log_probabilities(other, n_ctx, 3)
    index = np.arange(len(targets))
    nll = -q[index, targets]
    report = run(tiny, tmp_path, ref=other, n_ctx=n_ctx, chunks=3)
    found = report.drift
    assert found.tokens == len(targets) == 3 * (n_ctx - 1 - n_ctx // 2)
    assert found.ppl == pytest.approx(math.exp(nll.mean()), rel=1e-3)
    assert found.ppl_stderr == pytest.approx(
        math.exp(nll.mean()) * nll.std() / math.sqrt(len(nll) - 1), rel=1e-2
    )
    assert found.ref_ppl == pytest.approx(math.exp(-p[index, targets].mean()), rel=1e-3)
    kld = (np.exp(p) * (p - q)).sum(axis=1)
    assert found.kld_mean == pytest.approx(kld.mean(), rel=1e-3)
    assert found.kld_max == pytest.approx(kld.max(), rel=1e-2)
    assert report.chunks == 3


def test_a_model_against_itself(tiny: Path, tmp_path: Path) -> None:
    found = run(tiny, tmp_path, ref=tiny).drift
    assert found.kld_mean is not None
    assert found.kld_mean < 1e-6
    assert found.top1_agreement == 1
    assert found.ref_ppl == pytest.approx(found.ppl, rel=1e-6)


def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that are loaded from now on."""
    names: list[str] = []
    original = Source.window_engine

    def spy(self: Source, settings: object) -> object:
        names.append(self.path.name)
        return original(self, settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Source, "window_engine", spy)
    return names


def test_the_reference_is_computed_once(
    tiny: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loads(monkeypatch)
    first = run(tiny, tmp_path, ref=other)
    assert loaded == ["other.gguf", "tiny.gguf"]
    loaded.clear()
    assert run(tiny, tmp_path, ref=other).drift == first.drift
    assert loaded == ["tiny.gguf"]
    for change in ({"chunks": 5}, {"n_ctx": 32}, {"texts": [TEXT[1:]]}, {"kv_type": "f32"}):
        loaded.clear()
        run(tiny, tmp_path, ref=other, **change)
        assert loaded == ["other.gguf", "tiny.gguf"], change


def test_no_cache_gives_the_same_figures_and_leaves_nothing(
    tiny: Path, other: Path, tmp_path: Path
) -> None:
    without = run(tiny, tmp_path, ref=other, use_cache=False)
    assert not (tmp_path / "cache").exists()
    assert run(tiny, tmp_path, ref=other).drift == without.drift


def test_a_damaged_entry_is_computed_again(tiny: Path, other: Path, tmp_path: Path) -> None:
    first = run(tiny, tmp_path, ref=other)
    (entry,) = (tmp_path / "cache").iterdir()
    data = bytearray(entry.read_bytes())
    data[-1000] ^= 255  # in the last window
    entry.write_bytes(data)
    assert run(tiny, tmp_path, ref=other).drift == first.drift
    assert entry.read_bytes() != bytes(data)


def test_an_entry_too_large_for_the_cache_is_not_written(
    tiny: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsq.runtime.reference_cache.ReferenceCache.accepts", lambda *_: False)
    report = run(tiny, tmp_path, ref=other)
    assert report.drift.kld_mean is not None
    assert not (tmp_path / "cache").exists()


def test_the_report(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = run(tiny, tmp_path, progress=lambda what, i, n, _: seen.append((what, i, n)))
    flat = json.loads(json.dumps(report.to_json()))
    assert flat["kld_mean"] is None
    assert flat["ref"] is None
    assert flat["tokens"] == 6 * 31
    assert flat["size_bytes"] == tiny.stat().st_size
    assert flat["bpw"] == 32
    assert flat["tokens_per_second"] > 0
    assert "BOS first" in flat["protocol"]
    assert len(flat["text_sha256"]) == 64
    assert seen == [("model", 6, 6)]


def test_progress_tells_of_both_models(tiny: Path, other: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    run(tiny, tmp_path, ref=other, progress=lambda what, i, *_: seen.append((what, i)))
    assert seen == [*(("reference", i) for i in range(1, 7)), ("model", 6)]


def test_a_model_without_bos_sees_the_text_as_it_is(tmp_path: Path) -> None:
    bare = write_tiny_gguf(tmp_path / "bare.gguf", add_bos=False)
    report = run(bare, tmp_path)
    assert "no BOS" in report.protocol


def test_short_text(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the text has 3 tokens, but one window needs 64"):
        run(tiny, tmp_path, texts=["the"])


def test_vocabularies_that_differ(tiny: Path, tmp_path: Path) -> None:
    tokens = tiny_tokens()
    tokens[67] = "ĀĀ"
    changed = write_tiny_gguf(tmp_path / "changed.gguf", tokens=tokens)
    with pytest.raises(InputError, match=r"token 67 is 'C' in .*tiny\.gguf but 'ĀĀ' in"):
        run(tiny, tmp_path, ref=changed)


def test_absent_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.gguf: no such file"):
        run(tmp_path / "absent.gguf", tmp_path)


@pytest.mark.torch
def test_a_gguf_against_its_hugging_face_original(tiny: Path, tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "hf")
    found = run(tiny, tmp_path, ref=folder).drift
    assert found.kld_mean is not None
    assert found.kld_mean < 1e-5
    assert found.top1_agreement == pytest.approx(1, abs=0.01)
    assert found.ref_ppl == pytest.approx(found.ppl, rel=1e-3)

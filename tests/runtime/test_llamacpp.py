"""The llama.cpp engine: positions, cache, windows, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsq.errors import DsqError, InputError
from dsq.runtime.engine import Engine, prefill
from dsq.runtime.llamacpp import LlamaCppEngine
from tests.tiny_gguf import BOS, EOS, token_id, write_tiny_gguf

IDS = [token_id(BOS), *range(60, 99)]


def test_it_is_an_engine(engine: LlamaCppEngine) -> None:
    checked: Engine = engine
    assert checked.n_ctx == 256
    assert checked.n_vocab == 293
    assert checked.max_windows == 1


def test_logits_in_one_go_equal_logits_token_by_token(engine: LlamaCppEngine) -> None:
    whole = engine.logits(IDS).copy()
    assert whole.shape == (len(IDS), 293)
    engine.truncate(0)
    for i, token in enumerate(IDS):
        np.testing.assert_allclose(engine.eval([token]), whole[i], atol=2e-2)
    assert engine.tokens == tuple(IDS)


def test_a_context_filled_in_several_batches(tiny: Path, engine: LlamaCppEngine) -> None:
    whole = engine.logits(IDS).copy()
    with LlamaCppEngine(tiny, n_ctx=256, n_batch=16, n_threads=1) as small:
        np.testing.assert_allclose(small.logits(IDS), whole, atol=2e-2)
        np.testing.assert_allclose(small.logits(IDS, all=False), whole[-1:], atol=2e-2)


def test_truncating_goes_back_in_time(engine: LlamaCppEngine) -> None:
    first = engine.logits(IDS[:20]).copy()
    engine.logits(IDS[20:], pos0=20)
    engine.truncate(10)
    assert engine.tokens == tuple(IDS[:10])
    assert engine.n_past == 10
    np.testing.assert_allclose(engine.logits(IDS[10:20], pos0=10), first[10:], atol=2e-2)


def test_pos0_replaces_what_followed(engine: LlamaCppEngine) -> None:
    engine.logits(IDS)
    replaced = engine.logits([70, 71], pos0=5).copy()
    assert engine.tokens == (*IDS[:5], 70, 71)
    fresh = engine.logits([*IDS[:5], 70, 71])[-2:]
    np.testing.assert_allclose(replaced, fresh, atol=2e-2)


def test_prefill_evaluates_only_what_is_new(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    original = LlamaCppEngine.logits

    def spy(self: LlamaCppEngine, tokens: list[int], *, pos0: int = 0, all: bool = True) -> object:
        seen.append((pos0, len(tokens)))
        return original(self, tokens, pos0=pos0, all=all)

    wanted = engine.logits([*IDS[:30], 7, 8])[-1].copy()
    engine.logits(IDS)
    monkeypatch.setattr(LlamaCppEngine, "logits", spy)
    np.testing.assert_allclose(prefill(engine, [*IDS[:30], 7, 8]), wanted, atol=2e-2)
    prefill(engine, [*IDS[:30], 7, 8])  # all known: the last token runs again for its logits
    prefill(engine, [*IDS[:30], 7, 8], reuse=False)
    assert seen == [(30, 2), (31, 1), (0, 32)]


def test_windows_are_independent_and_only_scored_rows_come_back(tiny: Path) -> None:
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 256, (3, 32)).astype(np.int32)
    with LlamaCppEngine(tiny, n_ctx=32, n_batch=96, n_seq_max=3, n_threads=1) as engine:
        together = engine.window_logits(windows, 16).copy()
        assert together.shape == (3 * 15, 293)
        for i, window in enumerate(windows):
            alone = engine.logits(window.tolist())[16:-1]
            np.testing.assert_allclose(together[15 * i : 15 * i + 15], alone, atol=2e-2)


def test_a_window_longer_than_the_batch(tiny: Path) -> None:
    windows = np.arange(64, dtype=np.int32)[None] + 50
    with LlamaCppEngine(tiny, n_ctx=64, n_threads=1) as whole:
        wanted = whole.window_logits(windows, 32).copy()
    with LlamaCppEngine(tiny, n_ctx=64, n_batch=24, n_threads=1) as parts:
        np.testing.assert_allclose(parts.window_logits(windows, 32), wanted, atol=2e-2)


def test_the_rope_factor_counts(tmp_path: Path, engine: LlamaCppEngine) -> None:
    path = write_tiny_gguf(tmp_path / "unscaled.gguf", rope=("linear", 1.0))
    wanted = engine.logits(IDS)[-1].copy()
    with LlamaCppEngine(path, n_ctx=256, n_threads=1) as unscaled:
        assert np.abs(unscaled.logits(IDS)[-1] - wanted).max() > 0.5


def test_the_context_is_never_overrun(engine: LlamaCppEngine) -> None:
    with pytest.raises(InputError, match="257 tokens do not fit a context of 256; raise n_ctx"):
        engine.logits([65] * 257)
    engine.logits([65] * 256, all=False)
    with pytest.raises(InputError, match="257 tokens"):
        engine.eval([65])


def test_tokens_outside_the_vocabulary(engine: LlamaCppEngine) -> None:
    with pytest.raises(InputError, match="token 293 is outside its 293 tokens"):
        engine.logits([65, 293])
    with pytest.raises(InputError, match="token -1 is outside"):
        engine.logits([65, -1])
    with pytest.raises(InputError, match="no tokens"):
        engine.logits([])
    with pytest.raises(ValueError, match="pos0 is 3, but the sequence has 0"):
        engine.logits([65], pos0=3)


def test_a_missing_file_and_a_file_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        LlamaCppEngine(tmp_path / "absent.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"bad\.gguf: llama\.cpp cannot load it: .*magic"):
        LlamaCppEngine(bad)


def test_a_damaged_model_names_what_llama_cpp_says(tiny: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"tensor .* is not within the file bounds"):
        LlamaCppEngine(cut)


def test_gpu_layers_need_a_build_with_a_gpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_cpp.llama_supports_gpu_offload", lambda: False)
    with pytest.raises(InputError, match="GGML_CUDA=on"):
        LlamaCppEngine(tiny, n_gpu_layers=1)


def test_more_context_than_trained_warns(tiny: Path) -> None:
    with pytest.warns(UserWarning, match="1024 tokens exceeds the 512"):
        LlamaCppEngine(tiny, n_ctx=1024, n_threads=1).close()
    with LlamaCppEngine(tiny, n_threads=1) as engine:
        assert engine.n_ctx == 512


def test_kv_types(tiny: Path, engine: LlamaCppEngine) -> None:
    wanted = engine.logits(IDS)[-1].copy()
    with LlamaCppEngine(tiny, n_ctx=256, kv_type="f32", n_threads=1) as exact:
        np.testing.assert_allclose(exact.logits(IDS)[-1], wanted, atol=5e-2)
    with pytest.raises(InputError, match="unknown tensor type 'f17'"):
        LlamaCppEngine(tiny, kv_type="f17")
    # a quantized V cache needs flash attention: llama.cpp's own words come through
    with pytest.raises(DsqError, match="cannot make a context of 256 tokens with a q8_0 KV"):
        LlamaCppEngine(tiny, n_ctx=256, kv_type="q8_0", flash_attention=False)


def test_it_is_silent_unless_asked(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    LlamaCppEngine(tiny, n_ctx=256, n_threads=1).close()
    assert capfd.readouterr() == ("", "")
    LlamaCppEngine(tiny, n_ctx=256, n_threads=1, verbose=True).close()
    assert "llama_model_loader" in capfd.readouterr().err
    LlamaCppEngine(tiny, n_ctx=256, n_threads=1).close()
    assert capfd.readouterr() == ("", "")


def test_its_tokenizer_is_the_files(engine: LlamaCppEngine) -> None:
    assert engine.tokenizer.encode("the") == [token_id(BOS), token_id("t"), token_id("he")]
    assert engine.tokenizer.vocab.eos == token_id(EOS)


def test_closing_twice(tiny: Path) -> None:
    engine = LlamaCppEngine(tiny, n_ctx=256, n_threads=1)
    engine.close()
    engine.close()

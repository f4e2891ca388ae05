"""Right artifacts pass at every type; each mistake fails, with its reason."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.hf.writer import plan_to_hf
from dsq.convert.hf.writer import write_hf as write_hf_directory
from dsq.convert.imatrix import Imatrix
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.convert.tensor_plan import half_split_rows, interleaved_rows
from dsq.convert.verify_tensors import ERROR_BOUND, error_bound, release
from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.presets import preset
from dsq.quant.scheme import BF16, BY_NAME, F32
from dsq.runtime.verification import logits as verify_logits
from dsq.runtime.verification import twin
from dsq.runtime.verification.receipt import Check, Verification, receipt_path, write_receipt
from dsq.runtime.verification.verify import verify
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.models import llama_config, write_hf
from tests.runtime.damage import rewrite, swapped, taken

N_HEAD, N_HEAD_KV, HEAD_DIM = 4, 2, 64
CONFIG = llama_config(num_key_value_heads=N_HEAD_KV)
ALL = {
    "tensors",
    "hyperparameters",
    "rope",
    "token_ids",
    "tokenizer_parity",
    "chat_template",
    "logits_short",
    "logits_long",
    "runs",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "model", CONFIG)


@pytest.fixture(scope="module")
def q8_0(source: Path) -> Path:
    return quantized(source, "q8_0")


def quantized(source: Path, name: str, **options: Any) -> Path:
    checkpoint = open_checkpoint(source)
    out = source.parent / f"{name}.gguf"
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, preset(name), **options), out, force=True)
    return out


def by_name(result: Verification) -> dict[str, Check]:
    return {check.name: check for check in result.checks}


def failed(result: Verification) -> dict[str, str]:
    return {check.name: check.detail for check in result.checks if check.ok is False}


@pytest.mark.parametrize("name", ["f32", "bf16", "q8_0", "q4_k_m", "iq4_xs", "q2_k"])
def test_right_at_every_type(source: Path, name: str) -> None:
    """One tolerance for all of them, and well within it."""
    result = verify(quantized(source, name), source)
    assert failed(result) == {}
    assert result.ok
    checks = by_name(result)
    assert set(checks) == ALL
    assert checks["logits_short"].data["difference"] < 1e-4
    assert checks["logits_long"].data["difference"] < 1e-3
    assert checks["logits_short"].data["same_top_token"] == 1
    assert len(checks["tensors"].data["tensors"]) == len(open_checkpoint(source).tensors)


ROPES: dict[str, dict[str, Any]] = {
    "plain": {"rope_theta": 10000.0, "rope_scaling": None},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "yarn": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
        }
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_and_shape(tmp_path: Path, rope: str) -> None:
    """Also multi-query attention, biases, heads of their own size and a tied head."""
    config = llama_config(
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        head_dim=96,
        tie_word_embeddings=True,
        **ROPES[rope],
    )
    source = write_hf(tmp_path / "model", config)
    assert failed(verify(quantized(source, "q4_k_m"), source)) == {}


def test_slices(source: Path, q8_0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer gives what the whole model gives."""
    checkpoint = open_checkpoint(q8_0)
    ids = np.arange(70, 270, dtype=np.int32)

    def run() -> list[verify_logits.LogitsResult]:
        return verify_logits.compare_logits(
            checkpoint, open_checkpoint(source).spec, ids, ids, threads=1
        )

    whole = run()
    monkeypatch.setattr(twin, "SLICE_BYTES", 1)
    cut = run()
    assert [len(r.hidden) for r in whole] == [1, 1]
    assert [len(r.hidden) for r in cut] == [CONFIG["num_hidden_layers"]] * 2
    for a, b in zip(whole, cut, strict=True):
        assert b.ok
        assert np.abs(a.logits - b.logits).max() < 1e-4


def test_long_positions_are_real(source: Path, q8_0: Path) -> None:
    """The last tokens see the first ones, more than 4,096 positions behind them."""
    spec = open_checkpoint(source).spec
    ids = np.arange(70, 270, dtype=np.int32)
    probe = verify_logits.long_probe(ids)
    assert probe.positions[-1] - probe.positions[verify_logits.N_NEAR - 1] > 4096
    assert probe.sees[-1].all()
    assert not probe.sees[verify_logits.N_NEAR, : verify_logits.N_NEAR].any()
    # A factor that is off by 1/400 turns tokens 4,352 apart by up to 2.7 radians, near ones hardly.
    off = replace(spec, rope=replace(spec.rope, factor=4.01))
    short, long = verify_logits.compare_logits(open_checkpoint(q8_0), off, ids, ids, threads=1)
    assert not long.ok
    assert long.difference > 10 * short.difference


def test_temporary_files_are_gone(
    source: Path, q8_0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(q8_0.parent.iterdir())
    verify(q8_0, source)
    assert list(tmp_path.iterdir()) == []
    assert sorted(q8_0.parent.iterdir()) == before


METADATA: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "factor 1": (
        {"llama.rope.scaling.factor": 1.0},
        {"rope": "factor is 1, the source says linear 4", "logits_long": "positions 0 to"},
    ),
    "factor lost": (
        {"llama.rope.scaling.factor": None, "llama.rope.scaling.type": None},
        {"rope": "factor is 1, the source says linear 4", "logits_short": "llama.cpp and the"},
    ),
    "theta": (
        {"llama.rope.freq_base": 10000.0},
        {"rope": "base is 10000, the source says 100000", "logits_long": ""},
    ),
    "epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": 1e-3},
        {"hyperparameters": "RMSNorm epsilon is 0.001, the source says 1e-06", "logits_short": ""},
    ),
    "context": (
        {"llama.context_length": 4096},
        {"hyperparameters": "context is 4096, the source says 16384"},
    ),
    "kv heads": (
        {"llama.attention.head_count_kv": 4},
        {"hyperparameters": "KV heads is 4, the source says 2"},
    ),
    "pre-tokenizer": (
        {"tokenizer.ggml.pre": "gpt-2"},
        {"token_ids": "pre-tokenizer gpt-2", "tokenizer_parity": ": from token"},
    ),
    "bos": (
        {"tokenizer.ggml.add_bos_token": False},
        {"token_ids": "add_bos is false, the source says true", "logits_short": "as"},
    ),
}


@pytest.mark.parametrize("mistake", METADATA)
def test_metadata(source: Path, q8_0: Path, tmp_path: Path, mistake: str) -> None:
    change, reasons = METADATA[mistake]
    result = verify(rewrite(q8_0, tmp_path / "a.gguf", metadata=change), source)
    found = failed(result)
    assert not result.ok
    for name, words in reasons.items():
        assert words in found[name]
    assert "tensors" not in found


def test_a_lost_factor_is_far_above_the_tolerance(source: Path, q8_0: Path, tmp_path: Path) -> None:
    wrong = rewrite(q8_0, tmp_path / "a.gguf", metadata={"llama.rope.scaling.factor": 1.0})
    checks = by_name(verify(wrong, source))
    for name, tolerance in verify_logits.TOLERANCE.items():
        assert checks[name].data["difference"] > 30 * tolerance


def test_swapped_tokens(source: Path, q8_0: Path, tmp_path: Path) -> None:
    tokens = list(read_gguf(q8_0).metadata["tokenizer.ggml.tokens"])
    a, b = tokens.index("("), tokens.index(")")
    tokens[a], tokens[b] = tokens[b], tokens[a]
    wrong = rewrite(q8_0, tmp_path / "a.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    found = failed(verify(wrong, source))
    assert f"id {min(a, b)} is ')', the source says '(' (2 ids differ)" in found["token_ids"]
    assert f"of the probe as {b}, the source as {a}" in found["logits_short"]
    assert "tokenizer_parity" in found


def test_fim_ids(source: Path, q8_0: Path, tmp_path: Path) -> None:
    """Hole and end exchanged: the usual bug."""
    metadata = read_gguf(q8_0).metadata
    keys = ("tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.fim_mid_token_id")
    hole, end = (metadata[key] for key in keys)
    change = dict(zip(keys, (end, hole), strict=True))
    found = failed(verify(rewrite(q8_0, tmp_path / "a.gguf", metadata=change), source))
    assert list(found) == ["token_ids"]
    assert f"fim_suffix id is {end} (" in found["token_ids"]
    assert f"the source says {hole} (" in found["token_ids"]


def test_chat_template(source: Path, q8_0: Path, tmp_path: Path) -> None:
    model = tmp_path / "instruct"
    write_hf(model, CONFIG)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0].content }}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    result = verify(q8_0, model, logits=False)
    assert failed(result) == {"chat_template": "the chat template is missing, the source has one"}


N_ROWS = N_HEAD * HEAD_DIM
ROWS = np.arange(N_ROWS)
TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "q not permuted": (
        {"blk.0.attn_q.weight": taken(half_split_rows(N_ROWS, N_HEAD))},
        "blk.0.attn_q.weight: its rows are in Hugging Face's order: the rotary permutation",
    ),
    "k not permuted": (
        {"blk.1.attn_k.weight": taken(half_split_rows(N_HEAD_KV * HEAD_DIM, N_HEAD_KV))},
        "blk.1.attn_k.weight: its rows are in Hugging Face's order",
    ),
    "q permuted twice": (
        {"blk.0.attn_q.weight": taken(interleaved_rows(N_ROWS, N_HEAD))},
        "permuted twice",
    ),
    "k permuted for q's heads": (
        {
            "blk.0.attn_k.weight": taken(
                half_split_rows(N_HEAD_KV * HEAD_DIM, N_HEAD_KV)[
                    interleaved_rows(N_HEAD_KV * HEAD_DIM, N_HEAD)
                ]
            )
        },
        "blk.0.attn_k.weight: its rows are permuted for 4 heads; the source has 2",
    ),
    "heads swapped": (
        {"blk.0.attn_q.weight": swapped(HEAD_DIM, 3 * HEAD_DIM, HEAD_DIM)},
        "blk.0.attn_q.weight: heads 1 and 3 are swapped",
    ),
    "embedding rows swapped": (
        {"token_embd.weight": swapped(5, 9)},
        "token_embd.weight: rows 5 and 9 are swapped",
    ),
    "head rows swapped": (
        {"output.weight": swapped(7, 4000)},
        "output.weight: rows 7 and 4000 are swapped",
    ),
    "a row copied": (
        {"token_embd.weight": lambda rows: rows[[0, 0, *range(2, len(rows))]]},
        "token_embd.weight: row 1 holds the source's 0",
    ),
    "a row damaged": (
        {"blk.1.ffn_up.weight": lambda rows: np.where(ROWS_512 == 17, rows ^ 0x40, rows)},
        "blk.1.ffn_up.weight: row 17 differs from the source",
    ),
    "a norm lost": (
        {"blk.0.attn_norm.weight": lambda rows: np.ones_like(rows.view("<f4")).view("u1")},
        "blk.0.attn_norm.weight: relative error",
    ),
    "nan": (
        {"output_norm.weight": lambda rows: np.full_like(rows.view("<f4"), np.nan).view("u1")},
        "output_norm.weight: 256 of its rows hold NaN or Inf",
    ),
}
ROWS_512 = np.arange(512)[:, None]


@pytest.mark.parametrize("mistake", TENSORS)
def test_tensors(source: Path, q8_0: Path, tmp_path: Path, mistake: str) -> None:
    changes, words = TENSORS[mistake]
    wrong = rewrite(q8_0, tmp_path / "a.gguf", tensors=changes)
    found = failed(verify(wrong, source, logits=False))
    assert list(found) == ["tensors"]
    assert words in found["tensors"]


@pytest.mark.parametrize("mistake", ["q not permuted", "heads swapped", "embedding rows swapped"])
def test_tensors_at_two_bits(source: Path, tmp_path: Path, mistake: str) -> None:
    changes, words = TENSORS[mistake]
    wrong = rewrite(quantized(source, "q2_k"), tmp_path / "a.gguf", tensors=changes)
    assert words in failed(verify(wrong, source, logits=False))["tensors"]


def exchanged(a: str, b: str) -> dict[str, str]:
    return {a: b, b: a}


@pytest.mark.parametrize(
    ("renamed", "words"),
    [
        (
            exchanged("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"),
            "blk.0.ffn_gate.weight: it holds the source's model.layers.0.mlp.up_proj.weight",
        ),
        (
            exchanged("blk.0.attn_v.weight", "blk.1.attn_v.weight"),
            "blk.1.attn_v.weight: it holds the source's model.layers.0.self_attn.v_proj.weight",
        ),
        (
            exchanged("blk.0.attn_q.weight", "blk.1.attn_q.weight"),
            "blk.0.attn_q.weight: it holds the source's model.layers.1.self_attn.q_proj.weight",
        ),
    ],
)
def test_tensors_exchanged(
    source: Path, q8_0: Path, tmp_path: Path, renamed: dict[str, str], words: str
) -> None:
    wrong = rewrite(q8_0, tmp_path / "a.gguf", renamed=renamed)
    assert words in failed(verify(wrong, source, logits=False))["tensors"]


def test_transposed_and_scaled(source: Path, tmp_path: Path) -> None:
    f32 = quantized(source, "f32")

    def transposed(rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(rows.view("<f4").T).view("u1")

    wrong = rewrite(
        f32,
        tmp_path / "a.gguf",
        tensors={
            "blk.0.attn_output.weight": transposed,
            "blk.0.ffn_up.weight": lambda rows: (rows.view("<f4") * 2).view("u1"),
        },
    )
    found = failed(verify(wrong, source, logits=False))["tensors"]
    assert "blk.0.attn_output.weight: it is transposed" in found
    assert "blk.0.ffn_up.weight: it is the source's times 2" in found


def test_a_token_twice(source: Path, q8_0: Path, tmp_path: Path) -> None:
    """llama.cpp would end the process; here it is four checks that fail."""
    tokens = list(read_gguf(q8_0).metadata["tokenizer.ggml.tokens"])
    tokens[60] = tokens[61]
    wrong = rewrite(q8_0, tmp_path / "a.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    found = failed(verify(wrong, source))
    assert "tokens 60 and 61 are both" in found["token_ids"]
    assert set(found) == ALL - {"tensors", "hyperparameters", "rope"}


def test_no_room_for_twins(
    source: Path, q8_0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    found = failed(verify(q8_0, source))
    assert "set TMPDIR to a larger disk" in found["logits_short"]
    assert set(found) == {"logits_short", "logits_long"}


def test_released_pages_come_back(q8_0: Path) -> None:
    data = open_checkpoint(q8_0).data("token_embd.weight")
    before = hashlib.sha256(data).hexdigest()
    release(data)
    assert hashlib.sha256(data).hexdigest() == before
    release(np.zeros(10_000, np.uint8))  # no mapped file: nothing happens


def test_missing_tensor(source: Path, q8_0: Path, tmp_path: Path) -> None:
    wrong = rewrite(q8_0, tmp_path / "a.gguf", renamed={"blk.1.ffn_up.weight": ""})
    found = failed(verify(wrong, source))
    assert found["tensors"] == "model.layers.1.mlp.up_proj.weight is missing"
    assert "blk.1.ffn_up.weight is missing" in found["logits_short"]
    assert "llama.cpp cannot load it" in found["runs"]
    assert set(found) == {"tensors", "logits_short", "logits_long", "runs"}


def test_an_unknown_tensor(source: Path, q8_0: Path, tmp_path: Path) -> None:
    renamed = {"blk.1.ffn_up.weight": "blk.1.ffn_upp.weight"}
    found = failed(verify(rewrite(q8_0, tmp_path / "a.gguf", renamed=renamed), source))
    assert "blk.1.ffn_upp.weight is too many: the source has none" in found["tensors"]


def test_llama3_factors_lost(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "model", llama_config(**ROPES["llama3"]))
    good = quantized(source, "q8_0")
    wrong = rewrite(good, tmp_path / "a.gguf", renamed={"rope_freqs.weight": ""})
    found = failed(verify(wrong, source))
    assert "rope_freqs.weight is missing" in found["tensors"]
    assert "the source says llama3 8" in found["rope"]
    assert set(found) == {"tensors", "rope", "logits_short", "logits_long"}


def test_another_model_of_the_same_shape(source: Path, q8_0: Path, tmp_path: Path) -> None:
    other = write_hf(tmp_path / "other", CONFIG, seed=1)
    result = verify(q8_0, other)
    assert list(failed(result)) == ["tensors"]
    reasons = {t["name"]: t["reason"] for t in by_name(result)["tensors"].data["tensors"]}
    assert all(reason and "not the source's weights" in reason for reason in reasons.values())


def test_from_a_gguf_and_back_to_hf(source: Path, tmp_path: Path) -> None:
    bf16 = quantized(source, "bf16")
    checkpoint = open_checkpoint(bf16)
    q4 = tmp_path / "q4.gguf"
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, preset("q4_k_m")), q4)
    assert failed(verify(q4, bf16)) == {}

    folder = tmp_path / "back"
    write_hf_directory(open_checkpoint(q4), plan_to_hf(open_checkpoint(q4)), folder)
    back = verify(folder, q4)
    assert failed(back) == {}
    assert "all exact" in by_name(back)["tensors"].detail
    assert by_name(back)["logits_long"].ok is None
    assert "not applicable" in by_name(back)["logits_long"].detail
    # and it is not the bf16 model any more
    assert "tensors" in failed(verify(folder, bf16, logits=False))


def test_shards(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    plan = plan_gguf(checkpoint, preset("q8_0"), split_max_bytes=1 << 20)
    written = run_gguf_plan(checkpoint, plan, tmp_path / "a.gguf")
    result = verify(written.paths[0], source)
    assert failed(result) == {}
    assert [p for p, _, _ in result.artifact.files] == list(written.paths)


def test_damaged_files_are_errors(source: Path, q8_0: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(q8_0.read_bytes()[:-1000])
    with pytest.raises(InputError, match="truncated"):
        verify(cut, source)
    with pytest.raises(InputError, match="no such file"):
        verify(q8_0, tmp_path / "nowhere")


def test_receipt(source: Path, q8_0: Path, tmp_path: Path) -> None:
    wrong = rewrite(q8_0, tmp_path / "a.gguf", metadata={"llama.rope.freq_base": 5000.0})
    result = verify(wrong, source, logits=False)
    path = receipt_path(wrong)
    assert path == tmp_path.resolve() / "a.gguf.receipt.json"
    write_receipt(result, path)
    receipt = json.loads(path.read_text())
    assert receipt["ok"] is False
    assert receipt["options"]["logits"] is False
    files = {f["name"]: f["sha256"] for f in receipt["source"]["files"]}
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    assert files == {
        name: hashlib.sha256((source / name).read_bytes()).hexdigest() for name in names
    }
    (file,) = receipt["artifact"]["files"]
    assert file == {
        "name": "a.gguf",
        "bytes": wrong.stat().st_size,
        "sha256": hashlib.sha256(wrong.read_bytes()).hexdigest(),
    }
    checks = {check["name"]: check for check in receipt["checks"]}
    assert checks["rope"]["problems"] == ["base is 5000, the source says 100000"]
    tensor = next(t for t in checks["tensors"]["tensors"] if t["name"] == "blk.0.attn_q.weight")
    assert tensor["type"] == "q8_0"
    assert tensor["source_type"] == "bf16"
    assert 0 < tensor["relative_rms_error"] < tensor["bound"]
    assert set(result.to_json()) == {"ok", "checks"}
    assert set(result.to_json()["checks"][0]) == {"name", "ok", "detail"}


SLOW = ("iq1", "iq2")  # ggml takes ten seconds to make their grids


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "student": lambda rng, shape: rng.standard_t(4, size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
}


@pytest.mark.parametrize("weights", DISTRIBUTIONS)
@pytest.mark.parametrize("name", [n if n[:3] not in SLOW else slow(n) for n in ERROR_BOUND])
def test_bounds_hold_and_are_not_loose(name: str, weights: str) -> None:
    """What ggml's rounding costs stays below the bound, and a foreign tensor above it."""
    to, rng = BY_NAME[name], np.random.default_rng(3)
    values = (0.02 * DISTRIBUTIONS[weights](rng, (32, 1024))).astype(np.float32)
    importance = np.ones(1024, np.float32)
    stored = ggml.dequantize(ggml.quantize(values, to, importance), to, 1024)
    error = np.linalg.norm(stored - values) / np.linalg.norm(values)
    bound = error_bound(to, F32)
    assert bound / 8 < error < bound / 1.1
    foreign = np.linalg.norm(stored - values[::-1]) / np.linalg.norm(values)
    assert foreign > 1.05 * bound


def test_bounds_of_exact_storage() -> None:
    assert error_bound(F32, BY_NAME["q4_k"]) == 0
    assert error_bound(BF16, BF16) == 0
    assert error_bound(BF16, F32) > 0


@pytest.mark.slow
def test_with_an_imatrix(source: Path) -> None:
    """Weighted rounding moves the errors elsewhere, but not beyond the bounds."""
    rng = np.random.default_rng(0)
    checkpoint = open_checkpoint(source)
    names = [s.name for s in plan_gguf(checkpoint, preset("q8_0")).steps if len(s.shape) == 2]
    shapes = {s.name: s.shape for s in plan_gguf(checkpoint, preset("q8_0")).steps}
    values = {
        name: np.exp(1.5 * rng.standard_normal(shapes[name][1])).astype(np.float32)
        for name in names
    }
    imatrix = Imatrix(path=Path("im.gguf"), values=values, n_chunks=1, datasets=())
    for name in ("iq2_xxs", "iq1_m", "q2_k_s"):
        artifact = quantized(source, name, imatrix=imatrix)
        assert failed(verify(artifact, source)) == {}


def test_tokens_of_the_probe(source: Path) -> None:
    """The probe is long enough for both, in any vocabulary of this kind."""
    vocabulary = open_checkpoint(source).vocabulary()
    ids = Tokenizer.from_vocabulary(vocabulary).encode(verify_logits.PROBE_TEXT)
    needed = verify_logits.N_NEAR + 1 + verify_logits.N_FAR
    assert len(ids) >= max(needed, verify_logits.N_SHORT)
    assert len(set(ids)) > 30


def test_what_is_not_asked_is_told(source: Path, q8_0: Path) -> None:
    result = verify(q8_0, source, logits=False)
    assert result.ok
    assert by_name(result)["logits_short"].ok is None
    assert by_name(result)["logits_short"].detail == "not run: --no-logits"

"""`--method compensated`: less divergence in the same bytes, the same bytes every time."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.imatrix import Imatrix, sums_of_stats
from dsq.convert.pipeline import GgufPlan, plan_gguf, run_gguf_plan
from dsq.errors import InputError
from dsq.quant import ggml
from dsq.quant.presets import preset
from dsq.quant.stats import read_stats
from dsq.runtime import decoder
from dsq.runtime.calibration import calibrate
from dsq.runtime.evaluate import evaluate
from dsq.runtime.fidelity import compensate
from dsq.runtime.fidelity.two_ways import TwoWays
from tests.models import TINY_CODER, llama_config, random_weights, write_hf, write_safetensors

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

N_CTX = 256
STDLIB = Path(sysconfig.get_path("stdlib"))
CALIBRATION = [(STDLIB / name).read_text() for name in ("ast.py", "argparse.py", "pathlib.py")]
HELD_OUT = (TINY_CODER / "heldout.txt").read_text()


@dataclass(frozen=True)
class Calibrated:
    source: Path  # tiny-coder as bf16 GGUF
    ids: np.ndarray
    imatrix: Imatrix


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    folder = tmp_path_factory.mktemp("calibrated")
    checkpoint = open_checkpoint(TINY_CODER)
    source = folder / "tiny.gguf"
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, preset("bf16")), source)
    options = calibrate.Options(n_ctx=N_CTX, n_tokens=8192, n_threads=1)
    ids = calibrate.choose_windows(checkpoint, CALIBRATION, options)
    calibrate.calibrate(source, folder / "stats", ids, options=options)
    stats = read_stats(folder / "stats")
    return Calibrated(source, stats.tokens, sums_of_stats(stats).means())


def quantize(
    source: Path, kind: str, out: Path, ids: np.ndarray, imatrix: Imatrix | None
) -> tuple[GgufPlan, tuple[compensate.TensorReport, ...]]:
    checkpoint = open_checkpoint(source)
    plan = plan_gguf(checkpoint, preset(kind), imatrix=imatrix)
    options = compensate.Options(n_threads=1, device="cpu")
    return plan, compensate.quantize(checkpoint, plan, ids, out, options).tensors


def tensor_bytes(path: Path) -> dict[str, bytes]:
    file = read_gguf(path)
    return {name: file.data(name).tobytes() for name in file.tensors}


@pytest.mark.parametrize(("kind", "share"), [("q4_0", 0.6), ("q2_k", 0.6)])
def test_less_divergence_than_with_an_imatrix_of_the_same_text(
    kind: str, share: float, tiny: Calibrated, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    plan, reports = quantize(tiny.source, kind, ours, tiny.ids, tiny.imatrix)
    checkpoint = open_checkpoint(tiny.source)
    run_gguf_plan(checkpoint, plan, theirs)

    def kld(path: Path) -> float:
        report = evaluate(
            path, texts=[HELD_OUT], ref=tiny.source, chunks=4, n_threads=1, use_cache=False
        )
        assert report.drift.kld_mean is not None
        return report.drift.kld_mean

    assert kld(ours) < share * kld(theirs)
    # The same file otherwise: header, types, places, sizes.
    assert read_gguf(ours).metadata.keys() == read_gguf(theirs).metadata.keys()
    infos = [
        [(t.name, t.shape, t.type, t.offset) for t in read_gguf(path).tensors.values()]
        for path in (ours, theirs)
    ]
    assert infos[0] == infos[1]
    assert ours.stat().st_size == theirs.stat().st_size
    assert len(reports) == 28
    assert all(r.error is not None and r.error < 0.9 for r in reports)


def test_the_same_bytes_again_and_from_a_checkpoint(tiny: Calibrated, tmp_path: Path) -> None:
    """GGUF stores Q and K rows in another order than the checkpoint; the result is the same."""
    found = []
    for i, source in enumerate([tiny.source, tiny.source, TINY_CODER]):
        out = tmp_path / f"{i}.gguf"
        quantize(source, "q4_k_m", out, tiny.ids[:4], tiny.imatrix)
        found.append(tensor_bytes(out))
    assert found[0] == found[1]
    assert found[0] == found[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.gguf", "1.gguf", "2.gguf"]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ],
    ids=["gqa-biases", "mqa-tied"],
)
def test_at_8_bits_every_matrix_is_near_the_original(changes: dict, tmp_path: Path) -> None:
    """Rows in their places, biases taken off: a mistake is far greater than the rounding."""
    source = write_hf(tmp_path / "model", llama_config(**changes))
    ids = np.random.default_rng(0).integers(0, 4000, (6, N_CTX)).astype(np.int32)
    quantize(source, "q8_0", tmp_path / "ours.gguf", ids, None)
    plain = tmp_path / "plain.gguf"
    checkpoint = open_checkpoint(source)
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, preset("bf16")), plain)
    ours, theirs = read_gguf(tmp_path / "ours.gguf"), read_gguf(plain)
    for name, info in theirs.tensors.items():
        rows = ggml.dequantize(theirs.data(name), info.type, info.shape[-1])
        got = ggml.dequantize(ours.data(name), ours.tensors[name].type, info.shape[-1])
        assert np.abs(got - rows).max() <= 0.03 * np.abs(rows).max(), name


def test_types_of_codebooks_are_rounded_by_ggml(tiny: Calibrated, tmp_path: Path) -> None:
    """They have no error of feedback to report; each is what ggml made of some weights."""
    source = write_hf(tmp_path / "model")
    imatrix = Imatrix(Path(), {n: v for n, v in tiny.imatrix.values.items() if v.size == 256})
    _, reports = quantize(source, "iq3_xs", tmp_path / "out.gguf", tiny.ids[:4], imatrix)
    assert {(r.type, r.error) for r in reports} == {("iq3_s", None), ("iq3_xxs", None)}
    file = read_gguf(tmp_path / "out.gguf")
    for name, info in file.tensors.items():
        assert ggml.is_valid(file.data(name), info.type), name


def test_float_tensors_pass_unchanged(tiny: Calibrated, tmp_path: Path) -> None:
    _, reports = quantize(tiny.source, "bf16", tmp_path / "out.gguf", tiny.ids[:4], tiny.imatrix)
    assert reports == ()
    assert tensor_bytes(tmp_path / "out.gguf") == tensor_bytes(tiny.source)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "model")
    data = bytearray((source / "model.safetensors").read_bytes())
    header = int.from_bytes(data[:8], "little")
    place = json.loads(data[8 : 8 + header])["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    data[8 + header + place[0] : 8 + header + place[0] + 2] = b"\xc0\x7f"  # NaN
    (source / "model.safetensors").write_bytes(data)
    ids = np.random.default_rng(0).integers(0, 4000, (2, N_CTX)).astype(np.int32)
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight: weights are NaN"):
        quantize(source, "q4_0", tmp_path / "out.gguf", ids, None)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_hessian_that_overflows_names_the_tensor(tmp_path: Path) -> None:
    """Every weight is finite, and so is every activation; its square is not."""
    config = llama_config()
    source = write_hf(tmp_path / "model", config, dtype="F32")
    weights = random_weights(config)
    weights["model.layers.1.post_attention_layernorm.weight"] *= 1e25
    write_safetensors(source / "model.safetensors", weights, "F32")
    ids = np.random.default_rng(0).integers(0, 4000, (2, 64)).astype(np.int32)
    with pytest.raises(InputError, match=r"blk\.1\.ffn_gate\.weight: its Hessian has values that"):
        quantize(source, "q8_0", tmp_path / "out.gguf", ids, None)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_one_token_again_and_again(tmp_path: Path) -> None:
    """Its Hessians have rank one. They get damp, which is told, and the file is sound."""
    source = write_hf(tmp_path / "model")
    checkpoint, out = open_checkpoint(source), tmp_path / "out.gguf"
    ids = np.full((1, 64), 77, np.int32)
    options = compensate.Options(damp=0.0, n_threads=1, device="cpu")
    plan = plan_gguf(checkpoint, preset("q4_0"))
    report = compensate.quantize(checkpoint, plan, ids, out, options)
    assert all(tensor.damp > 0 for tensor in report.tensors)
    file = read_gguf(out)
    for name, info in file.tensors.items():
        assert ggml.is_valid(file.data(name), info.type), name


def test_dead_channels_are_told_and_harm_nothing(tmp_path: Path) -> None:
    """Two norm gains of zero: what the layer's matrices read is never active there."""
    config = llama_config(num_hidden_layers=1)
    source, out = write_hf(tmp_path / "model", config, dtype="F32"), tmp_path / "out.gguf"
    weights = random_weights(config)
    weights["model.layers.0.post_attention_layernorm.weight"][[3, 200]] = 0
    write_safetensors(source / "model.safetensors", weights, "F32")
    ids = np.random.default_rng(0).integers(0, 4000, (2, 64)).astype(np.int32)
    _, reports = quantize(source, "q8_0", out, ids, None)
    dead = {report.name: report.dead_channels for report in reports if report.dead_channels}
    assert dead == {"blk.0.ffn_gate.weight": 2, "blk.0.ffn_up.weight": 2}
    file = read_gguf(out)
    for name, info in file.tensors.items():
        assert ggml.is_valid(file.data(name), info.type), name
    # They are rounded to the nearest, as if there were no feedback.
    info = file.tensors["blk.0.ffn_up.weight"]
    up = ggml.dequantize(file.data(info.name), info.type, info.shape[-1])
    wanted = weights["model.layers.0.mlp.up_proj.weight"][:, [3, 200]]
    assert np.abs(up[:, [3, 200]] - wanted).max() < 0.01 * np.abs(up).max()


def test_two_equal_ways_lack_nothing(tmp_path: Path) -> None:
    """With the weights left as they are, both ways are transformers' (see test_decoder)."""
    checkpoint = open_checkpoint(
        write_hf(tmp_path / "model", llama_config(attention_bias=True, num_key_value_heads=2))
    )
    spec = checkpoint.spec
    ids = np.random.default_rng(1).integers(0, 4000, (3, 700)).astype(np.int32)
    embedding = decoder.read_tensor(checkpoint, "model.embed_tokens.weight")
    graph = decoder.Decoder(spec, 700)
    hidden = embedding[torch.from_numpy(ids.astype(np.int64))]
    with TwoWays(spec, ids, tmp_path, "cpu") as ways:
        ways.embed(embedding, embedding)
        for i in range(spec.n_layer):
            weights = decoder.read_layer(checkpoint, i)
            ways.enter(weights)
            inputs = {
                "attn_in": graph.attn_in(weights, hidden),
                "attn_out": graph.mixed(weights, hidden),
            }
            between = graph.add_attention(weights, hidden, inputs["attn_out"])
            inputs["ffn_in"] = graph.ffn_in(weights, between)
            inputs["ffn_out"] = graph.gated(weights, between)
            for stage, names in decoder.STAGES.items():
                seen = ways.see(stage)
                rows = inputs[stage].flatten(0, 1)
                expected = rows.T @ rows / len(rows)
                torch.testing.assert_close(seen.hessian, expected, rtol=1e-3, atol=1e-4)
                weight = weights[f"{names[0]}.weight"]
                scale = (weight @ seen.hessian).abs().max()
                assert seen.missing(weight).abs().max() < 1e-4 * scale
            ways.leave()
            hidden = graph.add_ffn(weights, between, inputs["ffn_out"])


def test_what_is_missing_is_what_the_output_lacks(tmp_path: Path) -> None:
    """Another weight for o: down's aim must tell of the error in the hidden state as well."""
    checkpoint = open_checkpoint(write_hf(tmp_path / "model"))
    spec = checkpoint.spec
    ids = np.random.default_rng(2).integers(0, 4000, (2, N_CTX)).astype(np.int32)
    embedding = decoder.read_tensor(checkpoint, "model.embed_tokens.weight")
    weights = decoder.read_layer(checkpoint, 0)
    graph = decoder.Decoder(spec, N_CTX)
    with TwoWays(spec, ids, tmp_path, "cpu") as ways:
        ways.embed(embedding, embedding)
        ways.enter(weights)
        other = weights["self_attn.o_proj.weight"] * 0.9
        for stage in decoder.STAGES:
            seen = ways.see(stage)
            if stage == "attn_out":
                ways.put("self_attn.o_proj", other)
    down = weights["mlp.down_proj.weight"]
    hidden = embedding[torch.from_numpy(ids.astype(np.int64))]
    wanted = graph.layer(weights, hidden)
    changed = {**weights, "self_attn.o_proj.weight": other}
    between = graph.add_attention(changed, hidden, graph.mixed(changed, hidden))
    x = graph.gated(changed, between)
    lacks = (wanted - graph.add_ffn(changed, between, x)).flatten(0, 1)
    expected = lacks.T @ x.flatten(0, 1) / len(lacks)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(seen.missing(down), expected, rtol=1e-2, atol=1e-5)


def test_verify_knows_what_was_moved_on_purpose(tmp_path: Path) -> None:
    """The file's own word widens the bounds; another model's weights are still told."""
    from dsq.cli.main import main
    from dsq.runtime.verification.verify import verify

    out = tmp_path / "m.gguf"
    command = ["quantize", "q4_0", str(TINY_CODER), "--method", "compensated", "--calibrate"]
    command += ["--text", str(TINY_CODER / "heldout.txt"), "--tokens", "2k", "--ctx", "128"]
    assert main([*command, "--distill", "1k", "-o", str(out)]) == 0
    receipt = verify(out, TINY_CODER, logits=False)
    checks = {check.name: check for check in receipt.checks}
    assert checks["tensors"].ok, checks["tensors"].detail
    assert "compensated+distilled" in checks["tensors"].detail
    config = json.loads((TINY_CODER / "config.json").read_text())
    other = verify(out, write_hf(tmp_path / "other", config), logits=False)
    assert not {check.name: check for check in other.checks}["tensors"].ok

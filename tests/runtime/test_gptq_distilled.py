"""GPTQ with distillation: the same codes, closer to the original on text never trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from dsq.convert.checkpoint import open_checkpoint
from dsq.errors import InputError
from dsq.runtime.fidelity import distill, gptq
from dsq.runtime.verification.verify import verify
from dsq.runtime.windows import cut
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.models import TINY_CODER, llama_config, write_hf
from tests.runtime.dying import die

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from dsq.quant.gptq import Scheme  # noqa: E402
from dsq.runtime.decoder import Decoder  # noqa: E402
from dsq.runtime.fidelity.gptq_plan import Options, Override, plan_gptq  # noqa: E402
from dsq.runtime.fidelity.teacher import Teacher  # noqa: E402

HELDOUT = (TINY_CODER / "heldout.txt").read_text(encoding="utf-8")
HALF = len(HELDOUT) // 2
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
IDS = np.random.default_rng(0).integers(0, 4000, (16, 32)).astype(np.int32)
SHORT = distill.Options(batch_tokens=64, epochs=1, check_every=2, lr=2e-3)
IN_ORDER = Scheme(3, 32, act_order=True, static_groups=True)
SCATTERED = Scheme(3, 32, sym=False, act_order=True)


def export(
    source: Path, out: Path, ids: np.ndarray, how: distill.Options | None, scheme: Scheme
) -> gptq.Report:
    k_proj_dense = (Override(r".*layers\.1\.self_attn\.k_proj", None),)
    options = Options(scheme, dynamic=k_proj_dense, n_threads=1, device="cpu", distill=how)
    return gptq.convert(plan_gptq(open_checkpoint(source), options), ids, out)


@dataclass(frozen=True)
class Pair:
    """A model's directory without distillation and with it."""

    model: Path
    before: Path
    after: Path
    report: gptq.Report

    def kld(self, out: Path, ids: np.ndarray, folder: Path) -> float:
        """Through the reader of GPTQ directories."""
        source = open_checkpoint(self.model)
        teacher = Teacher(source, Decoder(source.spec, ids.shape[1]), ids, folder)
        teacher.run()
        return teacher.kld(open_checkpoint(out))


def made(model: Path, folder: Path, ids: np.ndarray, how: distill.Options, scheme: Scheme) -> Pair:
    before, after = folder / "before", folder / "after"
    export(model, before, ids, None, scheme)
    return Pair(model, before, after, export(model, after, ids, how, scheme))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(**SMALL, num_key_value_heads=1)
    return write_hf(tmp_path_factory.mktemp("small") / "model", config)


@pytest.fixture(scope="module")
def pair(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made(small, tmp_path_factory.mktemp("pair"), IDS, SHORT, IN_ORDER)


@pytest.mark.slow
def test_closer_on_other_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_vocabulary(open_checkpoint(TINY_CODER).vocabulary())
    learned, other = (
        cut(tokenizer.encode(text), 128, bos=tokenizer.vocab.bos, chunks=n).ids
        for text, n in ((HELDOUT[:HALF], 40), (HELDOUT[HALF:], 10))
    )
    how = distill.Options(epochs=1, check_every=4, lr=2e-3)
    scheme = Scheme(3, 64, act_order=True, static_groups=True)
    pair = made(TINY_CODER, tmp_path, learned, how, scheme)
    before, after = (pair.kld(out, other, tmp_path) for out in (pair.before, pair.after))
    assert after < 0.99 * before  # measured: 0.984 with 5,120 tokens


def test_the_report_is_of_the_directory(pair: Pair, tmp_path: Path) -> None:
    said = pair.report.distillation
    assert said is not None
    _, held = distill.split(IDS, SHORT)
    assert pair.kld(pair.before, held, tmp_path) == pytest.approx(said.kld_before, rel=1e-3)
    assert pair.kld(pair.after, held, tmp_path) == pytest.approx(said.kld_after, rel=1e-3)
    assert said.kld_after < said.kld_before
    assert pair.report.to_json()["distillation"]["steps"] == said.steps == 7


def test_only_scales_and_gains_change(pair: Pair) -> None:
    changed = set()
    files = [out / "model.safetensors" for out in (pair.before, pair.after)]
    with safe_open(files[0], "pt") as old, safe_open(files[1], "pt") as new:
        assert set(old.keys()) == set(new.keys())
        for name in old.keys():  # noqa: SIM118
            mine, theirs = new.get_tensor(name), old.get_tensor(name)
            assert mine.dtype == theirs.dtype
            if not torch.equal(mine, theirs):
                assert name.endswith((".scales", "norm.weight"))
                changed.add(name.rpartition(".")[2])
    assert changed == {"scales", "weight"}
    configs = [
        json.loads((out / "quantize_config.json").read_text()) for out in (pair.before, pair.after)
    ]
    assert configs[1]["meta"].pop("distilled") is True
    assert configs[0] == configs[1]


def test_verify_knows_that_norms_were_moved(pair: Pair) -> None:
    checks = {check.name: check for check in verify(pair.after, pair.model, logits=False).checks}
    assert checks["tensors"].ok, checks["tensors"].detail
    assert "moved on purpose (distilled)" in checks["tensors"].detail


def test_too_few_windows_are_told_before_the_first_layer(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 windows of 32 tokens are too few to distill on"):
        export(small, tmp_path / "out", IDS[:3], SHORT, IN_ORDER)
    assert list(tmp_path.iterdir()) == []


_CODE = """
from pathlib import Path
from tests.runtime.test_gptq_distilled import IDS, SCATTERED, SHORT, export
export(Path(model), Path(out), IDS, SHORT, SCATTERED)
"""


@pytest.mark.slow
def test_killed_in_one_phase_after_the_other(small: Path, tmp_path: Path) -> None:
    """The same bytes in the end: asymmetric, the groups scattered."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    report = export(small, whole, IDS, SHORT, SCATTERED)
    assert report.distillation is not None
    assert report.distillation.best_step > 0
    for where, nth in (
        ("dsq.runtime.fidelity.two_ways:TwoWays.leave", 2),
        ("dsq.runtime.fidelity.teacher:Teacher._store", 3),
        ("dsq.runtime.fidelity.distill:_Run._look", 2),
        ("dsq.runtime.fidelity.gptq_student:GptqStudent.save", 1),
        ("dsq.convert.hf.quantized_dir:DirectoryWriter.put", 5),  # learned scales
        ("dsq.convert.hf.quantized_dir:DirectoryWriter.complete", 1),
    ):
        die(_CODE, where, nth, model=small, out=out)
        assert not out.exists()
    again = export(small, out, IDS, SHORT, SCATTERED)
    assert again.resumed_layers == 2
    assert again.distillation is not None
    assert again.distillation.kld_after == report.distillation.kld_after
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "out"}

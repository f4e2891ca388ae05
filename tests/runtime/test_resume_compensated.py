"""`--method compensated` killed, short of disk, run twice: the same bytes in the end."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dsq.convert import atomic
from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.pipeline import plan_gguf
from dsq.errors import InputError
from dsq.quant.presets import preset
from dsq.runtime.calibration.workdir import WorkDir
from dsq.runtime.fidelity import compensate, two_ways
from tests.models import llama_config, write_hf
from tests.runtime.changed import changed
from tests.runtime.dying import die

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "attention_bias": True,
}
IDS = np.random.default_rng(0).integers(0, 4000, (10, 32)).astype(np.int32)
BATCH = 160  # five windows at once: two batches


def quantize(
    model: Path, out: Path, *, ids: np.ndarray = IDS, damp: float = 0.1, force: bool = False
) -> compensate.Report:
    checkpoint = open_checkpoint(model)
    options = compensate.Options(damp, n_threads=1, device="cpu")
    plan = plan_gguf(checkpoint, preset("q4_0"))
    return compensate.quantize(checkpoint, plan, ids, out, options, force=force)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf"), llama_config(**SMALL))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_ways, "BATCH_TOKENS", BATCH)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What a run gives that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "whole.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_ways, "BATCH_TOKENS", BATCH)
        report = quantize(model, out)
    return SimpleNamespace(bytes=out.read_bytes(), tensors=report.tensors)


_CHILD = """
from pathlib import Path
import numpy as np
from dsq.runtime.fidelity import two_ways
from tests.runtime.test_resume_compensated import BATCH, quantize
two_ways.BATCH_TOKENS = BATCH
quantize(Path(model), Path(out))
"""
WRITE = "dsq.runtime.calibration.borders:Border.write"
SAVE = "dsq.runtime.calibration.workdir:WorkDir.save"
SLAB = "dsq.convert.gguf.writer:start_writeback"


@pytest.mark.parametrize(
    ("where", "nth", "layers"),
    [
        # Of hidden states: 2 batches, of 2 ways (embedding); 12 a layer: see `two_ways`.
        pytest.param(WRITE, 2, 0, id="embedding"),
        pytest.param(WRITE, 12, 0, id="first layer"),
        pytest.param(WRITE, 22, 1, id="second layer"),
        pytest.param(WRITE, 28, 1, id="leaving the second layer"),
        pytest.param(WRITE, 36, 2, id="last layer"),
        pytest.param("safetensors.numpy:save", 2, 1, id="before a layer's file"),
        pytest.param(SAVE, 3, 1, id="after a layer's file"),
        pytest.param(SLAB, 40, 3, id="the GGUF"),
        pytest.param("pathlib:Path.replace", 7, 3, id="naming it"),
    ],
)
def test_killed_and_run_again_gives_the_same_bytes(
    model: Path, tmp_path: Path, whole: SimpleNamespace, where: str, nth: int, layers: int
) -> None:
    out = tmp_path / "m.gguf"
    die(_CHILD, where, nth, model=model, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf.partial"]
    report = quantize(model, out)
    assert report.resumed_layers == layers
    assert report.tensors == whole.tensors
    assert out.read_bytes() == whole.bytes
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_killed_twice(model: Path, tmp_path: Path, whole: SimpleNamespace) -> None:
    """Hidden states that a resumed run wrote are good to go on from as well."""
    out = tmp_path / "m.gguf"
    for _ in range(2):
        die(_CHILD, WRITE, 17, model=model, out=out)  # a layer is 12 of them, embedding 4
    report = quantize(model, out)
    assert report.resumed_layers == 2
    assert out.read_bytes() == whole.bytes


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """No file may be larger: the kernel's own error, EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_room_for(name: str) -> Iterator[None]:
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == name:
            write_bytes(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        yield


@pytest.mark.parametrize(
    ("fault", "message", "layers"),
    [
        pytest.param(
            lambda n_bytes: no_room_for("layer-1.safetensors"),
            "the disk is full; free some space",
            1,
            id="a layer",
        ),
        pytest.param(
            lambda n_bytes: largest_file(n_bytes - 1), "cannot hold a file that large", 3, id="GGUF"
        ),
    ],
)
def test_a_disk_that_fills_up_is_told_and_resumed(
    model: Path,
    tmp_path: Path,
    whole: SimpleNamespace,
    fault: Callable[[int], AbstractContextManager[None]],
    message: str,
    layers: int,
) -> None:
    out = tmp_path / "m.gguf"
    with fault(len(whole.bytes)), pytest.raises(InputError) as caught:
        quantize(model, out)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert quantize(model, out).resumed_layers == layers
    assert out.read_bytes() == whole.bytes
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_disk_too_small_is_told_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    n_bytes = open_checkpoint(model).tensors["model.embed_tokens.weight"].n_bytes  # more than q4_0
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage._replace(free=n_bytes))
    with pytest.raises(InputError, match="free some space or give another output"):
        quantize(model, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_is_not_mixed_with_another(
    model: Path, tmp_path: Path, whole: SimpleNamespace
) -> None:
    out = tmp_path / "m.gguf"
    die(_CHILD, WRITE, 22, model=model, out=out)
    for other in ({"damp": 0.2}, {"ids": IDS[:9]}):
        with pytest.raises(InputError, match="holds an unfinished run with other settings"):
            quantize(model, out, **other)
    assert quantize(model, out).resumed_layers == 1
    assert out.read_bytes() == whole.bytes


def test_other_weights_are_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "hf", tmp_path / "m.gguf"
    shutil.copytree(model, source)
    die(_CHILD, WRITE, 22, model=source, out=out)
    changed(model, source, "model.layers.2.mlp.up_proj.weight", 0.5)  # in the last row
    with pytest.raises(InputError, match="holds an unfinished run with other settings"):
        quantize(source, out)


def test_two_runs_on_one_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with WorkDir(out, "settings"), pytest.raises(InputError, match="being written by another run"):
        quantize(model, out)


def test_an_output_that_exists_is_kept(model: Path, tmp_path: Path, whole: SimpleNamespace) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("mine")
    with pytest.raises(InputError, match="exists; give another output, or --force"):
        quantize(model, out)
    assert out.read_text() == "mine"
    quantize(model, out, force=True)
    assert out.read_bytes() == whole.bytes

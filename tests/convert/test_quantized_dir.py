"""The directory of quantized weights: read by others' rules, gone on with after a kill."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from dsq.convert.atomic import DiskError
from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.hf import quantized_dir
from dsq.convert.hf.quantized_dir import (
    DirectoryWriter,
    OutTensor,
    check_output,
    dense_data,
    dense_type,
    model_files,
)
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.errors import InputError
from dsq.quant.presets import preset
from dsq.quant.scheme import BF16, F16
from tests.exllamav2_config import by_its_rules
from tests.models import llama_config, random_weights, to_bf16, write_hf

TENSORS = (
    OutTensor("a.qweight", "I32", (8, 5)),
    OutTensor("a.scales", "F16", (3, 5)),
    OutTensor("b.weight", "BF16", (4, 7)),
    OutTensor("b.groups", "I16", (6,)),
    OutTensor("c.weight", "F32", (2, 2)),
)
DTYPES = {"I32": "<i4", "F16": "<f2", "BF16": "<u2", "I16": "<i2", "F32": "<f4"}


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {t.name: rng.integers(0, 99, t.shape).astype(DTYPES[t.dtype]) for t in TENSORS}


def write(folder: Path, out: Path, shard_bytes: int, *, force: bool = False) -> None:
    with DirectoryWriter(folder, out, TENSORS, shard_bytes) as writer:
        for name, array in values().items():
            writer.put(name, array)
        ready = writer.complete({"config.json": {"é": 1}}, force=force)
    (folder / ready).replace(out)


@pytest.mark.parametrize(("shard_bytes", "n_shards"), [(1 << 30, 1), (200, 2), (1, 5)])
def test_safetensors_reads_every_tensor(tmp_path: Path, shard_bytes: int, n_shards: int) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    write(work, out, shard_bytes)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == n_shards
    if n_shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.n_bytes for t in TENSORS)
        places = index["weight_map"]
    else:
        places = {t.name: "model.safetensors" for t in TENSORS}
    for tensor in TENSORS:
        with safe_open(out / places[tensor.name], framework="numpy") as file:
            part = file.get_slice(tensor.name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (tensor.dtype, tensor.shape)
            if tensor.dtype != "BF16":  # numpy has none
                np.testing.assert_array_equal(file.get_tensor(tensor.name), values()[tensor.name])
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == {"é": 1}
    assert list(work.iterdir()) == []


def test_the_files_of_another_run_are_gone_on_with(tmp_path: Path) -> None:
    """Also when it was killed with some of the shards in the last folder already."""
    work = tmp_path / "work"
    work.mkdir()
    with DirectoryWriter(work, tmp_path / "out", TENSORS, 1) as writer:
        for name in ("a.qweight", "a.scales", "b.weight"):
            writer.put(name, values()[name])
    (work / "ready").mkdir()
    (work / "model-00002-of-00005.safetensors").replace(
        work / "ready" / "model-00002-of-00005.safetensors"
    )
    with DirectoryWriter(work, tmp_path / "out", TENSORS, 1) as writer:
        for name in ("b.groups", "c.weight"):
            writer.put(name, values()[name])
        (work / writer.complete({"config.json": {}})).replace(tmp_path / "out")
    (tmp_path / "again").mkdir()
    write(tmp_path / "again", tmp_path / "whole", 1)
    for file in (tmp_path / "whole").glob("model*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "wrong", [np.zeros((8, 5), np.int64), np.zeros((5, 8), np.int32), np.zeros(40, np.int32)]
)
def test_another_shape_or_type_is_a_mistake(tmp_path: Path, wrong: np.ndarray) -> None:
    with (
        DirectoryWriter(tmp_path, tmp_path / "out", TENSORS) as writer,
        pytest.raises(ValueError, match=r"a\.qweight"),
    ):
        writer.put("a.qweight", wrong)


def test_only_a_models_files_are_replaced(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    write(work, out, 200)
    with pytest.raises(InputError, match="out exists; give another output, or --force"):
        check_output(out, force=False)
    write(work, out, 1 << 30, force=True)
    assert not (out / "model.safetensors.index.json").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt, which is not a model's file"):
        check_output(out, force=True)


def test_a_full_disk_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    close = os.close
    monkeypatch.setattr(quantized_dir, "reserve", full)
    closed: list[int] = []
    monkeypatch.setattr(quantized_dir.os, "close", lambda file: closed.append(file) or close(file))
    with (
        pytest.raises(OSError, match="No space left"),
        DirectoryWriter(tmp_path, tmp_path, TENSORS),
    ):
        pass
    assert len(closed) == 1


# The dense tensors


def test_dense_tensors_are_the_sources_from_gguf_and_hf(tmp_path: Path) -> None:
    """GGUF's Q rows are permuted, its norms in f32: here they are the checkpoint's again."""
    config = llama_config(num_key_value_heads=2, attention_bias=True)
    source = write_hf(tmp_path / "model", config)
    checkpoint = open_checkpoint(source)
    gguf = tmp_path / "model.gguf"
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, preset("bf16")), gguf)
    weights = random_weights(config)
    assert dense_type(checkpoint) is BF16
    for opened in (checkpoint, open_checkpoint(gguf)):
        for name, array in weights.items():
            np.testing.assert_array_equal(dense_data(opened, name, BF16), to_bf16(array), name)


def test_a_float32_model_is_held_in_f16(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_hf(tmp_path / "model", dtype="F32"))
    assert dense_type(checkpoint) is F16
    name = "model.norm.weight"
    expected = load_file(tmp_path / "model" / "model.safetensors")[name].astype(np.float16)
    np.testing.assert_array_equal(dense_data(checkpoint, name, F16), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, 70000.0])
def test_what_f16_cannot_hold_is_named(tmp_path: Path, value: float) -> None:
    source = write_hf(tmp_path / "model", dtype="F32")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"][5, 3] = value
    from safetensors.numpy import save_file

    save_file(weights, source / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight: weights go up to .*f16 cannot hold"):
        dense_data(open_checkpoint(source), "lm_head.weight", F16)


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_hf(tmp_path / "model"))
    run_gguf_plan(checkpoint, plan_gguf(checkpoint, preset("q8_0")), tmp_path / "q.gguf")
    with pytest.raises(InputError, match="its weights are q8_0 already"):
        dense_type(open_checkpoint(tmp_path / "q.gguf"))


# config.json


def files_of(tmp_path: Path, **changes: Any) -> Path:
    checkpoint = open_checkpoint(write_hf(tmp_path / "model", llama_config(**changes)))
    out = tmp_path / "out"
    out.mkdir()
    for name, content in model_files(checkpoint, BF16, {"quant_method": "gptq"}).items():
        (out / name).write_text(json.dumps(content), encoding="utf-8")
    return out


def test_exllamav2_finds_factor_and_base(tmp_path: Path) -> None:
    out = files_of(tmp_path)
    assert by_its_rules(out) == (100000, 4)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "gptq"}


@pytest.mark.torch
def test_transformers_finds_factor_and_base(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    out = files_of(tmp_path)
    config = AutoConfig.from_pretrained(out)
    steps = LlamaRotaryEmbedding(config).inv_freq.numpy()
    assert steps[0] == 0.25  # factor 4
    assert steps[1] == pytest.approx(100000 ** (-2 / 64) / 4)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("def")["input_ids"][0] == config.bos_token_id


def test_the_variants_end_of_turn_is_in_the_generation_config(tmp_path: Path) -> None:
    """An instruct model ends its turns with another token than the base model its texts."""
    source = write_hf(tmp_path / "model")
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["eos_token"] = "<|EOT|>"
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    checkpoint = open_checkpoint(source)
    eot = checkpoint.vocabulary().tokens.index("<|EOT|>")
    assert eot != llama_config()["eos_token_id"]
    files = model_files(checkpoint, BF16, {})
    assert files["generation_config.json"]["eos_token_id"] == eot
    assert files["config.json"]["eos_token_id"] == eot


def test_an_output_that_came_meanwhile_is_a_fault_of_the_disk(tmp_path: Path) -> None:
    """So the finished layers are kept: see WorkDir."""
    work, out = tmp_path / "work", tmp_path / "out"
    for folder in (work, out):
        folder.mkdir()
    (out / "theirs.txt").touch()
    with pytest.raises(DiskError, match="theirs.txt"):
        write(work, out, 1 << 30, force=True)


def test_an_old_output_left_by_a_kill_is_no_hindrance(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    for folder in (work, out, work / quantized_dir._OLD):
        folder.mkdir()
    (work / quantized_dir._OLD / "config.json").touch()
    (out / "config.json").touch()
    write(work, out, 1 << 30, force=True)
    assert (out / "model.safetensors").exists()

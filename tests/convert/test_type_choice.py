"""The choice of types equals llama-quantize's dry run, for shapes too large to quantize here."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf.reader import read_gguf
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.errors import InputError
from dsq.quant.plan import ModelShape, PlanTensor, choose_types
from dsq.quant.presets import PRESETS
from tests.models import llama_config, write_hf
from tests.peer import llama_quantize_log

SHAPES = {
    "24 layers, MHA, untied": {"num_hidden_layers": 24, "num_key_value_heads": 4},
    "31 layers, GQA 4, tied": {
        "num_hidden_layers": 31,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "80 layers, GQA (llama.cpp's 70B rule)": {
        "num_hidden_layers": 80,
        "num_key_value_heads": 2,
    },
    "9 layers, rows of 96": {
        "num_hidden_layers": 9,
        "hidden_size": 96,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "intermediate_size": 160,
    },
    "3 layers, rows of 40": {
        "num_hidden_layers": 3,
        "hidden_size": 40,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 72,
    },
}


@pytest.fixture(scope="module", params=SHAPES, ids=list(SHAPES))
def model(request, tmp_path_factory):
    shape = {"hidden_size": 256, "intermediate_size": 256, **SHAPES[request.param]}
    folder = tmp_path_factory.mktemp("model")
    source = open_checkpoint(write_hf(folder / "hf", llama_config(**shape)))
    run_gguf_plan(source, plan_gguf(source, PRESETS["bf16"]), folder / "bf16.gguf")
    return folder / "bf16.gguf"


def dry_run_types(path, preset, imatrix):
    """What llama-quantize says it would do: its log names each tensor and the new type.

    None when it knows no type that could hold the rows.
    """
    code, log = llama_quantize_log(
        path, path.with_name("none.gguf"), PRESETS[preset].ftype, imatrix=imatrix, dry_run=True
    )
    if code:
        assert "no tensor type fallback is defined" in log
        return None
    types = {}
    for line in log.splitlines():
        found = re.match(r"\[ *\d+/ *\d+\] (\S+) +- \[.*type = +(\S+), size = .*", line)
        if found:
            changed = re.search(r"\((\w+)\)$", line)
            types[found.group(1)] = (changed.group(1) if changed else found.group(2)).lower()
    return types


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("preset", PRESETS)
def test_types_equal_llama_quantize(model, preset, with_imatrix):
    values = {
        t.name: np.ones(t.n_per_row, np.float32)
        for t in read_gguf(model).tensors.values()
        if len(t.shape) == 2
    }
    theirs = dry_run_types(model, preset, values if with_imatrix else None)
    checkpoint = open_checkpoint(model)
    spec = checkpoint.spec
    tensors = [PlanTensor(t.name, t.shape, t.type) for t in checkpoint.tensors.values()]
    shape = ModelShape(spec.n_layer, spec.n_head, spec.n_head_kv)

    def ours():
        choice = choose_types(tensors, PRESETS[preset], shape, has_imatrix=with_imatrix)
        return {name: t.name for name, t in choice.items()}

    if theirs is None:
        with pytest.raises(InputError, match="llama.cpp defines no fallback"):
            ours()
    else:
        assert ours() == theirs

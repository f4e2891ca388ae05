"""The planner against llama.cpp's own sizes, dsq's own files, and its promise never to exceed."""

from __future__ import annotations

import ctypes
import re
from math import prod
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.convert import memory
from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf.writer import padded
from dsq.convert.model_shapes import SHAPES, header_bytes, known_shape, n_params, plan_tensors
from dsq.convert.names import gguf_name
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.convert.spec import spec_from_config
from dsq.errors import InputError
from dsq.quant.plan import PlanTensor
from dsq.quant.presets import PRESETS
from dsq.quant.scheme import F32
from dsq.runtime import bandwidth, fit
from dsq.runtime.bandwidth import CARDS, card, memory_bandwidth
from dsq.runtime.fit import FIT_PRESETS, Limits, place, plan_presets, recommend, weights_of
from tests.models import llama_config, write_hf
from tests.tiny_gguf import write_tiny_gguf

GIB = 1 << 30
TINY = {"n_layer": 3, "n_embd": 256, "n_ff": 512, "n_head": 4, "n_ctx": 8192}


def reported(path: Path, n_ctx: int, kv_type: str) -> dict[str, float]:
    """MiB of each buffer that llama.cpp says it allocates, by its log."""
    import llama_cpp

    from dsq.quant.scheme import ggml_type
    from dsq.runtime import llama_log

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = ggml_type(kv_type).id
        context = llama_cpp.llama_init_from_model(model, params)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    finally:
        llama_log.install(False)
    text = "".join(lines)
    found = {}
    for kind in ("KV", "output", "compute"):
        match = re.search(rf"{kind}\s+buffer size = +([\d.]+) MiB", text)
        assert match, kind
        found[kind] = float(match[1])
    return found


def check_against_llama_cpp(path: Path, n_ctx: int, kv_type: str) -> None:
    spec = open_checkpoint(path).spec
    real = reported(path, n_ctx, kv_type)
    assert memory.kv_bytes(spec, n_ctx, kv_type) / 2**20 == pytest.approx(real["KV"], abs=0.01)
    buffers = real["output"] + real["compute"]
    ours = memory.compute_bytes(spec, n_ctx, kv_type) / 2**20
    assert ours >= buffers - 0.01
    assert ours <= buffers * (1.01 if kv_type == "f16" else 1.09) + 0.1


@pytest.mark.parametrize("n_ctx", [300, 4096])
@pytest.mark.parametrize("kv_type", memory.KV_TYPES)
def test_buffers_are_those_of_llama_cpp(smollm2_gguf: Path, n_ctx: int, kv_type: str) -> None:
    check_against_llama_cpp(smollm2_gguf, n_ctx, kv_type)


@pytest.mark.parametrize(
    ("n_ff", "n_head_kv", "n_ctx"), [(1376, 4, 512), (1376, 1, 8192), (5504, 2, 2048)]
)
def test_buffers_of_other_shapes(tmp_path: Path, n_ff: int, n_head_kv: int, n_ctx: int) -> None:
    path = write_tiny_gguf(
        tmp_path / "a.gguf", **{**TINY, "n_embd": 512, "n_ff": n_ff, "n_head_kv": n_head_kv}
    )
    check_against_llama_cpp(path, n_ctx, "f16")


@pytest.mark.parametrize("preset", ["q8_0", "q4_k_m", "q2_k"])
def test_a_files_size_is_known_before_it_is_made(tmp_path: Path, preset: str) -> None:
    config = llama_config()
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", config))
    plan = plan_gguf(checkpoint, PRESETS[preset])
    made = run_gguf_plan(checkpoint, plan, tmp_path / "a.gguf", threads=1)
    tensors = [
        PlanTensor(gguf_name(n), t.shape, t.type if len(t.shape) > 1 else F32)
        for n, t in checkpoint.tensors.items()
    ]
    header = made.size_bytes - plan.layout.data_bytes
    limits = Limits(ram=GIB)
    (row,) = plan_presets(checkpoint.spec, tensors, limits, 128, header=header, presets=(preset,))
    assert row.file == made.size_bytes
    assert row.bpw == pytest.approx(plan.bpw)


@pytest.mark.parametrize(
    ("name", "billions"), [("1.3b", 1.3), ("5.7bmqa", 5.7), ("6.7b", 6.7), ("33b", 33.3)]
)
def test_the_four_sizes(name: str, billions: float) -> None:
    for written in (name, f"deepseek-coder-{name}", f"deepseek-ai/deepseek-coder-{name}-instruct"):
        found = known_shape(written)
        assert found is not None
        assert n_params(found[1]) / 1e9 == pytest.approx(billions, rel=0.04)
    assert known_shape("deepseek-coder-7b-v1.5") is None


def test_the_shape_of_6_7b_is_its_configs() -> None:
    config = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 16384,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rope_theta": 100000,
        "vocab_size": 32256,
        "bos_token_id": 32013,
        "eos_token_id": 32014,
    }
    assert spec_from_config(config) == SHAPES["deepseek-coder-6.7b"]


sizes = st.integers(0, 96 << 30)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    ram=sizes,
    vram=st.one_of(st.just(0), sizes),
    n_ctx=st.integers(1, 16384),
    kv_type=st.sampled_from([None, *memory.KV_TYPES]),
    presets=st.sets(st.sampled_from(FIT_PRESETS), min_size=1, max_size=3),
    speeds=st.tuples(*[st.one_of(st.none(), st.floats(1e8, 1e13))] * 2),
)
def test_nothing_that_is_recommended_exceeds_the_limits(
    name: str,
    ram: int,
    vram: int,
    n_ctx: int,
    kv_type: str | None,
    presets: set[str],
    speeds: tuple[float | None, float | None],
) -> None:
    spec = SHAPES[name]
    limits = Limits(ram, vram, *speeds)
    rows = plan_presets(
        spec,
        plan_tensors(spec),
        limits,
        n_ctx,
        header=header_bytes(spec),
        kv_type=kv_type,
        presets=[p for p in FIT_PRESETS if p in presets],
    )
    for row in rows:
        at = row.placement
        assert (at is None) == bool(row.lacks)
        if at is None:
            continue
        assert at.ram <= ram
        assert at.vram <= vram
        # Nothing is lost on the way: what is on neither side is on no side.
        kv = memory.kv_bytes(spec, n_ctx, at.kv_type)
        assert at.ram + at.vram >= row.weights + kv + at.compute
        if not vram:
            assert at.n_gpu_layers == 0
    chosen, why = recommend(rows, limits)
    assert why
    assert (chosen is None) == all(row.placement is None for row in rows)
    assert chosen is None or chosen.placement is not None


def tensor_bytes(name: str, preset: str) -> tuple[dict[str, int], int]:
    from dsq.quant.plan import ModelShape, choose_types

    spec = SHAPES[name]
    tensors = plan_tensors(spec)
    types = choose_types(
        tensors, PRESETS[preset], ModelShape(spec.n_layer, spec.n_head, spec.n_head_kv)
    )
    found = {t.name: prod(t.shape[:-1]) * types[t.name].row_bytes(t.shape[-1]) for t in tensors}
    return found, sum(padded(n) for n in found.values())


def test_layers_go_to_the_card_one_by_one() -> None:
    spec = SHAPES["deepseek-coder-6.7b"]
    found, total = tensor_bytes("deepseek-coder-6.7b", "q4_k_m")
    weights = weights_of(spec, found)
    assert weights.total == total
    layers = []
    for vram in range(0, 16 * GIB, GIB // 2):
        at = place(spec, weights, Limits(ram=64 * GIB, vram=vram), 4096, "f16")
        assert isinstance(at, fit.Placement)
        layers.append(at.n_gpu_layers)
    assert layers == sorted(layers)
    assert layers[0] == 0
    assert layers[-1] == spec.n_layer + 1
    assert len(set(layers)) > 8


def test_a_full_card_reads_everything_but_the_embedding_once_a_token() -> None:
    spec = SHAPES["deepseek-coder-6.7b"]
    found, _ = tensor_bytes("deepseek-coder-6.7b", "q8_0")
    limits = Limits(ram=GIB, vram=80 * GIB, ram_bandwidth=None, vram_bandwidth=1e12)
    at = place(spec, weights_of(spec, found), limits, 16384, "f16")
    assert isinstance(at, fit.Placement)
    read = sum(found.values()) - found["token_embd.weight"]
    assert at.tokens_per_s == pytest.approx(1e12 / read, rel=1e-4)
    assert at.tokens_per_s_full == pytest.approx(1e12 / (read + 8 * GIB), rel=1e-4)


def recommended(name: str, limits: Limits, n_ctx: int = 16384) -> tuple[str | None, str | None]:
    spec = SHAPES[name]
    rows = plan_presets(spec, plan_tensors(spec), limits, n_ctx, header=0)
    row, _ = recommend(rows, limits)
    return (row.preset, row.placement.kv_type) if row and row.placement else (None, None)


def test_what_is_recommended() -> None:
    big = Limits(32 * GIB, 24 * GIB, 40e9, 1e12)
    assert recommended("deepseek-coder-6.7b", big) == ("q8_0", "f16")
    # A q8_0 cache and q5_k_s rather than a q4_0 cache and q5_k_m.
    assert recommended("deepseek-coder-33b", big) == ("q5_k_s", "q8_0")
    # Too slow at any type: not the coarsest, which is hardly faster.
    assert recommended("deepseek-coder-33b", Limits(64 * GIB, 0, 5e9))[0] == "q4_k_m"
    assert recommended("deepseek-coder-33b", Limits(2 * GIB)) == (None, None)


def test_errors_name_the_numbers() -> None:
    spec = SHAPES["deepseek-coder-1.3b"]
    found, _ = tensor_bytes("deepseek-coder-1.3b", "q8_0")
    with pytest.raises(InputError, match="16384"):
        fit.plan_file(spec, found, Limits(GIB), 16385)
    with pytest.raises(InputError, match=r"needs .* GiB of memory, 1\.0 GiB are there.*--kv-type"):
        fit.plan_file(spec, found, Limits(GIB), 16384)
    with pytest.raises(InputError, match="rtx-4090"):
        card("voodoo 2")
    assert fit.plan_file(spec, found, Limits(8 * GIB), 4096).n_gpu_layers == 0


def test_cards_by_any_spelling() -> None:
    assert card("NVIDIA GeForce RTX 4090") is CARDS["rtx-4090"]
    assert card("rtx_4090") is CARDS["rtx-4090"]


def test_memory_bandwidth_is_of_this_world() -> None:
    found = memory_bandwidth(1)
    assert 1e8 < found < 2e12
    assert memory_bandwidth(1) == found  # measured once


def test_a_measurement_goes_on_until_passes_agree() -> None:
    assert not bandwidth._steady([])
    assert not bandwidth._steady([5, 5, 5, 5, 5, 9])  # the fast one shows that the others were held
    assert bandwidth._steady([2, 9, 8.9, 8.8, 3, 9, 8.95])

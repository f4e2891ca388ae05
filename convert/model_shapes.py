"""The shapes of DeepSeek Coder's four sizes, so that nothing is downloaded to plan with them.

Source: config.json of deepseek-ai/deepseek-coder-{1.3b,5.7bmqa,6.7b,33b}-{base,instruct}.
"""

from __future__ import annotations

from math import prod

from dsq.convert.names import expected_tensors, gguf_name
from dsq.convert.rope import Rope
from dsq.convert.spec import ModelSpec
from dsq.quant.plan import PlanTensor, tensor_order
from dsq.quant.scheme import BF16, F32

FAMILY = "deepseek-coder"

# In front of the weights, dsq's GGUF of the 6.7b instruct model has 2,062,414 bytes: metadata, the
# tokenizer twice (as llama.cpp reads it, and its tokenizer.json), and about 64 a tensor.
_TOKENIZER_BYTES = 2_043_790
_TENSOR_INFO_BYTES = 64


def _shape(n_layer: int, n_embd: int, n_ff: int, n_head: int, n_head_kv: int) -> ModelSpec:
    return ModelSpec(
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=n_ff,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=128,
        n_vocab=32256,
        n_ctx=16384,
        rms_eps=1e-6,
        rope=Rope(freq_base=100000.0, kind="linear", factor=4.0),
        bos_id=32013,
        eos_ids=(32014,),
    )


SHAPES: dict[str, ModelSpec] = {
    "deepseek-coder-1.3b": _shape(24, 2048, 5504, 16, 16),
    "deepseek-coder-5.7bmqa": _shape(32, 4096, 11008, 32, 1),
    "deepseek-coder-6.7b": _shape(32, 4096, 11008, 32, 32),
    "deepseek-coder-33b": _shape(62, 7168, 19200, 56, 8),
}


def known_shape(name: str) -> tuple[str, ModelSpec] | None:
    """The full name and shape of `name`; None when it is no such model.

    `deepseek-coder-6.7b`, `6.7b`, `deepseek-ai/deepseek-coder-6.7b-instruct` are one shape.
    """
    key = name.lower().removeprefix("deepseek-ai/").removesuffix("-base").removesuffix("-instruct")
    key = key if key.startswith(FAMILY) else f"{FAMILY}-{key}"
    key = key.replace("-5.7b", "-5.7bmqa") if key.endswith("-5.7b") else key
    return (key, SHAPES[key]) if key in SHAPES else None


def plan_tensors(spec: ModelSpec) -> list[PlanTensor]:
    """What a bf16 checkpoint of this shape has: the input of `quant.plan.choose_types`."""
    found = [
        PlanTensor(gguf_name(name), shape, F32 if len(shape) == 1 else BF16)
        for name, shape in expected_tensors(spec).items()
    ]
    return sorted(found, key=lambda t: tensor_order(t.name))


def header_bytes(spec: ModelSpec) -> int:
    """About what stands before the weights in a GGUF of this shape, DeepSeek's tokenizer in it."""
    return _TOKENIZER_BYTES + _TENSOR_INFO_BYTES * len(expected_tensors(spec))


def n_params(spec: ModelSpec) -> int:
    return sum(map(prod, expected_tensors(spec).values()))

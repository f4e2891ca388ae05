"""A random Llama of some hundred kilobytes, as a GGUF file and as a Hugging Face directory.

Both hold the same float32 weights, and a byte-level BPE vocabulary of 296 tokens with DeepSeek's
kinds of special tokens, so llama.cpp, transformers and dsq can be held against each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

MERGES = (
    *("Ġ t", "h e", "i n", "r e", "o n", "e r", "Ġ a", "a t", "Ġt he", "Ġ s", "o r", "Ġ c"),
    *("e n", "i s", "Ġ f", "d e", "Ġ =", "in g", "Ġ i", "re t", "u r", "ur n", "ret urn"),
    *("Ġ (", "s e", "l f", "se lf", "Ġ Ġ", "ĠĠ ĠĠ", "de f"),
)
BOS, EOS, HOLE, BEGIN, END, EOT = "<bos>", "<eos>", "<hole>", "<begin>", "<end>", "<eot>"
SPECIAL = (BOS, EOS, HOLE, BEGIN, END, EOT)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eot>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = {}, 0
    for byte in range(256):
        if byte in plain:
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(256 + extra)
            extra += 1
    return [letters[b] for b in range(256)]


def tiny_tokens() -> list[str]:
    return [*_byte_letters(), *(m.replace(" ", "") for m in MERGES), *SPECIAL, "[PAD292]"]


def token_id(text: str) -> int:
    return tiny_tokens().index(text)


def _weights(
    n_layer: int, n_embd: int, n_ff: int, n_head: int, n_head_kv: int, seed: int
) -> dict[str, npt.NDArray[np.float32]]:
    """By HF name."""
    rng = np.random.default_rng(seed)
    n_kv, n_vocab = n_embd // n_head * n_head_kv, len(tiny_tokens())

    def matrix(rows: int, columns: int, gain: float = 1.0) -> npt.NDArray[np.float32]:
        return (gain * columns**-0.5 * rng.standard_normal((rows, columns))).astype(np.float32)

    def norm() -> npt.NDArray[np.float32]:
        return (1 + 0.1 * rng.standard_normal(n_embd)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(n_vocab, n_embd, n_embd**0.5),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(n_vocab, n_embd, 2.0),
    }
    for i in range(n_layer):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.self_attn.q_proj.weight": matrix(n_embd, n_embd, 2.0),
            f"{layer}.self_attn.k_proj.weight": matrix(n_kv, n_embd, 2.0),
            f"{layer}.self_attn.v_proj.weight": matrix(n_kv, n_embd),
            f"{layer}.self_attn.o_proj.weight": matrix(n_embd, n_embd),
            f"{layer}.post_attention_layernorm.weight": norm(),
            f"{layer}.mlp.gate_proj.weight": matrix(n_ff, n_embd),
            f"{layer}.mlp.up_proj.weight": matrix(n_ff, n_embd),
            f"{layer}.mlp.down_proj.weight": matrix(n_embd, n_ff),
        }
    return weights


_NAMES = (
    ("model.layers.", "blk."),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
)


def _interleave(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write_tiny_gguf(
    path: Path,
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_ff: int = 128,
    n_head: int = 4,
    n_head_kv: int = 2,
    rope: tuple[str, float] = ("linear", 4.0),
    n_ctx: int = 512,
    seed: int = 0,
    add_bos: bool = True,
    tokens: list[str] | None = None,
) -> Path:
    """Write the GGUF; another `seed` gives another model of the same shape."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope[0]))
    writer.add_rope_scaling_factor(rope[1])
    names = tokens or tiny_tokens()
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-coder")
    writer.add_token_list(names)
    n_plain = 256 + len(MERGES)
    writer.add_token_types([1] * n_plain + [3] * len(SPECIAL) + [5])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(token_id(BOS))
    writer.add_eos_token_id(token_id(EOS))
    writer.add_eot_token_id(token_id(EOT))
    writer.add_uint32("tokenizer.ggml.fim_pre_token_id", token_id(BEGIN))
    writer.add_uint32("tokenizer.ggml.fim_suf_token_id", token_id(HOLE))
    writer.add_uint32("tokenizer.ggml.fim_mid_token_id", token_id(END))
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in _weights(n_layer, n_embd, n_ff, n_head, n_head_kv, seed).items():
        if "q_proj" in name or "k_proj" in name:
            weight = _interleave(weight, n_head if "q_proj" in name else n_head_kv)
        for old, new in _NAMES:
            name = name.replace(old, new)
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_hf(
    folder: Path,
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_ff: int = 128,
    n_head: int = 4,
    n_head_kv: int = 2,
    rope: tuple[str, float] = ("linear", 4.0),
    n_ctx: int = 512,
    seed: int = 0,
) -> Path:
    """The same model as `write_tiny_gguf` of the same arguments, as a Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = tiny_tokens()
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": n_embd,
        "intermediate_size": n_ff,
        "num_attention_heads": n_head,
        "num_key_value_heads": n_head_kv,
        "num_hidden_layers": n_layer,
        "max_position_embeddings": n_ctx,
        "rms_norm_eps": 1e-6,
        "vocab_size": len(tokens),
        "rope_theta": 100000,
        "rope_scaling": {"type": rope[0], "factor": rope[1]},
        "bos_token_id": token_id(BOS),
        "eos_token_id": token_id(EOS),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        _weights(n_layer, n_embd, n_ff, n_head, n_head_kv, seed), folder / "model.safetensors"
    )
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer_json(tokens)))
    settings = {
        "add_bos_token": True,
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _tokenizer_json(tokens: list[str]) -> dict[str, Any]:
    """DeepSeek Coder's tokenizer.json, with this vocabulary."""
    n_plain = 256 + len(MERGES)

    def split(pattern: str) -> dict[str, Any]:
        kind = {"Regex": pattern}
        return {"type": "Split", "pattern": kind, "behavior": "Isolated", "invert": False}

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": True, **flags}
            for i in range(n_plain, n_plain + len(SPECIAL))
        ],
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                split("[\r\n]"),
                split("\\s?\\p{L}+"),
                split("\\s?\\p{P}+"),
                split("[一-龥ࠀ-一가-퟿]+"),
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": {**byte_level, "use_regex": True},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {tokens[i]: i for i in range(n_plain)},
            "merges": list(MERGES),
        },
    }

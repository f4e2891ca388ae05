"""What dsq calls of exllamav2 0.3.2, without CUDA: same names and signatures, logits by torch.

The generator is in `generator.py`. Where the real one asserts, so does this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class ExLlamaV2Config:
    def __init__(self, model_dir: str | None = None) -> None:
        assert model_dir is not None
        read = json.loads((Path(model_dir) / "config.json").read_text())
        self.model_dir = model_dir
        self.vocab_size = read["vocab_size"]
        self.max_seq_len = read["max_position_embeddings"]
        self.max_input_len, self.max_batch_size = 2048, 1
        self.no_flash_attn = False
        self.rotary_embedding_base = read.get("rope_theta", 10000.0)
        self.scale_pos_emb, self.alt_rope_method = 1.0, None
        scaling = read.get("rope_scaling")  # `rope_parameters` is not looked at
        if scaling:
            kind = scaling.get("type") or scaling.get("rope_type")
            if kind == "linear":
                self.scale_pos_emb = scaling["factor"]
            else:
                self.alt_rope_method = kind


class ExLlamaV2:
    def __init__(self, config: ExLlamaV2Config) -> None:
        self.config, self.engine = config, None

    def load_autosplit(
        self,
        cache: Any,
        reserve_vram: Any = None,
        last_id_only: bool = False,
        callback: Any = None,
        callback_gen: Any = None,
        progress: bool = False,
    ) -> None:
        from dsq.runtime.torch_engine import TorchEngine

        assert cache.lazy
        self.config.max_input_len = min(self.config.max_input_len, self.config.max_seq_len)
        self.engine = TorchEngine(self.config.model_dir, n_threads=1)

    def unload(self) -> None:
        self.engine = None


class ExLlamaV2Cache:
    def __init__(
        self,
        model: ExLlamaV2,
        batch_size: int = 1,
        max_seq_len: int = -1,
        copy_from: Any = None,
        lazy: bool = False,
        num_key_value_heads: int | None = None,
        fixed_device: int | None = None,
    ) -> None:
        self.batch_size, self.max_seq_len, self.lazy = batch_size, max_seq_len, lazy


class ExLlamaV2Cache_Q8(ExLlamaV2Cache): ...


class ExLlamaV2Cache_Q4(ExLlamaV2Cache): ...


class ExLlamaV2Tokenizer:
    def __init__(
        self,
        config: ExLlamaV2Config,
        lazy_init: bool = True,
        force_json: bool = False,
        force_spm: bool = False,
    ) -> None:
        self.n_pieces = config.vocab_size

    def get_id_to_piece_list(self, include_special_tokens: bool = False) -> list[str]:
        return [f"<{i}>" for i in range(self.n_pieces)]

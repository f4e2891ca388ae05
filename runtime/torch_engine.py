"""TorchEngine: a Hugging Face directory run by transformers in float32 on the CPU.

The reference that every other format is held against; of a GPTQ or EXL2 directory it runs the exact
codes (see `packed_engine`). The configuration is built from dsq's own ModelSpec, and the rotary
frequencies that transformers made of it are compared with ours: a RoPE factor that some version
drops is found before a token is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsq.convert.checkpoint import HfCheckpoint, open_checkpoint
from dsq.convert.spec import ModelSpec
from dsq.errors import DsqError, InputError
from dsq.quant.threads import default_threads
from dsq.runtime.engine import Floats

if TYPE_CHECKING:
    from dsq.tokenizer_port.tokenizer import Tokenizer

_WINDOW_TOKENS = 2048  # at most so many tokens at once, as in llama.cpp's batches


def require_torch(path: str | Path) -> None:
    """Raise InputError, naming the extra, when torch or transformers is missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{path}: a Hugging Face directory is run by PyTorch, which is not installed "
            f"({error}); pip install 'dsq[torch]', or convert the model to GGUF"
        ) from error


def open_directory(path: Path) -> HfCheckpoint:
    """Raises InputError for what is no Hugging Face, GPTQ or EXL2 directory."""
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint, HfCheckpoint):
        raise InputError(
            f"{path}: torch runs directories, and this is a GGUF; leave --engine out, or convert "
            f"it: dsq convert --to hf"
        )
    return checkpoint


def load_model(checkpoint: HfCheckpoint, device: str = "cpu") -> Any:
    """The directory as transformers' LlamaForCausalLM, its rotary frequencies checked.

    On the CPU in float32; the matrices of a GPTQ or EXL2 directory stay packed. On a card in 16
    bits, bfloat16 where the directory says so, and packed matrices are unpacked to them: what is
    rounded then is their dequantized values. Raises DsqError for frequencies that differ.
    """
    import torch
    from transformers import LlamaForCausalLM

    config = llama_config(checkpoint.spec)
    with _quiet():
        if checkpoint.packed is None:
            model: Any = LlamaForCausalLM.from_pretrained(
                checkpoint.path,
                config=config,
                dtype=torch.float32 if device == "cpu" else card_dtype(checkpoint),
                attn_implementation="sdpa",
                local_files_only=True,
                use_safetensors=None,  # .bin only where there is nothing else, weights_only
            ).to(device)
        elif device == "cpu":
            from dsq.runtime.packed_engine import load_packed

            model = load_packed(checkpoint, config)
        else:
            model = _unpacked(checkpoint, config, device, card_dtype(checkpoint))
    check_rope(model, checkpoint.spec, checkpoint.path)
    return model.eval()


def card_dtype(checkpoint: HfCheckpoint) -> Any:
    """What a card computes in."""
    import torch

    said = checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype")
    return torch.bfloat16 if said == "bfloat16" else torch.float16


def _unpacked(checkpoint: HfCheckpoint, config: Any, device: str, dtype: Any) -> Any:
    """A packed directory as a dense model: one matrix after another, so that nothing large is held
    twice."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from dsq.runtime.decoder import read_tensor

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    for name in checkpoint.tensors:
        module, _, kind = name.rpartition(".")
        value = read_tensor(checkpoint, name).to(device, dtype)
        setattr(model.get_submodule(module), kind, torch.nn.Parameter(value, False))
    if checkpoint.spec.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


class TorchEngine:
    """See `dsq.runtime.engine.Engine`. Raises InputError without the torch extra."""

    def __init__(self, path: str | Path, *, n_ctx: int = 0, n_threads: int | None = None) -> None:
        require_torch(path)
        import torch

        self.path = Path(path)
        self._checkpoint = open_directory(self.path)
        spec = self._checkpoint.spec
        self._n_ctx = n_ctx or spec.n_ctx
        self._torch = torch
        torch.set_num_threads(n_threads or default_threads())
        self._model: Any = load_model(self._checkpoint)
        self._n_vocab = spec.n_vocab
        self._tokens: list[int] = []
        self._cache: Any = None

    @property
    def n_ctx(self) -> int:
        return self._n_ctx

    @property
    def n_vocab(self) -> int:
        return self._n_vocab

    @property
    def max_windows(self) -> int:
        return max(1, _WINDOW_TOKENS // self._n_ctx)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from dsq.tokenizer_port.tokenizer import Tokenizer

        return Tokenizer.from_vocabulary(self._checkpoint.vocabulary())

    @property
    def n_past(self) -> int:
        return 0 if self._cache is None else int(self._cache.get_seq_length())

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self._tokens[: self.n_past])

    def truncate(self, n_tokens: int) -> None:
        if self._cache is not None and n_tokens < self.n_past:
            if n_tokens:
                self._cache.crop(n_tokens - self.n_past)  # a negative number: drop that many
            else:
                self._cache = None
        del self._tokens[n_tokens:]

    def eval(self, tokens: Sequence[int]) -> Floats:
        row: Floats = self.logits(tokens, pos0=self.n_past, all=False)[0]
        return row

    def logits(self, tokens: Sequence[int], *, pos0: int = 0, all: bool = True) -> Floats:
        if not len(tokens):
            raise InputError("no tokens to evaluate")
        if pos0 > self.n_past:
            raise ValueError(f"pos0 is {pos0}, but the sequence has {self.n_past} tokens")
        if pos0 + len(tokens) > self._n_ctx:
            raise InputError(
                f"{pos0 + len(tokens)} tokens do not fit a context of {self._n_ctx}; "
                "raise n_ctx or shorten the input"
            )
        self.truncate(pos0)
        ids = self._ids(np.asarray(tokens, np.int64)[None])
        self._tokens[pos0:] = [int(i) for i in tokens]
        with self._torch.inference_mode():
            out = self._model.model(ids, past_key_values=self._cache, use_cache=True)
            self._cache = out.past_key_values
            hidden = out.last_hidden_state[0] if all else out.last_hidden_state[0, -1:]
            result: Floats = self._model.lm_head(hidden).numpy()
        return result

    def window_logits(self, windows: npt.NDArray[np.int32], first: int) -> Floats:
        self.truncate(0)
        with self._torch.inference_mode():
            out = self._model.model(self._ids(windows.astype(np.int64)), use_cache=False)
            hidden = out.last_hidden_state[:, first:-1].flatten(0, 1)
            result: Floats = self._model.lm_head(hidden).numpy()
        return result

    def _ids(self, ids: npt.NDArray[np.int64]) -> Any:
        if ids.min() < 0 or ids.max() >= self._n_vocab:
            raise InputError(
                f"{self.path}: token {ids.max()} is outside its {self._n_vocab} tokens"
            )
        return self._torch.from_numpy(ids)

    def close(self) -> None:
        self._model = self._cache = None

    def __enter__(self) -> TorchEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def llama_config(spec: ModelSpec) -> Any:
    """transformers' LlamaConfig with every value stated, so that no default can slip in."""
    from transformers import LlamaConfig

    rope = spec.rope.to_config()
    scaling = rope["rope_scaling"] or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    scaling = {k: v for k, v in scaling.items() if k not in ("type", "rope_type")}
    return LlamaConfig(
        vocab_size=spec.n_vocab,
        hidden_size=spec.n_embd,
        intermediate_size=spec.n_ff,
        num_hidden_layers=spec.n_layer,
        num_attention_heads=spec.n_head,
        num_key_value_heads=spec.n_head_kv,
        head_dim=spec.head_dim,
        hidden_act="silu",
        max_position_embeddings=spec.n_ctx,
        rms_norm_eps=spec.rms_eps,
        attention_bias=spec.attention_bias,
        mlp_bias=spec.mlp_bias,
        tie_word_embeddings=spec.tied,
        bos_token_id=spec.bos_id,
        eos_token_id=list(spec.eos_ids) or None,
        pad_token_id=spec.pad_id,
        rope_parameters={
            "rope_theta": rope["rope_theta"],
            "rope_type": kind,
            **scaling,
        },
    )


def check_rope(model: Any, spec: ModelSpec, path: Path) -> None:
    """Raise unless the model turns positions by the frequencies that `spec` asks for."""
    rotary = model.model.rotary_emb
    wanted, scale = spec.rope.inv_freq(spec.head_dim)
    found = rotary.inv_freq.double().cpu().numpy()
    same = found.shape == wanted.shape and np.allclose(found, wanted, rtol=1e-5)
    if not same or abs(rotary.attention_scaling - scale) > 1e-6:
        raise DsqError(
            f"{path}: transformers computes other rotary frequencies than config.json asks for "
            f"({spec.rope.kind}, factor {spec.rope.factor:g}); use transformers 5.23"
        )


class _quiet:
    """transformers draws progress bars and warns of what does not matter here."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._logging = logging
        self._level = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bars:
            self._logging.enable_progress_bar()

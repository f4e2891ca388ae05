"""Checkpoint: a model's weights, shapes and vocabulary, whatever file they lie in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from dsq.convert.gguf.reader import GgufFile, read_gguf
from dsq.convert.gguf.spec import spec_from_gguf
from dsq.convert.gptq.reader import GptqLinears
from dsq.convert.json_file import read_object, shown
from dsq.convert.names import ROPE_FREQS, expected_tensors, gguf_name, hf_name
from dsq.convert.open_packed import has_packed_weights, open_packed, packed_method
from dsq.convert.packed import Codes, PackedLinears
from dsq.convert.spec import ModelSpec, spec_from_config
from dsq.convert.tensors import TensorInfo
from dsq.convert.weight_files import Weights, has_weights, open_weights
from dsq.errors import InputError

if TYPE_CHECKING:
    from dsq.tokenizer_port.vocabulary import Vocabulary

# What a GGUF says of itself (dsq.quantize.method) when it was made of a `gathered` checkpoint.
GATHERED = "gathered"

_COMPARE_BYTES = 1 << 24
_SHARD = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")


class Checkpoint(Protocol):
    """A model that can be read. `tensors` has the file's own names; `data` copies nothing."""

    @property
    def path(self) -> Path: ...

    @property
    def format(self) -> Literal["hf", "gguf"]: ...

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as stored, shape (n_bytes,)."""

    def vocabulary(self, *, pre: str | None = None) -> Vocabulary:
        """The tokenizer; `pre` overrides the pre-tokenizer's name."""


@dataclass(frozen=True, eq=False)
class HfCheckpoint:
    """A Hugging Face directory. `tensors` is complete and checked against `spec`.

    A GPTQ or EXL2 directory seems to hold dense matrices, in float32: see `PackedLinears`.
    """

    path: Path
    spec: ModelSpec
    tensors: Mapping[str, TensorInfo]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    weights: Weights
    check_tied: Callable[[], None]  # reads weights, so it waits until some are asked for
    packed: PackedLinears | None = None  # the matrices of a GPTQ or EXL2 directory
    format: Literal["hf"] = "hf"

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """As in `Checkpoint`; a packed matrix is dequantized to float32."""
        self.check_tied()
        if self.packed is not None and name in self.packed.tensors:
            return self.packed.data(name)
        return self.weights.read(_tensor(self, name))

    def codes(self, name: str) -> Codes | None:
        """The codes of a packed matrix; None for a tensor that is stored dense."""
        packed = self.packed is not None and name in self.packed.tensors
        return self.packed.codes(name) if self.packed is not None and packed else None

    def stored_as(self, name: str) -> tuple[str, int]:
        """What a tensor is in the files, and its bytes there: a packed matrix seems larger."""
        if self.packed is not None and name in self.packed.tensors:
            return self.packed.kind(name), self.packed.stored_bytes(name)
        info = _tensor(self, name)
        return info.type.name, info.n_bytes

    def gathered(self) -> HfCheckpoint:
        """The same model, more of whose GPTQ groups are runs: see `GptqLinears.gathered`."""
        if not isinstance(self.packed, GptqLinears) or self.spec.mlp_bias:
            return self
        packed = self.packed.gathered()
        return self if packed is self.packed else replace(self, packed=packed)

    @property
    def files(self) -> set[Path]:
        """Every file that holds weights."""
        return {info.path for info in self.weights.tensors.values()}

    def vocabulary(self, *, pre: str | None = None) -> Vocabulary:
        from dsq.tokenizer_port.load import load_hf

        return load_hf(
            self.path,
            self.spec.n_vocab,
            pre=pre,
            config=self.config,
            generation_config=self.generation_config,
        )


@dataclass(frozen=True, eq=False)
class GgufCheckpoint:
    """A GGUF model. `tensors` is complete and checked against `spec`; Q and K rows are permuted."""

    path: Path
    spec: ModelSpec
    gguf: GgufFile
    format: Literal["gguf"] = "gguf"

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.gguf.tensors

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        return self.gguf.data(name)

    def vocabulary(self, *, pre: str | None = None) -> Vocabulary:
        from dsq.tokenizer_port.load import vocabulary_from_gguf

        return vocabulary_from_gguf(self.gguf.metadata, pre=pre)


def open_checkpoint(source: str | Path) -> HfCheckpoint | GgufCheckpoint:
    """Open a Hugging Face directory, a GGUF file, or a directory with one GGUF model.

    Reads headers only, and checks every tensor's name and shape. Hub ids: `hub.resolve` first.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix == ".gguf" or _magic(path) == b"GGUF":
            return _open_gguf(path)
        raise InputError(f"{path}: neither a directory nor a .gguf file")
    if not path.is_dir():
        raise InputError(f"{path}: there is no such file or directory")
    if (path / "config.json").is_file() and (has_weights(path) or has_packed_weights(path)):
        return _open_hf(path)
    ggufs = _gguf_models(path)
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    if ggufs:
        names = ", ".join(p.name for p in ggufs)
        raise InputError(f"{path}: holds {len(ggufs)} GGUF models; give one of them: {names}")
    return _open_hf(path)  # fails, and says what is missing


def _magic(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4)
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror or error}") from error


def _gguf_models(directory: Path) -> list[Path]:
    """GGUF files, a split model's first shard standing for all of it."""
    return sorted(
        path
        for path in directory.glob("*.gguf")
        if (shard := _SHARD.search(path.name)) is None or int(shard[1]) == 1
    )


def _open_gguf(path: Path) -> GgufCheckpoint:
    gguf = read_gguf(path)
    spec = spec_from_gguf(gguf)
    named: dict[str, TensorInfo] = {}
    for name, info in gguf.tensors.items():
        if name != ROPE_FREQS:
            try:
                named[hf_name(name)] = info
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
    _check_tensors(path, spec, named, gguf_name)
    return GgufCheckpoint(path, spec, gguf)


def _open_hf(path: Path) -> HfCheckpoint:
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: config.json is missing; give a complete model directory")
    config = read_object(path / "config.json")
    generation = path / "generation_config.json"
    generation_config = read_object(generation) if generation.is_file() else {}
    method = packed_method(path, config)
    try:
        spec = spec_from_config(_without_packing(config) if method else config, generation_config)
    except InputError as error:
        raise type(error)(f"{path}: {error}") from error
    packed: PackedLinears | None = None
    if method:
        spec, weights, tensors, packed = open_packed(path, method, config, spec)
    else:
        weights = open_weights(path)
        tensors = dict(weights.tensors)
    check_tied: Callable[[], None] = _nothing
    if spec.tied and "lm_head.weight" in tensors:
        pair = dict(tensors)
        check_tied = cache(lambda: _check_tied(path, pair, weights))
        del tensors["lm_head.weight"]
    _check_tensors(path, spec, tensors)
    return HfCheckpoint(path, spec, tensors, config, generation_config, weights, check_tied, packed)


def _without_packing(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _nothing() -> None:
    """The model stores no second matrix to compare."""


def _check_tied(path: Path, tensors: Mapping[str, TensorInfo], weights: Weights) -> None:
    """Refuse a tied model whose two matrices differ.

    transformers 4 ties them and forgets lm_head, transformers 5 keeps both: no way to be right.
    """
    pair = [tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    embedding, head = pair
    if embedding is None or head is None:
        return  # the missing one is reported with all others
    if embedding.type is head.type and embedding.shape == head.shape:
        a, b = weights.read(embedding), weights.read(head)
        # .bin files hold both names of one storage
        if a.ctypes.data == b.ctypes.data or _equal(a, b):
            return
    raise InputError(
        f"{path}: config.json says tie_word_embeddings, but lm_head.weight differs from "
        f"model.embed_tokens.weight; set tie_word_embeddings to false if lm_head.weight is meant"
    )


def _equal(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> bool:
    return all(
        np.array_equal(a[i : i + _COMPARE_BYTES], b[i : i + _COMPARE_BYTES])
        for i in range(0, a.size, _COMPARE_BYTES)
    )


def _check_tensors(
    path: Path,
    spec: ModelSpec,
    tensors: Mapping[str, TensorInfo],
    in_file: Callable[[str], str] = str,
) -> None:
    """Every tensor that `spec` asks for is there with its shape, and no other.

    `tensors` has Hugging Face names; `in_file` turns one into the file's own, for messages.
    """
    n_layer = _count_layers(tensors)
    if n_layer != spec.n_layer:  # also keeps a claim of 10^9 layers from being listed
        raise InputError(f"{path}: the config says {spec.n_layer} layers, the weights {n_layer}")
    for kind, flag in (("self_attn.q_proj", "attention_bias"), ("mlp.gate_proj", "mlp_bias")):
        if (f"model.layers.0.{kind}.bias" in tensors) != getattr(spec, flag):
            raise InputError(
                f"{path}: config.json says {flag} {str(getattr(spec, flag)).lower()}, but the "
                f"weights {'lack' if getattr(spec, flag) else 'have'} "
                f"model.layers.0.{kind}.bias; correct the config"
            )
    expected = expected_tensors(spec)
    for name, shape in expected.items():
        info = tensors.get(name)
        if info is None:
            raise InputError(f"{path}: tensor {in_file(name)!r} is missing")
        if info.shape != shape:
            raise InputError(
                f"{info.path}: tensor {shown(info.name)} has shape {list(info.shape)}; "
                f"the config asks for {list(shape)}"
            )
    for name, info in tensors.items():
        if name not in expected:
            raise InputError(
                f"{info.path}: tensor {shown(info.name)} is none of a Llama of this config"
            )


def _count_layers(names: Iterable[str]) -> int:
    numbers = (name.split(".")[2] for name in names if name.startswith("model.layers."))
    return len(set(numbers))


def _tensor(checkpoint: HfCheckpoint, name: str) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise InputError(f"{checkpoint.path}: there is no tensor {name!r}")
    return info

"""Calibration statistics: what a model's linears read, and how its output leans on what they give.

One safetensors file, F32 but for the tokens:

    tokens                   (windows, n_ctx) I32  what was run, BOS included
    blk.0.attn_in.mean_sq    (n_in)                mean of squares a channel: the importance matrix
    blk.0.attn_in.hessian    (n_in, n_in)          E[x xᵀ], uncentred; only if asked for
    blk.0.attn_q.weight.grad_sq  (n_out)           E[(∂L/∂y_o)²]; only if asked for

Means are over all tokens of all windows. Inputs are named by the layer's four stages (see `STAGES`)
and `output`, the head's input, which a tied model's `token_embd.weight` reads too. Gradients have
the tensor's GGUF name and its rows in GGUF's order (Q and K interleaved); L is defined in
`dsq.runtime.calibration.fisher`. `__metadata__` holds one key, `dsq_stats`: JSON.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsq.errors import InputError
from dsq.quant.fileio import reserve, write_at

F32Array = npt.NDArray[np.float32]
I32Array = npt.NDArray[np.int32]

VERSION = 1
OUTPUT = "output"
_KEY = "dsq_stats"

# The tensors that read each stage's input, by their GGUF names inside a layer.
STAGES: dict[str, tuple[str, ...]] = {
    "attn_in": ("attn_q", "attn_k", "attn_v"),
    "attn_out": ("attn_output",),
    "ffn_in": ("ffn_gate", "ffn_up"),
    "ffn_out": ("ffn_down",),
}
_STAGE_OF = {tensor: stage for stage, tensors in STAGES.items() for tensor in tensors}
_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")

SHAPE_KEYS = ("n_layer", "n_embd", "n_ff", "n_head", "n_head_kv", "head_dim", "n_vocab")


def input_of(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` → `blk.3.attn_in`, `output.weight` → `output`.

    Raises KeyError for a tensor that is no linear (norms, biases, the token embedding).
    """
    if gguf_name == "output.weight":
        return OUTPUT
    match = _TENSOR.fullmatch(gguf_name)
    if match is None:
        raise KeyError(gguf_name)
    return f"blk.{match[1]}.{_STAGE_OF[match[2]]}"


def input_sizes(model: Mapping[str, Any]) -> dict[str, int]:
    """n_in of every input of a model of that shape, in the order of computation."""
    n_embd = model["n_embd"]
    stages = {
        "attn_in": n_embd,
        "attn_out": model["n_head"] * model["head_dim"],
        "ffn_in": n_embd,
        "ffn_out": model["n_ff"],
    }
    sizes = {f"blk.{i}.{s}": n for i in range(model["n_layer"]) for s, n in stages.items()}
    return {**sizes, OUTPUT: n_embd}


def output_sizes(model: Mapping[str, Any]) -> dict[str, int]:
    """n_out of every linear of a model of that shape, by GGUF tensor name."""
    n_q, n_kv = (model[key] * model["head_dim"] for key in ("n_head", "n_head_kv"))
    rows = {
        "attn_q": n_q,
        "attn_k": n_kv,
        "attn_v": n_kv,
        "attn_output": model["n_embd"],
        "ffn_gate": model["n_ff"],
        "ffn_up": model["n_ff"],
        "ffn_down": model["n_embd"],
    }
    sizes = {f"blk.{i}.{t}.weight": n for i in range(model["n_layer"]) for t, n in rows.items()}
    return {**sizes, "output.weight": model["n_vocab"]}


@dataclass(frozen=True, eq=False)
class Input:
    """What was seen at one linear's input: `mean_sq` (n_in), over `count` tokens."""

    mean_sq: F32Array
    count: int
    _read_hessian: Callable[[], F32Array] | None = None

    @property
    def hessian(self) -> F32Array | None:
        """E[x xᵀ] (n_in, n_in), read anew at each access; None when none was asked for."""
        return None if self._read_hessian is None else self._read_hessian()


@dataclass(frozen=True, eq=False)
class Stats:
    """A statistics file. `model` has the sizes of `SHAPE_KEYS` and the hashes of `check_model`."""

    path: Path
    model: dict[str, Any]
    n_ctx: int
    tokens: I32Array  # (windows, n_ctx)
    inputs: Mapping[str, Input]
    gradients: Mapping[str, F32Array]  # (n_out) by tensor; empty unless asked for
    record: dict[str, Any]  # where the text came from, seed, versions

    @property
    def has_hessians(self) -> bool:
        return self.inputs[OUTPUT]._read_hessian is not None

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Refuse a model that these are not the statistics of.

        `norms` is a hash of the norm gains, which quantizing leaves alone; `weights` of a sample of
        the others, compared only where neither model was quantized. Raises InputError.
        """
        keys = [*SHAPE_KEYS, "norms"]
        if not (model["quantized"] or self.model["quantized"]):
            keys.append("weights")
        for key in keys:
            if self.model[key] != model[key]:
                what = f"a hash of its {key}," if key in ("norms", "weights") else key
                raise InputError(
                    f"{self.path}: statistics of another model: {what} {self.model[key]}, not "
                    f"{model[key]}; calibrate this model (dsq calibrate)"
                )


def is_stats(path: Path) -> bool:
    """Whether the file looks like safetensors, by its first bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError:
        return False
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def read_stats(path: str | Path) -> Stats:
    """Open a statistics file and check it; Hessians stay on disk.

    Raises InputError for what is no such file, or damaged, or of another version.
    """
    from safetensors import SafetensorError

    path = Path(path)
    try:
        return _read(path)
    except OSError as error:
        raise InputError(f"{path}: cannot read the statistics: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(
            f"{path}: no statistics file, or damaged ({error}); run dsq calibrate"
        ) from None


def _read(path: Path) -> Stats:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        about = _metadata(path, file.metadata())
        model = about["model"]
        tensors = _Tensors(path, file, set(file.keys()))
        tokens: I32Array = tensors.get("tokens", (about["windows"], about["n_ctx"]), "I32")
        inputs = {
            name: Input(
                tensors.finite(f"{name}.mean_sq", (n,)),
                about["count"],
                tensors.later(f"{name}.hessian", (n, n)) if about["hessians"] else None,
            )
            for name, n in input_sizes(model).items()
        }
        gradients = {
            name: tensors.finite(f"{name}.grad_sq", (n,))
            for name, n in output_sizes(model).items()
            if about["gradients"]
        }
    return Stats(path, model, about["n_ctx"], tokens, inputs, gradients, about["record"])


_TYPES = {
    "version": int,
    "model": dict,
    "n_ctx": int,
    "windows": int,
    "count": int,
    "hessians": bool,
    "gradients": bool,
    "record": dict,
}
_MODEL_TYPES = {**dict.fromkeys(SHAPE_KEYS, int), "norms": str, "weights": str, "quantized": bool}
_MOST_LAYERS = 10_000  # keeps a damaged number from being listed


def _metadata(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise InputError(f"{path}: no statistics of dsq calibrate (no {_KEY} in its header)")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("version") != VERSION:
        version = about.get("version") if isinstance(about, dict) else "unreadable"
        raise InputError(
            f"{path}: statistics of version {str(version)[:20]}, this dsq reads {VERSION}; "
            "run dsq calibrate again"
        )
    model: Any = about.get("model")
    for found, types in ((about, _TYPES), (model, _MODEL_TYPES)):
        for key, type_ in types.items():
            value = found.get(key) if isinstance(found, dict) else None
            if type(value) is not type_ or (isinstance(value, int) and not 0 <= value < 1 << 40):
                raise InputError(
                    f"{path}: {key} is {str(value)[:40]!r}; the file is damaged: "
                    "run dsq calibrate again"
                )
    if model["n_layer"] > _MOST_LAYERS:
        raise InputError(f"{path}: n_layer is {model['n_layer']}; the file is damaged")
    return about


@dataclass(frozen=True)
class _Tensors:
    """A safetensors file's tensors, their shapes checked."""

    path: Path
    file: Any
    names: set[str]

    def get(self, name: str, shape: tuple[int, ...], dtype: str = "F32") -> Any:
        self._check(name, shape, dtype)
        return self.file.get_tensor(name)

    def finite(self, name: str, shape: tuple[int, ...]) -> F32Array:
        return self._finite(name, self.get(name, shape))

    def _finite(self, name: str, values: F32Array) -> F32Array:
        if not np.isfinite(values).all():
            raise InputError(
                f"{self.path}: {name} has values that are NaN or Inf; run dsq calibrate again"
            )
        return values

    def later(self, name: str, shape: tuple[int, ...]) -> Callable[[], F32Array]:
        from safetensors import safe_open

        self._check(name, shape, "F32")

        def read() -> F32Array:
            with safe_open(self.path, framework="numpy") as file:
                return self._finite(name, file.get_tensor(name))

        return read

    def _check(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        if name not in self.names:
            raise InputError(f"{self.path}: {name} is missing; run dsq calibrate again")
        part = self.file.get_slice(name)
        if tuple(part.get_shape()) != shape or part.get_dtype() != dtype:
            raise InputError(
                f"{self.path}: {name} is {part.get_dtype()} of shape {part.get_shape()}, "
                f"{dtype} of {list(shape)} is needed; run dsq calibrate again"
            )


class StatsWriter(AbstractContextManager["StatsWriter"]):
    """Writes a statistics file in place, in any order: the layout is known before the first value.

    A file that is there with the same header is gone on with (a resumed calibration). The caller
    chooses a temporary name, and renames it when all is in. Raises OSError (disk full: at once).
    """

    def __init__(
        self,
        path: Path,
        *,
        model: Mapping[str, Any],
        n_ctx: int,
        tokens: I32Array,
        hessians: bool = False,
        gradients: bool = False,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        shapes = _layout(model, tokens, hessians=hessians, gradients=gradients)
        about = {
            "version": VERSION,
            "model": dict(model),
            "n_ctx": n_ctx,
            "windows": len(tokens),
            "count": tokens.size,
            "hessians": hessians,
            "gradients": gradients,
            "record": dict(record or {}),
        }
        header, self._places = _header(shapes, about)
        self._start = len(header)
        self.n_bytes = self._start + sum(n for _, n in self._places.values())
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if os.fstat(self._file).st_size != self.n_bytes or (
                os.pread(self._file, len(header), 0) != header
            ):
                os.ftruncate(self._file, 0)
                reserve(self._file, self.n_bytes)
                self._put("tokens", np.ascontiguousarray(tokens, np.int32))
                write_at(self._file, header, 0)  # last: it says that the file is begun
        except BaseException:
            os.close(self._file)
            raise

    def put_input(self, name: str, mean_sq: F32Array, hessian: F32Array | None = None) -> None:
        """`mean_sq` (n_in) and, if this file holds them, `hessian` (n_in, n_in) of `name`."""
        self._put(f"{name}.mean_sq", mean_sq)
        if hessian is not None:
            self._put(f"{name}.hessian", hessian)

    def put_gradient(self, tensor: str, grad_sq: F32Array) -> None:
        """E[(∂L/∂y_o)²] (n_out) of the tensor of that GGUF name."""
        self._put(f"{tensor}.grad_sq", grad_sq)

    def _put(self, name: str, values: npt.NDArray[Any]) -> None:
        at, n_bytes = self._places[name]
        data = np.ascontiguousarray(values)
        assert data.nbytes == n_bytes, f"{name} of shape {data.shape}"
        write_at(self._file, data.reshape(-1).view(np.uint8).data, self._start + at)

    def sync(self) -> None:
        """What was put so far survives a power cut."""
        os.fsync(self._file)

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _layout(
    model: Mapping[str, Any], tokens: I32Array, *, hessians: bool, gradients: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"tokens": tokens.shape}
    for name, n in input_sizes(model).items():
        shapes[f"{name}.mean_sq"] = (n,)
        if hessians:
            shapes[f"{name}.hessian"] = (n, n)
    if gradients:
        shapes.update({f"{name}.grad_sq": (n,) for name, n in output_sizes(model).items()})
    return shapes


def _header(
    shapes: Mapping[str, tuple[int, ...]], about: Mapping[str, Any]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The file's header, and each tensor's offset in the data and size in bytes."""
    entries: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(about, sort_keys=True)}}
    places: dict[str, tuple[int, int]] = {}
    at = 0
    for name, shape in shapes.items():
        n_bytes = 4 * prod(shape)
        places[name] = (at, n_bytes)
        entries[name] = {
            "dtype": "I32" if name == "tokens" else "F32",
            "shape": list(shape),
            "data_offsets": [at, at + n_bytes],
        }
        at += n_bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places

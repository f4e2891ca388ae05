"""measurement.json: what was measured of a model's matrices, for any target; exllamav2's is read.

Ours: `dsq_measurement` (version), `model` (its sizes and hashes), `calibration`, and for each
matrix its candidates: runs of [bits, rows, group], `total_bits`, `error` in nats a token.
exllamav2's has the accuracy of a few combinations for each attention and each feed-forward block.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsq.errors import InputError
from dsq.quant.exl2 import Scheme, scheme_of_shares
from dsq.quant.exl2_search import Option
from dsq.quant.stats import SHAPE_KEYS

VERSION = 1
_KEY = "dsq_measurement"
_BLOCKS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_AGAIN = "measure this model again (leave --measurement out)"


@dataclass(frozen=True, eq=False)
class Measurement:
    """`options` by matrix, in nats; or by block, for exllamav2's, of which `theirs` is the content.

    `model` is as by `model_identity`.
    """

    model: Mapping[str, Any]
    options: Mapping[str, Sequence[Option]]
    calibration: Mapping[str, Any]
    theirs: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        if self.theirs is not None:
            return dict(self.theirs)
        return {
            _KEY: VERSION,
            "model": dict(self.model),
            "calibration": dict(self.calibration),
            "matrices": {
                name: [o.to_json() for o in found] for name, found in self.options.items()
            },
        }


def read_measurement(
    path: Path,
    model: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    biased: Collection[str] = (),
) -> Measurement:
    """Read and check a measurement of the model with that identity.

    `shapes`: (n_out, n_in) of the layers' matrices by module name; `biased`: those with a bias.
    Raises InputError for another model's, another version's, and what is none or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the measurement: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no measurement: not JSON ({error})") from error
    if isinstance(content, dict) and _KEY in content:
        return _ours(path, content, model, shapes, biased)
    if isinstance(content, dict) and isinstance(content.get("measurement"), dict):
        return _exllamav2(path, content, model, shapes, biased)
    raise InputError(f"{path}: no measurement of dsq or exllamav2; {_AGAIN}")


def _ours(
    path: Path,
    content: Mapping[str, Any],
    model: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    biased: Collection[str],
) -> Measurement:
    if type(content[_KEY]) is not int or content[_KEY] != VERSION:  # True == 1
        raise InputError(
            f"{path}: a measurement of version {str(content[_KEY])[:20]}, this dsq reads "
            f"{VERSION}; {_AGAIN}"
        )
    found, matrices = content.get("model"), content.get("matrices")
    if not isinstance(found, dict) or not isinstance(matrices, dict):
        raise InputError(f"{path}: its model or matrices are missing; {_AGAIN}")
    for key in (*SHAPE_KEYS, "norms", "weights"):
        if found.get(key) != model[key]:
            what = f"a hash of its {key}," if key in ("norms", "weights") else key
            raise InputError(
                f"{path}: a measurement of another model: {what} {str(found.get(key))[:40]}, not "
                f"{model[key]}; {_AGAIN}"
            )
    options: dict[str, list[Option]] = {}
    for name in shapes:
        entries = matrices.get(name)
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{path}: {name} is missing; {_AGAIN}")
        options[name] = [
            _option(path, name, entry, shapes[name], name in biased) for entry in entries
        ]
    calibration = content.get("calibration")
    return Measurement(model, options, calibration if isinstance(calibration, dict) else {})


def _option(path: Path, name: str, entry: Any, shape: tuple[int, int], bias: bool) -> Option:
    try:
        option = Option.from_json(entry)
        (scheme,) = option.schemes.values()
        if list(option.schemes) != [name] or not 0 <= option.error < float("inf"):
            raise ValueError("another matrix's, or an error that is none")
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path}: {name}: {str(error)[:60]}: damaged; {_AGAIN}") from error
    scheme.check(f"{path}: {name}", shape[1])
    return replace(option, total_bits=scheme.total_bits(shape[0], bias=bias))


def _exllamav2(
    path: Path,
    content: Mapping[str, Any],
    model: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    biased: Collection[str],
) -> Measurement:
    """A block's error is the square of what it lacks of its output; such energies add up."""
    options: dict[str, list[Option]] = {}
    measured = content["measurement"]
    for layer in range(model["n_layer"]):
        for block, names in _BLOCKS.items():
            key = f"model.layers.{layer}.{block}"
            entries = measured.get(key)
            if not isinstance(entries, list) or not entries:
                raise InputError(f"{path}: a measurement of another model: {key} is missing")
            options[key] = []
            for entry in entries:
                schemes, total = {}, 0
                try:
                    for name in names:
                        n_out, n_in = shapes[f"{key}.{name}"]
                        scheme = _of_exllamav2(n_in, entry[name])
                        scheme.check(f"{path}: {key}.{name}", n_in)
                        schemes[f"{key}.{name}"] = scheme
                        total += scheme.total_bits(n_out, bias=f"{key}.{name}" in biased)
                    error = (1 - float(entry["accuracy"])) ** 2
                    if not error < float("inf"):  # NaN too
                        raise ValueError("an accuracy that is none")
                    stated = int(entry["total_bits"])
                except (KeyError, TypeError, ValueError, ArithmeticError) as error_:
                    raise InputError(
                        f"{path}: {key}: {str(error_)[:60]}: damaged; {_AGAIN}"
                    ) from error_
                if stated != total and not biased:
                    raise InputError(
                        f"{path}: a measurement of another model: {key} takes {stated:,} bits "
                        f"there, {total:,} here; {_AGAIN}"
                    )
                options[key].append(Option(schemes, total, error))
    extra = sum(f"model.layers.{model['n_layer']}.{block}" in measured for block in _BLOCKS)
    if extra:
        raise InputError(
            f"{path}: a measurement of another model: more than {model['n_layer']} layers"
        )
    return Measurement(model, options, {}, content)


def _of_exllamav2(n_in: int, params: Mapping[str, Any]) -> Scheme:
    """QParams as exllamav2 writes them: one group size, one a width, or by width."""
    bits, sizes = [int(b) for b in params["bits"]], params["group_size"]
    if isinstance(sizes, dict):
        groups = [int(sizes[str(b)]) for b in bits]
    else:
        groups = [int(g) for g in sizes] if isinstance(sizes, list) else [int(sizes)] * len(bits)
    return scheme_of_shares(n_in, bits, [float(p) for p in params["bits_prop"]], groups)

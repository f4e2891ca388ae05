"""One EXL2 matrix, its candidates and the choice among them; the bytes by an independent reader."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from dsq.errors import InputError
from dsq.quant.exl2 import (
    Scheme,
    find_scales,
    ordered,
    quantize,
    scales,
    scheme_of_shares,
)
from dsq.quant.exl2_layout import EXL2_BITS, pack
from dsq.quant.exl2_measurement import Measurement, read_measurement
from dsq.quant.exl2_search import (
    TOLERANCE,
    Option,
    allocate,
    best_widths,
    candidates,
    candidates_of,
    extremes,
    group_sizes,
)
from dsq.quant.stats import SHAPE_KEYS
from tests.quant.exl2_reference import reconstruct

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def problem(n_in: int = 256, n_out: int = 96, seed: int = 0):
    """A weight (n_out, n_in), and the Hessian of inputs that are correlated and of unequal size."""
    rng = np.random.default_rng(seed)
    mix = np.eye(n_in) + 0.1 * rng.standard_normal((n_in, n_in))
    inputs = rng.standard_normal((4 * n_in, n_in)) @ mix * rng.lognormal(sigma=0.7, size=n_in)
    weight = rng.standard_normal((n_out, n_in)) * 0.05
    return torch.tensor(weight).float(), torch.tensor(inputs.T @ inputs / len(inputs)).float()


def scheme(*runs: tuple[int, int, int]) -> Scheme:
    return Scheme.from_json(runs)


def layer_error(missed, hessian, damp: float) -> float:
    damped = hessian.double() + damp * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    return float(((missed.double() @ damped) * missed.double()).sum())


MIXED = scheme((8, 32, 32), (6, 64, 64), (5, 32, 32), (4, 64, 64), (3, 32, 32), (2, 64, 16))
SCHEMES = [
    *(pytest.param(scheme((b, 256, 64)), 96, id=f"{b} bits") for b in EXL2_BITS),
    pytest.param(scheme((8, 64, 32), (5, 192, 32)), 96, id="one size of group"),
    pytest.param(MIXED, 288, id="every width, groups of 16 to 64"),
    pytest.param(scheme((4, 128, 128), (3, 192, 128)), 96, id="a short last group"),
    pytest.param(scheme((6, 64, 32), (4, 160, 128)), 64, id="one key head"),
    pytest.param(scheme((5, 96, 96), (4, 32, 32)), 40, id="padded columns"),
]


@pytest.mark.parametrize(("runs", "n_out"), SCHEMES)
def test_exllamav2_reads_the_values_that_were_chosen(runs: Scheme, n_out: int) -> None:
    weight, hessian = problem(runs.n_in, n_out)
    found = quantize("m", weight, ordered(hessian, "m"), runs)
    parts = pack(found.tensor)
    read = reconstruct(parts)[:, :n_out].T
    np.testing.assert_array_equal(read, found.values.numpy().astype(np.float16))
    np.testing.assert_array_equal(found.tensor.dequantized(), found.values.numpy())
    # Each code is one of its width, and the size is what was counted.
    widths = np.repeat(found.tensor.group_bits, found.tensor.group_rows)
    assert (found.tensor.codes < (1 << widths)[:, None]).all()
    assert sum(8 * part.nbytes for part in parts.values()) == runs.total_bits(n_out)


@pytest.mark.parametrize(
    "runs", [scheme((4, 256, 64)), scheme((6, 32, 32), (4, 64, 64), (3, 160, 32))]
)
def test_error_feedback_is_that_of_gptq(runs: Scheme) -> None:
    """Under the scales that were chosen, the codes are those of the published algorithm."""
    weight, hessian = problem(runs.n_in)
    order = ordered(hessian, "m")
    found = quantize("m", weight, order, runs)
    scale = np.repeat(found.tensor.scales(), found.tensor.group_rows, axis=0)
    half = 1 << (np.repeat(found.tensor.group_bits, found.tensor.group_rows) - 1)
    damped = hessian.double() + 0.1 * hessian.diagonal().double().mean() * torch.eye(runs.n_in)
    inverse = torch.linalg.inv(damped[order.perm][:, order.perm])
    upper = torch.linalg.cholesky(inverse, upper=True).numpy()
    left = weight.double()[:, order.perm].T.numpy().copy()
    codes = np.empty(left.shape, np.uint8)
    for i in range(runs.n_in):
        level = np.clip(np.round(left[i] / scale[i]), -half[i], half[i] - 1)
        codes[i] = level + half[i]
        missed = (left[i] - level * scale[i]) / upper[i, i]
        left[i:] -= np.outer(upper[i, i:], missed)
    assert (codes == found.tensor.codes).mean() > 0.999
    error = layer_error(weight - found.values, hessian, 0.1)
    assert float(found.error.sum()) == pytest.approx(error, rel=1e-3)


def test_rows_go_by_the_size_of_their_inputs() -> None:
    weight, hessian = problem()
    hessian[7, 7] = 0.0  # a dead channel
    hessian[7, :] = hessian[:, 7] = 0.0
    order = ordered(hessian, "m")
    sizes = hessian.diagonal()[order.perm]
    assert bool((sizes[1:] <= sizes[:-1]).all())
    assert int(order.perm[-1]) == 7
    found = quantize("m", weight, order, scheme((4, 256, 32)))
    assert found.tensor.invperm[7] == 255


def test_what_the_output_lacks_is_made_up_for() -> None:
    weight, hessian = problem()
    missing = 0.05 * weight @ hessian
    order = ordered(hessian, "m", damp=1e-4)
    found = quantize("m", weight, order, scheme((8, 256, 32)), missing)
    short = layer_error(0.05 * weight, hessian, 0)
    assert layer_error(1.05 * weight - found.values, hessian, 0) < 0.01 * short


@pytest.mark.parametrize("bits", EXL2_BITS)
def test_scales_are_about_the_best(bits: int) -> None:
    """Against every code under a fine ladder of largest scales."""
    rng = np.random.default_rng(bits)
    weight = torch.tensor(rng.standard_normal((64, 64)) * rng.lognormal(sigma=0.3, size=64)).float()
    cost = torch.tensor(rng.lognormal(sigma=0.2, size=64)).float()
    half = 1 << (bits - 1)

    def errors(scale):
        level = (weight / scale).round().clamp(-half, half - 1)
        return cost @ (weight - level * scale).square()

    codes, largest = find_scales(weight[None], cost[None], bits)
    error = float(errors(scales(codes, largest)[0]).sum())
    top = float(weight.abs().max()) / (half - 1)
    ladder = torch.linspace(0.3, 1.1, 60) * top
    every = [
        torch.stack([errors(torch.full((64,), float(m)) * (c + 1) ** 2 / 256) for c in range(16)])
        for m in ladder
    ]
    assert error < 1.02 * min(float(e.amin(0).sum()) for e in every)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 3e4])
def test_exllamav2s_division_of_the_largest_scale_loses_nothing(size: float) -> None:
    weight = torch.linspace(-size, size, 64 * 8).reshape(1, 64, 8)
    _, largest = find_scales(weight, torch.ones(1, 64), 6)
    assert largest.dtype == torch.float16
    assert float((largest * 2.0**-8).float() * 256) == float(largest) > 0


def test_weights_of_zero_stay_zero() -> None:
    _, hessian = problem()
    found = quantize("m", torch.zeros(96, 256), ordered(hessian, "m"), scheme((3, 256, 64)))
    assert not found.values.any()
    assert not reconstruct(pack(found.tensor)).any()


@pytest.mark.parametrize(
    ("n_in", "n_out", "bits", "shares", "groups", "total"),
    [  # exllamav2 0.3.2: QParams(...).total_bits
        (576, 192, [3, 2], [0.05, 0.95], 64, 259248),
        (576, 1536, [4, 3], [0.1, 0.9], 128, 2900208),
        (1536, 576, [8, 4, 3], [0.05, 0.1, 0.85], [32, 128, 128], 3162576),
        (2048, 128, [6, 5], [0.1, 0.9], 32, 1440768),
        (5504, 2048, [8, 6], [0.15, 0.85], 128, 71833616),
    ],
)
def test_sizes_are_exllamav2s(n_in, n_out, bits, shares, groups, total) -> None:
    sizes = groups if isinstance(groups, list) else [groups] * len(bits)
    assert scheme_of_shares(n_in, bits, shares, sizes).total_bits(n_out) == total


@pytest.mark.parametrize(
    ("runs", "n_in", "told"),
    [
        (scheme((4, 80, 16)), 80, "multiple of 32"),
        (scheme((4, 64, 32)), 96, "64 rows for 96 inputs"),
        (scheme((3, 64, 32), (4, 32, 32)), 96, "never increasing"),
        (scheme((7, 96, 32)), 96, "bits"),
        (scheme((4, 96, 48)), 96, "multiples of 32"),
        (scheme((4, 48, 32), (3, 48, 32)), 96, "may be short"),
    ],
)
def test_schemes_that_kernels_cannot_read_are_refused(runs: Scheme, n_in: int, told: str) -> None:
    with pytest.raises(InputError, match=told):
        runs.check("m", n_in)


def test_weights_beyond_f16_are_refused() -> None:
    weight, hessian = problem()
    weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="m: its compensated weights"):
        quantize("m", weight, ordered(hessian, "m"), scheme((4, 256, 64)))


# Candidates and the choice


def test_candidates_cost_what_is_predicted() -> None:
    weight, hessian = problem(n_in=320, n_out=160)
    order = ordered(hessian, "m")
    share = torch.tensor(np.random.default_rng(1).lognormal(size=160)).float()
    found = candidates("m", weight, order, share, bias=False)
    assert len(found) > 20
    bpw = [option.total_bits / weight.numel() for option in found]
    assert bpw[0] < 2.4
    assert bpw[-1] > 8
    ends = found[0].total_bits, found[-1].total_bits
    assert ends == extremes(320, 160, bias=False)  # known before anything is measured
    for smaller, larger in itertools.pairwise(found):
        assert larger.total_bits > smaller.total_bits
        assert larger.error < smaller.error
    for option in found[:: len(found) // 5]:
        made = quantize("m", weight, order, option.schemes["m"])
        assert float(made.error @ share) == pytest.approx(option.error, rel=0.2)


def test_runs_are_cut_in_the_best_way() -> None:
    """Against every way to give four groups widths that never increase."""
    rng = np.random.default_rng(0)
    table = np.sort(rng.lognormal(sigma=2, size=(4, len(EXL2_BITS))), axis=1)  # 8 bits first
    sizes = np.array([32, 32, 32, 16])
    widths = sorted(EXL2_BITS, reverse=True)
    found = best_widths(table, sizes)
    ways = [w for w in itertools.product(widths, repeat=4) if list(w) == sorted(w, reverse=True)]

    def measured(way):
        error = sum(table[g, widths.index(b)] for g, b in enumerate(way))
        return int(np.dot(sizes, way)), float(error)

    for way in found:
        assert way in ways
    # Whatever the price a bit, none of all ways is cheaper than the best of those found.
    for price in np.geomspace(1e-4, 1, 50):
        least = min(e + price * b for b, e in map(measured, ways))
        assert min(e + price * b for b, e in map(measured, found)) == pytest.approx(least, rel=0.02)


def options(n: int = 12, seed: int = 0) -> dict[str, list[Option]]:
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(n):
        size, leaning = 1000 * int(rng.integers(4, 20)), rng.lognormal()
        found[f"m{i}"] = [
            Option({f"m{i}": scheme((b, 32, 32))}, int(size * b), float(leaning * 4.0**-b))
            for b in np.arange(2, 8.1, 0.25)
        ]
    return found


@pytest.mark.parametrize("bpw", [2.2, 2.5, 4.0, 5.37, 8.0])
def test_the_target_is_met_with_less_error_than_by_equal_shares(bpw: float) -> None:
    table = options()
    n_weights = sum(found[0].total_bits // 2 for found in table.values())
    chosen = allocate(table, n_weights, bpw)
    assert bpw - TOLERANCE <= chosen.bpw <= bpw
    assert chosen.schemes.keys() == table.keys()
    equal = [
        max(f, key=lambda o: (o.total_bits <= bpw * f[0].total_bits / 2, o.total_bits))
        for f in table.values()
    ]
    assert chosen.error <= sum(o.error for o in equal)


def test_a_target_out_of_reach_is_refused() -> None:
    table = options()
    n_weights = sum(found[0].total_bits // 2 for found in table.values())
    for bpw in (1.9, 8.1):
        with pytest.raises(InputError, match=r"take 2\.000 to 8\.000 bits a weight"):
            allocate(table, n_weights, bpw)


SMOLLM2 = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)} | {
    **dict.fromkeys(("gate", "up"), (1536, 576)),
    "down": (576, 1536),
}
CODER = dict.fromkeys("qkvo", (2048, 2048)) | {
    **dict.fromkeys(("gate", "up"), (5504, 2048)),
    "down": (2048, 5504),
}
TARGETS = (2.5, 3.0, 4.0, 5.37, 6.5, 8.0)


def of_shapes(shapes: dict[str, tuple[int, int]], n_layer: int) -> dict[str, list[Option]]:
    """Candidates as a measurement of such a model finds them: errors fall fourfold a bit, and
    the first rows of an act-order weigh most."""
    rng, found = np.random.default_rng(0), {}
    for layer in range(n_layer):
        for name, (n_out, n_in) in shapes.items():
            leaning = rng.lognormal(sigma=2) * np.sort(rng.lognormal(sigma=1.5, size=n_in))[::-1]
            tables = {}
            for group in group_sizes(n_in):
                share = np.add.reduceat(leaning, np.arange(0, n_in, group))
                tables[group] = share[:, None] * 4.0 ** -np.array(sorted(EXL2_BITS, reverse=True))
                tables[group] *= 1 + group / 1000  # larger groups fit less well
            found[f"{layer}.{name}"] = candidates_of(name, (n_out, n_in), tables, bias=False)
    return found


@pytest.mark.parametrize(
    ("shapes", "n_layer", "targets"),
    [
        pytest.param(SMOLLM2, 3, (2.5, 8.0), id="SmolLM2, 3 layers"),
        pytest.param(CODER, 3, (2.2, 8.0), id="1.3b, 3 layers"),
        pytest.param(SMOLLM2, 30, TARGETS, id="SmolLM2", marks=pytest.mark.slow),
        pytest.param(CODER, 24, (2.2, *TARGETS), id="1.3b", marks=pytest.mark.slow),
    ],
)
def test_targets_on_the_shapes_of_real_models(shapes, n_layer, targets) -> None:
    table = of_shapes(shapes, n_layer)
    n_weights = n_layer * sum(n_out * n_in for n_out, n_in in shapes.values())
    last = float("inf")
    for bpw in targets:
        chosen = allocate(table, n_weights, bpw)
        assert bpw - TOLERANCE <= chosen.bpw <= bpw
        assert chosen.error < last
        last = chosen.error


def test_what_can_be_is_known_before_anything_is_measured() -> None:
    """Also where larger groups happen to lose less, or no width loses anything."""
    for error in (lambda group, bits: 4.0**-bits / group, lambda group, bits: 0.0 * bits):
        bits = np.array(sorted(EXL2_BITS, reverse=True))
        tables = {g: np.tile(error(g, bits), (-(-576 // g), 1)) for g in group_sizes(576)}
        sizes = [o.total_bits for o in candidates_of("m", (192, 576), tables, bias=True)]
        assert (sizes[0], sizes[-1]) == extremes(576, 192, bias=True)
        assert sizes == sorted(sizes)


# measurement.json

MODEL = {
    **dict.fromkeys(SHAPE_KEYS, 64),
    "n_layer": 1,
    "quantized": False,
    "norms": "abc",
    "weights": "def",
}
SHAPES = {
    **{f"model.layers.0.self_attn.{n}_proj": (64, 64) for n in "qkvo"},
    **{f"model.layers.0.mlp.{n}_proj": (128, 64) for n in ("gate", "up")},
    "model.layers.0.mlp.down_proj": (64, 128),
}


def measurement() -> Measurement:
    made = {
        name: [
            Option({name: runs}, runs.total_bits(shape[0]), 4.0**-bits)
            for bits in (2, 4, 8)
            for runs in [scheme((bits, shape[1], 32))]
        ]
        for name, shape in SHAPES.items()
    }
    return Measurement(MODEL, made, {"rows": 1})


def test_a_measurement_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "measurement.json"
    file.write_text(json.dumps(measurement().to_json()))
    assert read_measurement(file, MODEL, SHAPES).options == measurement().options


def first_option(content: dict) -> dict:
    return content["matrices"]["model.layers.0.mlp.up_proj"][0]


def first_run(content: dict) -> list:
    return first_option(content)["schemes"]["model.layers.0.mlp.up_proj"][0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m["model"].update(weights="other"), "of another model: a hash of its weights"),
        (lambda m: m["model"].update(n_embd=32), "of another model: n_embd 32, not 64"),
        (lambda m: m.update(dsq_measurement=9), "version 9, this dsq reads 1"),
        (lambda m: m["matrices"].popitem(), "down_proj is missing"),
        (lambda m: m["matrices"]["model.layers.0.mlp.up_proj"][0].pop("error"), "damaged"),
        (lambda m: m["matrices"]["model.layers.0.mlp.up_proj"][0].update(error=-1), "damaged"),
        (lambda m: m.update(dsq_measurement=True), "version True, this dsq reads 1"),
        (lambda m: first_option(m).update(total_bits=float("inf")), "up_proj.*damaged"),
        (lambda m: first_run(m).__setitem__(1, float("inf")), "up_proj.*damaged"),
        (lambda m: m.pop("matrices"), "missing"),
        (lambda m: m.pop("dsq_measurement"), "no measurement of dsq or exllamav2"),
    ],
)
def test_other_measurements_are_refused(change, told: str, tmp_path: Path) -> None:
    content = json.loads(json.dumps(measurement().to_json()))
    change(content)
    file = tmp_path / "measurement.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=told) as raised:
        read_measurement(file, MODEL, SHAPES)
    assert "\n" not in str(raised.value)


def exllamav2s(accuracies=(0.9, 0.99)) -> dict:
    """What exllamav2 writes: two choices for each block of one layer."""
    content: dict = {"measurement": {}, "last_module_idx": 2}
    for block in ("self_attn", "mlp"):
        key = f"model.layers.0.{block}"
        names = [name for name in SHAPES if name.startswith(key)]
        entries = []
        for bits, accuracy in zip(([3, 2], [8]), accuracies, strict=True):
            share = [0.25, 0.75] if len(bits) == 2 else [1]
            group = {str(b): 32 for b in bits}
            params = {"group_size": group, "bits": bits, "bits_prop": share, "scale_bits": 4}
            total = 0
            for name in names:
                n_out, n_in = SHAPES[name]
                total += scheme_of_shares(n_in, bits, share, [32] * len(bits)).total_bits(n_out)
            entries.append(
                {"accuracy": accuracy, "total_bits": total}
                | {name.split(".")[-1]: params for name in names}
            )
        content["measurement"][key] = entries
    return content


def test_exllamav2s_measurement_is_read(tmp_path: Path) -> None:
    file = tmp_path / "measurement.json"
    file.write_text(json.dumps(exllamav2s()))
    found = read_measurement(file, MODEL, SHAPES)
    assert list(found.options) == ["model.layers.0.self_attn", "model.layers.0.mlp"]
    n_weights = sum(a * b for a, b in SHAPES.values())
    most = sum(o[-1].total_bits for o in found.options.values()) / n_weights
    chosen = allocate(found.options, n_weights, most)
    assert chosen.schemes.keys() == SHAPES.keys()
    assert chosen.schemes["model.layers.0.mlp.down_proj"] == scheme((8, 128, 32))
    assert found.to_json() == exllamav2s()

    content = exllamav2s()
    content["measurement"]["model.layers.0.mlp"][0]["total_bits"] += 1
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="of another model: model.layers.0.mlp takes"):
        read_measurement(file, MODEL, SHAPES)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(accuracy=float("nan")),
        lambda entry: entry["up_proj"].update(group_size=0),
        lambda entry: entry["up_proj"].update(bits_prop=[0.1]),
        lambda entry: entry.pop("up_proj"),
    ],
)
def test_a_damaged_measurement_of_exllamav2_is_refused(change, tmp_path: Path) -> None:
    content = json.loads(json.dumps(exllamav2s()))
    change(content["measurement"]["model.layers.0.mlp"][0])
    file = tmp_path / "measurement.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp"):
        read_measurement(file, MODEL, SHAPES)

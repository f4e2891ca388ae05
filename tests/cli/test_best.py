"""`dsq quantize` with a target, a recipe, or best-N: the budget is kept and the file is closer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsq.cli.main import main
from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.gguf.reader import read_gguf
from dsq.runtime.calibration.workdir import WorkDir
from dsq.runtime.fidelity import mix
from dsq.runtime.source import Source
from tests.cli.test_main import fails
from tests.models import TINY_CODER, llama_config, write_hf
from tests.runtime.changed import changed
from tests.runtime.dying import die

pytestmark = pytest.mark.torch

HELDOUT = TINY_CODER / "heldout.txt"
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
CALIBRATE = ("--calibrate", "--text", HELDOUT, "--ctx", "64", "--tokens", "512", "-t", "1")


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    command = ["calibrate", str(TINY_CODER), "--text", str(HELDOUT), "--tokens", "4k"]
    command += ["--ctx", "128", "--hessians", "--gradients", "-o", str(out), "--json"]
    assert main(command) == 0
    return out


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    """The table of a model and its statistics, which most tests here need."""
    sensitivities, tables = mix.sensitivities, {}

    def remembered(checkpoint: Any, stats: Any, **settings: Any) -> Any:
        key = checkpoint.path, stats.path
        if key not in tables:
            tables[key] = sensitivities(checkpoint, stats, **settings)
        return tables[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mix, "sensitivities", remembered)
        yield


def quantize(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, object]:
    capsys.readouterr()
    assert main(["quantize", *map(str, args), "--json"]) == 0
    content: dict[str, object] = json.loads(capsys.readouterr().out)
    return content


def test_bits_a_weight(tmp_path: Path, stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mix.gguf"
    quantize(capsys, "--target-bpw", 4.5, TINY_CODER, "--stats", stats, "-o", out)
    assert 4.45 < Source(out).bpw <= 4.5
    recipe = json.loads((tmp_path / "mix.recipe.json").read_text())
    stored = {name: t.type.name for name, t in open_checkpoint(out).tensors.items()}
    assert recipe["types"].items() <= stored.items()


def test_a_recipe_gives_the_same_file_again(
    tmp_path: Path, stats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again, recipe = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "r.json"
    quantize(
        capsys,
        *("--target-kld", 0.01, TINY_CODER, "--stats", stats, "-o", first),
        *("--save-recipe", recipe),
    )
    quantize(capsys, "--recipe", recipe, TINY_CODER, "--stats", stats, "-o", again)
    assert first.read_bytes() == again.read_bytes()
    assert 0.005 < json.loads(recipe.read_text())["predicted_kld"] <= 0.01


def test_a_size_in_bytes_is_kept(
    tmp_path: Path, stats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mix.gguf"
    quantize(capsys, "--target-size", "3.4MiB", TINY_CODER, "--stats", stats, "-o", out)
    assert 0.95 * 3.4 * 2**20 < out.stat().st_size <= 3.4 * 2**20


def test_a_card_leaves_what_the_cache_does_not_take(
    stats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--vram", "24M", "--ctx", 2048, TINY_CODER, "--stats", stats, "--dry-run")
    report = quantize(capsys, *command)
    memory = {"weights": report["size_bytes"], "kv": 2 * 4 * 256 * 2048 * 2}
    assert sum(memory.values()) < 24 * 2**20  # type: ignore[call-overload]
    words = fails(capsys, "quantize", "--vram", "8M", *command[2:])
    assert "use a smaller --ctx" in words


def test_the_table_is_printed(stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", "--target-bpw", "4", str(TINY_CODER), "--stats", str(stats)]
    assert main([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "blk.3.ffn_down" in text
    assert "the best mix at each size" in text
    assert "would write" in text


@pytest.mark.slow
def test_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each step is judged on held-out text; a mix alone beats the stock file of its size."""
    out = tmp_path / "best.gguf"
    report = quantize(
        capsys,
        *("best-4.91", TINY_CODER, "--text", HELDOUT, "--ctx", 128, "--tokens", "8k", "-o", out),
    )
    steps = report["steps"]
    assert isinstance(steps, list)
    assert [step["name"] for step in steps] == ["stock q4_0", "mix", "compensated", "distilled"]
    stock, kept = steps[0], [step for step in steps if step["kept"]]
    assert kept[-1]["kld"] < 0.5 * stock["kld"]  # measured: 0.21 with 28k tokens
    assert Source(out).bpw <= 4.91
    # The file says how its weights came to be.
    names = [step["name"] for step in kept]
    method = "+".join(name for name in names if name in ("compensated", "distilled"))
    metadata = read_gguf(out).metadata
    assert {key: value for key, value in metadata.items() if "quantize." in key} == {
        "dsq.quantize.method": method,
        "dsq.quantize.dataset": "heldout.txt",
        "dsq.quantize.tokens": 56 * 128,
    }


@pytest.mark.parametrize(
    "places",
    [
        pytest.param(
            (
                "dsq.runtime.calibration.steps:Steps._output",  # of the statistics
                "dsq.runtime.fidelity.mix:sensitivities",
                "dsq.runtime.fidelity.two_ways:TwoWays.see",
                "dsq.runtime.calibration.workdir:WorkDir.finish_all",
            ),
            id="in every step",
            marks=pytest.mark.slow,
        ),
        pytest.param(("dsq.runtime.fidelity.mix:sensitivities",), id="once"),
    ],
)
def test_killed_and_run_again(
    tmp_path: Path, places: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The statistics are not made again, and the file has the same bytes."""
    model = write_hf(tmp_path / "hf", llama_config(**SMALL))
    command = ["--target-bpw", "6", model, "--method", "compensated", *CALIBRATE]
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    quantize(capsys, *command, "-o", whole)
    recipes = [file.with_suffix(".recipe.json") for file in (whole, out)]
    command += ["-o", out, "--save-recipe", recipes[1]]
    for where in places:
        code = "from dsq.cli.main import main\nmain(command)"
        die(code, where, 1, command=["quantize", *map(str, command)])
        assert not out.exists()
        assert (tmp_path / "out.gguf.partial").is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsq.runtime.calibration.steps.Steps._embed", None)  # it is not begun anew
        report = quantize(capsys, *command)
    assert report["files"] == [str(out)]
    assert out.read_bytes() == whole.read_bytes()
    assert recipes[0].read_bytes() == recipes[1].read_bytes()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"hf", *(path.name for path in (whole, out, *recipes))}


def test_an_unfinished_mix_is_not_mixed_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    original, model = write_hf(tmp_path / "original", llama_config(**SMALL)), tmp_path / "hf"
    shutil.copytree(original, model)
    command = ["--target-bpw", "6", model, *CALIBRATE, "-o", "out.gguf"]
    with monkeypatch.context() as patch:
        patch.setattr("dsq.runtime.fidelity.mix.sensitivities", interrupted)
        assert main(["quantize", *map(str, command)]) == 130
    words = fails(capsys, "quantize", "--target-bpw", "7", *command[2:])
    assert "out.gguf.partial holds an unfinished run with other settings" in words
    changed(original, model, "model.layers.0.mlp.up_proj.weight", 0.5)  # in the last row
    words = fails(capsys, "quantize", *command)
    assert "out.gguf.partial holds an unfinished run with other settings" in words
    with WorkDir(tmp_path / "b.gguf", "settings"):
        words = fails(capsys, "quantize", *command[:-1], "b.gguf")
    assert "b.gguf is being written by another run" in words
    # Without -o the name is not known yet; nothing is left of a look at the table.
    report = quantize(capsys, *command[:-2], "--dry-run")
    assert str(report["output"]).startswith("hf-")
    left = {path.name for path in tmp_path.glob("*gguf*")}
    assert left == {"out.gguf.partial", "b.gguf.partial"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--target-bpw", "4", "--target-kld", "1", "."), "give one target"),
        (("q4_0", ".", "--target-bpw", "4"), "leave TYPE out"),
        (("q4_0", ".", "--save-recipe", "r.json"), "--save-recipe: only with a target"),
        (("--target-bpw", "4", TINY_CODER), "give --stats FILE"),
        (("--target-bpw", "-1", "."), "no positive number"),
        (("--target-bpw", "4", TINY_CODER, "--pure"), "--pure: the mix decides"),
        (("best-4.5", TINY_CODER, "--text", HELDOUT, "--dry-run"), "leave --stats"),
        (("--recipe", "nowhere.json", TINY_CODER), "cannot read the recipe"),
    ],
)
def test_a_muddle_is_an_error(
    capsys: pytest.CaptureFixture[str], args: tuple[object, ...], words: str
) -> None:
    assert words in fails(capsys, "quantize", *args)


def test_too_small_a_target(stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = fails(capsys, "quantize", "--target-bpw", 2, TINY_CODER, "--stats", stats)
    assert "raise the target" in words
    text = ("--calibrate", "--text", HELDOUT)
    for command in (("best-0.5", TINY_CODER, *text[1:]), ("--target-bpw", 0.5, TINY_CODER, *text)):
        assert "0.5 bpw: norms and embedding alone take" in fails(capsys, "quantize", *command)


def test_statistics_that_do_not_serve(
    tmp_path: Path, stats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_hf(tmp_path / "other", llama_config())
    words = fails(capsys, "quantize", "--target-bpw", 5, other, "--stats", stats)
    assert "statistics of another model" in words
    bare = tmp_path / "bare.safetensors"
    command = ["calibrate", str(TINY_CODER), "--text", str(HELDOUT), "--tokens", "256"]
    assert main([*command, "--ctx", "128", "-o", str(bare), "--json"]) == 0
    capsys.readouterr()
    words = fails(capsys, "quantize", "--target-bpw", 5, TINY_CODER, "--stats", bare)
    assert "--hessians --gradients" in words

"""Layer-streamed statistics against whole models: transformers' hooks, autograd, llama.cpp."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsq.convert import atomic
from dsq.convert.checkpoint import open_checkpoint
from dsq.convert.identity import model_identity
from dsq.convert.names import gguf_name, hf_name
from dsq.convert.pipeline import plan_gguf, run_gguf_plan
from dsq.errors import DsqError, InputError
from dsq.quant.presets import preset
from dsq.quant.stats import STAGES, Stats, input_of, read_stats
from dsq.runtime import decoder
from dsq.runtime.calibration import steps as calibration_steps
from dsq.runtime.calibration.calibrate import Options, calibrate, choose_windows
from dsq.runtime.calibration.moments import Moments
from dsq.runtime.calibration.workdir import WorkDir
from tests.models import TINY_CODER, llama_config, random_weights, write_hf, write_safetensors
from tests.runtime.changed import changed

pytestmark = pytest.mark.torch

TEXT = (TINY_CODER / "heldout.txt").read_text(encoding="utf-8")[:6000]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "attention_bias": True,
}
FEW = Options(n_ctx=32, n_tokens=640, n_threads=1)
ALL = Options(
    n_ctx=32, n_tokens=640, hessians=True, gradients=True, n_gradient_tokens=320, n_threads=1
)


def windows(path: Path, options: Options = FEW, text: str = TEXT) -> Any:
    return choose_windows(open_checkpoint(path), [text], options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf"), llama_config(**SMALL), dtype="F32")


@pytest.fixture(scope="module")
def stats(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    out = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    calibrate(model, out, windows(model), options=ALL)
    return read_stats(out)


@pytest.fixture(scope="module")
def whole(model: Path) -> Any:
    """The same model in transformers, whole."""
    import torch
    from transformers import LlamaForCausalLM

    from dsq.runtime.torch_engine import llama_config as config

    spec = open_checkpoint(model).spec
    torch.set_num_threads(1)
    found = LlamaForCausalLM.from_pretrained(model, config=config(spec), dtype=torch.float32)
    return found.eval()


def linears(whole: Any) -> dict[str, Any]:
    """transformers' modules by GGUF name."""
    names = [n for n, _ in whole.named_modules() if n.endswith("_proj") or n == "lm_head"]
    return {gguf_name(f"{name}.weight"): whole.get_submodule(name) for name in names}


def test_the_stages_are_the_decoders() -> None:
    theirs = {
        stage: tuple(gguf_name(f"model.layers.0.{n}.weight").split(".")[2] for n in names)
        for stage, names in decoder.STAGES.items()
    }
    assert theirs == STAGES


def test_moments_equal_those_of_transformers_modules(stats: Stats, whole: Any) -> None:
    import torch

    seen: dict[str, Any] = {}
    hooks = [
        linear.register_forward_hook(lambda m, x, y, n=name: seen.update({n: x[0].detach()}))
        for name, linear in linears(whole).items()
    ]
    with torch.inference_mode():
        whole(torch.from_numpy(stats.tokens.astype(np.int64)))
    for hook in hooks:
        hook.remove()
    assert {input_of(name) for name in seen} == set(stats.inputs)
    for name, values in seen.items():
        x = values.flatten(0, 1).double().numpy()
        found = stats.inputs[input_of(name)]
        assert found.count == len(x)
        np.testing.assert_allclose(found.mean_sq, (x**2).mean(0), rtol=1e-4, err_msg=name)
        hessian = found.hessian
        assert hessian is not None
        scale = np.sqrt(np.outer((x**2).mean(0), (x**2).mean(0)))
        assert np.abs(hessian - x.T @ x / len(x)).max() < 1e-5 * scale.max()
        np.testing.assert_array_equal(hessian, hessian.T)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 700])
def test_strips_make_a_whole_hessian(n: int) -> None:
    import torch

    x = np.random.default_rng(n).standard_normal((2, 3, 40, n), dtype=np.float32)
    moments = Moments(n, "cpu", hessian=True)
    for batch in x:
        moments.add(torch.from_numpy(batch))
    rows = x.reshape(-1, n).astype(np.float64)
    np.testing.assert_allclose(moments.mean_sq(), (rows**2).mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.hessian(), rows.T @ rows / len(rows), atol=1e-6)


def test_gradients_equal_autograd_through_the_whole_model(stats: Stats, whole: Any) -> None:
    import torch

    ids = torch.from_numpy(stats.tokens[:10].astype(np.int64))
    outputs: dict[str, Any] = {}

    def keep(module: Any, inputs: Any, output: Any, name: str) -> None:
        output.retain_grad()
        outputs[name] = output

    hooks = [
        linear.register_forward_hook(lambda m, x, y, n=name: keep(m, x, y, n))
        for name, linear in linears(whole).items()
    ]
    log_p = whole(ids).logits.log_softmax(-1)
    for hook in hooks:
        hook.remove()
    # The labels: drawn from p by inverting its distribution function, at uniform numbers.
    draws = np.stack([np.random.default_rng([0, i]).random(32) for i in range(10)])
    below = log_p.detach().double().exp().cumsum(-1).numpy()
    labels = torch.from_numpy((below <= draws[..., None] * below[..., -1:]).sum(-1))
    log_p.gather(-1, labels[..., None]).sum().backward()
    assert set(outputs) == set(stats.gradients)
    for name, output in outputs.items():
        wanted = output.grad.flatten(0, 1).double().square().mean(0).numpy()
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
        if heads:  # GGUF's row order: LlamaModel.permute of llama.cpp's converter
            wanted = wanted.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
        np.testing.assert_allclose(stats.gradients[name], wanted, rtol=2e-3, err_msg=name)


def test_labels_are_drawn_in_proportion() -> None:
    import torch

    from dsq.runtime.calibration.fisher import sampled_labels

    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    labels = sampled_labels(p.expand(1000, -1), (np.arange(1000) + 0.5) / 1000)
    np.testing.assert_array_equal(np.bincount(labels.numpy()), [500, 0, 300, 200])
    edge = sampled_labels(p.expand(2, -1), np.array([0.0, np.nextafter(1, 0)]))
    assert edge.tolist() == [0, 3]


def test_second_order_estimate_is_near_the_measured_divergence(tmp_path: Path) -> None:
    """½ Σ_o g_o δw_o H δw_oᵀ for a small random δ in one matrix of tiny-coder."""
    import torch

    options = Options(128, 2048, hessians=True, gradients=True, n_threads=1)
    calibrate(TINY_CODER, tmp_path / "s", windows(TINY_CODER, options), options=options)
    stats = read_stats(tmp_path / "s")
    checkpoint = open_checkpoint(TINY_CODER)
    graph = decoder.Decoder(checkpoint.spec, 128)
    weights = {hf_name: decoder.read_tensor(checkpoint, hf_name) for hf_name in checkpoint.tensors}
    ids = torch.from_numpy(stats.tokens.astype(np.int64))

    def log_p(changed: dict[str, Any]) -> Any:
        merged = {**weights, **changed}
        hidden = merged["model.embed_tokens.weight"][ids]
        for i in range(checkpoint.spec.n_layer):
            start = f"model.layers.{i}."
            part = {n.removeprefix(start): w for n, w in merged.items() if n.startswith(start)}
            hidden = graph.layer(part, hidden)
        logits = graph.logits(merged["model.norm.weight"], merged["lm_head.weight"], hidden)
        return logits.log_softmax(-1)

    generator = torch.Generator().manual_seed(0)
    ratios = {}
    with torch.inference_mode():
        before = log_p({})
        for name in stats.gradients:
            if not name.startswith(("blk.1", "output")) or "attn_q" in name or "attn_k" in name:
                continue  # Q and K would have to be reordered here
            weight = weights[hf_name(name)]
            delta = 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
            after = log_p({hf_name(name): weight + delta})
            measured = (before.exp() * (before - after)).sum(-1).mean()
            hessian = torch.from_numpy(stats.inputs[input_of(name)].hessian)
            by_row = ((delta @ hessian) * delta).sum(1)
            ratios[name] = float(
                0.5 * (torch.from_numpy(stats.gradients[name]) @ by_row) / measured
            )
    assert len(ratios) == 6
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios


def test_moments_need_no_hessians(stats: Stats, model: Path, tmp_path: Path) -> None:
    """And are the same bits without."""
    calibrate(model, tmp_path / "s", windows(model), options=FEW)
    few = read_stats(tmp_path / "s")
    assert not few.has_hessians
    assert not few.gradients
    for name, found in few.inputs.items():
        np.testing.assert_array_equal(found.mean_sq, stats.inputs[name].mean_sq)


def test_a_gguf_is_the_same_model_as_its_checkpoint(tmp_path: Path) -> None:
    source = open_checkpoint(write_hf(tmp_path / "hf", llama_config(**SMALL)))
    ours = {}
    for kind in ("bf16", "f16", "f32", "q8_0"):
        out = tmp_path / f"{kind}.gguf"
        run_gguf_plan(source, plan_gguf(source, preset(kind)), out)
        ours[kind] = model_identity(open_checkpoint(out))
    assert ours["bf16"] == ours["f16"] == ours["f32"] == model_identity(source)
    assert ours["q8_0"]["quantized"]
    assert ours["q8_0"]["norms"] == ours["bf16"]["norms"]
    for path in (source.path, tmp_path / "bf16.gguf"):
        calibrate(path, tmp_path / f"{path.name}.st", windows(path), options=FEW)
    assert (tmp_path / "hf.st").read_bytes() == (tmp_path / "bf16.gguf.st").read_bytes()
    stats = read_stats(tmp_path / "hf.st")
    stats.check_model(ours["q8_0"])
    other = write_hf(tmp_path / "other", llama_config(**SMALL), seed=1)
    with pytest.raises(InputError, match="a hash of its norms"):
        stats.check_model(model_identity(open_checkpoint(other)))


def test_a_tied_model_has_gradients_of_its_head(tmp_path: Path) -> None:
    config = llama_config(**SMALL, tie_word_embeddings=True)
    path = write_hf(tmp_path / "hf", config)
    calibrate(path, tmp_path / "s", windows(path), options=ALL)
    assert read_stats(tmp_path / "s").gradients["output.weight"].all()


# What is run


def test_windows_are_llama_perplexitys(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    every = choose_windows(checkpoint, [TEXT], Options(n_ctx=32))
    assert (every[:, 0] == checkpoint.spec.bos_id).all()
    some = choose_windows(checkpoint, [TEXT], FEW)
    assert some.shape == (20, 32)
    assert {w.tobytes() for w in some} < {w.tobytes() for w in every}
    again = choose_windows(checkpoint, [TEXT], FEW)
    np.testing.assert_array_equal(some, again)
    other = choose_windows(checkpoint, [TEXT], Options(n_ctx=32, n_tokens=640, seed=1))
    assert not np.array_equal(some, other)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a = 1", FEW, "one window needs 32; give a longer text"),
        (" \n", FEW, "the text is empty"),
        (TEXT, Options(n_ctx=32, n_tokens=31), "--tokens 31 is less than a window of 32"),
        (TEXT, Options(n_ctx=32768), "trained on 16384 tokens; give less"),
        (TEXT, Options(n_ctx=32, device="cuda"), "sees no CUDA card"),
    ],
)
def test_bad_input_is_refused(
    model: Path, tmp_path: Path, text: str, options: Options, message: str
) -> None:
    import torch

    if options.device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA card")
    with pytest.raises(InputError, match=message):
        calibrate(model, tmp_path / "s", windows(model, options, text), options=options)
    assert not list(tmp_path.iterdir())


def test_nan_activations_name_the_layer(tmp_path: Path) -> None:
    config = llama_config(**SMALL)
    path = write_hf(tmp_path / "hf", config, dtype="F32")
    weights = random_weights(config)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write_safetensors(path / "model.safetensors", weights, "F32")
    with pytest.raises(DsqError, match=r"activations at blk\.1\.ffn_out are NaN or Inf"):
        calibrate(path, tmp_path / "s", windows(path), options=FEW)
    assert not (tmp_path / "s.partial").exists()


# Faults

_CHILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from dsq.runtime.calibration import steps as calibration_steps
from dsq.runtime.calibration import calibrate
from dsq.runtime.calibration.borders import Border

left, write = int(sys.argv[3]), Border.write

def dying(border, start, values):
    global left
    left -= 1
    if left == 0:
        write(border, start, values[:, :5])  # the last thing it does is half done
        os.kill(os.getpid(), signal.SIGKILL)
    write(border, start, values)

Border.write = dying
options = calibrate.Options(
    hessians=True, gradients=True, n_gradient_tokens=320, n_threads=1
)
calibration_steps.BATCH_TOKENS = 160
ids = np.load(sys.argv[4])
calibrate.calibrate(sys.argv[1], Path(sys.argv[2]), ids, options=options)
"""


@pytest.mark.parametrize("at", [3, 11, 17, 23], ids=["embedding", "forwards", "head", "backwards"])
def test_killed_and_run_again_gives_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Writes of hidden states: 4 a border (5 windows of 32 at once), then 2 a border backwards."""
    monkeypatch.setattr(calibration_steps, "BATCH_TOKENS", 160)
    calibrate(model, tmp_path / "whole", windows(model), options=ALL)
    out = tmp_path / "killed"
    np.save(tmp_path / "ids.npy", windows(model))
    command = [sys.executable, "-c", _CHILD, model, out, str(at), tmp_path / "ids.npy"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not out.exists()
    report = calibrate(model, out, windows(model), options=ALL)
    assert report.resumed_steps == {3: 0, 11: 2, 17: 5, 23: 8}[at]
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "killed", "ids.npy"}


def stop_at(step: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_run_is_not_mixed_with_another(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, out, windows(model), options=FEW, progress=stop_at(2))
    with pytest.raises(InputError, match=r"s\.partial holds an unfinished run with other settings"):
        calibrate(model, out, windows(model), options=ALL)
    assert calibrate(model, out, windows(model), options=FEW).resumed_steps == 2


def test_an_interrupted_run_of_other_weights_is_not_gone_on_with(
    model: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "hf", tmp_path / "s"
    shutil.copytree(model, source)
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, out, windows(source), options=FEW, progress=stop_at(2))
    changed(model, source, "model.layers.2.mlp.up_proj.weight", 0.5)  # in the last row
    with pytest.raises(InputError, match=r"s\.partial holds an unfinished run with other settings"):
        calibrate(source, out, windows(source), options=FEW)


def test_two_runs_on_one_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    with (
        WorkDir(out, "settings"),
        pytest.raises(InputError, match="is being written by another run"),
    ):
        calibrate(model, out, windows(model), options=FEW)


def test_an_output_that_exists_is_kept(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    out.write_text("mine")
    with pytest.raises(InputError, match="exists; give another output, or --force"):
        calibrate(model, out, windows(model), options=FEW)
    calibrate(model, out, windows(model), options=FEW, force=True)
    assert read_stats(out)


def test_a_disk_too_small_is_told_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="free some space or give another output"):
        calibrate(model, tmp_path / "s", windows(model), options=FEW)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_told_and_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve, left = os.posix_fallocate, [3]

    def full(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*args)

    out = tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(InputError, match="the disk is full; free some space"):
            calibrate(model, out, windows(model), options=FEW)
    assert calibrate(model, out, windows(model), options=FEW).resumed_steps == 2

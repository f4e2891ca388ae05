"""The cache of repacked models: by content, bounded, and safe when two runs want the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dsq.convert.checkpoint import HfCheckpoint, open_checkpoint
from dsq.errors import DsqError, InputError
from dsq.runtime import repack_cache
from dsq.runtime.repack_cache import RepackCache, generation_engine
from dsq.runtime.source import EngineSettings, Source
from tests.models import ROOT, llama_config, write_hf
from tests.packed_models import write_gptq

SMALL = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2}


def model(folder: Path, bits: int = 4, **settings: object) -> HfCheckpoint:
    config = llama_config(torch_dtype="float16", **{**SMALL, "num_key_value_heads": 2})
    write_gptq(folder, config=config, bits=bits, **settings)
    return opened(folder)


def opened(folder: Path) -> HfCheckpoint:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, HfCheckpoint)
    return checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[HfCheckpoint]:
    folder = tmp_path_factory.mktemp("models")
    return [model(folder / str(bits), bits) for bits in (4, 3, 2)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which GGUFs were really written."""
    paths: list[Path] = []
    original = repack_cache.run_repack

    def counted(plan, out, **options):  # type: ignore[no-untyped-def]
        paths.append(out)
        return original(plan, out, **options)

    monkeypatch.setattr(repack_cache, "run_repack", counted)
    return paths


def used(cache: RepackCache, checkpoint: HfCheckpoint) -> Path:
    with cache.open(checkpoint, threads=1) as (path, _):
        assert path.is_file()
    return path


def test_an_entry_is_made_once_and_found_by_content(models, made, tmp_path):
    cache = RepackCache(tmp_path / "cache")
    first = used(cache, models[0])
    assert used(cache, models[0]) == first
    shutil.copytree(models[0].path, tmp_path / "elsewhere")  # other times, other folder
    for file in (tmp_path / "elsewhere").iterdir():
        os.utime(file, (1, 1))
    assert used(cache, opened(tmp_path / "elsewhere")) == first
    assert made == [first]
    (tmp_path / "elsewhere" / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert used(cache, opened(tmp_path / "elsewhere")) != first


def test_the_entry_used_longest_ago_makes_room(models, made, tmp_path):
    cache = RepackCache(tmp_path / "cache")
    a, b = used(cache, models[0]), used(cache, models[1])
    os.utime(a, (2, 2))
    os.utime(b, (1, 1))
    bounded = RepackCache(cache.folder, limit=a.stat().st_size + b.stat().st_size)
    c = used(bounded, models[2])
    assert (a.exists(), b.exists(), c.exists()) == (True, False, True)
    assert not b.with_suffix(".json").exists()
    used(bounded, models[0])
    assert made == [a, b, c]


def test_what_is_being_loaded_is_not_removed(models, tmp_path):
    cache = RepackCache(tmp_path / "cache")
    size = used(cache, models[0]).stat().st_size
    bounded = RepackCache(cache.folder, limit=int(1.5 * size))
    with bounded.open(models[0], threads=1) as (a, _):
        b = used(bounded, models[1])
        assert a.exists()
    c = used(bounded, models[2])  # now both may go
    assert (a.exists(), b.exists(), c.exists()) == (False, False, True)


def test_what_a_killed_run_left_counts_for_nothing(models, made, tmp_path):
    cache = RepackCache(tmp_path / "cache")
    a, b = used(cache, models[0]), used(cache, models[1])
    a.with_suffix(".json").unlink()  # killed before the record
    left = [path.with_name(f".{path.name}.0123abcd.tmp") for path in (a, b)]
    for path in left:
        path.write_bytes(b"half")
    b.write_bytes(b.read_bytes()[:-1])
    wanted = models[0]
    assert used(cache, wanted) == a
    assert made == [a, b, a]
    assert not any(path.exists() for path in left)
    assert not b.exists()


def test_two_threads_make_one_entry(models, made, tmp_path):
    cache = RepackCache(tmp_path / "cache")
    gate, found = threading.Barrier(3), []

    def run() -> None:
        gate.wait()
        found.append(used(cache, models[0]))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [made[0]] * 3
    assert len(made) == 1


_USE = """
import sys
from pathlib import Path
from dsq.convert.checkpoint import open_checkpoint
from dsq.runtime.repack_cache import RepackCache
cache = RepackCache(Path(sys.argv[1]), limit=int(sys.argv[2]))
for path in sys.argv[3:]:
    with cache.open(open_checkpoint(path), threads=1) as (gguf, record):
        assert gguf.stat().st_size == record.size_bytes
"""


def test_processes_that_push_each_other_out(models, tmp_path):
    """Room for one of three; each process finds each model whole all the same."""
    size = used(RepackCache(tmp_path / "cache"), models[0]).stat().st_size
    paths = [str(m.path) for m in models]
    command = [sys.executable, "-c", _USE, str(tmp_path / "cache"), str(int(1.5 * size))]
    runs = [
        subprocess.Popen([*command, *order], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for order in (paths * 2, paths[::-1] * 2)
    ]
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def test_what_does_not_fit_and_what_cannot_be_written(models, tmp_path):
    with pytest.raises(InputError, match="more than the cache's 1000 B; .* --engine torch"):
        used(RepackCache(tmp_path / "cache", limit=1000), models[0])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DsqError, match="cannot be used .*; set DSQ_CACHE to another folder"):
        used(RepackCache(tmp_path / "file"), models[0])


def test_engines_that_cannot_run_a_model(models, tmp_path):
    cache = RepackCache(tmp_path / "cache")
    gguf = used(cache, models[0])
    settings = EngineSettings(64, 1)
    with pytest.raises(InputError, match="--engine torch runs directories, and this is a GGUF"):
        generation_engine(Source(gguf), settings, name="torch")
    dense = write_hf(tmp_path / "dense", llama_config(**SMALL, num_key_value_heads=2))
    with pytest.raises(InputError, match="llama.cpp runs GGUF files; convert the directory"):
        generation_engine(Source(dense), settings, name="llama.cpp")


def test_llama_cpp_runs_it_and_a_loss_is_told(models, tmp_path):
    cache = RepackCache(tmp_path / "cache")
    scattered = model(tmp_path / "scattered", desc_act=True)
    for checkpoint, n_told in ((models[0], 1), (models[0], 0), (scattered, 2), (scattered, 1)):
        told: list[str] = []
        settings = EngineSettings(64, 1)
        engine = generation_engine(Source(checkpoint.path), settings, cache=cache, tell=told.append)
        assert engine.logits([5, 6, 7]).shape == (3, engine.n_vocab)
        engine.close()
        assert len(told) == n_told, told
    assert "not lossless: 12 of 14 matrices were rounded to q8_0, a weight by at most" in told[0]

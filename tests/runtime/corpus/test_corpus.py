"""Samples and windows: nothing is lost, and a middle can be put back."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.errors import InputError
from dsq.runtime.corpus import fim
from dsq.runtime.corpus.corpus import Corpus
from dsq.runtime.corpus.samples import Cutter
from dsq.runtime.corpus.sources import Document, Entry
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.corpus.conftest import python_module


def parts(tokenizer, ids):
    """(prefix, suffix, middle) of a FIM sample, by its markers."""
    v = tokenizer.vocab
    assert ids[0] == v.fim_prefix
    hole, end = ids.index(v.fim_suffix), ids.index(v.fim_middle)
    assert 0 < hole < end
    return tuple(
        tokenizer.decode_bytes(some) for some in (ids[1:hole], ids[hole + 1 : end], ids[end + 1 :])
    )


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200), seed=st.integers())
@settings(max_examples=50, deadline=None)
def test_a_fim_sample_is_the_text_again(tokenizer, text, seed):
    prefix, suffix, middle = parts(tokenizer, fim.sample(tokenizer, text, random.Random(seed)))
    assert (prefix + middle + suffix).decode() == text


def test_cuts_fall_anywhere(tokenizer):
    text = python_module(1, 2)
    found = {
        len(parts(tokenizer, fim.sample(tokenizer, text, random.Random(i)))[0]) for i in range(300)
    }
    assert len(found) > 100
    assert min(found) < 0.05 * len(text)
    assert max(found) > 0.8 * len(text)


def test_a_model_without_the_tokens_gets_no_fim(tokenizer):
    plain = Tokenizer.from_vocabulary(
        replace(tokenizer.vocab, fim_prefix=None, fim_suffix=None, fim_middle=None)
    )
    cutter = Cutter(plain, 256, 0, 1.0)
    assert cutter.fim_rate == 0
    assert not any(sample.is_fim for sample in cutter.code(document(3)))


def document(n, n_functions=12):
    entries = (
        Entry(f"r/m{i}.py", "Python", f"#m{i}.py\n{python_module(i, n_functions)}\n", "", "MIT")
        for i in range(n)
    )
    return Document(tuple(entries))


@pytest.mark.parametrize("n_ctx", [64, 300, 4096])
def test_samples_hold_all_the_text_and_fit_the_window(tokenizer, n_ctx):
    whole = document(5)
    end = Cutter(tokenizer, n_ctx, 0, 0).end
    assert tokenizer.vocab.tokens[end] == "<｜end▁of▁sentence｜>"
    plain = list(Cutter(tokenizer, n_ctx, 0, 0.0).code(whole))
    text = "".join(entry.text for entry in whole.entries)
    assert "".join(tokenizer.decode(sample.ids) for sample in plain) == text
    assert all(sample.ids[-1] == end for sample in plain)
    assert all(len(sample.ids) < n_ctx for sample in plain)
    cut = list(Cutter(tokenizer, n_ctx, 0, 1.0).code(whole))
    assert all(len(sample.ids) < n_ctx for sample in cut)
    assert sum(sample.is_fim for sample in cut) > 0.9 * len(cut)
    for one, other in zip(plain, cut, strict=True):
        if other.is_fim:
            prefix, suffix, middle = parts(tokenizer, other.ids[:-1])
            assert prefix + middle + suffix == tokenizer.decode_bytes(one.ids)


def test_a_shortened_fim_sample_is_plain_text(tokenizer):
    cutter = Cutter(tokenizer, 400, 0, 1.0)
    sample = next(sample for sample in cutter.code(document(2)) if sample.is_fim)
    whole = cutter.shorten(sample, 10_000)
    prefix, suffix, middle = parts(tokenizer, sample.ids[:-1])
    assert tokenizer.decode_bytes(whole.ids) == prefix + middle + suffix
    assert cutter.shorten(sample, 9).ids == whole.ids[:9]
    assert not whole.is_fim


def test_files_stay_together_while_they_fit(tokenizer):
    whole = document(6, 2)
    sizes = [len(tokenizer.encode(entry.text, add_bos=False)) for entry in whole.entries]
    samples = list(Cutter(tokenizer, 2 * max(sizes) + 40, 0, 0.0).code(whole))
    assert [len(sample.entries) for sample in samples] == [2, 2, 2]


def test_one_long_line_is_cut_as_well(tokenizer):
    entry = Entry("a", "Text", "word " * 3000, "", "")
    samples = list(Cutter(tokenizer, 128, 0, 0.0).prose(Document((entry,))))
    assert "".join(tokenizer.decode(sample.ids) for sample in samples) == entry.text
    assert all(len(sample.ids) < 128 for sample in samples)


# Windows

documents = st.lists(
    st.tuples(st.lists(st.integers(10, 99), min_size=1, max_size=30), st.booleans()),
    min_size=1,
    max_size=30,
)


@given(documents, st.integers(4, 24), st.sampled_from([None, 7]))
@settings(deadline=None)
def test_windows_hold_the_documents_tokens(made, n_ctx, bos):
    corpus = Corpus([ids for ids, _ in made], [whole for _, whole in made], {})
    room = n_ctx - (bos is not None)
    if corpus.n_tokens < room:
        with pytest.raises(InputError, match="one window needs"):
            corpus.windows(n_ctx, bos=bos)
        return
    windows = corpus.windows(n_ctx, bos=bos)
    assert windows.dtype == np.int32
    assert windows.shape == (corpus.n_tokens // room, n_ctx)
    if bos is not None:
        assert (windows[:, 0] == bos).all()
    tokens = sorted(windows[:, n_ctx - room :].ravel().tolist())
    have = sorted(token for ids, _ in made for token in ids)
    for token in tokens:
        have.remove(token)  # ValueError if a token came out that did not go in
    assert len(have) < room


def test_whole_documents_are_not_cut_while_others_can_fill(tokenizer):
    rng = random.Random(0)
    whole = [[1, *[5] * rng.randint(20, 60), 2] for _ in range(40)]  # 1 begins one, 2 ends it
    other = [[6] * rng.randint(5, 90) for _ in range(60)]
    corpus = Corpus(whole + other, [True] * 40 + [False] * 60, {})
    windows = corpus.windows(64, bos=0)
    begins, ends = (windows == 1).sum(axis=1), (windows == 2).sum(axis=1)
    assert begins.sum() == 40
    assert (begins == ends).all()
    # Any number of windows is a sample of all: the whole documents do not come out first.
    assert 0 < begins[len(windows) // 2 :].sum() < 40


def test_windows_stop_at_the_tokens_asked_for(tokenizer):
    corpus = Corpus([[5] * 1000], [False], {})
    assert len(corpus.windows(64, 640)) == 10
    with pytest.raises(InputError, match="the corpus has 63 tokens"):
        corpus.windows(64, 63)
    with pytest.raises(InputError, match="at least 4"):
        corpus.windows(3)

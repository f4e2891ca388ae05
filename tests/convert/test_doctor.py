"""The diagnosis: every fault is found, every mend gives a fresh conversion's metadata back."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsq.convert.doctor import diagnose, mended_entries
from dsq.convert.doctor.template import CODER_TEMPLATE
from dsq.convert.gguf.reader import read_gguf
from dsq.errors import InputError
from tests.old_conversions import EVERY_FAULT, FAULTS, convert, drop, foreign, put

PARAMETERS = pytest.mark.parametrize("name", EVERY_FAULT)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("instruct"), template=CODER_TEMPLATE)


@pytest.fixture
def vocab_files(llama_cpp_source):
    return llama_cpp_source / "models"


def codes(metadata, **options):
    return [finding.code for finding in diagnose(metadata, (), **options).findings]


def mended(metadata, **options):
    kinds = dict.fromkeys(metadata, (0, None))  # types do not matter here
    findings = diagnose(metadata, (), **options).findings
    return {entry.key: entry.value for entry in mended_entries(metadata, kinds, findings)}


def plain(metadata):
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in metadata.items()}


# -- what is right is left alone


def test_fresh_conversions_are_healthy(base, instruct):
    for path in (base, instruct):
        assert codes(read_gguf(path).metadata) == []
        assert codes(foreign(path)) == []


def test_a_real_model_of_another_family_is_healthy(smollm2_gguf):
    gguf = read_gguf(smollm2_gguf)
    assert diagnose(gguf.metadata, gguf.tensors).findings == ()


# -- each fault


@PARAMETERS
def test_each_fault_is_found_and_mended(base, name):
    code, fault = EVERY_FAULT[name]
    metadata = foreign(base)
    fault(metadata)
    assert code in codes(metadata)
    assert plain(mended(metadata)) == plain(foreign(base))


some_faults = st.tuples(*(st.sampled_from([None, *line]) for line in FAULTS))


@settings(max_examples=40, deadline=None)
@given(names=some_faults, of_instruct=st.booleans())
def test_all_faults_of_a_file_are_mended_at_once(base, instruct, names, of_instruct):
    path = instruct if of_instruct else base
    metadata = foreign(path)
    for name in filter(None, names):
        EVERY_FAULT[name][1](metadata)
    assert plain(mended(metadata)) == plain(foreign(path))
    assert codes(mended(metadata)) == []
    # no two findings touch one key
    found = diagnose(metadata, ()).findings
    touched = [key for f in found for key in (*(e.key for e in f.set), *f.delete)]
    touched += [row for f in found for row, _ in f.token_types]
    assert len(touched) == len(set(touched))


def test_keys_keep_their_order_and_new_ones_follow(base):
    metadata = foreign(base)
    metadata["tokenizer.ggml.pre"] = "gpt-2"
    del metadata["tokenizer.ggml.eos_token_id"]
    kinds = dict.fromkeys(metadata, (0, None))
    entries = mended_entries(metadata, kinds, diagnose(metadata, ()).findings)
    assert [e.key for e in entries] == [*metadata, "tokenizer.ggml.eos_token_id"]


# -- the family


def test_a_fine_tune_with_more_tokens_is_still_recognised(base):
    metadata = foreign(base)
    metadata["tokenizer.ggml.tokens"] = ["<extra>", *metadata["tokenizer.ggml.tokens"], "<x>"]
    metadata["tokenizer.ggml.token_type"] = np.array([4, *metadata["tokenizer.ggml.token_type"], 4])
    drop("tokenizer.ggml.pre")(metadata)
    assert mended(metadata)["tokenizer.ggml.pre"] == "deepseek-coder"


def test_of_an_unknown_family_only_what_holds_for_all_is_mended(base):
    """One letter is missing: the vocabulary is no longer DeepSeek Coder's."""
    metadata = foreign(base)
    tokens = ["<letter>" if t == "û" else t for t in metadata["tokenizer.ggml.tokens"]]
    metadata["tokenizer.ggml.tokens"] = tokens
    for name in ("no pre", "no rope factor", "no rope base", "rows normal", "add_bos false"):
        EVERY_FAULT[name][1](metadata)
    diagnosis = diagnose(metadata, ())
    assert diagnosis.family is None
    assert [(f.code, f.mendable) for f in diagnosis.findings] == [
        ("pre", False),
        ("padding_types", True),
    ]
    assert "--pre NAME" in diagnosis.findings[0].mend
    assert mended(metadata, pre="deepseek-coder")["tokenizer.ggml.pre"] == "deepseek-coder"


@pytest.mark.parametrize("name", ["deepseek-coder", "deepseek-llm", "llama-bpe"])
def test_known_vocabularies_without_a_pre_tokenizer(vocab_files, name):
    metadata = dict(read_gguf(vocab_files / f"ggml-vocab-{name}.gguf").metadata)
    assert "pre" not in codes(metadata)
    del metadata["tokenizer.ggml.pre"]
    assert mended(metadata)["tokenizer.ggml.pre"] == name


def test_no_vocabulary_is_taken_for_another(vocab_files):
    """Of each of llama.cpp's byte-level vocabularies: its own name is right, or nothing is said."""
    for path in sorted(vocab_files.glob("ggml-vocab-*.gguf")):
        metadata = dict(read_gguf(path).metadata)
        said = metadata.pop("tokenizer.ggml.pre", None)
        after = mended(metadata, thorough=False)
        assert after.get("tokenizer.ggml.pre") in (said, None), path.name


def test_the_careless_types_of_llama_cpps_vocabulary_file(vocab_files):
    metadata = read_gguf(vocab_files / "ggml-vocab-deepseek-coder.gguf").metadata
    found = {f.code: dict(f.token_types) for f in diagnose(metadata, ()).findings}
    markers = [*range(32015, 32022)]
    assert found["control_types"] == dict.fromkeys(markers, 3)
    assert found["padding_types"] == dict.fromkeys(range(32022, 32256), 5)
    assert "letter_types" not in found
    said = {f.code: f for f in diagnose(metadata, ()).findings}
    assert "(32022–32255)" in said["padding_types"].wrong
    assert said["padding_types"].to_json()["token_types"] == {"32022-32255": 5}
    assert codes(mended(metadata)) == []


def test_an_embedded_tokenizer_tells_the_pre_tokenizer(base):
    """Here of another family than the tokens look like."""
    metadata = read_gguf(base).metadata
    tokenizer = json.loads(metadata["tokenizer.huggingface.json"])
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ],
    }
    metadata = {**metadata, "tokenizer.huggingface.json": json.dumps(tokenizer)}
    assert mended(metadata)["tokenizer.ggml.pre"] == "smollm"
    assert codes({**metadata, "tokenizer.ggml.pre": "starcoder"}) == []  # cuts alike
    with pytest.raises(InputError, match=r"--pre gpt-2: .* is smollm's"):
        diagnose(metadata, (), pre="gpt-2")


# -- RoPE


def coder(vocab_files, **changes):
    """Metadata of DeepSeek Coder 6.7b, by llama.cpp's vocabulary file."""
    metadata = dict(read_gguf(vocab_files / "ggml-vocab-deepseek-coder.gguf").metadata)
    metadata.update({f"llama.{key.replace('__', '.')}": v for key, v in changes.items()})
    return {key: value for key, value in metadata.items() if value is not None}


def rope(metadata):
    return [f for f in diagnose(metadata, ()).findings if f.code.startswith(("rope", "context"))]


def test_the_widths_of_a_published_model_make_it_sure(vocab_files, base):
    metadata = coder(vocab_files, rope__scaling__factor=None)
    (found,) = rope(metadata)
    assert found.sure
    assert "DeepSeek Coder 6.7b" in found.wrong
    tiny = foreign(base)
    EVERY_FAULT["no rope factor"][1](tiny)
    assert [f.sure for f in rope(tiny)] == [False]


@pytest.mark.parametrize(
    ("n_embd", "n_ff", "heads", "kv", "size"),
    [
        (2048, 5504, 16, 16, "1.3b"),
        (4096, 11008, 32, 1, "5.7bmqa"),
        (4096, 11008, 32, 32, "6.7b"),
        (7168, 19200, 56, 8, "33b"),
    ],
)
def test_each_size_has_a_context_of_16384(vocab_files, n_embd, n_ff, heads, kv, size):
    metadata = coder(
        vocab_files,
        embedding_length=n_embd,
        feed_forward_length=n_ff,
        attention__head_count=heads,
        attention__head_count_kv=kv,
        context_length=4096,
    )
    (found,) = rope(metadata)
    assert found.code == "context_length"
    assert f"Coder {size} " in found.wrong
    assert mended(metadata)["llama.context_length"] == 16384


def test_a_fine_tune_for_a_longer_context_keeps_its_rope(vocab_files):
    longer = {"rope__scaling__factor": 8.0, "context_length": 32768}
    assert rope(coder(vocab_files, **longer)) == []
    assert rope(coder(vocab_files, rope__scaling__type="yarn", context_length=65536)) == []
    assert len(rope(coder(vocab_files, rope__scaling__factor=0.25))) == 1  # the inverse, by mistake


def test_deepseek_llm_has_no_scaling(vocab_files):
    """Coder v1.5 is one."""
    metadata = read_gguf(vocab_files / "ggml-vocab-deepseek-llm.gguf").metadata
    assert rope(metadata) == []
    assert codes(metadata) == ["padding_types"]


def test_the_old_key_of_any_family(smollm2_gguf):
    metadata = {**read_gguf(smollm2_gguf).metadata, "llama.rope.scale_linear": 2.0}
    after = mended(metadata)
    assert "llama.rope.scale_linear" not in after
    assert after["llama.rope.scaling.type"] == "linear"
    assert after["llama.rope.scaling.factor"] == 2.0


# -- end of sequence, template


def test_the_instruct_models_early_uploads(instruct):
    metadata = foreign(instruct)
    eos, eot = 4110, 4117
    put(eos_token_id=eos)(metadata)
    (found,) = diagnose(metadata, ()).findings
    assert (found.code, found.sure, found.serious) == ("eos", True, False)  # eot is there
    nameless = {**metadata, "general.name": "model"}  # the template says enough
    assert [f.set for f in diagnose(nameless, ()).findings] == [found.set]
    assert mended(metadata)["tokenizer.ggml.eos_token_id"] == eot
    drop("tokenizer.ggml.eot_token_id")(metadata)
    assert {f.code: f.serious for f in diagnose(metadata, ()).findings} == {
        "eos": True,
        "eot": True,
    }


def test_a_base_model_with_the_instruct_models_eos(base):
    metadata = {**foreign(base), "general.name": "Tiny Coder Base"}
    put(eos_token_id=4117)(metadata)
    assert mended(metadata)["tokenizer.ggml.eos_token_id"] == 4110
    # without a name and a template nothing else says what it is
    metadata["general.name"] = "model"
    found = {f.code: f.sure for f in diagnose(metadata, ()).findings}
    assert found == {"chat_template": False}


def test_an_instruct_model_without_its_template(instruct):
    metadata = foreign(instruct)
    drop("tokenizer.chat_template")(metadata)
    put(eos_token_id=4110)(metadata)
    assert sorted(codes(metadata)) == ["chat_template", "eos"]
    assert plain(mended(metadata)) == plain(foreign(instruct))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}",
        "### Instruction: fixed text",
        "{{ messages.__class__.__mro__ }}",
        "{{ nothing.at.all }}",
        "",
    ],
)
def test_a_broken_template_is_replaced_where_the_right_one_is_known(base, instruct, template):
    metadata = {**foreign(instruct), "tokenizer.chat_template": template}
    assert codes(metadata) == ["chat_template"]
    assert plain(mended(metadata)) == plain(foreign(instruct))
    other = {**foreign(base), "tokenizer.chat_template": template or "{{"}
    if "###" not in template:  # a base model's fine-tune: its format is not DeepSeek's
        assert [f.mendable for f in diagnose(other, ()).findings] == [False]


def test_a_fine_tunes_own_chat_format_is_left_alone(base):
    """Magicoder's way: its own template, the base model's EOS."""
    template = "{% for m in messages %}@@ {{ m.role }}\n{{ m.content }}\n{% endfor %}"
    for name in ("Magicoder", "tuned-instruct"):
        metadata = {**foreign(base), "tokenizer.chat_template": template, "general.name": name}
        assert codes(metadata) == []
        put(eos_token_id=metadata["tokenizer.ggml.tokens"].index("<|User|>"))(metadata)
        assert codes(metadata) == []


def test_right_ids_under_the_old_names_are_read_by_llama_cpp(base):
    metadata = foreign(base)
    for old, new in (("prefix", "fim_pre"), ("suffix", "fim_suf"), ("middle", "fim_mid")):
        row = metadata.pop(f"tokenizer.ggml.{new}_token_id")
        metadata[f"tokenizer.ggml.{old}_token_id"] = row
    assert codes(metadata) == []


def test_the_template_is_the_one_that_llama_cpp_tests(llama_cpp_source):
    source = (llama_cpp_source / "tests" / "test-chat-template.cpp").read_text(encoding="utf-8")
    found = re.search(r'deepseek-coder-33b-instruct",\s*/\* .template_str= \*/ (".*"),\n', source)
    assert found is not None
    assert json.loads(found[1]) == CODER_TEMPLATE


# -- bad input


def test_a_pre_that_llama_cpp_does_not_know(base):
    with pytest.raises(InputError, match="did you mean deepseek-coder"):
        diagnose(foreign(base), (), pre="deepseek-codr")


def test_other_tokenizers_are_not_looked_into(vocab_files):
    metadata = read_gguf(vocab_files / "ggml-vocab-llama-spm.gguf").metadata
    diagnosis = diagnose(metadata, ())
    assert diagnosis.findings == ()
    assert "'llama'" in diagnosis.evidence
    with pytest.raises(InputError, match="leave --pre out"):
        diagnose(metadata, (), pre="gpt-2")


def test_what_is_not_examined_is_said(base, vocab_files, smollm2_gguf):
    def scope(metadata, **options):
        found = diagnose(metadata, (), **options)
        return " | ".join(found.examined), " | ".join(found.not_examined)

    yes, no = scope(coder(vocab_files))
    assert no == ""
    assert "special ids" in yes
    assert "context length" in yes
    assert scope(foreign(base))[1].startswith("context length (the widths are none")
    no_tokenizer = {"general.architecture": "qwen2", "qwen2.context_length": 5}
    for metadata, why in (
        (read_gguf(vocab_files / "ggml-vocab-llama-spm.gguf").metadata, "the tokenizer is 'llama'"),
        (read_gguf(vocab_files / "ggml-vocab-bert-bge.gguf").metadata, "the tokenizer is 'bert'"),
        (no_tokenizer, "the file has no tokenizer"),
    ):
        yes, no = scope(metadata)
        assert yes == "RoPE's old key"
        assert f"pre-tokenizer, special ids, token types, vocabulary ({why}" in no
        assert "RoPE values, context length (they are known of DeepSeek Coder only)" in no
        assert "chat template (there is none" in no
    other = read_gguf(smollm2_gguf).metadata
    yes, no = scope(other)
    assert "that llama.cpp knows the pre-tokenizer's name" in yes
    assert "whether the pre-tokenizer is the model's" in no
    assert "whether the pre-tokenizer is the model's" not in scope(other, pre="smollm")[1]
    moved = {**foreign(base), "general.architecture": "qwen2"}
    assert "the architecture or the kind of scaling" in scope(moved)[1]


def test_what_else_keeps_a_vocabulary_from_being_read(base):
    tokens = list(foreign(base)["tokenizer.ggml.tokens"])
    tokens[300] = tokens[299]
    for change in (
        {"tokenizer.ggml.tokens": tokens},
        {"tokenizer.ggml.merges": np.array([1])},
        {"tokenizer.ggml.unknown_token_id": 99999},
        {"tokenizer.ggml.tokens": [1, 2]},
    ):
        (found,) = diagnose({**foreign(base), **change}, ()).findings
        assert (found.code, found.mendable) == ("vocabulary", False)


values = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 2**40), st.floats(), st.text(max_size=5)
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, "x", np.array([1])])
def test_odd_widths_are_no_known_ones(vocab_files, value):
    assert rope(coder(vocab_files, embedding_length=value)) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_value_under_any_key_gives_a_diagnosis(base, data):
    """Never an unexpected error; and what is called mended is not found again."""
    metadata = foreign(base)
    keys = [*metadata, "llama.rope.scale_linear", "tokenizer.huggingface.json"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        value = data.draw(values)
        if value is None:
            metadata.pop(key, None)
        else:
            metadata[key] = value
    diagnosis = diagnose(metadata, ())
    left = diagnose(mended(metadata), ()).findings
    assert {f.code for f in left} <= {f.code for f in diagnosis.findings if not f.mendable}
    assert not any(f.mendable for f in left)


def test_a_tokenizer_json_that_contradicts_the_arrays() -> None:
    """What dsq refuses to run is no healthy file."""

    from dsq.convert.gguf.metadata import vocabulary_entries
    from dsq.tokenizer_port.load import load_hf
    from tests.models import TINY_CODER

    vocab = load_hf(TINY_CODER, 4160)
    metadata = {entry.key: entry.value for entry in vocabulary_entries(vocab)}
    metadata["general.architecture"] = "llama"
    own = json.loads(metadata["tokenizer.huggingface.json"])
    merges = own["model"]["merges"]
    merges[4], merges[5] = merges[5], merges[4]
    before = {f.code for f in diagnose(metadata, ()).findings}
    metadata["tokenizer.huggingface.json"] = json.dumps(own)
    found = [f for f in diagnose(metadata, ()).findings if f.code not in before]
    assert [f.code for f in found] == ["vocabulary"]
    assert "merge 4" in found[0].wrong

"""The pre-tokenizer's name, and the types of the tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from dsq.convert.doctor.facts import HF_JSON, TOKENIZER, Facts
from dsq.convert.doctor.family import MARKER_STARTS, Family, is_control_text
from dsq.convert.doctor.findings import TOKEN_TYPE, Finding, spans
from dsq.convert.gguf.metadata import ARRAY, I32, STRING, KeyValue
from dsq.errors import InputError
from dsq.tokenizer_port.json_file import brief, parse_object
from dsq.tokenizer_port.pretokenize import ALIASES, CHAINS, LLAMA_CPP_NAMES, recognise
from dsq.tokenizer_port.vocabulary import TokenType, pad_token

_PRE = TOKENIZER + "pre"
NORMAL, CONTROL = int(TokenType.NORMAL), int(TokenType.CONTROL)
USER_DEFINED, UNUSED = int(TokenType.USER_DEFINED), int(TokenType.UNUSED)

# llama.cpp always calls these user-defined (gpt-oss).
_RENDERED = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))


def check_pre(facts: Facts, family: Family | None, asked: str | None) -> Iterator[Finding]:
    """`asked` is the user's `--pre`. Raises InputError where the file's own tokenizer denies it."""
    embedded = embedded_pre(facts)
    if asked and embedded and not _cuts_alike(asked, embedded, facts, family, asked):
        raise InputError(
            f"--pre {asked}: the tokenizer inside the file, {HF_JSON}, is {embedded}'s; leave "
            "--pre out"
        )
    known = asked or embedded or (family.pre if family else None)
    said = facts.metadata.get(_PRE)
    absent = said in (None, "", "default") or not isinstance(said, str)
    if absent:
        wrong = f"{_PRE} {'is absent' if said is None else f'is {brief(said)}'}"
        if said is None:
            wrong += ", as in files made before April 2024"
    elif said not in LLAMA_CPP_NAMES:
        wrong = f"{_PRE} is {brief(said)}, a name that llama.cpp does not know"
    elif known and not _cuts_alike(said, known, facts, family, asked):
        why = "by --pre" if asked else f"by {HF_JSON}" if embedded else "by the vocabulary"
        wrong = f"{_PRE} is {said!r}; {why} it is {known!r}"
    else:
        return
    yield Finding(
        code="pre",
        wrong=wrong,
        effect=(
            "llama.cpp refuses the file"
            if not absent and said not in LLAMA_CPP_NAMES
            else "text is cut in other places than in training: other tokens, worse answers, and "
            "nothing that says so"
        ),
        mend=(
            f"set {_PRE} to {known!r}"
            if known
            else "none by itself: the family is not recognised; say which it is with --pre NAME"
        ),
        set=(KeyValue(_PRE, known, STRING),) if known else (),
    )


def embedded_pre(facts: Facts) -> str | None:
    """The pre-tokenizer of the tokenizer.json inside; None without one, or for an unknown one."""
    text = facts.text(HF_JSON)
    if text is None:
        return None
    try:
        return recognise(parse_object(text, HF_JSON), HF_JSON)
    except InputError:
        return None


def _cuts_alike(
    said: str, known: str, facts: Facts, family: Family | None, asked: str | None
) -> bool:
    """Whether two of llama.cpp's names cut text alike, as far as the evidence can deny it.

    llama.cpp never normalizes, so that is left out.
    """
    said, known = ALIASES.get(said, said), ALIASES.get(known, known)
    if said == known:
        return True
    mine, right = CHAINS.get(said), CHAINS.get(known)
    if asked or HF_JSON in facts.metadata or (family is not None and family.is_deepseek):
        if mine is None or right is None:
            return False
        return (mine.steps, mine.ignore_merges) == (right.steps, right.ignore_merges)
    # Llama 3's vocabulary is used with and without `ignore_merges` (Smaug), on purpose.
    return mine is None or right is None or mine.steps == right.steps


def check_types(facts: Facts, family: Family | None) -> Iterator[Finding]:
    if not facts.is_bpe:
        return
    letters = frozenset(family.letters) if family else frozenset()
    types, n = facts.types, len(facts.tokens)
    if types is None or len(types) != n:
        yield _whole(facts, letters)
        return
    right = _corrections(facts, letters, types)
    marks = [i for i, kind in right.items() if kind == CONTROL]
    if marks:
        silent = any(types[i] == NORMAL for i in marks)
        yield Finding(
            code="control_types",
            wrong=f"{_named(facts, marks)} typed {_kinds(types, marks)}, not control",
            effect=(
                "prompts and chat templates cannot write them: their text is cut into pieces"
                if silent
                else "a user who types their text ends the turn or opens a hole; they are printed"
            ),
            mend="type them control",
            serious=silent,
            token_types=tuple((i, CONTROL) for i in marks),
        )
    wrong = [i for i, kind in right.items() if kind == USER_DEFINED]
    if wrong:
        yield Finding(
            code="letter_types",
            wrong=f"{_named(facts, wrong)} typed {_kinds(types, wrong)}, not user-defined",
            effect="these letters become other tokens than in training, or are not printed",
            mend="type them user-defined",
            token_types=tuple((i, USER_DEFINED) for i in wrong),
        )
    rows = [i for i, kind in right.items() if kind == UNUSED]
    if rows:
        yield Finding(
            code="padding_types",
            wrong=f"rows without a token ({_rows(rows)}) typed {_kinds(types, rows)}, not unused",
            effect="the text [PAD…] becomes such a row, which no training has touched",
            mend="type them unused",
            serious=False,
            token_types=tuple((i, UNUSED) for i in rows),
        )


def _corrections(facts: Facts, letters: frozenset[int], types: list[int]) -> dict[int, int]:
    """Token id → the type that it should have and has not."""
    right = {i: USER_DEFINED for i in letters if types[i] != USER_DEFINED}
    for i, text in enumerate(facts.tokens):
        # Most tokens are neither: this keeps 32,000 of them to a few milliseconds.
        if not text.startswith(MARKER_STARTS) or types[i] not in (NORMAL, USER_DEFINED):
            continue
        if text == pad_token(i):
            right[i] = UNUSED
        elif (
            is_control_text(text)
            and text not in _RENDERED
            # A normal token that BPE can build is ordinary text.
            and (types[i] == USER_DEFINED or text not in facts.merged)
        ):
            right[i] = CONTROL
    return right


def _whole(facts: Facts, letters: frozenset[int]) -> Finding:
    """The types are absent, or are not one a token: all of them anew."""
    types, n = facts.types, len(facts.tokens)
    kinds = (types or [])[:n]
    kinds += [NORMAL] * (n - len(kinds))
    for i, kind in _corrections(facts, letters, kinds).items():
        kinds[i] = kind
    if TOKEN_TYPE not in facts.metadata:
        wrong = f"{TOKEN_TYPE} is absent"
    elif types is None:
        wrong = f"{TOKEN_TYPE} is {brief(facts.metadata[TOKEN_TYPE])}, no list of types"
    else:
        wrong = f"{TOKEN_TYPE} has {len(types)} entries for {n} tokens"
    return Finding(
        code="token_types",
        wrong=wrong,
        effect="control tokens are taken for text, or llama.cpp refuses the file",
        mend="type markers control and rows without a token unused; all others stay",
        set=(KeyValue(TOKEN_TYPE, kinds, ARRAY, I32),),
    )


def _named(facts: Facts, rows: Iterable[int]) -> str:
    """`<a>, <b>, <c> and 4 more`"""
    texts = [facts.tokens[i] for i in rows]
    shown = ", ".join(brief(text)[1:-1] for text in texts[:3])
    return shown if len(texts) <= 3 else f"{shown} and {len(texts) - 3} more"


def _rows(rows: Iterable[int]) -> str:
    """`32022–32255`, or `7, 9–12, 20 and 5 more`"""
    runs = spans(rows)
    shown = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs[:3])
    more = sum(b - a + 1 for a, b in runs[3:])
    return f"{shown} and {more} more" if more else shown


_NAMES = {kind.value: kind.name.lower().replace("_", "-") for kind in TokenType}


def _kinds(types: list[int], rows: Iterable[int]) -> str:
    """`normal`, or `normal and user-defined`"""
    counts = Counter(types[i] for i in rows)
    return " and ".join(_NAMES.get(kind, str(kind)) for kind, _ in counts.most_common())

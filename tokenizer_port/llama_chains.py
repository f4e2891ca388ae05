"""How llama.cpp cuts text where a published tokenizer.json is not known, or does otherwise.

llama.cpp applies a list of regexes one after another, each to the pieces of the one before, then
maps bytes (`llm_tokenizer_bpe` in llama-vocab.cpp, `unicode_regex_split` in unicode.cpp). It runs
most of them over a text in which every non-ASCII character is replaced by a byte for its category,
so `\\p{Lu}` means `\\p{L}` there, `[^a-z]` is true of "é", and `\\d` knows ASCII digits only. The
regexes here say in Oniguruma's language what comes out of that; where llama.cpp has a function by
hand instead of the regex, they say what the function does.

Not here although llama.cpp differs: DeepSeek Coder and LLM. A space outside ASCII (U+2028, U+3000)
beside a CJK character belongs to its piece in the published file, which the models were trained
on, and not in llama.cpp. Nor the long s in `'ſ`, a contraction to Llama 3's file.
"""

from __future__ import annotations

from dsq.tokenizer_port.chains import Chain, byte_level, split
from dsq.tokenizer_port.regexes import DEEPSEEK_V3, DIGITS_1_TO_3, GPT2, KANA

# Not (?i:…), which in Oniguruma makes "ſ" an "s".
_CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_MARKS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES

_LETTERS_MARKS = rf"{_LEAD}[\p{{L}}\p{{M}}]+{_CONTRACTION}?"
_QWEN2_TAIL = rf"{_LEAD}\p{{L}}+|\p{{N}}|{_MARKS}[\r\n]*|{_LINES}"

# ASCII letters alone have a case.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_O200K = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}?|"
    rf"\p{{N}}{{1,3}}|{_MARKS}[\r\n/]*|{_LINES}"
)

# Digits in threes from the right. The text before a number stays with its first group: the
# function cuts behind each group and nowhere else.
_THREES = r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"

# `unicode_cpt_is_han`
_HAN = (
    r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}"
    r"\x{2B740}-\x{2B81F}\x{2B820}-\x{2CEAF}\x{2CEB0}-\x{2EBEF}\x{F900}-\x{FAFF}"
    r"\x{2F800}-\x{2FA1F}"
)

# U+8C48 is in llama.cpp's source where U+F900 is meant: an editor normalized it.
_AFMOE_ASIAN = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{8C48}-\x{FAFF}\x{3040}-\x{309F}\x{30A0}-\x{30FF}"
    r"\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}\x{0E40}-\x{0E7F}\x{0E80}-\x{0EFF}\x{1780}-\x{17FF}"
    r"\x{1000}-\x{109F}\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+"
)
_YOUTU_ASIAN = (
    r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|"
    r"[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}\x{FF1B}\x{FF0C}"
    r"\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+|[\x{3105}-\x{312F}]+|"
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
)


def _chain(*regexes: str, ignore_merges: bool = False) -> Chain:
    steps = (*(split(regex) for regex in regexes), byte_level(False))
    return Chain(steps, ignore_merges=ignore_merges)


LLAMA_CPP_CHAINS: dict[str, Chain] = {
    # A file that names no pre-tokenizer, too.
    "default": _chain(r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "afmoe": _chain(_THREES, _AFMOE_ASIAN, DEEPSEEK_V3),
    "chameleon": _chain(
        "<sentinel:[0-9]+>",
        "IMGIMG[A-I]{1,4}Z",
        r"[\t\n]|    |  ",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        GPT2,
    ),
    "exaone-moe": _chain(
        rf"{_CONTRACTION}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
        rf"{_MARKS}[\r\n/]?|\s*[\r\n]|{_SPACES}"
    ),
    "falcon": _chain(r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"),
    "gpt-4o": _chain(_O200K),
    "llama4": _chain(_O200K),
    "tekken": _chain(
        rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_MARKS}[\r\n/]*|{_LINES}",
        ignore_merges=True,
    ),
    "granite-embed-multi-97m": _chain(
        _O200K.replace(r"[\p{L}&&", r"[\p{L}\p{M}&&"), ignore_merges=True
    ),
    "jais-2": _chain(
        rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_MARKS}[\r\n]*|\s*[\r\n]+|"
        + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
        + r"\s{1,2}(?!\S)|\s"
    ),
    "kimi-k2": _chain(
        rf"[{_HAN}]+|{_LEAD}[\p{{L}}&&[^{_HAN}]]+{_CONTRACTION}?|\p{{N}}{{1,3}}|"
        rf"{_MARKS}[\r\n]*|{_LINES}"
    ),
    "laguna": _chain(r"[^\n]+|\n+", f"{_CONTRACTION}|{_QWEN2_TAIL}"),
    "minicpm5": _chain(
        DIGITS_1_TO_3,
        rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}+|{_MARKS}[\r\n]*|{_LINES}",
        ignore_merges=True,
    ),
    "spark2_5": _chain(
        DIGITS_1_TO_3,
        KANA,
        DEEPSEEK_V3.replace(r"[\r\n]*|\s*[\r\n]+", r"|[\r\n]"),
        r"\p{N}",
    ),
    "superbpe": _chain(r"\p{N}+", "(?=([0-9]{3})+(?![0-9]))"),
    "tiny_aya": _chain(_THREES, rf"{_LETTERS_MARKS}|\p{{N}}{{1,3}}|{_MARKS}[\r\n/]*|{_LINES}"),
    "ufakzeka": _chain(_QWEN2_TAIL),
    "viking": _chain(r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"),
    "youtu": _chain(
        _YOUTU_ASIAN,
        rf"{_LETTERS_MARKS}|\p{{N}}|{_MARKS}[\r\n/]*|{_LINES}",
        ignore_merges=True,
    ),
}

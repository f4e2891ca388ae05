"""The text of a manual page, without its troff markup."""

from __future__ import annotations

import re

_TITLES = frozenset(("SH", "SS"))
_FONTS = frozenset(("B", "I", "SM", "SB"))
_ALTERNATING = frozenset(("BR", "RB", "IR", "RI", "BI", "IB"))
_BREAKS = frozenset(("TP", "TQ", "PP", "P", "LP", "IP", "HP", "br", "sp"))
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"|(\S+)')
_CHARACTERS = {
    **{"aq": "'", "dq": '"', "cq": "'", "oq": "'", "lq": '"', "rq": '"', "ha": "^", "ti": "~"},
    **{"bu": "•", "em": "—", "en": "–", "hy": "-", "co": "©", "rs": "\\", "ga": "`", "at": "@"},
    **{"->": "→", "<-": "←", "<=": "≤", ">=": "≥", "bv": "|", "ul": "_"},
}
_ESCAPE = re.compile(
    r"\\(?:"
    r"f(?:\(..|\[[^]]*\]|.)"  # font
    r"|s[-+]?\d{1,2}"  # size
    r"|[mMF](?:\(..|\[[^]]*\]|.)|[*n](?:\(..|\[[^]]*\]|.)|[hvwlLX]'[^']*'"
    r"|\((?P<two>..)|\[(?P<long>[^]]*)\]"  # a character by name
    r"|(?P<one>.)|$)"
)
_SINGLE = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "'", "`": "`"}


def plain(page: str) -> str:
    """The text of a man(7) page; the empty string for an alias and for mdoc(7), which differs."""
    if re.search(r"^\.(so|Dd)\b", page, re.MULTILINE):
        return ""
    out: list[str] = []
    skipping: str | None = None
    for line in page.splitlines():
        if skipping is not None:
            if line.startswith(skipping):
                skipping = None
            continue
        if not line.startswith((".", "'")):
            out.append(_unescape(line))
            continue
        name, _, rest = line[1:].strip().partition(" ")
        if name in ("de", "de1", "ig", "am"):
            skipping = ".."
        elif name == "TS":
            skipping = ".TE"
        elif name in _TITLES:
            out += ["", _unescape(" ".join(_arguments(rest)))]
        elif name in _FONTS:
            out.append(_unescape(" ".join(_arguments(rest))))
        elif name in _ALTERNATING:
            out.append(_unescape("".join(_arguments(rest))))
        elif name in _BREAKS:
            out.append("")
            if name == "IP" and rest.strip():
                out.append(_unescape(_arguments(rest)[0]))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip() + "\n"


def _arguments(rest: str) -> list[str]:
    return [
        quoted.replace('""', '"') if quoted else bare for quoted, bare in _ARGUMENT.findall(rest)
    ]


def _unescape(text: str) -> str:
    text = re.sub(r'\\".*', "", text)  # a comment

    def replace(match: re.Match[str]) -> str:
        if match["one"] is not None:
            return _SINGLE.get(match["one"], "")
        return _CHARACTERS.get(match["two"] or match["long"] or "", "")

    return _ESCAPE.sub(replace, text)

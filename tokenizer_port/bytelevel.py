"""GPT-2's byte-level alphabet: every byte as one printable character."""

from __future__ import annotations


def _alphabet() -> dict[int, str]:
    # Bytes that print stand for themselves; the others follow from U+0100 on, in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    table.update({byte: chr(0x100 + i) for i, byte in enumerate(others)})
    return table


BYTE_TO_CHAR: dict[int, str] = _alphabet()
CHAR_TO_BYTE: dict[str, int] = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_bytes(token: str) -> bytes:
    """The bytes of a token; a text outside the alphabet is taken as it is written."""
    try:
        return bytes(CHAR_TO_BYTE[char] for char in token)
    except KeyError:
        return token.encode("utf-8", errors="replace")


def printable(raw: bytes) -> str:
    """The text of `raw`; each byte that belongs to no UTF-8 character in it becomes `<0xE4>`."""
    found = ""
    at = 0
    while at < len(raw):
        try:
            return found + raw[at:].decode("utf-8")
        except UnicodeDecodeError as error:
            wrong = raw[at + error.start : at + error.end]
            found += raw[at : at + error.start].decode("utf-8")
            found += "".join(f"<0x{byte:02X}>" for byte in wrong)
            at += error.end
    return found

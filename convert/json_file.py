"""The strict JSON reader; it lives in `tokenizer_port`, which may not import this room."""

from __future__ import annotations

from dsq.tokenizer_port.json_file import brief, parse_object, read_object, shown

__all__ = ["brief", "parse_object", "read_object", "shown"]

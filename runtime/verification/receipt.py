"""The receipt of a verification: what was compared, by hash, and what was found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsq import __version__
from dsq.convert.atomic import write_text
from dsq.convert.checkpoint import GgufCheckpoint, HfCheckpoint
from dsq.errors import InputError

_READ_BYTES = 1 << 22
# Beside the weights, what a Hugging Face directory says of the model.
_SIDE_FILES = ("*.json", "*.jinja", "*.model", "merges.txt")


@dataclass(frozen=True)
class Check:
    """One question with its answer; `ok` is None when it was not asked, and `detail` says why."""

    name: str
    ok: bool | None
    detail: str
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


@dataclass(frozen=True)
class Side:
    """An artifact or a source, with the hash of each of its files."""

    path: Path
    format: str
    files: tuple[tuple[Path, int, str], ...]  # path, bytes, SHA-256

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "format": self.format,
            "files": [{"name": p.name, "bytes": n, "sha256": h} for p, n, h in self.files],
        }


@dataclass(frozen=True)
class Verification:
    """All checks of one artifact against one source."""

    artifact: Side
    source: Side
    checks: tuple[Check, ...]
    options: dict[str, Any]
    seconds: float

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """What `dsq verify --json` prints."""
        return {"ok": self.ok, "checks": [check.to_json() for check in self.checks]}

    def receipt(self) -> dict[str, Any]:
        """What the receipt holds: the same with every tensor and every hash."""
        return {
            "ok": self.ok,
            "dsq": __version__,
            "llama_cpp_python": version("llama-cpp-python"),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 3),
            "options": self.options,
            "artifact": self.artifact.to_json(),
            "source": self.source.to_json(),
            "checks": [{**check.to_json(), **check.data} for check in self.checks],
        }


def receipt_path(artifact: Path) -> Path:
    """`model.gguf` → `model.gguf.receipt.json` beside it."""
    path = Path.cwd() / artifact  # not resolved: the hub's cache links to hashes
    return path.with_name(f"{path.name}.receipt.json")


def write_receipt(verification: Verification, path: Path) -> None:
    write_text(path, json.dumps(verification.receipt(), indent=1, ensure_ascii=False) + "\n")


def hash_side(
    checkpoint: HfCheckpoint | GgufCheckpoint,
    threads: int,
    progress: Callable[[int], None] = lambda n: None,
) -> Side:
    """Hash all files of a checkpoint, several at a time."""
    paths = side_files(checkpoint)
    with ThreadPoolExecutor(threads, thread_name_prefix="dsq-hash") as pool:
        hashed = list(pool.map(lambda path: _sha256(path, progress), paths))
    files = tuple((p, n, h) for p, (n, h) in zip(paths, hashed, strict=True))
    return Side(checkpoint.path, checkpoint.format, files)


def side_files(checkpoint: HfCheckpoint | GgufCheckpoint) -> list[Path]:
    """Weights, and for a directory its configuration and tokenizer; no receipts."""
    if isinstance(checkpoint, GgufCheckpoint):
        return list(checkpoint.gguf.shards)
    weights = checkpoint.files
    beside = {
        path
        for pattern in _SIDE_FILES
        for path in checkpoint.path.glob(pattern)
        if path.is_file() and not path.name.endswith(".receipt.json")
    }
    return sorted(weights | beside)


def _sha256(path: Path, progress: Callable[[int], None]) -> tuple[int, str]:
    digest, n = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                digest.update(buffer[:got])
                n += got
                progress(got)
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror or error}") from error
    return n, digest.hexdigest()

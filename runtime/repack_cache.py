"""GPTQ and EXL2 directories made runnable in llama.cpp: their GGUFs, kept in the user's cache.

An entry is a GGUF and a small record beside it, under the hash of the directory's contents; the
record comes last, so that a GGUF without one counts as absent. Each entry has a lock: held alone
while it is made, shared while it is loaded, and whoever makes room takes only what nobody holds.
Entries used longest ago go first. A loaded model stays mapped when its file is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import dsq
from dsq.convert.atomic import DiskError, write_text
from dsq.convert.checkpoint import HfCheckpoint, open_checkpoint
from dsq.convert.files import human
from dsq.convert.repack import plan_repack, run_repack
from dsq.errors import DsqError, InputError
from dsq.quant.threads import default_threads
from dsq.runtime.reference_cache import default_folder, file_identity
from dsq.runtime.source import EngineSettings, Source
from dsq.runtime.verification.receipt import side_files

if TYPE_CHECKING:
    from dsq.runtime.engine import Engine

EngineName = Literal["auto", "llama.cpp", "torch"]
ENGINES: tuple[EngineName, ...] = ("auto", "llama.cpp", "torch")
DEFAULT_LIMIT = 48 << 30
Tell = Callable[[str], None]

_VERSION = 1  # of what a repack makes of the same directory
_REMEDY = "set DSQ_CACHE to another folder, or take --engine torch, which needs none"


@dataclass(frozen=True)
class Record:
    """What an entry is: the receipt of its repack, in short."""

    size_bytes: int
    n_matrices: int
    n_lossy: int
    largest_difference: float | None  # of a weight; None: not known
    lossy_types: list[str]

    @property
    def loss(self) -> str | None:
        """How it differs from the directory, for people; None for a lossless one."""
        if not self.n_lossy:
            return None
        largest = self.largest_difference
        bound = "" if largest is None else f", a weight by at most {largest:.2g}"
        types = " and ".join(self.lossy_types)
        return f"{self.n_lossy} of {self.n_matrices} matrices were rounded to {types}{bound}"


class RepackCache:
    """Entries under `folder`, at most `limit` bytes together."""

    def __init__(self, folder: Path | None = None, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = default_folder() / "repacked" if folder is None else folder
        self.limit = limit

    @contextmanager
    def open(
        self,
        checkpoint: HfCheckpoint,
        *,
        threads: int | None = None,
        tell: Tell = lambda text: None,
    ) -> Iterator[tuple[Path, Record]]:
        """The GGUF of a packed directory, made if it is not there; it stays until the block ends.

        `tell` hears what takes time. Raises InputError for what does not fit, DsqError for a
        folder that cannot be written.
        """
        threads = threads or default_threads()
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                key = self._key(checkpoint, threads)
                lock = stack.enter_context(self._lock_file(key).open("a"))
                record = self._shared(lock.fileno(), key, checkpoint, threads, tell)
                os.utime(self._gguf(key))
            except OSError as error:
                raise DsqError(
                    f"{self.folder}: the cache of repacked models cannot be used "
                    f"({error.strerror or error}); {_REMEDY}"
                ) from error
            yield self._gguf(key), record

    def _shared(
        self, lock: int, key: str, checkpoint: HfCheckpoint, threads: int, tell: Tell
    ) -> Record:
        """The record of an entry that is there, with the lock held shared."""
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if (record := self._record(key)) is not None:
                return record
            if not _try_alone(lock):
                tell("another dsq uses this model's entry of the cache; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if self._record(key) is None:
                self._make(key, checkpoint, threads, tell)
            # To share a lock is to drop it first: the entry may be gone again, so look once more.

    def _make(self, key: str, checkpoint: HfCheckpoint, threads: int, tell: Tell) -> None:
        plan = plan_repack(checkpoint)
        size = plan.gguf.layout.data_bytes
        if size > self.limit:
            raise InputError(
                f"{checkpoint.path}: its GGUF takes {human(size)}, more than the cache's "
                f"{human(self.limit)}; make one with dsq convert --to gguf and give that, or take "
                f"--engine torch"
            )
        self._make_room(size, key)
        tell(f"repacking {checkpoint.path} for llama.cpp: {human(size)} → {self.folder}")
        try:
            artifact, receipt = run_repack(plan, self._gguf(key), force=True, threads=threads)
        except DiskError as error:
            raise InputError(f"{error}; or {_REMEDY}") from error
        record = Record(
            artifact.size_bytes,
            len(receipt["tensors"]),
            receipt["lossy_tensors"],
            receipt["largest_difference"],
            sorted({t["type"] for t in receipt["tensors"] if not t["exact"]}),
        )
        write_text(self._gguf(key).with_suffix(".json"), json.dumps(asdict(record)))

    def _make_room(self, n_bytes: int, own: str) -> None:
        """Remove what killed runs left, and the oldest entries until `n_bytes` fit."""
        self._remove(own)  # nobody has it: its lock is held
        entries = []
        for path in self.folder.glob("*.lock"):
            key = path.stem
            if key != own:
                with suppress(OSError), path.open("a") as lock:
                    if _try_alone(lock.fileno()) and self._record(key) is None:
                        self._remove(key)
            if (gguf := self._gguf(key)).exists():
                state = gguf.stat()
                entries.append((state.st_mtime_ns, state.st_size, key))
        total = sum(size for _, size, _ in entries)
        for _, size, key in sorted(entries):
            if total + n_bytes <= self.limit:
                return
            with self._lock_file(key).open("a") as lock:
                if _try_alone(lock.fileno()):
                    self._remove(key)
                    total -= size

    def _remove(self, key: str) -> None:
        gguf = self._gguf(key)
        unfinished = self.folder.glob(f".{key}.*.tmp")  # see `atomic_files`
        for path in (gguf.with_suffix(".json"), gguf, *unfinished):
            path.unlink(missing_ok=True)

    def _record(self, key: str) -> Record | None:
        gguf = self._gguf(key)
        try:
            record = Record(**json.loads(gguf.with_suffix(".json").read_text(encoding="utf-8")))
            return record if gguf.stat().st_size == record.size_bytes else None
        except (OSError, ValueError, TypeError):  # absent, cut short, or of another version
            return None

    def _key(self, checkpoint: HfCheckpoint, threads: int) -> str:
        """The hash of the contents, which is remembered for files that did not change."""
        files = sorted(checkpoint.files | set(side_files(checkpoint)))
        identity = hashlib.sha256(file_identity(files).encode()).hexdigest()[:32]
        remembered = self.folder / f"{identity}.content"
        with suppress(OSError, ValueError):
            content = remembered.read_text(encoding="ascii")
            if len(content) == 64:
                return _versioned(content)
        with ThreadPoolExecutor(threads, thread_name_prefix="dsq-hash") as pool:
            hashes = list(pool.map(_sha256, files))
        named = [f"{file.name}\0{hash}" for file, hash in zip(files, hashes, strict=True)]
        content = hashlib.sha256("\0".join(named).encode()).hexdigest()
        write_text(remembered, content)
        return _versioned(content)

    def _gguf(self, key: str) -> Path:
        return self.folder / f"{key}.gguf"

    def _lock_file(self, key: str) -> Path:
        return self.folder / f"{key}.lock"


def _versioned(content: str) -> str:
    return hashlib.sha256(f"{_VERSION}\0{dsq.__version__}\0{content}".encode()).hexdigest()[:32]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _try_alone(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def generation_engine(
    source: Source,
    settings: EngineSettings,
    *,
    name: EngineName = "auto",
    cache: RepackCache | None = None,
    tell: Tell = lambda text: None,
) -> Engine:
    """The engine that `chat` and `complete` run a model in.

    `auto`: llama.cpp, through the cache for a GPTQ or EXL2 directory; torch for a dense directory.
    `tell` hears when that is not lossless. `torch` runs the exact codes of a packed directory.
    Raises InputError where the engine cannot run the model.
    """
    path = source.path
    if name == "torch" and source.is_gguf:
        raise InputError(
            f"{path}: --engine torch runs directories, and this is a GGUF; leave --engine out, or "
            f"convert it: dsq convert --to hf"
        )
    if name == "torch" or source.is_gguf:
        return source.engine(settings)
    if source.packed_method is None:
        if name == "llama.cpp":
            raise InputError(
                f"{path}: llama.cpp runs GGUF files; convert the directory: dsq convert --to gguf, "
                f"or take --engine torch"
            )
        return source.engine(settings)
    checkpoint = open_checkpoint(source.path)
    assert isinstance(checkpoint, HfCheckpoint)
    cache = cache or RepackCache()
    with cache.open(checkpoint, threads=settings.n_threads, tell=tell) as (gguf, record):
        if record.loss:
            tell(
                f"{path} runs as a GGUF that is not lossless: {record.loss}; --engine torch runs "
                f"its exact codes, slower"
            )
        engine = Source(gguf).engine(settings)
        _ = engine.tokenizer  # read while the file is sure to be there
    return engine

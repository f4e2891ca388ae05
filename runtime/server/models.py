"""The models that one server offers: loaded on demand, unloaded when idle or to make room."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dsq.errors import DsqError
from dsq.runtime.server.backend import Backend, Busy
from dsq.runtime.server.problems import ModelNotFound
from dsq.tokenizer_port.tokenizer import Tokenizer

log = logging.getLogger("dsq.server")


@dataclass(eq=False)
class Model:
    """A loaded model. `n_users` requests hold it."""

    name: str
    tokenizer: Tokenizer
    backend: Backend
    n_users: int = 0
    last_used: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Offer:
    """A model that can be loaded. `memory_bytes` is the estimate of what it takes then."""

    path: Path
    created: int  # seconds since 1970: the file's
    memory_bytes: int = 0


class ModelPool:
    """At most `most_loaded` models at once, the least recently used unloaded for the next.

    A pool of one model serves it under any name, as llama.cpp's server does, so that an editor's
    fixed `"model": "gpt-4"` works; with several the name must be right.
    """

    def __init__(
        self,
        offers: Mapping[str, Offer],
        make_backend: Callable[[Path], Backend],
        read_tokenizer: Callable[[Path], Tokenizer],
        *,
        most_loaded: int = 1,
        idle_s: float | None = None,
        free_memory: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.offers = dict(offers)
        self.loaded: dict[str, Model] = {}
        self._make_backend, self._read_tokenizer = make_backend, read_tokenizer
        self._most_loaded, self._idle_s = most_loaded, idle_s
        self._free_memory = free_memory
        self._lock = asyncio.Lock()  # one model is loaded at a time
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._wanted: Counter[str] = Counter()  # requests that wait for it to be loaded

    def name_of(self, asked: str | None) -> str:
        """The offered name for what a request says. Raises ModelNotFound."""
        if asked in self.offers:
            return asked
        if len(self.offers) == 1:
            return next(iter(self.offers))
        if not asked and len(self.loaded) == 1:
            return next(iter(self.loaded))
        names = ", ".join(list(self.offers)[:20])
        raise ModelNotFound(f"no model {(asked or '')[:100]!r} here; models: {names}")

    @asynccontextmanager
    async def use(self, asked: str | None) -> AsyncGenerator[Model, None]:
        """The model, loaded, and kept while the block runs."""
        name = self.name_of(asked)
        self._wanted[name] += 1
        try:
            while (model := self.loaded.get(name)) is None:
                loading = self._loading.get(name)
                if loading is None:
                    loading = self._loading[name] = asyncio.create_task(self._load_alone(name))
                    loading.add_done_callback(lambda done: self._has_loaded(name, done))
                # An editor gives up a request at the next keystroke: the loading goes on for that.
                await asyncio.shield(loading)
            model.n_users += 1
        finally:
            self._wanted[name] -= 1
        try:
            yield model
        finally:
            model.n_users -= 1
            model.last_used = time.monotonic()

    async def _load_alone(self, name: str) -> None:
        async with self._lock:
            await self._load(name)

    def _has_loaded(self, name: str, task: asyncio.Task[None]) -> None:
        del self._loading[name]
        if not task.cancelled():
            task.exception()  # asked for here, as those who wanted the model may have left

    async def _load(self, name: str) -> Model:
        offer = self.offers[name]
        while len(self.loaded) >= self._most_loaded or (self.loaded and self._short(offer)):
            await self._unload_one()
        if self._short(offer):
            raise DsqError(
                f"{name} needs about {offer.memory_bytes >> 20} MiB, but "
                f"{(self._free_memory() or 0) >> 20} MiB are free; start the server with a "
                "smaller -c or --kv-type q8_0, or take a smaller quantization (dsq fit shows them)"
            )
        log.info("loading %s", name)
        tokenizer = await asyncio.to_thread(self._read_tokenizer, offer.path)
        backend = self._make_backend(offer.path)
        try:
            await backend.start()
        except BaseException:
            await backend.close()
            raise
        model = self.loaded[name] = Model(name, tokenizer, backend)
        return model

    def _short(self, offer: Offer) -> bool:
        free = self._free_memory()
        return free is not None and offer.memory_bytes > free

    async def _unload_one(self) -> None:
        idle = [m for m in self.loaded.values() if not m.n_users and not self._wanted[m.name]]
        if not idle:
            raise Busy(sum(model.n_users for model in self.loaded.values()), 5)
        await self._unload(min(idle, key=lambda model: model.last_used))

    async def _unload(self, model: Model) -> None:
        log.info("unloading %s", model.name)
        del self.loaded[model.name]
        await model.backend.close()

    async def unload_idle(self) -> None:
        """Unload what nobody has used for `idle_s` seconds."""
        if self._idle_s is None:
            return
        async with self._lock:
            limit = time.monotonic() - self._idle_s
            for model in list(self.loaded.values()):
                if not model.n_users and model.last_used < limit:
                    await self._unload(model)

    async def close(self) -> None:
        for task in self._loading.values():
            task.cancel()
        async with self._lock:
            for model in list(self.loaded.values()):
                await self._unload(model)

"""Several models behind one server: loaded on demand, unloaded when idle or to make room."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dsq.errors import DsqError
from dsq.runtime.server.backend import Busy
from dsq.runtime.server.models import ModelPool, Offer
from dsq.runtime.server.problems import ModelNotFound
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.server.scripted_backend import ScriptedBackend

MIB = 2**20


class Made:
    """A pool of models a, b and c, and the backends it has made."""

    def __init__(self, tokenizer: Tokenizer, names: str = "abc", free: int = 0, **how: float):
        self.backends: dict[str, ScriptedBackend] = {}
        used = {name: i * MIB for i, name in enumerate(names, start=1)}

        def make(path: Path) -> ScriptedBackend:
            self.backends[path.name] = ScriptedBackend(lambda request: [])
            return self.backends[path.name]

        def free_now() -> int | None:
            if not free:
                return None
            open_ = [name for name, backend in self.backends.items() if not backend.closed]
            return free - sum(used[name] for name in open_)

        offers = {name: Offer(Path(name), 1, used[name]) for name in names}
        self.pool = ModelPool(
            offers,
            make,
            lambda path: tokenizer,
            free_memory=free_now,
            **how,  # type: ignore[arg-type]
        )

    async def touch(self, name: str | None) -> str:
        async with self.pool.use(name) as model:
            return model.name


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))  # type: ignore[arg-type]


def test_the_least_recently_used_model_makes_room(tokenizer: Tokenizer) -> None:
    made = Made(tokenizer, most_loaded=2)

    async def test() -> None:
        for name in ("a", "b", "a", "c"):
            assert await made.touch(name) == name
        assert list(made.pool.loaded) == ["a", "c"]
        assert made.backends["b"].closed
        await made.pool.close()
        assert all(backend.closed for backend in made.backends.values())

    run(test)


def test_a_model_in_use_is_never_unloaded(tokenizer: Tokenizer) -> None:
    made = Made(tokenizer, most_loaded=1, idle_s=0.0)

    async def test() -> None:
        async with made.pool.use("a"):
            with pytest.raises(Busy):
                await made.touch("b")
            await made.pool.unload_idle()
            assert list(made.pool.loaded) == ["a"]
        await made.pool.unload_idle()
        assert not made.pool.loaded

    run(test)


def test_one_load_for_many_requests_at_once(tokenizer: Tokenizer) -> None:
    made = Made(tokenizer)
    n_made = []
    original = made.pool._make_backend
    made.pool._make_backend = lambda path: (n_made.append(path), original(path))[1]

    async def test() -> None:
        await asyncio.gather(*(made.touch("a") for _ in range(20)))
        assert len(n_made) == 1

    run(test)


def test_memory_is_asked_before_a_model_is_loaded(tokenizer: Tokenizer) -> None:
    made = Made(tokenizer, free=int(3.5 * MIB), most_loaded=3)

    async def test() -> None:
        await made.touch("a")
        await made.touch("b")
        await made.touch("c")  # 3 MiB: only with the other two gone
        assert list(made.pool.loaded) == ["c"]

    run(test)
    small = Made(tokenizer, free=MIB // 2)

    async def too_large() -> None:
        with pytest.raises(DsqError, match="a needs about 1 MiB, but 0 MiB are free"):
            await small.touch("a")
        assert not small.backends

    run(too_large)


def test_names(tokenizer: Tokenizer) -> None:
    several, one = Made(tokenizer), Made(tokenizer, names="a")

    async def test() -> None:
        assert await one.touch("gpt-4") == "a"  # an editor's fixed name
        with pytest.raises(ModelNotFound, match="models: a, b, c"):
            await several.touch("gpt-4")
        with pytest.raises(ModelNotFound):
            await several.touch(None)
        await several.touch("b")
        assert await several.touch(None) == "b"

    run(test)


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(tokenizer: Tokenizer) -> None:
    made = Made(tokenizer)

    async def fail(self: ScriptedBackend) -> None:
        raise DsqError("cannot be loaded")

    async def test() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ScriptedBackend, "start", fail)
            with pytest.raises(DsqError, match="cannot be loaded"):
                await made.touch("a")
        assert made.backends["a"].closed
        assert await made.touch("a") == "a"

    run(test)

"""What a conversation takes by itself never exceeds the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsq.convert.memory import kv_bytes
from dsq.errors import InputError
from dsq.runtime.chat_plan import LEAST_CTX, Asked, ChatPlan, plan_chat
from tests.models import TINY_CODER
from tests.tiny_gguf import write_tiny_gguf

MiB = 1 << 20


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose cache at its whole context is far larger than its weights."""
    path = tmp_path_factory.mktemp("long") / "long.gguf"
    return write_tiny_gguf(path, n_ctx=4096, n_layer=4, n_embd=256, n_ff=128, n_head_kv=4)


def plan(path: Path, free: int, asked: Asked | None = None, **more: int) -> ChatPlan:
    return plan_chat(path, asked or Asked(), engine="auto", free=free, **more)


def test_with_room_the_cache_is_fine_and_the_context_the_usual_one(long: Path) -> None:
    found = plan(long, 8 << 30)
    assert (found.settings.n_ctx, found.settings.kv_type) == (4096, "f16")
    assert found.settings.n_gpu_layers == 0
    assert "context 4,096, f16 cache" in found.about()


def test_memory_that_gets_short(long: Path) -> None:
    """Never more than there is; less cache, then less context, and at the end a clear error."""
    need = plan(long, 8 << 30).ram
    seen, refused = [], ""
    for free in range(need, 0, -MiB // 4):
        try:
            found = plan(long, free)
        except InputError as error:
            refused = str(error)
            break
        assert found.ram <= free
        seen.append((found.settings.n_ctx, found.settings.kv_type))
    assert "of memory" in refused
    assert "-c" in refused
    assert seen[0] == (4096, "f16")
    assert (4096, "q8_0") in seen
    assert seen[-1] == (LEAST_CTX, "q4_0")
    assert [n for n, _ in seen] == sorted((n for n, _ in seen), reverse=True)


def test_what_is_asked_for_is_taken_or_refused(long: Path) -> None:
    found = plan(long, 8 << 30, Asked(n_ctx=2048, kv_type="q4_0"))
    assert (found.settings.n_ctx, found.settings.kv_type) == (2048, "q4_0")
    tight = plan(long, 8 << 30).ram - MiB
    with pytest.raises(InputError, match="take a smaller context"):
        plan(long, tight, Asked(n_ctx=4096, kv_type="f16"))


def test_layers_go_to_a_card_that_is_there(long: Path) -> None:
    free = 8 << 30
    whole = plan(long, free, card_free=4 << 30)
    assert whole.settings.n_gpu_layers == 5
    assert 0 < whole.vram <= 4 << 30
    none = plan(long, free, Asked(n_gpu_layers=0), card_free=4 << 30)
    assert (none.settings.n_gpu_layers, none.vram) == (0, 0)
    asked = plan(long, free, Asked(n_gpu_layers=3))
    assert (asked.settings.n_gpu_layers, asked.ram) == (3, 0)


def test_a_quantized_cache_that_the_heads_do_not_divide_into(tiny: Path) -> None:
    with pytest.raises(InputError, match="heads of 16 values"):
        plan(tiny, 8 << 30, Asked(kv_type="q8_0"))
    assert plan(tiny, 8 << 30).settings.kv_type == "f16"


def test_a_directory_in_torch() -> None:
    found = plan(TINY_CODER, 8 << 30)
    assert found.settings.kv_type == "f32"
    with pytest.raises(InputError, match="of memory in torch"):
        plan(TINY_CODER, 64 * MiB)


def test_the_sum_holds_the_whole_cache(long: Path) -> None:
    from dsq.convert.checkpoint import open_checkpoint

    spec = open_checkpoint(long).spec
    assert plan(long, 8 << 30).ram > kv_bytes(spec, 4096, "f16") + long.stat().st_size

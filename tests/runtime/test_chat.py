"""Conversations: what is kept, what is evaluated again, and interruptions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsq.errors import InputError
from dsq.runtime.chat import ChatSession
from dsq.runtime.llamacpp import LlamaCppEngine
from dsq.runtime.sampling import GREEDY
from dsq.runtime.source import Source
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.scripted import ScriptedEngine
from tests.tiny_gguf import EOT, token_id

EOT_ID = token_id(EOT)
A, B, C = (token_id(letter) for letter in "abc")


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_vocabulary(Source(tiny).vocabulary)


def session(tokenizer: Tokenizer, script: object, n_ctx: int = 200) -> ChatSession:
    engine = ScriptedEngine(tokenizer, script, n_ctx)  # type: ignore[arg-type]
    return ChatSession(engine, system="s", sampler=GREEDY)


def roles(chat: ChatSession) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in chat.messages]


def test_an_answer_joins_the_conversation(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, [A, B, EOT_ID, C, EOT_ID])
    assert "".join(chat.send("hi")) == "ab"
    assert chat.last is not None
    assert chat.last.stop_reason == "eos"
    assert "".join(chat.send("more")) == "c"
    assert roles(chat) == [
        *(("system", "s"), ("user", "hi"), ("assistant", "ab")),
        *(("user", "more"), ("assistant", "c")),
    ]


def test_the_next_turn_evaluates_only_what_is_new(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, [A, B, EOT_ID, C, EOT_ID])
    list(chat.send("hi"))
    engine = chat._engine
    assert isinstance(engine, ScriptedEngine)
    held = engine.n_past
    engine.evaluated.clear()
    list(chat.send("more"))
    whole = tokenizer.chat(chat.messages[:-1], add_generation_prompt=True)
    assert engine.evaluated[0] == len(whole) - held
    assert engine.held[: len(whole)] == whole


def test_reuse_says_what_a_fresh_engine_says(tiny: Path) -> None:
    with LlamaCppEngine(tiny, n_ctx=256, n_threads=1) as engine:
        chat = ChatSession(engine, sampler=GREEDY, max_tokens=8)
        list(chat.send("hi"))
        answer = "".join(chat.send("the"))
        prompt = engine.tokenizer.chat(chat.messages[:-1], add_generation_prompt=True)
        engine.truncate(0)
        ids: list[int] = []
        for _ in range(8):
            ids.append(int(engine.logits([*prompt, *ids])[-1].argmax()))
        assert chat.last is not None
        assert chat.last.tokens == tuple(ids)
        assert chat.last.text == answer


def interrupted() -> Iterator[int]:
    yield from (A, B)
    raise KeyboardInterrupt


def test_ctrl_c_keeps_the_partial_answer_and_the_session(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, interrupted())
    got: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        got.extend(chat.send("hi"))
    assert roles(chat)[1:] == [("user", "hi"), ("assistant", "ab")]
    assert chat.last is None
    chat._engine.script = iter([C, EOT_ID])  # type: ignore[attr-defined]
    assert "".join(chat.send("go on")) == "c"


def test_ctrl_c_before_the_first_token_takes_the_message_back(tokenizer: Tokenizer) -> None:
    def at_once() -> Iterator[int]:
        raise KeyboardInterrupt
        yield 0

    chat = session(tokenizer, at_once())
    with pytest.raises(KeyboardInterrupt):
        list(chat.send("hi"))
    assert roles(chat) == [("system", "s")]


def test_an_answer_left_halfway_is_kept(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, [A, B, C, EOT_ID])
    answer = chat.send("hi")
    assert next(answer) == "a"
    assert next(answer) == "b"
    chat._engine.script = iter([C, EOT_ID])  # type: ignore[attr-defined]
    assert "".join(chat.send("next")) == "c"
    assert roles(chat)[1:] == [
        *(("user", "hi"), ("assistant", "ab"), ("user", "next"), ("assistant", "c")),
    ]


def test_an_answer_never_begun_is_not_kept(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, [A, EOT_ID])
    chat.send("hi")
    assert "".join(chat.send("hello")) == "a"
    assert roles(chat)[1:] == [("user", "hello"), ("assistant", "a")]


def test_a_conversation_that_no_longer_fits(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, [A, EOT_ID, B, EOT_ID], n_ctx=60)
    list(chat.send("hi"))
    with pytest.raises(InputError, match="but a context of 60 holds at most"):
        chat.send("x" * 60)
    assert len(chat.messages) == 3
    assert "".join(chat.send("y")) == "b"


def test_reset_keeps_the_system_message(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, [A, EOT_ID, B, EOT_ID])
    list(chat.send("hi"))
    chat.send("left")
    chat.reset()
    assert roles(chat) == [("system", "s")]


def test_an_interrupted_message_leaves_its_file_for_the_next(tokenizer: Tokenizer) -> None:
    def at_once() -> Iterator[int]:
        raise KeyboardInterrupt
        yield 0

    chat = session(tokenizer, at_once())
    chat.attached = ["#a.py"]
    with pytest.raises(KeyboardInterrupt):
        list(chat.send("hi"))
    chat._engine.script = iter([A, EOT_ID])  # type: ignore[attr-defined]
    list(chat.send("hello"))
    assert roles(chat)[1] == ("user", "#a.py\n---\n\nhello")
    assert chat.attached == []


def test_undo_and_regenerate(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, [A, EOT_ID, B, EOT_ID, C, EOT_ID])
    list(chat.send("hi"))
    list(chat.send("more"))
    assert "".join(chat.regenerate()) == "c"
    assert roles(chat)[1:] == [
        *(("user", "hi"), ("assistant", "a")),
        *(("user", "more"), ("assistant", "c")),
    ]
    assert [chat.undo(), chat.undo(), chat.undo()] == ["more", "hi", None]
    assert roles(chat) == [("system", "s")]
    with pytest.raises(InputError, match="no message yet"):
        chat.regenerate()


def test_the_oldest_turns_make_room_and_the_repository_stays(tokenizer: Tokenizer) -> None:
    script = [token for _ in range(40) for token in (A, B, EOT_ID)]
    chat = session(tokenizer, script, n_ctx=400)
    chat.files = "#r.py"
    dropped = []
    for i in range(30):
        list(chat.send(f"message {i}"))
        dropped.append(chat.n_dropped)
        assert chat.n_used <= 400
        assert roles(chat)[0] == ("system", "s")
        assert roles(chat)[-2:] == [("user", f"message {i}"), ("assistant", "ab")]
        assert "#r.py\n---\n\nmessage" in tokenizer.decode(chat._engine.tokens)
    assert sum(dropped) == 30 - len(chat.turns())
    assert 0 < sum(map(bool, dropped)) < sum(dropped)  # several at once, not one every time
    with pytest.raises(InputError, match="but a context of 400 holds at most"):
        chat.send("x" * 500)
    assert roles(chat)[-2] == ("user", "message 29")


def test_the_system_message_can_change(tokenizer: Tokenizer) -> None:
    chat = session(tokenizer, [A, EOT_ID])
    list(chat.send("hi"))
    chat.system = "t"
    assert roles(chat)[:2] == [("system", "t"), ("user", "hi")]
    chat.system = None
    assert chat.system is None
    assert roles(chat)[0] == ("user", "hi")

"""The `/` commands, saved conversations, and lines that are read."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsq.errors import InputError
from dsq.runtime import chat_store
from dsq.runtime.chat import ChatSession
from dsq.runtime.chat_commands import COMMANDS, Command, Commands, help_text, parse
from dsq.runtime.chat_input import PlainReader, is_open, reader, unquoted
from dsq.runtime.sampling import GREEDY
from dsq.runtime.source import Source
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.corpus.conftest import write_files
from tests.runtime.scripted import ScriptedEngine
from tests.tiny_gguf import EOT, token_id


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_vocabulary(Source(tiny).vocabulary)


@pytest.fixture
def chat(tokenizer: Tokenizer) -> ChatSession:
    script = [token_id("a"), token_id(EOT)] * 9
    return ChatSession(ScriptedEngine(tokenizer, script, 400), sampler=GREEDY)  # type: ignore[arg-type]


@pytest.fixture
def commands(chat: ChatSession, tokenizer: Tokenizer) -> Commands:
    return Commands(chat, tokenizer, "tiny.gguf")


def run(commands: Commands, line: str) -> str:
    command = parse(line)
    assert command is not None
    return commands.run(command)


def asked(chat: ChatSession) -> list[str]:
    return [m["content"] for m in chat.messages if m["role"] == "user"]


@pytest.mark.parametrize(
    "line",
    ["hello", "", "/usr/bin/env is a file", "/etc is full", "// a comment", "/", "a /help", "/2 x"],
)
def test_messages_that_are_no_commands(line: str) -> None:
    assert parse(line) is None


def test_commands_and_their_other_names() -> None:
    assert parse(" /HELP ") == Command("help", "")
    assert parse("/reset") == Command("clear", "")
    assert parse("/exit") == Command("quit", "")
    assert parse("/system Be brief.\nAlways.") == Command("system", "Be brief.\nAlways.")
    for line, message in (
        ("/nope", "no such command"),
        ("/file", "needs PATH"),
        ("/undo all", "takes nothing behind it"),
    ):
        with pytest.raises(InputError, match=message):
            parse(line)
    assert all(f"/{name}" in help_text() for name in COMMANDS)


def test_a_file_goes_with_the_next_message(
    chat: ChatSession, commands: Commands, tmp_path: Path
) -> None:
    write_files(tmp_path, {"my file.py": "x = 1\n"})
    said = run(commands, f"/file '{tmp_path}/my file.py'")
    assert "tokens go with the next message" in said
    list(chat.send("why?"))
    list(chat.send("and?"))
    assert asked(chat) == [f"#{tmp_path}/my file.py\nx = 1\n\n---\n\nwhy?", "and?"]


def test_a_long_file_is_cut_at_a_lines_end_and_said_so(
    chat: ChatSession, commands: Commands, tmp_path: Path
) -> None:
    write_files(tmp_path, {"a.py": "line = 1\n" * 200})
    assert "more had no room and were cut off" in run(commands, f"/file {tmp_path / 'a.py'}")
    assert chat.attached[0].endswith("line = 1\n")
    list(chat.send("why?"))


def test_a_repository_stays_before_the_conversation(
    chat: ChatSession, commands: Commands, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_files(tmp_path / "r", {"a.py": "import b\n", "b.py": "x = 1\n"})
    assert "b.py, a.py" in run(commands, f"/repo {tmp_path / 'r'}")
    list(chat.send("why?"))
    assert asked(chat) == ["why?"]  # the conversation itself does not repeat the files
    assert "#b.py\nx = 1\n\n#a.py\nimport b\n\n---\n\nwhy?" in tokenizer.decode(chat._engine.tokens)
    assert "The files of r stay" in run(commands, "/clear")
    assert run(commands, "/repo") == "No repository."
    assert chat.files == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"\xff\xfe", "no text in UTF-8"),
        (b"a\0b", "binary"),
        (b" ", "empty"),
    ],
)
def test_files_that_cannot_be_shown(
    commands: Commands, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "a.py"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        run(commands, f"/file {path}")


def test_save_clear_load(chat: ChatSession, commands: Commands, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    with pytest.raises(InputError, match="no conversation yet"):
        run(commands, f"/save {path}")
    run(commands, "/system Be brief.")
    list(chat.send("hi"))
    before = chat.messages
    for _ in range(2):  # a saved one may be saved again
        run(commands, f"/save {path}")
    run(commands, "/clear")
    assert asked(chat) == []
    assert run(commands, f"/load {path}") == "1 turn loaded."
    assert chat.messages == before
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="exists and is no conversation"):
        run(commands, f"/save {tmp_path / 'other.json'}")
    assert (tmp_path / "other.json").read_text() == "{}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["format", "messages", "role", "content"]), inner)
    ),
    max_leaves=8,
)


@given(content=JSON)
def test_whatever_is_loaded_it_is_a_conversation_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: object
) -> None:
    path = tmp_path_factory.mktemp("load") / "a.json"
    for written in (content, {"format": "dsq chat", "messages": content}):
        path.write_text(json.dumps(written), encoding="utf-8")
        found, refused = [], ""
        try:
            found = chat_store.load(path)
        except InputError as error:
            refused = str(error)
        assert str(path) in refused or all(set(m) == {"role", "content"} for m in found)


def test_temperature_and_stats(chat: ChatSession, commands: Commands) -> None:
    assert run(commands, "/temp 0.5") == "Temperature 0.5."
    assert chat.sampler.temp == 0.5
    for bad in ("-1", "nan", "warm", "1e9"):
        with pytest.raises(InputError, match="number from 0 to 100"):
            run(commands, f"/temp {bad}")
    assert run(commands, "/stats") == "0 turns, context 0 of 400"


def test_lines_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one\n'''two\nthree\n'''\n'''four'''\n'''five\nsix"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    plain, found = PlainReader(), []
    while (message := plain.read()) is not None:
        found.append(message)
    assert found == ["one", "two\nthree", "four", "five\nsix"]


@given(text=st.text("ab'\n ", max_size=12))
def test_quotes_open_and_close(text: str) -> None:
    """Closed text is never waited for; what stands between the quotes comes out as it is."""
    quoted = f"'''{text}'''"
    assert not is_open(quoted)
    assert unquoted(quoted) == text.strip("\n") or "'" in text
    assert not is_open(unquoted("'''" + text.replace("'", "") + "'''"))


def test_the_history_is_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "dsq").mkdir()
    (tmp_path / "dsq" / "chat_history").write_text("old")
    path = chat_store.history_file()
    assert path is not None
    assert path.read_text() == "old"
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert chat_store.history_file() is None


def test_a_terminal_without_prompt_toolkit_gets_a_plain_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("hello\n'''a\nb'''\n"))
    shown = Terminal()
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    typed = reader(lambda: None, [])
    assert [typed.read(), typed.read(), typed.read()] == ["hello", "a\nb", None]
    assert shown.getvalue() == "> >   > "

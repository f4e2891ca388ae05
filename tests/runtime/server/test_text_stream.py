"""Text from tokens: stop strings are never half printed, characters never half decoded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsq.runtime.server.text_stream import TextStream
from dsq.runtime.stop_filter import StopFilter
from dsq.tokenizer_port.tokenizer import Tokenizer

SHORT = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def cut_at_first_stop(text: str, stops: list[str]) -> str:
    """Letter by letter: as soon as the text ends with a stop string, the longest such goes."""
    for n in range(1, len(text) + 1):
        ends = [stop for stop in stops if text[:n].endswith(stop)]
        if ends:
            return text[: n - max(map(len, ends))]
    return text


@given(pieces=st.lists(SHORT), stops=STOPS)
def test_however_it_is_cut_the_text_ends_before_the_first_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    wanted = cut_at_first_stop("".join(pieces), stops)
    found = StopFilter(stops)
    given_out = ""
    for piece in pieces:
        given_out += found.push(piece)
        assert wanted.startswith(given_out)  # at every moment, so nothing has to be taken back
    assert given_out + found.rest() == wanted


@given(text=st.text("ab", max_size=12), stops=STOPS)
def test_no_more_is_held_back_than_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    found = StopFilter(stops)
    out = found.push(text)
    if found.found is None:
        held = text[len(out) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@given(text=st.text(max_size=20), cut=st.integers(0, 80))
def test_characters_come_out_whole(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text, add_bos=False)
    stream = TextStream(tokenizer)
    pieces = [stream.push([i]).text for i in ids[:cut]]
    assert text.startswith("".join(pieces))
    pieces += [stream.push([i]).text for i in ids[cut:]]
    assert "".join(pieces) + stream.finish("stop").text == text


def test_half_a_character_at_the_length_limit_is_left_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a€", add_bos=False)
    for how, wanted in (("length", "a"), ("stop", "a�")):
        stream = TextStream(tokenizer)
        text = stream.push(ids[:-1]).text
        assert text + stream.finish(how).text == wanted  # type: ignore[arg-type]


def test_tokens_come_with_their_text(tokenizer: Tokenizer) -> None:
    """A token waits while its text is held back, and never comes if a stop string takes it."""
    stream = TextStream(tokenizer, ["abc"])
    ids = tokenizer.encode("xabyabcz", add_bos=False)
    assert len(ids) == 8
    seen = [[token.offset for token in stream.push([i]).tokens] for i in ids[:7]]
    assert seen == [[0], [], [], [1, 2, 3], [], [], []]
    assert stream.stop_string == "abc"
    assert stream.finish("stop").tokens == ()


def test_a_stop_string_inside_one_step_of_several_tokens(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["b"])
    piece = stream.push(tokenizer.encode("xabyz", add_bos=False))
    assert (piece.text, stream.n_tokens) == ("xa", 3)

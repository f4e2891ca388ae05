"""The tokenizer: one object for encoding, decoding, fill-in-the-middle and chat."""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from dsq.errors import InputError
from dsq.tokenizer_port import special
from dsq.tokenizer_port.bytelevel import printable, to_bytes
from dsq.tokenizer_port.chat import ControlTexts, encode_chat
from dsq.tokenizer_port.encoder import Encoder
from dsq.tokenizer_port.json_file import brief
from dsq.tokenizer_port.to_hf import tokenizer_json
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

_CONTROL = (TokenType.CONTROL, TokenType.UNKNOWN)


class Tokenizer:
    """Encodes as Hugging Face's `tokenizers` does, with two rules of its own.

    Nothing a user types becomes a control token unless `parse_special` asks for it, and BOS stands
    at the front exactly once. Decoding goes by the bytes of the tokens, so that DeepSeek's letter
    tokens (`ü` is one) come back as the letters, which HF's decoder prints as U+FFFD.

    `decode(encode(text), skip_special=False)` is the text (and a BOS before it), for every str
    without lone surrogates, where the vocabulary has a token for each of the 243 bytes that UTF-8
    uses. A byte without one becomes the unknown token if the vocabulary has one, and is left out
    if not, as HF and llama.cpp leave it out.
    """

    def __init__(self, vocab: Vocabulary, definition: Mapping[str, Any]) -> None:
        self.vocab = vocab
        self._definition = definition

    @classmethod
    def from_vocabulary(cls, vocab: Vocabulary) -> Tokenizer:
        tokenizer = cls(vocab, tokenizer_json(vocab))
        _ = tokenizer._plain  # a definition that `tokenizers` refuses is refused now
        return tokenizer

    def __len__(self) -> int:
        return len(self.vocab.tokens)

    # Encoding

    def encode(
        self, text: str, *, add_bos: bool | None = None, parse_special: bool = False
    ) -> list[int]:
        """Token ids; `add_bos` None does as the model wants.

        `parse_special` makes control tokens of their texts, as HF's tokenizer always does; a BOS
        that the text begins with is not doubled then.
        """
        ids = self._encoder(parse_special).encode(_checked(text))
        return self._with_bos(ids, add_bos)

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_bos: bool | None = None,
        parse_special: bool = False,
    ) -> list[list[int]]:
        """`encode` of each text, faster."""
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise InputError(f"texts: is {brief(texts)}; give a list of them")
        found = self._encoder(parse_special).encode_batch([_checked(text) for text in texts])
        return [self._with_bos(ids, add_bos) for ids in found]

    def fim(
        self,
        prefix: str,
        suffix: str,
        *,
        add_bos: bool | None = None,
        parse_special: bool = False,
    ) -> list[int]:
        """[BOS] begin-marker, prefix, hole-marker, suffix, end-marker: the middle is to follow.

        A BOS at the front of a `parse_special` prefix is moved before the marker.
        """
        v = self.vocab
        if v.fim_prefix is None or v.fim_suffix is None or v.fim_middle is None:
            raise InputError(
                "this model has no fill-in-the-middle tokens; complete from the prefix alone, or "
                "use a model trained for it (DeepSeek Coder base)"
            )
        before, after = (
            self.encode(text, add_bos=False, parse_special=parse_special)
            for text in (prefix, suffix)
        )
        written = v.bos is not None and before[:1] == [v.bos]
        ids = [v.fim_prefix, *before[written:], v.fim_suffix, *after, v.fim_middle]
        return self._with_bos(ids, True if written else add_bos)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        add_bos: bool | None = None,
        parse_special: bool = False,
        **variables: Any,
    ) -> list[int]:
        """The conversation in the model's own template; see `chat.encode_chat` for what is safe.

        `variables` (tools, documents, ...) are handed to the template. BOS is added where the
        template writes none. `parse_special` lets control tokens in the messages through.
        """
        ids = encode_chat(
            self,
            messages,
            {**variables, "add_generation_prompt": add_generation_prompt},
            parse_special=parse_special,
        )
        if parse_special and self.vocab.bos in ids:
            # It may be the messages' own: what counts is whether the template writes one.
            written = self.chat(
                messages, add_generation_prompt=add_generation_prompt, add_bos=False, **variables
            )
        else:
            written = ids
        return ids if self.vocab.bos in written else self._with_bos(ids, add_bos)

    def stop_ids(self, mode: Literal["complete", "chat"]) -> frozenset[int]:
        """The tokens that end generation.

        Chat: EOS, the end of a turn, the end of a text. Completion: EOS, the end of a text, the
        markers of a next file, and the end of a turn if the model is a chat model at all.
        DeepSeek: 32014 in every case, 32021 too where the model is an instruct model or chatting.
        """
        v = self.vocab
        ids = set(special.find_all(v.index, special.END_OF_TEXT))
        if v.eos is not None:
            ids.add(v.eos)
        if v.eot is not None and (mode == "chat" or v.chat_template is not None):
            ids.add(v.eot)
        if mode == "complete":
            ids |= special.find_all(v.index, special.NEXT_FILE)
        return frozenset(ids)

    # Decoding

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for: its bytes, or an added token's text in UTF-8."""
        return self._bytes[self._id(token)]

    def piece(self, token: int) -> str:
        """A token's text; a byte that makes no character within the token is `<0xE4>`."""
        return printable(self.token_bytes(token))

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        if not isinstance(ids, Iterable):
            raise InputError(f"token ids: are {brief(ids)}; a list of whole numbers is needed")
        silent = self._silent if skip_special else frozenset()
        numbers = map(self._id, ids)
        return b"".join(self._bytes[token] for token in numbers if token not in silent)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def stream_decoder(self, *, skip_special: bool = True) -> StreamDecoder:
        return StreamDecoder(self, skip_special)

    # Parts

    @cached_property
    def control_texts(self) -> ControlTexts:
        """Text → id of every token that a user's text must never become."""
        return ControlTexts({self.vocab.tokens[i]: i for i in self.vocab.ids_of_type(*_CONTROL)})

    def added_flags(self, text: str) -> Mapping[str, Any]:
        """An added token's entry in tokenizer.json (`lstrip`, `rstrip`, ...)."""
        return self._added_entries.get(text, {})

    @cached_property
    def _added_entries(self) -> dict[str, Mapping[str, Any]]:
        return {entry["content"]: entry for entry in self._definition.get("added_tokens") or []}

    @cached_property
    def _bytes(self) -> list[bytes]:
        literal = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN, TokenType.UNUSED)
        return [
            token.encode("utf-8", errors="replace") if kind in literal else to_bytes(token)
            for token, kind in zip(self.vocab.tokens, self.vocab.types, strict=True)
        ]

    @cached_property
    def _silent(self) -> frozenset[int]:
        return frozenset(self.vocab.ids_of_type(*_CONTROL, TokenType.UNUSED))

    def _id(self, token: int) -> int:
        try:
            number = operator.index(token)
        except TypeError:
            number = -1
        if not 0 <= number < len(self.vocab.tokens):
            raise InputError(
                f"token id {brief(token)}: ids go from 0 to {len(self.vocab.tokens) - 1}"
            )
        return number

    def _encoder(self, parse_special: bool) -> Encoder:
        return self._special if parse_special else self._plain

    @cached_property
    def _special(self) -> Encoder:
        return Encoder(self._definition)

    @cached_property
    def _plain(self) -> Encoder:
        """The same tokenizer without its control tokens, and without the merges that make them."""
        control = set(self.control_texts.ids)
        added = self._definition.get("added_tokens") or []
        kept = [entry for entry in added if entry["content"] not in control]
        model = {**self._definition["model"]}
        model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in control}
        # The library ignores the ids in added_tokens and numbers on from the vocabulary, so a token
        # that stands behind one left out here would move to another id, unless it is listed there.
        model["vocab"].update({entry["content"]: entry["id"] for entry in kept})
        model["merges"] = [m for m in model.get("merges") or [] if control.isdisjoint(_made(m))]
        if model.get("unk_token") not in model["vocab"]:
            model["unk_token"] = None
        definition = {**self._definition, "model": model, "added_tokens": kept}
        return Encoder({**definition, "post_processor": None})

    def _with_bos(self, ids: list[int], wanted: bool | None) -> list[int]:
        bos = self.vocab.bos
        wanted = self.vocab.add_bos if wanted is None else wanted
        if wanted and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids


class StreamDecoder:
    """Text from tokens as they arrive; a character is given out when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        piece = self._tokenizer.decode_bytes([token], skip_special=self._skip_special)
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left: an unfinished character comes out as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _made(merge: Any) -> tuple[str, str, str]:
    """A merge's two parts, and what they make."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second, first + second


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise InputError(f"text: is {brief(text)}; a str is needed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text: character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), "
            "which UTF-8 cannot hold; remove it"
        ) from None
    return text

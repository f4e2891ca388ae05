"""The tokenizer: one object for encoding, decoding, fill-in-the-middle and chat."""

from __future__ import annotations

import codecs
import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from dsq.errors import InputError
from dsq.tokenizer_port import special
from dsq.tokenizer_port.bytelevel import to_bytes
from dsq.tokenizer_port.chat import ControlTexts, encode_chat
from dsq.tokenizer_port.to_hf import tokenizer_json
from dsq.tokenizer_port.vocabulary import TokenType, Vocabulary

if TYPE_CHECKING:
    import tokenizers

_CONTROL = (TokenType.CONTROL, TokenType.UNKNOWN)


class Tokenizer:
    """Encodes as Hugging Face's `tokenizers` does, with two rules of its own.

    Nothing a user types becomes a control token unless `parse_special` asks for it, and BOS stands
    at the front exactly once. Decoding goes by the bytes of the tokens, so that DeepSeek's letter
    tokens (`ü` is one) come back as the letters, which HF's decoder prints as U+FFFD.
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

        `parse_special` makes control tokens of their texts, as HF's tokenizer always does.
        """
        ids = self._encode(self._special if parse_special else self._plain, text)
        return self._with_bos(ids, self.vocab.add_bos if add_bos is None else add_bos)

    def fim(self, prefix: str, suffix: str) -> list[int]:
        """[BOS] begin-marker, prefix, hole-marker, suffix, end-marker: the middle is to follow."""
        v = self.vocab
        if v.fim_prefix is None or v.fim_suffix is None or v.fim_middle is None:
            raise InputError(
                "this model has no fill-in-the-middle tokens; complete from the prefix alone, or "
                "use a model trained for it (DeepSeek Coder base)"
            )
        ids = [v.fim_prefix, *self.encode(prefix, add_bos=False)]
        ids += [v.fim_suffix, *self.encode(suffix, add_bos=False), v.fim_middle]
        return self._with_bos(ids, v.add_bos)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The conversation in the model's own template; see `chat.encode_chat` for what is safe.

        `variables` (tools, documents, ...) are handed to the template.
        """
        ids = encode_chat(
            self, messages, {**variables, "add_generation_prompt": add_generation_prompt}
        )
        return self._with_bos(ids, self.vocab.add_bos)

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
        if not 0 <= token < len(self.vocab.tokens):
            raise InputError(f"token id {token}: ids go from 0 to {len(self.vocab.tokens) - 1}")
        return self._bytes[token]

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        return b"".join(self._piece(token, skip_special) for token in ids)

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

    def _piece(self, token: int, skip_special: bool) -> bytes:
        return b"" if skip_special and token in self._silent else self.token_bytes(token)

    @cached_property
    def _special(self) -> tokenizers.Tokenizer:
        return _build(self._definition)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer without its control tokens."""
        control = self.control_texts.ids
        definition = {**self._definition, "model": {**self._definition["model"]}}
        definition["added_tokens"] = [
            entry
            for entry in self._definition.get("added_tokens") or []
            if entry["content"] not in control
        ]
        # They leave the model's vocabulary as well: with ignore_merges a piece of text that
        # equals one would be taken whole.
        parts = {part for merge in self.vocab.merges for part in merge.split(" ")}
        parts |= {merge.replace(" ", "") for merge in self.vocab.merges}
        definition["model"]["vocab"] = {
            token: i
            for token, i in self._definition["model"]["vocab"].items()
            if token not in control or token in parts
        }
        unknown = definition["model"].get("unk_token")
        if unknown is not None and unknown not in definition["model"]["vocab"]:
            definition["model"]["unk_token"] = None
        definition["post_processor"] = None
        return _build(definition)

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InputError(
                f"text cannot be encoded: {error}; it must be valid Unicode without surrogates"
            ) from error
        except BaseException as error:
            if not _is_theirs(error):
                raise
            raise _refusal(error, "encode with it") from error
        return ids

    def _with_bos(self, ids: list[int], wanted: bool) -> list[int]:
        bos = self.vocab.bos
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


def _build(definition: Mapping[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    model = {**copy.copy(definition["model"]), "dropout": None}  # dropout is for training
    text = json.dumps({**definition, "model": model}, ensure_ascii=False)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        if not _is_theirs(error):
            raise
        raise _refusal(error, "build it") from error


def _is_theirs(error: BaseException) -> bool:
    """`tokenizers` raises bare Exception, or panics, which is no Exception at all."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _refusal(error: BaseException, what: str) -> InputError:
    return InputError(
        f"tokenizer.json: the tokenizers library cannot {what}: {' '.join(str(error).split())}; "
        "the vocabulary and the merges do not fit together: convert again"
    )

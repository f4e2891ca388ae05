"""Load a Hugging Face directory with the transformers that is installed, and compare it with dsq.

Run by the Python of an environment that has transformers and nothing of dsq:
`python hf_probe.py DIRECTORY…` prints one JSON object. What is expected stands in
`DIRECTORY.expected.json` (see `hf_loading.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Expected = dict[str, Any]
Check = Callable[[Any, Expected], "str | None"]


def check_class(tokenizer: Any, expected: Expected) -> str | None:
    """The plain class, which takes tokenizer.json as it is; in transformers 5 it has two names."""
    from transformers import PreTrainedTokenizerFast

    return unequal("class", type(tokenizer), PreTrainedTokenizerFast)


def check_ids(tokenizer: Any, expected: Expected) -> str | None:
    """dsq's ids, and no BOS or EOS of its own, where none is asked for."""
    texts = [entry["text"] for entry in expected["texts"]]
    batch = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for entry, row in zip(expected["texts"], batch, strict=True):
        ids = tokenizer.encode(entry["text"], add_special_tokens=False)
        said = unequal(repr(entry["text"]), ids, entry["ids"])
        said = said or unequal(f"{entry['text']!r} in a batch", row, entry["ids"])
        if said:
            return said
    return None


def check_bos(tokenizer: Any, expected: Expected) -> str | None:
    """One BOS by default if the model wants it, else none."""
    front = [expected["special"]["bos"]] if expected["add_bos"] else []
    for entry in expected["texts"]:
        ids = tokenizer(entry["text"])["input_ids"]
        if said := unequal(repr(entry["text"]), ids, front + entry["ids"]):
            return said
    return None


def check_spaces(tokenizer: Any, expected: Expected) -> str | None:
    """Decoding gives the text back, spaces and all."""
    eos = expected["special"]["eos"]
    for text in expected["readable"]:
        ids = tokenizer(text)["input_ids"]
        said = unequal("decoded", tokenizer.decode([*ids, eos], skip_special_tokens=True), text)
        bare = tokenizer.encode(text, add_special_tokens=False)
        if said := said or unequal("decoded", tokenizer.decode(bare), text):
            return said
    return None


def check_fim(tokenizer: Any, expected: Expected) -> str | None:
    fim = expected["fim"]
    return unequal("fill in the middle", tokenizer(fim["text"])["input_ids"], fim["ids"])


def check_chat(tokenizer: Any, expected: Expected) -> str | None:
    """Every template: the text and the ids of dsq."""
    if not expected["chats"]:
        return unequal("chat_template", tokenizer.chat_template, None)
    for chat in expected["chats"]:
        arguments = {
            "conversation": chat["messages"],
            "chat_template": chat["template"],
            "add_generation_prompt": chat["add_generation_prompt"],
        }
        text = tokenizer.apply_chat_template(**arguments, tokenize=False)
        ids = tokenizer.apply_chat_template(**arguments, tokenize=True, return_dict=False)
        said = unequal(f"template {chat['template']}", text, chat["text"])
        if said := said or unequal(f"template {chat['template']}", ids, chat["ids"]):
            return said
    return None


def check_special(tokenizer: Any, expected: Expected) -> str | None:
    """The ids of BOS, EOS and padding, those of all added tokens, and no token added."""
    for name, row in expected["special"].items():
        if said := unequal(f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"), row):
            return said
    for text, row in expected["added"].items():
        if said := unequal(repr(text), tokenizer.convert_tokens_to_ids(text), row):
            return said
    return unequal("number of tokens", len(tokenizer), expected["n_tokens"])


def check_inputs(tokenizer: Any, expected: Expected) -> str | None:
    """What generate() takes: without token_type_ids, which Llama refuses."""
    return unequal("inputs", list(tokenizer("a")), ["input_ids", "attention_mask"])


def check_padding(tokenizer: Any, expected: Expected) -> str | None:
    """On the left, as the Llama classes pad: on the right a batch's answers begin after padding."""
    if expected["special"]["pad"] is None:
        return unequal("pad_token", tokenizer.pad_token, None)
    short, long = tokenizer(["a", "def f(x):"], padding=True)["attention_mask"]
    ones = len(tokenizer("a")["input_ids"])
    return unequal("mask", short, [0] * (len(long) - ones) + [1] * ones)


CHECKS: dict[str, Check] = {
    "class": check_class,
    "ids": check_ids,
    "bos": check_bos,
    "spaces": check_spaces,
    "fim": check_fim,
    "chat": check_chat,
    "special": check_special,
    "inputs": check_inputs,
    "padding": check_padding,
}


def unequal(what: str, found: object, wanted: object) -> str | None:
    if found == wanted:
        return None
    if isinstance(found, list) and isinstance(wanted, list):
        pairs = enumerate(zip(found, wanted, strict=False))
        i = next((i for i, (a, b) in pairs if a != b), min(len(found), len(wanted)))
        found, wanted = found[i : i + 4], wanted[i : i + 4]
        what = f"{what:.60} from {i}"
    return f"{what:.80}: {found!r:.80} instead of {wanted!r:.80}"


def probe(directory: Path) -> dict[str, str | None]:
    """Check → None, or what is wrong."""
    from transformers import AutoTokenizer

    expected = json.loads(Path(f"{directory}.expected.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    found: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check(tokenizer, expected)
        except Exception as error:  # whatever it raises, this version cannot use the directory
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main() -> None:
    import transformers

    directories = {Path(name).name: probe(Path(name)) for name in sys.argv[1:]}
    print(json.dumps({"transformers": transformers.__version__, "directories": directories}))


if __name__ == "__main__":
    main()

"""Train tiny-coder: DeepSeek Coder in miniature, the model that dsq's tests and benchmarks use.

Recipe
    data       CPython's standard library of the running interpreter (PSF licence), without
               site-packages, lib2to3, machine-made tables and files that do not parse; identical
               files once; files in the order of their hash, 2 % of them (by hash) held out
    tokenizer  byte-level BPE of 4096 tokens behind DeepSeek's normalizer, pre-tokenizer, decoder
               and post-processor, then DeepSeek's 22 added tokens
    model      LlamaForCausalLM, 4 layers of 256, RoPE base 100000 with linear factor 4, untied
    samples    half of the rows are plain source (BOS, a window of a file, EOS where the file
               ends), half are for filling in:
               BOS <fim begin> prefix <fim hole> suffix <fim end> middle EOS
    training   4096 tokens a step, rows of 512 (every fifth step 1024 or 2048), float32, Muon for
               the matrices inside the layers, AdamW for the rest, warm-up, then cosine; two
               one-thread workers, which other programs slow down less than two threads in step

Run it with `train`, or with `evaluate` to measure; the model card says what was run.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).resolve().parent.parent / "models" / "tiny-coder"
BPE_TOKENS = 4096
LETTERS = "õ÷ÁýÀÿøúþüùöû"  # what the byte table maps bytes to that UTF-8 never uses
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
HOLE, BEGIN, END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
ADDED = [*LETTERS, BOS, EOS, HOLE, BEGIN, END, "<pad>", "<|User|>", "<|Assistant|>", "<|EOT|>"]
ID = {token: BPE_TOKENS + i for i, token in enumerate(ADDED)}
STEP_TOKENS, PARTS, WORKERS = 4096, 4, 2  # a step is cut into parts for one-thread workers
SKIPPED = re.compile(r"(^|/)(site-packages|lib2to3|encodings|pydoc_data|config-.*)/|^_sysconfig")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": ID[BOS],
    "eos_token_id": ID[EOS],
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
    "rope_theta": 100000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 4160,  # 4118 tokens, and 42 rows that no token uses
}


def read_corpus() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The (path, text) pairs for training and those held out, each in the order of their hash."""
    warnings.simplefilter("ignore")  # those that parsing old files gives
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        if SKIPPED.search(name):
            continue
        data = (root / name).read_bytes()
        try:
            ast.parse(data)
            text = data.decode("utf-8")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if text.strip():
            found.setdefault(hashlib.sha256(data).hexdigest(), (name, text))
    split: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for digest in sorted(found):
        split[int(digest[:8], 16) % 50 == 0].append(found[digest])
    return split


def held_out_text(files: list[tuple[str, str]], limit: int = 150_000) -> str:
    """Those held-out files of at most 25 kB that fit, whole, into `limit` bytes."""
    joined = ""
    for name, text in files:
        part = f"# CPython Lib/{name}\n{text.rstrip()}\n\n\n"
        if len(part.encode()) <= 25_000 and len((joined + part).encode()) <= limit:
            joined += part
    return joined


class Sampler:
    """Draws training rows; every choice comes from one seeded generator."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, seed: int) -> None:
        self.texts, self.tokenizer, self.random = texts, tokenizer, random.Random(seed)
        self.sizes = [len(text) for text in texts]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def window(self, tokens: int) -> tuple[str, bool]:
        """Some lines of one file, at most about `tokens` tokens; and whether they reach its end."""
        text = self.random.choices(self.texts, self.sizes)[0]
        start = self.random.randrange(len(text)) if self.random.random() < 0.8 else 0
        start = text.rfind("\n", 0, start) + 1
        stop = start + int(tokens * 2.7)  # characters to a token
        return text[start:stop], stop >= len(text)

    def plain(self, room: int) -> list[int]:
        text, ends = self.window(2 * room)
        ids = [ID[BOS], *self.encode(text)] + ([ID[EOS]] if ends else [])
        return ids[:room]

    def fill_in(self, room: int) -> list[int]:
        """A prefix-suffix-middle sample: any span, or the rest of a line and some lines after."""
        text, _ = self.window(self.random.randint(64, room))
        start = self.random.randrange(len(text))
        stop = start + self.random.randint(1, max(1, len(text) // 2))
        if self.random.random() < 0.5:
            lines = text[start:].split("\n")
            stop = start + len("\n".join(lines[: self.random.choice([1, 1, 2, 4])]))
        prefix, middle, suffix = map(self.encode, (text[:start], text[start:stop], text[stop:]))
        excess = max(0, len(prefix) + len(middle) + len(suffix) + 5 - room)
        suffix = suffix[: max(0, len(suffix) - excess)]
        ids = [ID[BOS], ID[BEGIN], *prefix, ID[HOLE], *suffix, ID[END], *middle, ID[EOS]]
        return ids if len(ids) <= room else []

    def row(self, length: int) -> list[int]:
        ids: list[int] = []
        fill_in = self.random.random() < 0.5
        while len(ids) < length:
            room = length - len(ids)
            fits = fill_in and room > 128
            ids += self.fill_in(room) if fits else self.plain(room)
        return ids

    def batches(self) -> Iterator[Tensor]:
        while True:
            for length in (512, 512, 512, 512, self.random.choice([1024, 2048])):
                yield torch.tensor([self.row(length + 1) for _ in range(STEP_TOKENS // length)])


def pre_tokenizer(patterns: list[str], *more: pre.PreTokenizer) -> pre.PreTokenizer:
    """Splits one after another, then whatever else, then bytes as letters."""
    splits = [pre.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre.Sequence([*splits, *more, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


DEEPSEEK = pre_tokenizer(
    ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+"], pre.Digits(individual_digits=True)
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA_CPP_DEFAULT = pre_tokenizer([r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"])


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = DEEPSEEK
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = [symbol for symbol in pre.ByteLevel.alphabet() if symbol not in LETTERS]
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    for token in ADDED:
        tokenizer.add_tokens([AddedToken(token, normalized=True, special=token in (BOS, EOS))])
    assert {token: tokenizer.token_to_id(token) for token in ADDED} == ID
    return tokenizer


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps, in float32."""

    def __init__(self, weights: list[nn.Parameter], lr: float) -> None:
        super().__init__(weights, {"lr": lr, "momentum": 0.95, "decay": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(mean, momentum))
                scale = lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - lr * group["decay"]).sub_(update, alpha=scale)


def orthogonal(x: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def new_model(config: dict[str, Any]) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "torch_dtype"}))


def next_token_loss(model: LlamaForCausalLM, ids: Tensor, reduction: str) -> Tensor:
    logits = model(ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def train(out: Path, steps: int, done: int, seed: int) -> None:
    torch.manual_seed(seed + done)
    training, held_out = read_corpus()
    texts = [text for _, text in training]
    tokenizer = train_tokenizer(texts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.txt").write_text(held_out_text(held_out), encoding="utf-8", newline="")
    write_settings(out, tokenizer)
    print(f"{len(texts)} files, {sum(map(len, texts))} characters; {len(held_out)} held out")

    model = new_model(CONFIG)
    if done:
        model.load_state_dict(read_weights(out))
    inner = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    outer = [p for p in model.parameters() if all(p is not other for other in inner)]
    optimizers = [Muon(inner, 0.02), torch.optim.AdamW(outer, 4e-3, (0.9, 0.95), weight_decay=0.01)]

    def rate_at(step: int) -> float:
        warm = min(1.0, (step + 1) / 40)
        return warm * (0.01 + 0.99 * math.cos((done + step) / steps * math.pi / 2) ** 2)

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate_at) for o in optimizers]
    batches = Sampler(texts, tokenizer, seed + done).batches()
    pool = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
    weights = list(model.parameters())

    def loss_and_gradients(rows: Tensor) -> tuple[Tensor, ...]:
        loss = next_token_loss(model, rows, "mean")
        return loss.detach(), *torch.autograd.grad(loss, weights)

    for step in range(done + 1, steps + 1):
        parts = list(pool.map(loss_and_gradients, next(batches).chunk(PARTS)))
        loss, *gradients = (sum(values) / len(parts) for values in zip(*parts, strict=True))
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        nn.utils.clip_grad_norm_(outer, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 20 == 0 or step == steps:
            print(f"step {step}/{steps} loss {loss.item():.3f}", flush=True)
            save_weights(out, model)


def save_weights(out: Path, model: LlamaForCausalLM) -> None:
    weights = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    part = out / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(out / "model.safetensors")


def read_weights(out: Path) -> dict[str, Tensor]:
    return {n: w.float() for n, w in load_file(out / "model.safetensors").items()}


def write_settings(out: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos, eos = ({"__type": "AddedToken", "content": token, **flags} for token in (BOS, EOS))
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "legacy": True,
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": eos,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
    }
    generation = {"_from_model_config": True, "bos_token_id": ID[BOS], "eos_token_id": ID[EOS]}
    settings = {"": CONFIG, "tokenizer_": tokenizer_config, "generation_": generation}
    for prefix, value in settings.items():
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (out / f"{prefix}config.json").write_text(text, encoding="utf-8")


@torch.no_grad()
def evaluate(out: Path) -> None:
    """Perplexity on heldout.txt, in windows of a BOS and 511 tokens; and with usual mistakes."""
    text = (out / "heldout.txt").read_bytes().decode()
    weights = read_weights(out)
    print(f"{sum(w.numel() for w in weights.values())} parameters")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    factor_1 = {**CONFIG, "rope_scaling": {"factor": 1.0, "type": "linear"}}
    for label, config, tokenizer.pre_tokenizer in [
        ("as trained", CONFIG, DEEPSEEK),
        ("RoPE factor 1", factor_1, DEEPSEEK),
        ("GPT-2 pre-tokenizer", CONFIG, pre_tokenizer([GPT2])),
        ("llama.cpp's default", CONFIG, LLAMA_CPP_DEFAULT),
    ]:
        model = new_model(config)
        model.load_state_dict(weights)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        windows = [[ID[BOS], *ids[i : i + 511]] for i in range(0, len(ids), 511)]
        nats = sum(next_token_loss(model, torch.tensor([w]), "sum").item() for w in windows)
        perplexity, bits = math.exp(nats / len(ids)), nats / math.log(2) / len(text.encode())
        print(f"{label}: {len(ids)} tokens, perplexity {perplexity:.3f}, {bits:.4f} bits a byte")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or evaluate tiny-coder.")
    parser.add_argument("action", choices=["train", "evaluate"])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--done", type=int, default=0, help="go on after so many steps")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.action == "train":
        train(options.out, options.steps, options.done, options.seed)
    evaluate(options.out)


if __name__ == "__main__":
    main()

"""Directories in torch under the same loop: transformers' tokens, llama.cpp's samplers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsq.errors import DsqError, InputError
from dsq.runtime.server.backend import GenerateRequest, Sampling, Step
from dsq.runtime.server.client import WorkerBackend
from dsq.runtime.server.llama_batch import LlamaSettings
from dsq.runtime.server.loop import Loop
from dsq.runtime.server.torch_batch import Cells, TorchBatch, TorchSettings, torch_loop
from dsq.runtime.torch_engine import TorchEngine
from tests.models import llama_config
from tests.packed_models import write_exl2, write_gptq
from tests.tiny_gguf import BOS, token_id, write_tiny_hf

pytestmark = pytest.mark.torch
PROMPTS = [[token_id(BOS), *range(60 + 3 * i, 90 + 5 * i)] for i in range(6)]
N = 24


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `tiny`, as a directory."""
    return write_tiny_hf(tmp_path_factory.mktemp("torch-batch") / "hf")


@pytest.fixture(scope="module")
def settings(hf: Path) -> TorchSettings:
    return TorchSettings(str(hf), n_ctx=256, kv_size=1024, n_threads=1, n_draft=0)


@pytest.fixture
def loop(settings: TorchSettings) -> Iterator[Loop]:
    made = torch_loop(settings)
    yield made
    made.close()


@pytest.fixture
def llama(tiny: Path) -> Iterator[Loop]:
    made = Loop(LlamaSettings(str(tiny), n_ctx=256, n_threads=1, n_draft=0, flash_attention=False))
    yield made
    made.close()


@pytest.fixture(scope="module")
def generated(hf: Path) -> list[tuple[int, ...]]:
    """What transformers' own `generate` says after each prompt."""
    import torch
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        whole = model.generate(
            ids, attention_mask=mask, max_new_tokens=N, do_sample=False, eos_token_id=None
        )
        answers.append(tuple(whole[0, len(prompt) :].tolist()))
    return answers


def _run(loop: Loop, *requests: GenerateRequest, gap: int = 0) -> list[list[Step]]:
    """All steps of each request; `gap` steps go by between one request and the next."""
    steps: dict[int, list[Step]] = {id: [] for id in range(len(requests))}

    def go() -> None:
        for id, step in loop.step():
            assert isinstance(step, Step), step
            steps[id].append(step)

    for id, request in enumerate(requests):
        loop.submit(id, request)
        for _ in range(gap):
            go()
    while not loop.idle:
        go()
    return [steps[id] for id in range(len(requests))]


def _tokens(steps: list[Step]) -> tuple[int, ...]:
    return tuple(token for step in steps for token in step.token_ids)


def _ask(prompt: list[int], n: int = N, **more: Any) -> GenerateRequest:
    return GenerateRequest(tuple(prompt), n, **more)


@pytest.mark.parametrize("gap", [0, 3])
def test_greedy_is_transformers_own(loop: Loop, generated: list[tuple[int, ...]], gap: int) -> None:
    """More requests than slots, in one batch; with a gap they join while others stream."""
    together = _run(loop, *map(_ask, PROMPTS), gap=gap)
    assert [_tokens(s) for s in together] == generated


def test_requests_that_outgrow_the_cache_all_get_done(
    settings: TorchSettings, generated: list[tuple[int, ...]]
) -> None:
    loop = torch_loop(replace(settings, kv_size=256, n_draft=16))
    assert [_tokens(s) for s in _run(loop, *map(_ask, PROMPTS))] == generated
    loop.close()


def test_a_draft_that_is_taken_back_leaves_no_trace(
    settings: TorchSettings, generated: list[tuple[int, ...]]
) -> None:
    """Several guesses in one batch give what one token after another gives."""
    prompt, answer = PROMPTS[0], list(generated[0])
    n = len(prompt)
    with TorchBatch(settings) as batch:
        batch.decode(prompt, range(n), [0] * n, [0] * n)
        batch.copy(0, 1, n)
        rows = [*answer[:4], 9, 9, 9]
        batch.decode(rows, range(n, n + 7), [1] * 7, [1] * 7)
        batch.remove(1, n + 4)
        rest = answer[4:8]
        logits = batch.decode(rest, range(n + 4, n + 8), [1] * 4, [1] * 4)
        assert logits.argmax(axis=1).tolist() == answer[5:9]
        logits = batch.decode(answer[:8], range(n, n + 8), [0] * 8, [1] * 8)
        assert logits.argmax(axis=1).tolist() == answer[1:9], "the other sequence is as it was"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.8, seed=4, top_k=20, top_p=0.9, min_p=0.02),
        Sampling(temperature=0.7, seed=5, repeat_penalty=1.3, presence_penalty=0.5),
    ],
)
def test_a_seed_gives_what_it_gives_in_llama_cpp(
    loop: Loop, llama: Loop, sampling: Sampling
) -> None:
    """The same weights in float32 and the same samplers; llama.cpp's cache is in half precision."""
    bias = ((70, 2.0), (71, -4.0))
    requests = [_ask(p, 3, sampling=sampling, logit_bias=bias, n_logprobs=3) for p in PROMPTS]
    ours, theirs = _run(loop, *requests), _run(llama, *requests)
    assert [_tokens(s) for s in ours] == [_tokens(s) for s in theirs]
    assert _logprobs(ours) == pytest.approx(_logprobs(theirs), abs=0.02)


def _logprobs(answers: list[list[Step]]) -> list[float]:
    entries = [t for steps in answers for step in steps for t in step.logprobs or ()]
    return [t.logprob for t in entries] + [p for t in entries for _, p in t.top]


def test_greedy_is_llama_cpps_too(llama: Loop, generated: list[tuple[int, ...]]) -> None:
    assert [_tokens(s) for s in _run(llama, *map(_ask, PROMPTS))] == generated


def test_a_grammar_on_the_directorys_own_vocabulary(loop: Loop, hf: Path) -> None:
    grammar = 'root ::= "def " ("a" | "b") "()" "\\n"'
    request = _ask(PROMPTS[0], grammar=grammar, sampling=Sampling(temperature=1.0, seed=1))
    with TorchEngine(hf, n_threads=1) as engine:
        said = engine.tokenizer.decode(list(_tokens(_run(loop, request)[0])))
    assert said in ("def a()\n", "def b()\n")
    with pytest.raises(InputError, match="not valid GBNF"):
        loop.submit(9, _ask(PROMPTS[0], grammar="root ::= ((("))


@pytest.mark.parametrize("write", [write_gptq, write_exl2])
def test_a_packed_directory_runs_its_exact_codes(write: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "m", config=llama_config(torch_dtype="float16"))
    with TorchEngine(tmp_path / "m", n_ctx=64, n_threads=1) as engine:
        tokens = list(range(100, 120))
        for _ in range(6):
            tokens.append(int(engine.logits(tokens, all=False)[0].argmax()))
    loop = torch_loop(TorchSettings(str(tmp_path / "m"), n_ctx=64, n_threads=1))
    assert loop.info.size_bytes < loop.info.n_parameters * 2
    assert [*_tokens(_run(loop, _ask(tokens[:20], 6))[0])] == tokens[20:]
    loop.close()


@pytest.mark.parametrize("write", [write_gptq, write_exl2])
def test_unpacked_for_a_card(write: Callable[..., Any], tmp_path: Path) -> None:
    """What a card would be given; here in 16 bits on the CPU."""
    import torch

    from dsq.runtime import torch_engine

    write(tmp_path / "m", config=llama_config(torch_dtype="float16", tie_word_embeddings=True))
    checkpoint = torch_engine.open_directory(tmp_path / "m")
    ids = torch.arange(100, 120)[None]
    with torch.inference_mode():
        wanted = torch_engine.load_model(checkpoint)(ids).logits
        model = torch_engine._unpacked(
            checkpoint, torch_engine.llama_config(checkpoint.spec), "cpu", torch.bfloat16
        )
        torch_engine.check_rope(model, checkpoint.spec, checkpoint.path)
        found = model.eval()(ids).logits.float()
    assert (found - wanted).square().mean().sqrt() < 0.05 * wanted.std()


def test_cells_keep_sequences_apart() -> None:
    """Against lists of tokens: who sees which positions, whatever was shared and removed."""
    rng, size = np.random.default_rng(0), 64
    cells, wanted = Cells(4, size), [[] for _ in range(4)]
    stored = np.full(size, -1)
    count = 0
    for _ in range(300):
        a, b = (int(x) for x in rng.permutation(4)[:2])
        n = int(rng.integers(1, 6))
        if rng.random() < 0.2:
            keep = int(rng.integers(0, len(wanted[a]) + 1))
            cells.remove(a, keep)
            del wanted[a][keep:]
        elif rng.random() < 0.3 and not wanted[b]:
            cells.copy(a, b, n)
            wanted[b] = wanted[a][:n]
        elif len({t for w in wanted for t in w}) + n <= size:
            start, new = len(wanted[a]), list(range(count, count + n))
            positions = np.arange(start, start + n)
            where = cells.take(np.full(n, a), positions)
            stored[where] = new
            wanted[a] += new
            count += n
            seen = cells.visible(np.full(n, a), positions)
            for i in range(n):
                assert set(stored[: seen.shape[1]][seen[i]]) == set(wanted[a][: start + i + 1])
    with pytest.raises(DsqError, match="the KV cache is full"):
        cells.take(np.zeros(size + 1, np.int64), np.arange(size + 1))


def test_what_torch_cannot_run(tiny: Path, hf: Path) -> None:
    with pytest.raises(InputError, match="torch runs directories, and this is a GGUF"):
        TorchBatch(TorchSettings(str(tiny)))
    with pytest.raises(InputError, match="kv_size is 128, less than the 256 tokens"):
        TorchBatch(TorchSettings(str(hf), n_ctx=256, kv_size=128))


@pytest.mark.slow
def test_in_a_worker_process(settings: TorchSettings, generated: list[tuple[int, ...]]) -> None:
    async def ask(backend: WorkerBackend, prompt: list[int]) -> tuple[int, ...]:
        tokens: list[int] = []
        async for step in backend.generate(_ask(prompt)):
            tokens += step.token_ids
        return tuple(tokens)

    async def run() -> None:
        backend = WorkerBackend(settings, "torch")
        await backend.start()
        try:
            assert backend.info.kv_type == "float32"
            answers = await asyncio.gather(*(ask(backend, p) for p in PROMPTS))
            assert list(answers) == generated
        finally:
            await backend.close()

    asyncio.run(asyncio.wait_for(run(), 120))

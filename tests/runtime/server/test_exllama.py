"""exllamav2 behind the worker: a stand-in with its signatures here, the real one on a card."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dsq.errors import DsqError, InputError, UnsupportedError
from dsq.runtime.server.backend import GenerateRequest, PromptTooLong, Sampling, Step
from dsq.runtime.server.client import WorkerBackend
from dsq.runtime.server.exllama_backend import ExllamaLoop, ExllamaSettings
from dsq.runtime.server.torch_batch import TorchSettings, torch_loop
from tests.models import ROOT, llama_config
from tests.packed_models import write_exl2
from tests.tiny_gguf import BOS, token_id, write_tiny_hf

STAND_INS = ROOT / "tests" / "stand_ins"
PROMPTS = [[token_id(BOS), *range(60 + 3 * i, 90 + 5 * i)] for i in range(6)]
N = 12


def _forget() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "exllamav2"]:
        del sys.modules[name]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    _forget()
    monkeypatch.syspath_prepend(STAND_INS)
    yield importlib.import_module("exllamav2.generator")
    _forget()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hf(tmp_path_factory.mktemp("exllama") / "hf")


@pytest.fixture(scope="module")
def settings(hf: Path) -> ExllamaSettings:
    return ExllamaSettings(str(hf), n_ctx=300, kv_size=1024)


@pytest.fixture
def loop(stand_in: ModuleType, settings: ExllamaSettings) -> Iterator[ExllamaLoop]:
    made = ExllamaLoop(settings)
    yield made
    made.close()


def _ask(prompt: list[int], n: int = N, **more: Any) -> GenerateRequest:
    return GenerateRequest(tuple(prompt), n, **more)


def _run(loop: Any, *requests: GenerateRequest) -> list[list[Step]]:
    steps: dict[int, list[Step]] = {id: [] for id in range(len(requests))}
    for id, request in enumerate(requests):
        loop.submit(id, request)
    while not loop.idle:
        for id, step in loop.step():
            assert isinstance(step, Step), step
            steps[id].append(step)
    return [steps[id] for id in range(len(requests))]


def _tokens(steps: list[Step]) -> tuple[int, ...]:
    return tuple(token for step in steps for token in step.token_ids)


VARIED = (
    _ask(PROMPTS[0]),
    _ask(PROMPTS[1], sampling=Sampling(temperature=1.0, seed=3, top_k=30), n_logprobs=2),
    _ask(PROMPTS[2], sampling=Sampling(temperature=0.7, seed=5, repeat_penalty=1.3)),
    _ask(PROMPTS[3], logit_bias=((70, 30.0),)),
    _ask(PROMPTS[4], 40, grammar='root ::= "a" "b" [cd]', sampling=Sampling(temperature=1.0)),
    _ask(PROMPTS[5], 1),
)


@pytest.mark.torch
def test_requests_get_what_torch_gives_them(loop: ExllamaLoop, hf: Path) -> None:
    """Greedy, seeded, penalized, biased, constrained; more of them than run at once."""
    reference = torch_loop(TorchSettings(str(hf), n_ctx=300, n_threads=1, n_draft=0))
    found, wanted = _run(loop, *VARIED), _run(reference, *VARIED)
    reference.close()
    assert [s[-1].finish for s in found] == [s[-1].finish for s in wanted]
    for request, a, b in zip(VARIED, found, wanted, strict=True):
        if request.sampling.seed is not None or request.sampling.temperature == 0:
            assert _tokens(a) == _tokens(b)
        assert (a[0].logprobs is None) == (request.n_logprobs == 0)
    last = found[0][-1].usage
    assert last is not None
    assert (last.n_prompt, last.n_cached, last.n_generated) == (len(PROMPTS[0]), 0, N)
    assert loop.counters.generated_tokens == sum(len(_tokens(s)) for s in found)
    assert (loop.n_running, loop.n_waiting) == (0, 0)


@pytest.mark.torch
def test_stop_tokens_end_an_answer_and_are_not_in_it(loop: ExllamaLoop) -> None:
    whole = _tokens(_run(loop, _ask(PROMPTS[0]))[0])
    [steps] = _run(loop, _ask(PROMPTS[0], stop_ids=frozenset({whole[4]})))
    assert _tokens(steps) == whole[: whole.index(whole[4])]
    assert steps[-1].finish == "stop"
    assert not loop._generator.active_jobs, "its pages are free"


@pytest.mark.torch
def test_cancelling_frees_the_slot(loop: ExllamaLoop) -> None:
    for id in range(6):
        loop.submit(id, _ask(PROMPTS[id], 200))
    loop.step()
    assert (loop.n_running, loop.n_waiting) == (4, 2)
    for id in range(5):
        loop.cancel(id)
        loop.cancel(id)
    loop.step()
    assert (loop.n_running, loop.n_waiting) == (1, 0)


@pytest.mark.torch
def test_what_a_request_cannot_have(loop: ExllamaLoop) -> None:
    with pytest.raises(PromptTooLong):
        loop.submit(0, _ask([70] * 300))
    with pytest.raises(InputError, match="token 999 is outside the model's 293 tokens"):
        loop.submit(0, _ask([999]))
    with pytest.raises(UnsupportedError, match="no logits of a prompt"):
        loop.submit(0, _ask(PROMPTS[0], n_logprobs=1, prompt_logprobs=True))
    [steps] = _run(loop, _ask([70] * 290, 100))
    assert len(_tokens(steps)) == 10, "no more than the context holds"
    assert loop.idle


@pytest.mark.torch
def test_a_whole_page_is_not_evaluated_twice(loop: ExllamaLoop) -> None:
    prompt = [70 + i % 60 for i in range(280)]
    _run(loop, _ask(prompt, 2))
    [steps] = _run(loop, _ask([*prompt, 71], 2))
    usage = steps[0].usage
    assert usage is not None
    assert usage.n_cached == 256


def test_a_rope_that_exllamav2_would_not_see(stand_in: ModuleType, tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "new")
    config = folder / "config.json"
    text = config.read_text().replace('"rope_scaling": {"type"', '"rope_parameters": {"rope_type"')
    config.write_text(text.replace('"factor": 4.0', '"factor": 4.0, "rope_theta": 100000'))
    with pytest.raises(UnsupportedError, match=r"exllamav2 reads other .* \(linear, factor 4\)"):
        ExllamaLoop(ExllamaSettings(str(folder), n_ctx=256))


def test_what_keeps_it_from_loading(
    stand_in: ModuleType, settings: ExllamaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_flash_attention(*_: Any, **__: Any) -> None:
        raise AssertionError("Paged attention required Flash Attention 2.5.7 or later")

    monkeypatch.setattr(stand_in, "ExLlamaV2DynamicGenerator", no_flash_attention)
    with pytest.raises(DsqError, match="exllamav2 cannot load it: Paged attention required"):
        ExllamaLoop(settings)
    with pytest.raises(InputError, match="kv_type is q5_0; choose one of f16, q8_0, q4_0"):
        replace(settings, kv_type="q5_0")


@pytest.mark.slow
@pytest.mark.torch
def test_in_a_worker_process(
    settings: ExllamaSettings, monkeypatch: pytest.MonkeyPatch, hf: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))

    async def run() -> None:
        backend = WorkerBackend(settings, "exllamav2")
        await backend.start()
        try:
            steps = [step async for step in backend.generate(VARIED[0])]
            assert len(_tokens(steps)) == N
            assert backend.info.n_ctx == 300
        finally:
            await backend.close()

    asyncio.run(asyncio.wait_for(run(), 120))


@pytest.mark.gpu
def test_the_stand_in_has_the_real_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the real one what it is used for; needs exllamav2's CUDA extension to be imported."""
    real = pytest.importorskip("exllamav2.generator")
    kinds = ("ExLlamaV2DynamicGenerator", "ExLlamaV2DynamicJob")
    signatures = {k: list(inspect.signature(getattr(real, k)).parameters) for k in kinds}
    _forget()
    monkeypatch.syspath_prepend(STAND_INS)
    ours = importlib.import_module("exllamav2.generator")
    assert {k: list(inspect.signature(getattr(ours, k)).parameters) for k in kinds} == signatures
    _forget()


@pytest.mark.gpu
def test_an_exl2_directory_on_a_card(tmp_path: Path) -> None:
    """Against the exact codes in torch. Half precision may turn a near tie: one may differ."""
    pytest.importorskip("exllamav2")
    write_exl2(tmp_path / "m", config=llama_config(torch_dtype="float16"))
    prompts = [list(range(100 + 7 * i, 140 + 7 * i)) for i in range(6)]
    loop = ExllamaLoop(ExllamaSettings(str(tmp_path / "m"), n_ctx=512))
    reference = torch_loop(TorchSettings(str(tmp_path / "m"), n_ctx=512, device="cpu"))
    requests = [_ask(prompt, 8) for prompt in prompts]
    pairs = zip(_run(loop, *requests), _run(reference, *requests), strict=True)
    same = [_tokens(a)[0] == _tokens(b)[0] for a, b in pairs]
    loop.close()
    reference.close()
    assert sum(same) >= len(same) - 1

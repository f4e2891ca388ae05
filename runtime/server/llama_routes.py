"""llama.cpp's endpoints that generate nothing: /tokenize, /apply-template, /props, /slots."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from dsq import __version__
from dsq.errors import UnsupportedError
from dsq.runtime.server.bodies import (
    NO_TOOLS,
    DetokenizeBody,
    SamplingBody,
    TemplateBody,
    TokenizeBody,
    check_roles,
)
from dsq.runtime.server.models import Model
from dsq.runtime.server.native import with_pieces
from dsq.runtime.server.problems import HttpProblem
from dsq.runtime.server.service import Service
from dsq.runtime.server.transport import Json, LateJson


def add_routes(api: FastAPI, service: Service) -> None:
    @api.post("/tokenize")
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        async def make() -> Any:
            async with service.pool.use(body.model) as model:
                ids = await asyncio.to_thread(
                    model.tokenizer.encode,
                    body.content,
                    add_bos=None if body.add_special else False,
                    parse_special=body.parse_special is not False,
                )
                return {"tokens": with_pieces(model.tokenizer, ids) if body.with_pieces else ids}

        return LateJson(make, service.times)

    @api.post("/detokenize")
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        async def make() -> Any:
            async with service.pool.use(body.model) as model:
                return {"content": model.tokenizer.decode(body.tokens, skip_special=False)}

        return LateJson(make, service.times)

    @api.post("/apply-template")
    async def apply_template(body: TemplateBody, request: Request) -> Response:
        """The conversation as text, for /completion with parse_special."""

        async def make() -> Any:
            async with service.pool.use(body.model) as model:
                ids = await asyncio.to_thread(_conversation, body, model)
                return {"prompt": model.tokenizer.decode(ids, skip_special=False)}

        return LateJson(make, service.times)

    @api.post("/v1/chat/completions/input_tokens")
    @api.post("/chat/completions/input_tokens", include_in_schema=False)
    async def count(body: TemplateBody, request: Request) -> Response:
        async def make() -> Any:
            async with service.pool.use(body.model) as model:
                ids = await asyncio.to_thread(_conversation, body, model, whole=True)
                return {"object": "response.input_tokens", "input_tokens": len(ids)}

        return LateJson(make, service.times)

    @api.get("/props")
    async def props(model: str | None = None) -> Response:
        async def make() -> Any:
            async with service.pool.use(model) as loaded:
                return _props(loaded)

        return LateJson(make, service.times)

    @api.get("/slots")
    async def slots(model: str | None = None, fail_on_no_slot: int = 0) -> Response:
        """Of a model that is loaded; asking loads none. Which slot has which number, nobody needs
        to know: the busy ones come first."""
        pool = service.pool
        loaded = pool.loaded.get(pool.name_of(model))
        if loaded is None:
            return Json([])
        now, info = await loaded.backend.stats(), loaded.backend.info
        if fail_on_no_slot and now.n_busy >= now.n_slots:
            raise HttpProblem(503, f"all {now.n_slots} slots are busy", "no_slot", Retry_After="1")
        return Json(
            [
                {
                    "id": i,
                    "n_ctx": info.n_ctx,
                    "speculative": False,
                    "is_processing": i < now.n_busy,
                }
                for i in range(now.n_slots)
            ]
        )


def _conversation(body: TemplateBody, model: Model, *, whole: bool = False) -> list[int]:
    """Its tokens; without the BOS in front that /completion adds itself, unless `whole`."""
    if body.tools:
        raise UnsupportedError(NO_TOOLS)
    tokenizer = model.tokenizer
    check_roles(body.messages, tokenizer.vocab.chat_template)
    ids = tokenizer.chat(
        [message.plain() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    vocab = tokenizer.vocab
    drop = not whole and vocab.add_bos and vocab.bos is not None and ids[:1] == [vocab.bos]
    return ids[1:] if drop else ids


def _props(model: Model) -> dict[str, Any]:
    """As llama.cpp's, of what there is. The file's name only: its folder is nobody's business."""
    info, vocab = model.backend.info, model.tokenizer.vocab
    sampling = asdict(SamplingBody.model_validate({}).sampling())

    def text(token: int | None) -> str:
        return "" if token is None else vocab.tokens[token]

    return {
        "default_generation_settings": {
            "id": 0,
            "id_task": -1,
            "n_ctx": info.n_ctx,
            "speculative": False,
            "is_processing": False,
            "params": {**sampling, "seed": -1, "n_predict": -1, "stop": [], "grammar": ""},
        },
        "total_slots": info.n_slots,
        "model_alias": model.name,
        "model_path": PurePath(info.path).name,
        "modalities": {"vision": False, "audio": False, "video": False},
        "endpoint_slots": True,
        "endpoint_props": False,
        "endpoint_metrics": True,
        "chat_template": vocab.chat_template or "",
        "chat_template_caps": {},
        "bos_token": text(vocab.bos),
        "eos_token": text(vocab.eos),
        "build_info": f"dsq {__version__}",
        "is_sleeping": False,
    }

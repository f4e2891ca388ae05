"""The application: its routes, and how its errors look."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from dsq import __version__
from dsq.errors import DsqError
from dsq.runtime.server import llama_routes, web_page
from dsq.runtime.server.bodies import (
    ChatBody,
    CompletionBody,
    InfillBody,
    NativeCompletionBody,
    check_roles,
)
from dsq.runtime.server.faults import what_cannot_be_read, what_is_invalid
from dsq.runtime.server.limits import Gate, Limits
from dsq.runtime.server.metrics import RECORD, Record, log
from dsq.runtime.server.models import Model, ModelPool
from dsq.runtime.server.native import NativeShape
from dsq.runtime.server.openai import ChatShape, CompletionShape
from dsq.runtime.server.prepare import (
    NO_REPOS,
    prepare_chat,
    prepare_completion,
    prepare_infill,
    prepare_native,
)
from dsq.runtime.server.problems import HttpProblem, Problem, problem
from dsq.runtime.server.repos import Repositories
from dsq.runtime.server.service import Service, Shape
from dsq.runtime.server.transport import Json, TimeLimits

LOOK_FOR_IDLE_SECONDS = 5.0


def build_app(
    pool: ModelPool,
    limits: Limits | None = None,
    times: TimeLimits | None = None,
    repos: Repositories = NO_REPOS,
) -> ASGIApp:
    """The whole ASGI application. `pool` is closed when the server shuts down."""
    limits = limits or Limits()
    service = Service(pool, limits, times or TimeLimits(), repos)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(_unload_idle(pool))
        try:
            yield
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            await pool.close()

    api = FastAPI(
        title="dsq",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    _add_errors(api)
    _add_generation(api, service)
    llama_routes.add_routes(api, service)
    _add_state(api, service)
    web_page.add_routes(api)
    public = {"/health", "/v1/health", *web_page.PATHS}
    routes = frozenset(str(getattr(route, "path", "")) for route in api.routes)
    app: ASGIApp = Gate(api, limits, service.metrics, public, routes)
    if limits.cors:
        app = CORSMiddleware(
            app,
            allow_origins=list(limits.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key"],
        )
    return app


async def _unload_idle(pool: ModelPool) -> None:
    while True:
        await asyncio.sleep(LOOK_FOR_IDLE_SECONDS)
        await pool.unload_idle()


def _add_errors(api: FastAPI) -> None:
    def answer(request: Request, found: Problem) -> Response:
        record: Record = request.scope[RECORD]
        record.broke(found.status, found.code or "error")
        return Json(found.content, found.status, dict(found.headers))

    @api.exception_handler(DsqError)
    @api.exception_handler(Exception)
    async def known(request: Request, error: Exception) -> Response:
        found = problem(error)
        if found.status == 500:
            log.error("%s", found.message, exc_info=error)
        return answer(request, found)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, what_is_invalid(error))

    @api.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's own, of a body that it could not read
            return answer(request, what_cannot_be_read(error.__cause__))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        message = str(error.detail)
        if error.status_code == 404:
            message = "this server has no such path; GET /openapi.json lists what it has"
        return answer(request, problem(HttpProblem(error.status_code, message, code)))


def _add_generation(api: FastAPI, service: Service) -> None:
    repos = service.repos

    @api.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        def shape(body: CompletionBody, model: Model) -> Shape:
            prepared = prepare_completion(body, model.tokenizer, model.backend.info, repos)
            return CompletionShape(body, prepared, model.tokenizer, model.name)

        return service.respond(request, body, shape)

    @api.post("/v1/chat/completions")
    @api.post("/chat/completions", include_in_schema=False)
    async def chat(body: ChatBody, request: Request) -> Response:
        def shape(body: ChatBody, model: Model) -> Shape:
            check_roles(body.messages, model.tokenizer.vocab.chat_template)
            prepared = prepare_chat(body, model.tokenizer, model.backend.info, repos)
            return ChatShape(body, prepared, model.tokenizer, model.name)

        return service.respond(request, body, shape)

    @api.post("/completion")
    @api.post("/completions", include_in_schema=False)
    async def native(body: NativeCompletionBody, request: Request) -> Response:
        def shape(body: NativeCompletionBody, model: Model) -> Shape:
            prepared = prepare_native(body, model.tokenizer, model.backend.info, repos)
            return NativeShape(body, prepared, model.tokenizer, model.name, model.backend.info)

        return service.respond(request, body, shape)

    @api.post("/infill")
    async def fill(body: InfillBody, request: Request) -> Response:
        def shape(body: InfillBody, model: Model) -> Shape:
            prepared = prepare_infill(body, model.tokenizer, model.backend.info, repos)
            return NativeShape(body, prepared, model.tokenizer, model.name, model.backend.info)

        return service.respond(request, body, shape)


def _add_state(api: FastAPI, service: Service) -> None:
    pool = service.pool

    @api.get("/health")
    @api.get("/v1/health", include_in_schema=False)
    async def health() -> Response:
        """200 while every loaded model takes requests; a model not loaded yet is no fault."""
        if all(model.backend.healthy for model in pool.loaded.values()):
            return Json({"status": "ok"})
        loading = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
        return Json({"status": "loading model", "error": loading}, 503, {"Retry-After": "1"})

    @api.get("/v1/models")
    @api.get("/models", include_in_schema=False)
    async def models() -> Response:
        return Json({"object": "list", "data": [_model_card(pool, name) for name in pool.offers]})

    @api.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        return Json(_model_card(pool, pool.name_of(name)))

    @api.get("/metrics")
    async def metrics() -> Response:
        stats = {name: await model.backend.stats() for name, model in list(pool.loaded.items())}
        return Response(
            service.metrics.text(stats), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @api.get("/stats")
    async def stats() -> Response:
        """What the web page shows: the loaded models, how busy and how fast they are."""
        found = []
        for name, model in list(pool.loaded.items()):
            now = await model.backend.stats()
            found.append(
                {
                    "model": name,
                    "n_slots": now.n_slots,
                    "n_busy": now.n_busy,
                    "n_queued": now.n_queued,
                    "step_seconds": now.prompt_seconds_total + now.predict_seconds_total,
                    "outside_seconds": now.outside_seconds_total,
                    "tokens_per_second": round(now.tokens_per_second, 2),
                    "memory_bytes": now.memory_bytes,
                    "kv_used": now.kv_used,
                    "kv_size": now.kv_size,
                }
            )
        return Json({"models": found})


def _model_card(pool: ModelPool, name: str) -> dict[str, Any]:
    offer, loaded = pool.offers[name], pool.loaded.get(name)
    card: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": offer.created,
        "owned_by": "dsq",
        "loaded": loaded is not None,
    }
    if loaded is not None:
        info = loaded.backend.info
        card["meta"] = {
            "n_ctx": info.n_ctx,
            "n_ctx_train": info.n_ctx_train,
            "n_vocab": info.n_vocab,
            "n_params": info.n_parameters,
            "size": info.size_bytes,
            "kv_type": info.kv_type,
            "n_slots": info.n_slots,
            "chat": loaded.tokenizer.vocab.chat_template is not None,
            "infill": loaded.tokenizer.vocab.fim_suffix is not None,
        }
    return card

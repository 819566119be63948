"""The routes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from gemma_ext._version import __version__
from gemma_ext.serve.async_engine import AsyncEngine
from gemma_ext.serve.http.chat import Chat
from gemma_ext.serve.http.completions import Completion
from gemma_ext.serve.http.connection import EventStream, unless_client_leaves
from gemma_ext.serve.http.errors import ApiError, install
from gemma_ext.serve.http.gate import Gate
from gemma_ext.serve.http.generation import Service, check_choices
from gemma_ext.serve.http.metrics import CONTENT_TYPE, Metrics
from gemma_ext.serve.http.reading import read
from gemma_ext.serve.http.schemas import ChatBody, CompletionBody
from gemma_ext.serve.http.served import Served
from gemma_ext.serve.http.settings import Settings
from gemma_ext.serve.http.tokenizer import router

ROUTES = frozenset(
    (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/health",
        "/metrics",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
    )
)


def build_app(engine: AsyncEngine, served: Served, settings: Settings | None = None) -> FastAPI:
    """The ASGI application; it starts the engine when it starts, and drains and stops it.

    Args:
        engine: not started yet.
        served: the model behind it.
        settings: bounds of requests.
    """
    settings = settings or Settings()
    service = Service(engine, served, settings, Metrics(engine))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(
        title="gemma_ext",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    install(app)
    app.add_middleware(Gate, metrics=service.metrics, keys=settings.api_keys, routes=ROUTES)

    app.include_router(router(service))

    @app.post("/v1/completions", openapi_extra=_described(CompletionBody))
    async def completions(request: Request) -> Response:
        body = await read(request, service, CompletionBody)
        check_choices(service, len(body.prompt) * body.drawn)  # before encoding, which takes time
        most = engine.limits.max_model_len
        prompts = await served.encode(body.prompt, body.add_special_tokens, most)
        return await _answer(request, service, Completion(service, body, prompts), body.stream)

    @app.post("/v1/chat/completions", openapi_extra=_described(ChatBody))
    async def chat(request: Request) -> Response:
        body = await read(request, service, ChatBody)
        check_choices(service, body.choices)
        try:
            messages = [message.plain() for message in body.messages]
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        prompt = await served.encode_chat(messages, engine.limits.max_model_len)
        return await _answer(request, service, Chat(service, body, prompt), body.stream)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.check_name(name)
        return _model(service)

    @app.get("/health")
    async def health() -> JSONResponse:
        trouble = engine.trouble
        if trouble is not None:
            raise ApiError(503, trouble)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return app


async def _answer(
    request: Request, service: Service, answer: Completion | Chat, stream: bool | None
) -> Response:
    # a refusal has to come before the first byte of a stream
    await unless_client_leaves(request.receive, answer.start())
    if stream:
        return EventStream(answer.events(), answer.close)
    try:
        whole = await unless_client_leaves(request.receive, answer.whole())
    finally:
        answer.close()
    return Response(json.dumps(whole, ensure_ascii=False), media_type="application/json")


def _model(service: Service) -> dict[str, Any]:
    limits = service.engine.limits
    return {
        "id": service.served.name,
        "object": "model",
        "created": service.served.created,
        "owned_by": "gemma_ext",
        "max_model_len": limits.max_model_len,
        "loops": limits.loops,
        **service.served.facts,
    }


def _described(body: type[BaseModel]) -> dict[str, Any]:
    """The body in the OpenAPI page; it is read by hand so that its size and time are bounded."""
    schema = body.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

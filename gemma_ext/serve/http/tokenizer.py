"""POST /tokenize, /detokenize, GET /tokenizer_info: for clients without the tokenizer's files.

lm-eval looks for them and then needs no tokenizer of its own.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, FailFast, Field

from gemma_ext.serve.http.generation import Service
from gemma_ext.serve.http.reading import read

MOST_LETTERS = 2**20
MOST_TOKENS = 2**18


class TokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: Annotated[str, Field(max_length=MOST_LETTERS)]
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MOST_TOKENS), FailFast()
    ]


def router(service: Service) -> APIRouter:
    routes, served = APIRouter(), service.served

    @routes.get("/tokenizer_info")
    async def info() -> dict[str, Any]:
        tokenizer = served.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {
            **{name: getattr(tokenizer, name) for name in names},
            "chat_template": served.chat_template or tokenizer.chat_template,
            "model_max_length": service.engine.limits.max_model_len,
        }

    @routes.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await read(request, service, TokenizeBody)
        most = service.engine.limits.max_model_len

        def told() -> str:
            ids = served.ids(body.prompt, body.add_special_tokens)
            return json.dumps({"tokens": ids, "count": len(ids), "max_model_len": most})

        return _json(await served.apart(told, len(body.prompt)))

    @routes.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await read(request, service, DetokenizeBody)

        # special tokens stay, so that text and tokens go there and back
        def told() -> str:
            return json.dumps({"prompt": served.tokenizer.decode(body.tokens)})

        return _json(await served.apart(told, len(body.tokens)))

    return routes


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")

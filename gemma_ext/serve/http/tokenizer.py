"""POST /tokenize, /detokenize, GET /tokenizer_info: for clients without the tokenizer's files.

lm-eval looks for them and then needs no tokenizer of its own.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from gemma_ext.serve.http.generation import Service
from gemma_ext.serve.http.reading import read


class TokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


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
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await read(request, service, TokenizeBody)
        ids = await served.apart(lambda: served.ids(body.prompt, body.add_special_tokens))
        most = service.engine.limits.max_model_len
        return {"tokens": ids, "count": len(ids), "max_model_len": most}

    @routes.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        body = await read(request, service, DetokenizeBody)
        # special tokens stay, so that text and tokens go there and back
        text = await served.apart(lambda: served.tokenizer.decode(body.tokens))
        return {"prompt": text}

    return routes

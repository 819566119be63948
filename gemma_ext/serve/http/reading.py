"""Bodies, read and checked."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from gemma_ext.serve.http.connection import read_body
from gemma_ext.serve.http.errors import ApiError, of_validation
from gemma_ext.serve.http.generation import Service
from gemma_ext.serve.http.served import LARGE

Body = TypeVar("Body", bound=BaseModel)


async def read(request: Request, service: Service, kind: type[Body]) -> Body:
    """The body of a request to a model that is there.

    Raises:
        ApiError: 503 where the engine would not answer, 415, 408, 413, 400, 404.
    """
    if service.engine.trouble is not None:
        raise ApiError(503, service.engine.trouble, code="engine_stopped")
    # browsers send it for pages of other origins only where a server allows that
    told = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if told != "application/json":
        raise ApiError(415, f"Content-Type: expected application/json, got {told or 'none'}")
    raw = await read_body(request, service.settings.most_body, service.settings.body_seconds)
    try:
        if len(raw) > LARGE:
            body = await service.served.apart(lambda: kind.model_validate_json(raw), len(raw))
        else:
            body = kind.model_validate_json(raw)
    except ValidationError as error:
        raise of_validation(error) from None
    if body.model is not None:
        service.served.check_name(body.model)
    return body

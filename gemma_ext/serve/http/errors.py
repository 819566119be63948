"""Refusals in the form of the API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import reprlib
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from gemma_ext.serve.batch import EngineBusy, EngineError, EngineStopped, RequestExpired

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_FIELDS = {"stop_ids": "stop_token_ids"}  # of an engine's request to those of the API
CLIENT_LEFT = 499  # nobody reads it; it is counted
_BUSY_SECONDS = "1"  # of the Retry-After header


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class ApiError(Exception):
    """A refusal.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field of the body that is wrong, if it is one.
        code: for programs to tell refusals apart.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = _BUSY_SECONDS
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


FAULT = ApiError(500, "the server failed, its log says why")


def of_engine(error: EngineError) -> ApiError:
    """What the engine's trouble is to a client."""
    if isinstance(error, EngineBusy):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, RequestExpired):
        return ApiError(504, str(error), code="timeout")
    code = "engine_stopped" if isinstance(error, EngineStopped) else "engine_error"
    return ApiError(503, str(error), code=code)


def of_value(error: ValueError | TypeError) -> ApiError:
    """Of a sentence that begins with the name of what is wrong."""
    name, colon, rest = str(error).partition(": ")
    if not (colon and name.isidentifier()):
        return ApiError(400, str(error))
    name = _FIELDS.get(name, name)
    return ApiError(400, f"{name}: {rest}", param=name)


def of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, as one sentence."""
    first = error.errors(include_url=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {message}")
    unknown = first["type"] == "extra_forbidden"
    path = (*first["loc"], message) if unknown else first["loc"]
    if not path:
        return ApiError(400, f"the body is no JSON object: {message}")
    param = str(path[0])
    where = ".".join(str(part) for part in path)
    if unknown:
        return ApiError(400, f"{where}: no such argument", param=where, code="unknown_parameter")
    if first["type"] == "missing":
        code = "missing_required_parameter"
        return ApiError(400, f"{where}: expected a value, got none", param=where, code=code)
    if message.startswith(f"{param}: "):
        return ApiError(400, message, param=param)
    got = reprlib.repr(first["input"])  # of something large in no time
    return ApiError(400, f"{where}: {message[:1].lower()}{message[1:]}, got {got}", param=param)


def install(app: FastAPI) -> None:
    """Makes every refusal and every fault of the app an answer in the API's form."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(EngineError)
    async def engine(_: Request, error: EngineError) -> JSONResponse:
        return of_engine(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        sentence = f"{request.method} {request.url.path}: {error.detail}"
        response = ApiError(error.status_code, sentence).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientLeft)
    async def left(_: Request, error: ClientLeft) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(Exception)  # raised again behind the answer, so the log has it
    async def fault(_: Request, error: Exception) -> JSONResponse:
        return FAULT.response()

"""Access to the server: the API key, sizes of bodies, and errors in OpenAI's form.

vLLM's `--api-key` guards paths under /v1 and a few others; /metrics, /tokenize, /invocations, the
docs and more stay open. With our routes on, the key is required for all but `OPEN_PATHS`.
"""

import argparse
import hashlib
import json
import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from razor_vllm import compat

OPEN_PATHS = frozenset({"/health", "/ping", "/razor"})
"""Answered without the key: liveness, and the page, which has no figures in it."""

MAX_BODY_BYTES = 64 * 1024
"""Largest body that our routes accept."""

MAX_LOG_LINE = 2000
"""Most characters of a line of vLLM's log."""

OUR_PREFIX = "/v1/razor"


def error_response(
    status: HTTPStatus, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's form."""
    error = ErrorInfo(message=message, type=status.phrase, code=status.value)
    body = ErrorResponse(error=error).model_dump()
    return JSONResponse(body, status_code=status, headers=headers)


def _path(scope: Scope) -> str:
    return scope["path"].removeprefix(scope.get("root_path", ""))


def api_keys(args: argparse.Namespace) -> list[str]:
    """Keys that a server accepts, as vLLM finds them; empty if it needs none."""
    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


class KeyMiddleware(AuthenticationMiddleware):
    """Requires the API key on every path but `OPEN_PATHS`; the check itself is vLLM's.

    vLLM makes it as one of its option `--middleware`, with the application as the only argument,
    so it reads the keys from the server's options at the first request.
    """

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, [])

    async def __call__(  # type: ignore[override]
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        # A browser's preflight carries no key; it reads nothing.
        guarded = scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS"
        if not guarded or _path(scope) in OPEN_PATHS or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer"}
        message = "This server needs its API key: Authorization: Bearer KEY"
        response = error_response(HTTPStatus.UNAUTHORIZED, message, headers)
        await response(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        if not self.api_tokens:
            keys = api_keys(scope["app"].state.args)
            self.api_tokens = [hashlib.sha256(key.encode()).digest() for key in keys]
        return self.verify_token(Headers(scope=scope))


class ShortLines(logging.Filter):
    """Cuts long log lines: vLLM logs unknown model names at any length."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if len(text) > MAX_LOG_LINE:
            record.msg, record.args = text[:MAX_LOG_LINE] + "... (cut)", ()
        return True


def install(app: FastAPI) -> None:
    """Limit bodies, refuse requests while draining, require the key, use OpenAI's form of errors.

    Called while vLLM builds its application, before it adds its own middleware.
    """
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(ShortLines())
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_middleware(BodyLimit)
    app.add_middleware(Draining)
    args = app.state.args
    if api_keys(args):
        # The last one is asked first: vLLM's own answer to a missing key is not OpenAI's form.
        compat.add_middleware(args, f"{__name__}.{KeyMiddleware.__name__}")


class BodyLimit:
    """Refuses bodies above `MAX_BODY_BYTES` on our routes, before they are read into memory."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _path(scope).startswith(OUR_PREFIX):
            await self.app(scope, receive, send)
            return
        body = await _bounded_body(receive)
        if body is None:
            message = f"The body is above {MAX_BODY_BYTES:,} bytes"
            await error_response(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)


class Draining:
    """Refuses new requests once the server was told to end; running ones continue.

    `/health` is refused too, so that a load balancer goes elsewhere.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        draining = getattr(scope["app"].state, "razor_draining", False)
        if scope["type"] != "http" or not draining or _path(scope) == "/metrics":
            await self.app(scope, receive, send)
            return
        message = "The server is shutting down"
        headers = {"Retry-After": "10", "Connection": "close"}
        response = error_response(HTTPStatus.SERVICE_UNAVAILABLE, message, headers)
        await response(scope, receive, send)


async def _bounded_body(receive: Receive) -> bytes | None:
    """The body; None if it is too large, and then the rest of it is not read."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body  # the client is gone
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that gives the body once, and then what the original channel gives."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _answer_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    detail = error.detail if isinstance(error.detail, str) else json.dumps(error.detail)
    return error_response(status, detail, dict(error.headers or {}))

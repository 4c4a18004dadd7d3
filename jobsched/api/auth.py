"""The gate of the server: what every request passes before any route, and the token file.

`Guard` wraps the whole application (also unknown paths and the OpenAPI document) and checks, in this order: the Host
header (a foreign web page must not reach a loopback server by rebinding its name), the bearer token, the size of the
body. It also puts the security headers on every answer and logs what failed.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import structlog
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobsched.errors import AuthError, ConfigError, Forbidden, JobschedError

MAX_BODY_BYTES = 2 * 1024 * 1024
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})
OPEN_PATHS: Final = frozenset({"/v1/healthz", "/", "/dashboard.js", "/dashboard.css"})
"""Paths without a token, GET and HEAD only: health, and the dashboard's files, which hold no data."""
HEADERS: Final = (
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
     b"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)  # fmt: skip

log = structlog.get_logger(__name__)


def load_token(path: Path) -> str:
    """The server's token; made at first start, readable by its owner only. `ConfigError` when others can read it."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others", hint=f"chmod 600 {path}") from None
        token = path.read_text().strip()
        if not token:
            raise ConfigError(f"{path} is empty", hint="remove it; a new token is made at the next start") from None
        return token
    token = secrets.token_urlsafe(32)
    with open(handle, "w") as out:
        out.write(token + "\n")
    return token


class Guard:
    """ASGI middleware. `hosts` None: any Host header will do (the server listens beyond loopback on purpose)."""

    def __init__(self, app: ASGIApp, token: str, hosts: Iterable[str] | None) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()
        self._hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._let_in(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS, (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check(scope)
        except JobschedError as exc:
            await _send_error(answer, exc)
            return
        try:
            await self._app(scope, _limited(receive), answer)
        except Exception as exc:
            trace = "".join(traceback.format_exception(exc))  # without local variables: they hold secrets
            log.error("request failed", path=scope["path"], request_id=request_id, traceback=trace)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A session in a replica: the same conditions, and an error of the same form instead of the upgrade."""
        try:
            self._check(scope)
        except JobschedError as exc:
            await _send_error(send, exc, "websocket.http.response")
            return
        try:
            await self._app(scope, receive, send)
        except Exception as exc:
            trace = "".join(traceback.format_exception(exc))
            log.error("session failed", path=scope["path"], traceback=trace)

    def _check(self, scope: Scope) -> None:
        headers = dict(reversed(scope["headers"]))
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and host.rsplit(":", 1)[0] not in self._hosts and host not in self._hosts:
            raise Forbidden("the Host header names another server", hint="use the URL that the server printed")
        if scope["path"] in OPEN_PATHS and scope.get("method") in ("GET", "HEAD"):
            return
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            raise AuthError(
                "a valid token is required" if b"authorization" in headers else "a token is required",
                hint="it is in the file 'token' of the server's home directory; give it by --token-file, "
                "JOBSCHED_TOKEN_FILE or JOBSCHED_TOKEN, or in HTTP as 'Authorization: Bearer TOKEN'",
            )


def _limited(receive: Receive) -> Receive:
    """`receive` that gives up on a body beyond the limit, however it is framed."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request is larger than {MAX_BODY_BYTES} bytes")
        return message

    return limited


async def _send_error(send: Send, error: JobschedError, kind: str = "http.response") -> None:
    body = json.dumps(error.to_wire()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if isinstance(error, AuthError):
        headers.append((b"www-authenticate", b'Bearer realm="jobsched"'))
    await send({"type": f"{kind}.start", "status": error.http_status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})

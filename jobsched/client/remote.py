"""HTTP to one server: requests, bounded retries, event streams that pick up where they broke off, typed errors.

Used by `client.client` (which turns bodies into typed values) and by the CLI (which shows them as they are, because
building the models costs more than the whole rest of a listing). Never decides anything and knows no job.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2

from jobsched import errors

Params = Mapping[str, str | int | bool | None]

TRIES = 4
"""How often a safe request is sent before the server counts as unreachable: about two seconds in all."""
PROBLEM = frozenset(errors.Problem.__dataclass_fields__)
STREAM_SILENCE_S = 30.0
"""A stream without even a keep-alive comment (they come every 10 s) for this long is dead."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is. `source` says who told us; `local`: it came from this machine's home directory."""

    url: str
    token: str
    source: str
    local: bool = False


class Remote:
    """One server. Thread-safe; close it or use it in a `with` block."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        relocate: Callable[[], Endpoint | None] | None = None,
        patience_s: float = 60.0,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """`relocate` is asked where the server went when it no longer answers (a restarted local server may have
        another port). `patience_s` bounds how long a stream waits for its server to come back."""
        self.endpoint = endpoint
        self._relocate = relocate
        self._patience_s = patience_s
        host = urlsplit(endpoint.url).hostname or ""
        self._http = httpx2.Client(
            timeout=httpx2.Timeout(30.0, connect=5.0),
            transport=transport,
            verify=endpoint.url.startswith("https"),  # building a TLS context takes longer than most requests
            trust_env=host not in ("127.0.0.1", "localhost", "::1"),
        )

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **params: str | int | bool | None) -> bytes:
        """Body of GET /v1/`path`; parameters that are None or empty are left out."""
        return self._send("GET", path, params, None, safe=True)

    def post(self, path: str, body: object = None, *, safe: bool = True) -> bytes:
        """Body of POST /v1/`path`. `safe`: doing it twice is the same as doing it once (it carries a request id, or
        sets a state), so it is sent again when the connection breaks."""
        return self._send("POST", path, {}, {} if body is None else body, safe=safe)

    def change(
        self, method: Literal["PUT", "PATCH"], path: str, body: object, *, if_match: str = "", **params: bool
    ) -> bytes:
        """Body of PUT or PATCH /v1/`path`: doing it twice is the same as doing it once."""
        return self._send(method, path, params, body, safe=True, extra={"If-Match": if_match})

    def documents(self, path: str, **params: str | int | bool | None) -> Any:
        """`get`, parsed as JSON."""
        return json.loads(self.get(path, **params))

    def stream(
        self, path: str, *, last_id: str = "", **params: str | int | bool | None
    ) -> Iterator[httpx2.ServerSentEvent]:
        """Server-sent events of GET /v1/`path` until `event: end`. A broken stream is taken up again after the last
        event id, for as long as the server is away no longer than `patience_s`; streams without ids begin anew, so
        their readers must know what they have seen. Each reconnect is announced by an event `reconnected`."""
        away_since = 0.0
        while True:
            try:
                with self._http.sse(
                    self._url(path), params=_given(params), headers=self._headers({"Last-Event-ID": last_id}),
                    timeout=httpx2.Timeout(STREAM_SILENCE_S, connect=5.0),
                ) as source:
                    if source.response.status_code != 200:
                        source.response.read()
                        raise to_error(source.response)
                    if away_since:
                        away_since = 0.0
                        yield httpx2.ServerSentEvent(event="reconnected")
                    for event in source:
                        last_id = event.id or last_id
                        if event.event == "end":
                            return
                        if event.event == "error":
                            raise from_wire(json.loads(event.data))
                        yield event
            except (httpx2.TransportError, errors.Unreachable) as exc:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > self._patience_s:
                    raise self._unreachable(exc) from exc
            else:  # a server that is shut down ends its streams politely, without `end`
                away_since = away_since or time.monotonic()
            time.sleep(0.2 + 0.2 * random.random())
            self._follow_server()

    @contextmanager
    def upgrade(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """GET /v1/`path` on a connection that then speaks something else; see `channel`. Tried once."""
        try:
            with self._http.stream(
                "GET", self._url(path), headers=self._headers(headers), timeout=httpx2.Timeout(30.0, connect=5.0)
            ) as response:
                yield response
        except httpx2.TransportError as exc:
            raise self._unreachable(exc) from exc

    def _send(
        self, method: str, path: str, params: Params, body: object, *, safe: bool,
        extra: Mapping[str, str] = MappingProxyType({}),
    ) -> bytes:
        for trial in range(1, TRIES + 1):
            try:
                response = self._http.request(
                    method, self._url(path), params=_given(params), json=body, headers=self._headers(extra)
                )
            except httpx2.ConnectError as exc:  # nothing was sent: always safe to try again
                failure: Exception = self._unreachable(exc)
                failure.__cause__ = exc
            except httpx2.TransportError as exc:
                failure = self._unreachable(exc)
                failure.__cause__ = exc
                if not safe:
                    raise failure from exc
            except httpx2.InvalidURL as exc:
                raise errors.UsageError(f"{self.endpoint.url!r} is not a server URL: {exc}") from exc
            else:
                if response.is_success:
                    return response.content
                failure = to_error(response)
                if not (safe and isinstance(failure, errors.Unreachable)):
                    raise failure
            if trial < TRIES:
                time.sleep(0.1 * 2**trial * (0.5 + random.random()))
                self._follow_server()
        raise failure

    def _follow_server(self) -> None:
        found = self._relocate() if self._relocate else None
        if found is not None:
            self.endpoint = found

    def _url(self, path: str) -> str:
        return f"{self.endpoint.url.rstrip('/')}/v1/{path}"

    def _headers(self, extra: Mapping[str, str]) -> dict[str, str]:
        named = {"Authorization": f"Bearer {self.endpoint.token}"} if self.endpoint.token else {}
        return named | {k: v for k, v in extra.items() if v}

    def _unreachable(self, exc: Exception) -> errors.Unreachable:
        where = self.endpoint
        hint = (
            "it may have died: see server.log in its home, or start it again with 'jobsched serve'" if where.local
            else f"the address comes from {where.source}; check it, or start a server with 'jobsched serve'"
        )
        return errors.Unreachable(f"the server at {where.url} does not answer ({exc or type(exc).__name__})", hint=hint)


def to_error(response: httpx2.Response) -> errors.JobschedError:
    """The typed error that an answer stands for: by its code, else by its HTTP status."""
    try:
        body = response.json()
    except ValueError:
        body = None
    return from_wire(body if isinstance(body, dict) else {}, response.status_code)


def from_wire(body: Mapping[str, Any], status: int = 500) -> errors.JobschedError:
    """Inverse of `JobschedError.to_wire`; a body of another make becomes the error class of its HTTP status."""
    known = errors.all_errors()
    code = str(body.get("code", ""))
    by_status = {cls.http_status: cls for cls in reversed([*known.values()])}
    cls = known.get(code) or by_status.get(status, errors.JobschedError)
    hint = str(body.get("hint") or "")
    message = str(body.get("message") or body.get("detail") or f"the server answered with HTTP status {status}")
    listed = body.get("problems")
    problems = [errors.Problem(**{k: v for k, v in p.items() if k in PROBLEM}) for p in listed or ()]
    if issubclass(cls, errors.SpecError):
        return cls(problems or [errors.Problem(message, hint=hint)], hint=hint)
    error = cls(message, hint=hint)
    error.problems = tuple(problems)
    return error


def _given(params: Params) -> dict[str, str]:
    """Query parameters without the empty ones; booleans as the server reads them."""
    return {
        k: str(v).lower() if isinstance(v, bool) else str(v)
        for k, v in params.items() if v is not None and v != "" and v is not False
    }

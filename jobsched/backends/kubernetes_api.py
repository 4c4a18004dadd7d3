"""Thin calls to a Kubernetes API server: raw JSON in and out, errors that are ours, every request counted.

Used by `kubernetes` and `kubernetes_watch`. Needs the package `kubernetes`, of which it uses configuration, credentials
and connections; its typed models cost a millisecond per pod and drop what they do not know.
Thread-safe, as its connection pool is.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import kubernetes.client
import kubernetes.config
import urllib3
import websocket
from kubernetes.config.config_exception import ConfigException
from kubernetes.stream import ws_client

from jobsched.backends.containers import HANG_UP, SESSION
from jobsched.backends.kubernetes_render import message_of
from jobsched.backends.kubernetes_sessions import COMMANDS, PORTS, Exec, Forward, Socket
from jobsched.errors import BackendUnreachable, ConfigError
from jobsched.ports import Window
from jobsched.spec.backends import KubernetesBackend

Json = dict[str, Any]

TIMEOUT_S = 20.0
"""Longest wait for an answer."""
AT_ONCE = 16
"""Requests at the same time, beside watches and logs."""
KEPT = 256
"""Connections that are kept."""
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
MAX_LINE = 64 << 20


class Gone(Exception):
    """There is no such object (any more)."""


class Exists(Exception):
    """There is one of this name already."""


class Expired(Exception):
    """The server no longer remembers the version that a watch or a listing was to go on from."""


class Refused(Exception):
    """The server will not do it; the text is its own."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Stream:
    """An answer that goes on; `close` from another thread ends it."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def lines(self) -> Iterator[bytes]:
        """Whole lines, with their newline; the last may lack it. BackendUnreachable when it breaks off."""
        held: list[bytes] = []
        try:
            for piece in self._response.stream(amt=None):
                *whole, rest = piece.split(b"\n")
                for line in whole:
                    held.append(line)
                    yield b"".join(held) + b"\n"
                    held.clear()
                if rest:
                    held.append(rest)
            if held:
                yield b"".join(held)
        except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:  # closed by another thread
            raise BackendUnreachable(f"the API server broke off: {error}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Hang up; whoever reads wakes."""
        with suppress(Exception):
            connection = self._response.connection
            if connection is not None and connection.sock is not None:
                connection.sock.shutdown(socket.SHUT_RDWR)
        with suppress(Exception):
            self._response.close()


class Api:
    """One API server. `BackendUnreachable` from any method when it does not answer or knows us not."""

    def __init__(self, config: KubernetesBackend) -> None:
        configuration = kubernetes.client.Configuration()
        self.namespace = config.namespace or "default"
        try:
            self._load(config, configuration)
        except ConfigException as error:
            raise ConfigError(f"no access to a Kubernetes cluster: {error}",
                              hint="set KUBECONFIG, or backend.kubernetes.kubeconfig in the server's configuration"
                              ) from error
        configuration.connection_pool_maxsize = KEPT
        configuration.keep_alive = True
        configuration.retries = urllib3.Retry(total=1, redirect=0, status=0)
        websocket.setdefaulttimeout(TIMEOUT_S)
        self.host = str(configuration.host)
        self.calls: Counter[str] = Counter()
        """Requests so far, by verb and kind: `POST pods`."""
        self._client = kubernetes.client.ApiClient(configuration)
        self._configuration = configuration

    def _load(self, config: KubernetesBackend, configuration: Any) -> None:
        given = config.kubeconfig or os.environ.get("KUBECONFIG", "")
        if not given and "KUBERNETES_SERVICE_HOST" in os.environ and OWN_NAMESPACE.exists():
            kubernetes.config.load_incluster_config(configuration)
            self.namespace = config.namespace or OWN_NAMESPACE.read_text().strip()
            return
        file, context = config.kubeconfig or None, config.context or None
        kubernetes.config.load_kube_config(file, context, configuration, persist_config=False)
        contexts, current = kubernetes.config.list_kube_config_contexts(file)
        chosen = next((one for one in contexts if one["name"] == context), current)
        self.namespace = config.namespace or chosen["context"].get("namespace") or "default"

    # objects ------------------------------------------------------------------------------------------------------

    def get(self, path: str, query: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S) -> Json:
        return self._json("GET", path, query, timeout_s=timeout_s)

    def create(self, path: str, body: Json) -> Json:
        """`Exists` when there is one. Fields that the server does not know are refused, not dropped."""
        return self._json("POST", path, {"fieldValidation": "Strict"}, body)

    def patch(self, path: str, body: Json) -> Json:
        """Fields laid over an object's (RFC 7396; null removes one). With `metadata.resourceVersion` in it, `Exists`
        when the object has changed since."""
        return self._json("PATCH", path, {"fieldValidation": "Strict"}, body)

    def delete(self, path: str, grace_s: int | None = None, selector: str = "") -> None:
        """One object, or with a selector all that carry its labels; those that are gone are fine. `grace_s` 0 asks no
        kubelet."""
        options: Json = {"propagationPolicy": "Background"}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        with suppress(Gone):
            self._json("DELETE", path, {"labelSelector": selector} if selector else None, options)

    def stream(self, path: str, query: Mapping[str, str], silence_s: float) -> Stream:
        """An answer that comes in pieces, at most `silence_s` apart."""
        return Stream(self._send("GET", path, query, None, (TIMEOUT_S, silence_s)))

    def exec(self, path: str, command: Sequence[str], container: str) -> str:
        """Run a command beside a container's own; what it wrote to stdout. BackendUnreachable when that cannot be."""
        query = [("command", word) for word in command]
        query += [("container", container), ("stdout", "true"), ("stderr", "true")]
        headers = self._headers()
        headers = {name.lower(): text for name, text in headers.items()}
        headers["sec-websocket-protocol"] = ws_client.V4_CHANNEL_PROTOCOL
        self.calls[f"GET {_kind(path)}"] += 1
        try:
            client = ws_client.WSClient(
                self._configuration, ws_client.get_websocket_url(self.host + path, query), headers, False)
            try:
                client.run_forever(timeout=TIMEOUT_S)
                return str(client.read_channel(ws_client.STDOUT_CHANNEL))
            finally:
                client.close()
        except Exception as error:  # the library's own, the socket's, and those of its websocket package
            raise BackendUnreachable(f"cannot run a command in the pod: {error}") from error

    def execute(self, path: str, command: Sequence[str], container: str, window: Window | None, stdin: bool) -> Exec:
        """A session with a command in the pod at `path`. Gone, Refused when it does not run."""
        mark = f"{SESSION}={secrets.token_hex(8)}"
        query = [("command", word) for word in ("/bin/sh", "-c", 'export "$0"; exec "$@"', mark, *command)]
        query += [("container", container), ("stdout", "true"), ("stderr", "false" if window else "true"),
                  ("stdin", str(stdin).lower()), ("tty", str(window is not None).lower())]

        def hang_up() -> None:
            self.exec(f"{path}/exec", ["/bin/sh", "-c", HANG_UP, "sh", mark], container)

        session = Exec(self._socket(f"{path}/exec", query, COMMANDS), hang_up)
        if window is not None:
            session.resize(window)
        return session

    def forward(self, path: str, port: int) -> Forward:
        """A connection to a port of the pod at `path`. Gone, Refused when it does not run."""
        return Forward(self._socket(f"{path}/portforward", [("ports", str(port))], PORTS))

    def _socket(self, path: str, query: Sequence[tuple[str, str]], protocols: str) -> Socket:
        headers = {name.lower(): text for name, text in self._headers().items()}
        headers["sec-websocket-protocol"] = protocols
        self.calls[f"GET {_kind(path)}"] += 1
        try:
            return Socket(ws_client.create_websocket(
                self._configuration, ws_client.get_websocket_url(self.host + path, list(query)), headers))
        except websocket.WebSocketBadStatusException as error:
            raise _error(error.status_code, message_of(error.resp_body or b""), f"GET {path}") from error
        except (websocket.WebSocketException, OSError) as error:
            raise BackendUnreachable(f"the API server does not answer: {error}") from error

    def close(self) -> None:
        with suppress(Exception):
            self._client.rest_client.pool_manager.clear()

    # requests -----------------------------------------------------------------------------------------------------

    def _headers(self) -> dict[str, str]:
        headers: dict[str, str] = {"Accept": "application/json", "User-Agent": "jobsched"}
        self._client.update_params_for_auth(headers, [], ["BearerToken"], "", "GET", None)
        return headers

    def _json(self, method: str, path: str, query: Mapping[str, str] | None = None, body: Json | None = None,
              timeout_s: float = TIMEOUT_S) -> Json:
        response = self._send(method, path, query, body, timeout_s)
        with _errors():
            found = json.loads(response.data)
        return dict(found)

    def _send(self, method: str, path: str, query: Mapping[str, str] | None, body: Json | None,
              timeout_s: float | tuple[float, float]) -> Any:
        """The open response to a request that was granted."""
        self.calls[f"{method} {_kind(path)}"] += 1
        url = self.host + path + ("?" + urlencode(query) if query else "")
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = self._headers() | ({"Content-Type": kind} if body is not None else {})
        timeout = urllib3.Timeout(*timeout_s) if isinstance(timeout_s, tuple) else urllib3.Timeout(timeout_s, timeout_s)
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        with _errors():
            response = self._client.rest_client.pool_manager.request(
                method, url, body=data, headers=headers, timeout=timeout, preload_content=False)
            if response.status < 400:
                return response
            text = message_of(response.data)
        raise _error(response.status, text, f"{method} {path}")


def _kind(path: str) -> str:
    """`/api/v1/namespaces/x/pods/y/log` -> `pods/log`."""
    words = path.split("/")[3:] if path.startswith("/api/") else path.split("/")[4:]
    if not words:
        return "apis"
    words = words[2:] if words[0] == "namespaces" and len(words) > 2 else words
    return "/".join(words[:1] + words[2:3])


def _error(status: int, text: str, what: str) -> Exception:
    match status:
        case 404:
            return Gone(text)
        case 409:
            return Exists(text)
        case 410:
            return Expired(text)
        case 401:
            return BackendUnreachable(f"the API server does not accept our credentials ({what}): {text}")
        case 429 | 500 | 502 | 503 | 504:
            return BackendUnreachable(f"the API server cannot answer now ({what}): {text}")
        case _:
            return Refused(status, text)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise BackendUnreachable(f"the API server does not answer: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error)

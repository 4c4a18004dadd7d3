"""Thin calls to one Docker engine: every method is one or two requests, and its errors are ours.

Used by `docker`, which decides nothing either. Needs the package `docker`; thread-safe, as its client is.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import docker
import docker.errors
import docker.tls
import requests.exceptions
import urllib3.exceptions

from jobsched.backends import docker_render as render
from jobsched.backends.containers import HANG_UP, SEND, SESSION
from jobsched.backends.docker_render import Json
from jobsched.backends.docker_sessions import LOST, Exec
from jobsched.backends.sessions import TERMINAL
from jobsched.errors import BackendUnreachable
from jobsched.ports import Window
from jobsched.spec.backends import DockerEngine

TIMEOUT_S = 20
"""Longest wait for an answer."""
OF_CONTAINERS = {"type": "container"}


class Gone(Exception):
    """There is no such container (any more)."""


class Refused(Exception):
    """The engine will not do it; the text is its own."""


class ImageError(Exception):
    """The image cannot be had; the text is for people."""


class Engine:
    """One engine. `BackendUnreachable` from any method when it does not answer."""

    def __init__(self, config: DockerEngine) -> None:
        self.config = config
        self._client: Any = None
        self._making = threading.Lock()
        self._events: Any = None
        self._left = False

    # what there is ------------------------------------------------------------------------------------------------

    def info(self) -> Json:
        """What the engine says of itself: CPUs, memory, its clock."""
        with _errors():
            return dict(self._api.info())

    def ping(self) -> None:
        with _errors():
            self._api.ping()

    def knock(self) -> None:
        """As `ping`, on a connection of its own: an engine that is shutting down takes no new ones."""
        with _errors(), contextlib.closing(self._new_client()) as client:
            client.ping()

    def ours(self, label: str) -> list[Json]:
        """Containers with this label, running or not, inspected."""
        with _errors():
            found = self._api.containers(all=True, filters={"label": label})
        return self._inspected(found)

    def others(self, label: str, value: str) -> list[Json]:
        """Running containers without this label, or with another value of it, inspected."""
        with _errors():
            found = self._api.containers()
        return self._inspected([entry for entry in found if (entry.get("Labels") or {}).get(label) != value])

    def _inspected(self, entries: list[Json]) -> list[Json]:
        return [one for one in (self.find(entry["Id"]) for entry in entries) if one is not None]

    def inspect(self, container: str) -> Json:
        """Raises Gone."""
        with _errors():
            return dict(self._api.inspect_container(container))

    def find(self, container: str) -> Json | None:
        """By id or name; None when it is not there."""
        try:
            return self.inspect(container)
        except Gone:
            return None

    def pids(self, container: str) -> set[int]:
        """Processes of a container, by the engine's machine's numbers; empty when that cannot be told."""
        try:
            with _errors():
                top = self._api.top(container, ps_args="-eo pid")
        except (Gone, Refused):
            return set()
        return {int(row[0]) for row in top.get("Processes") or ()}

    def cpu_ns(self, container: str) -> int:
        """CPU time its processes used so far; -1 when that cannot be told."""
        try:
            with _errors(), contextlib.suppress(requests.exceptions.JSONDecodeError):  # of one that has just ended
                stats = self._api.stats(container, stream=False, one_shot=True)
                return int(stats.get("cpu_stats", {}).get("cpu_usage", {}).get("total_usage", -1))
        except (Gone, Refused):
            pass
        return -1

    # news ---------------------------------------------------------------------------------------------------------

    def events(self, since: str) -> Iterator[Json]:
        """What happens to containers from the engine's instant `since` on, until the engine ends or `interrupt` is
        called."""
        with _errors():
            self._events = stream = self._api.events(since=since, decode=True, filters=OF_CONTAINERS)
        if self._left:
            self.interrupt()
        try:
            with _errors(), contextlib.closing(stream):
                yield from stream
        except (AttributeError, ValueError) as error:  # closed under its reader
            raise BackendUnreachable("the stream of events broke off") from error

    def past_events(self, until: str) -> list[Json]:
        """What the engine remembers: its newest few hundred events since it was started."""
        with _errors():
            return list(self._api.events(since="1", until=until, decode=True, filters=OF_CONTAINERS))

    def interrupt(self) -> None:
        """End the stream of events."""
        if self._events is not None:
            with contextlib.suppress(Exception):  # the client's stream has many ways to be closed already
                self._events.close()

    def log(self, container: str, since_s: int, follow: bool) -> Any:
        """Log pieces (`TIME text`) from that second on, if wanted as they come until the container ends; has `close`.
        Raises Gone."""
        with _errors():
            return self._api.logs(container, stream=True, follow=follow, timestamps=True, since=since_s or None)

    # doing --------------------------------------------------------------------------------------------------------

    def has_image(self, image: str) -> bool:
        with _errors():
            try:
                self._api.inspect_image(image)
            except docker.errors.ImageNotFound:
                return False
            return True

    def pull(self, image: str, told: Callable[[str], None]) -> None:
        """Raises ImageError; `told` hears how far it is."""
        layers: dict[str, Json] = {}
        try:
            with _errors():
                for line in self._api.pull(image, stream=True, decode=True):
                    if "error" in line:
                        raise ImageError(_no_image(image, line["error"]))
                    layers[line.get("id", "")] = line
                    told(render.pull_progress(layers, image))
        except (Refused, Gone) as error:
            raise ImageError(_no_image(image, str(error))) from error

    def create(self, request: Json, name: str) -> str:
        """Id of the new container, or of the one that already has this name. Raises ImageError, Refused."""
        with _errors():
            try:
                return str(self._api.create_container_from_config(request, name)["Id"])
            except docker.errors.ImageNotFound as error:
                raise ImageError(_no_image(request["Image"], error.explanation or "not found")) from error
            except docker.errors.APIError as error:
                if error.status_code != 409:
                    raise
                return str(self._api.inspect_container(name)["Id"])

    def put(self, container: str, path: str, archive: Any) -> None:
        """Unpack a tar into a directory of the container."""
        with _errors():
            self._api.put_archive(container, path, archive)

    def start(self, container: str) -> None:
        """Idempotent. Raises Refused when its command cannot be run."""
        with _errors():
            self._api.start(container)

    def signal(self, container: str, number: int, who: str) -> list[int]:
        """Send a signal to the processes inside that catch it (`caught`), or to `all`; returns who got it. Empty too
        when the image has no shell to find out with."""
        try:
            with _errors():
                made = self._api.exec_create(container, ["/bin/sh", "-c", SEND, "sh", str(number), who])
                output = self._api.exec_start(made["Id"])
        except (Gone, Refused):
            return []
        return [int(word) for word in output.split() if word.isdigit()]

    def execute(self, container: str, command: Sequence[str], window: Window | None, stdin: bool) -> Exec:
        """Run a command in a container beside its own. Raises Gone, Refused when the container does not run."""
        terminal, mark = window is not None, f"{SESSION}={secrets.token_hex(8)}"
        environment = [mark, *(f"{name}={value}" for name, value in TERMINAL.items() if terminal)]
        client = self._new_client()
        try:
            with _errors():
                made = client.exec_create(
                    container, list(command), stdin=stdin, tty=terminal, environment=environment)["Id"]
                sock = client.exec_start(made, tty=terminal, socket=True)
        except BaseException:
            client.close()
            raise

        def code() -> int | None:
            try:
                with _errors():
                    found = client.exec_inspect(made)["ExitCode"]
            except (Gone, Refused):  # with its container
                return LOST
            return None if found is None else int(found)

        def resized(size: Window) -> None:
            with suppress(Gone, Refused), _errors():
                client.exec_resize(made, size.rows, size.columns)

        def hang_up() -> None:
            with suppress(Gone, Refused), _errors():
                ending = client.exec_create(container, ["/bin/sh", "-c", HANG_UP, "sh", mark])
                client.exec_start(ending["Id"])

        session = Exec(sock, terminal, code=code, resized=resized, hang_up=hang_up, left=client.close)
        if window is not None:
            resized(window)
        return session

    def kill(self, container: str, name: str = "SIGKILL") -> None:
        """To its first process; nothing happens to one that has ended."""
        with contextlib.suppress(Gone, Refused), _errors():
            self._api.kill(container, name)

    def remove(self, container: str) -> None:
        """With its anonymous volumes, running or not."""
        with contextlib.suppress(Gone, Refused), _errors():
            self._api.remove_container(container, v=True, force=True)

    def networks(self, label: str) -> list[Json]:
        with _errors():
            return list(self._api.networks(filters={"label": label}))

    def make_network(self, request: Json) -> None:
        """Unless there is one of that name. Raises Refused when the engine has no addresses left."""
        with _errors():
            if any(found["Name"] == request["Name"] for found in self._api.networks(names=[request["Name"]])):
                return
            self._api.create_network(
                request["Name"], driver=request["Driver"], labels=request["Labels"],
                check_duplicate=request["CheckDuplicate"])

    def remove_network(self, name: str) -> None:
        """Unless somebody is still on it."""
        with contextlib.suppress(Gone, Refused), _errors():
            self._api.remove_network(name)

    def leave(self) -> None:
        """End the stream of events for good."""
        self._left = True
        self.interrupt()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    @property
    def _api(self) -> Any:
        with self._making:
            if self._client is None:
                self._client = self._new_client()
            return self._client

    def _new_client(self) -> Any:
        tls = self.config.tls
        return docker.APIClient(
            base_url=self.config.url, version="auto", timeout=TIMEOUT_S,
            use_ssh_client=self.config.url.startswith("ssh:"),
            tls=docker.tls.TLSConfig(client_cert=(tls.cert, tls.key), ca_cert=tls.ca, verify=True) if tls else False,
        )


def _no_image(image: str, text: str) -> str:
    return f"image {image}: {text.strip()}"


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """The client's errors as ours."""
    try:
        yield
    except docker.errors.NotFound as error:
        raise Gone(_explained(error)) from error
    except docker.errors.APIError as error:
        raise Refused(_explained(error)) from error
    except (
        docker.errors.DockerException, requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError,
    ) as error:
        raise BackendUnreachable(f"the Docker engine does not answer: {error}", hint="is dockerd running?") from error


def _explained(error: Any) -> str:
    return str(error.explanation or error).strip()

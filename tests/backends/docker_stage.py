"""A real Docker engine for tests, if there is one: a tiny image made of this machine's own files, and clean-up.

The image holds a shell, a few tools, this interpreter with its library, and jobsched itself: no registry is needed.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import jobsched

PATIENCE_S = 120
"""For what takes a second or two on a machine that has nothing else to do."""
REPOSITORY = "jobsched-test/tiny"
OLD_S = 86_400
CHANGES = ["ENV PATH=/usr/local/bin:/usr/bin:/bin", "ENV PYTHONPATH=/opt/jobsched"]
TOOLS = ("sh", "sleep", "echo", "true", "false", "seq", "date", "setsid", "cat", "env", "ls", "id", "touch", "kill",
         "head", "dd", "tr", "yes", "stat", "tar")
LEFT_OUT = {"test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3", "pydoc_data", "site-packages", "turtledemo",
            "__pycache__", "config-3.11-x86_64-linux-gnu"}


@cache
def url() -> str:
    """Where an engine answers; empty when none does."""
    try:
        import docker
    except ModuleNotFoundError:
        return ""
    for found in (os.environ.get("DOCKER_HOST", ""), "unix:///var/run/docker.sock"):
        if found:
            try:
                client = docker.APIClient(base_url=found, version="auto", timeout=60)
                client.ping()
            except docker.errors.DockerException:
                continue
            client.close()
            return found
    return ""


needs_docker = pytest.mark.skipif(
    not url(), reason="no Docker engine at DOCKER_HOST or /var/run/docker.sock, or the package docker is missing")


@cache
def image() -> str:
    """The tiny image: a second or two. Named by what it holds, so that nobody takes it from tests that run beside."""
    client = api()
    name = put_image(client)
    for entry in client.images(REPOSITORY):
        if time.time() - entry["Created"] > OLD_S and name not in entry["RepoTags"]:
            with suppress(api_error()):
                client.remove_image(entry["Id"])
    return name


def put_image(client: Any) -> str:
    """Onto an engine, unless it is there."""
    data = rootfs()
    tag = hashlib.sha256(data).hexdigest()[:12]
    if not client.images(f"{REPOSITORY}:{tag}"):
        client.import_image_from_data(data, repository=REPOSITORY, tag=tag, changes=CHANGES)
    return f"{REPOSITORY}:{tag}"


@cache
def api() -> Any:
    import docker

    return docker.APIClient(base_url=url(), version="auto", timeout=60)


def api_error() -> type[Exception]:
    import docker

    return docker.errors.APIError


@cache
def rootfs() -> bytes:
    """A root file system of this machine's own files, as a tar."""
    out = io.BytesIO()
    python = Path(os.path.realpath(sys.executable))
    library = Path(os.__file__).parent
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, mode in (("tmp", 0o1777), ("etc", 0o755), ("usr/bin", 0o755)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        programs = [_which(tool) for tool in TOOLS]
        modules = list((library / "lib-dynload").glob("*.so"))
        for tool, program in zip(TOOLS, programs, strict=True):
            tar.add(os.path.realpath(program), f"bin/{tool}")
        for shared in _libraries([*programs, str(python), *map(str, modules)]):
            tar.add(os.path.realpath(shared), shared.lstrip("/"))
        tar.add(python, str(python).lstrip("/"))
        tar.add(library, str(library).lstrip("/"), filter=_needed)
        for name in ("python", "python3"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, str(python)
            tar.addfile(link)
        package = Path(jobsched.__file__).parent
        for source in (package / "__init__.py", package / "contract.py", *(package / "train").glob("*.py")):
            tar.add(source, f"opt/jobsched/jobsched/{source.relative_to(package)}")
    return out.getvalue()


def _needed(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    parts = set(Path(entry.name).parts)
    return None if parts & LEFT_OUT or entry.name.endswith((".pyc", ".a", ".whl")) else entry


def _which(tool: str) -> str:
    found = next((f"{place}/{tool}" for place in ("/bin", "/usr/bin") if os.path.exists(f"{place}/{tool}")), "")
    assert found, f"this machine has no {tool}"
    return found


def _libraries(programs: Iterable[str]) -> set[str]:
    """The shared libraries that these need, and the loader."""
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    words = [word for line in listed.splitlines() if line.startswith("\t") for word in line.split()]
    words += [os.path.join(os.path.dirname(word), "libgcc_s.so.1") for word in words if "libc.so" in word]  # of threads
    return {word for word in words if word.startswith("/") and os.path.exists(word)}


def leftovers(label: str) -> list[str]:
    """Names of containers and networks with this label."""
    client = api()
    found = [entry["Names"][0] for entry in client.containers(all=True, filters={"label": label})]
    return found + [network["Name"] for network in client.networks(filters={"label": label})]


def freeze(container: str) -> None:
    """Stop every process in it but the first, as a debugger would."""
    script = ("import os; me = os.getpid()\n"
              "for p in os.listdir('/proc'):\n  if p.isdigit() and int(p) not in (1, me): os.kill(int(p), 19)")
    client = api()
    client.exec_start(client.exec_create(container, ["python", "-c", script])["Id"])


class SecondEngine:
    """Another engine on this machine, with the tiny image, in a network namespace of its own: two would fight over
    docker0; and with a containerd of its own, not the machine's, which would not see its mounts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._sockets = tempfile.mkdtemp(prefix="jse-")
        """Of a short name: containerd's sockets below it may have 104 characters; pytest's workers use that up."""
        self.url = f"unix://{self._sockets}/docker.sock"

    def __enter__(self) -> SecondEngine:
        self.start()
        put_image(self._client())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            client = self._client()
            for entry in client.containers(all=True):
                client.remove_container(entry["Id"], force=True)
        finally:
            self.stop()
            shutil.rmtree(self._sockets, ignore_errors=True)

    def start(self) -> None:
        at = self.directory
        with open(at / "dockerd.log", "ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--net", "--mount", "sh", "-c",
                 '[ ! -d /run/containerd ] || mount -t tmpfs none /run/containerd; exec dockerd "$@"', "dockerd",
                 "-H", self.url, "--data-root", at / "data", "--exec-root",
                 f"{self._sockets}/exec", "--pidfile", at / "pid"],
                stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._client().ping()
                return
            except Exception:
                alive = self._process.poll() is None and time.monotonic() < deadline
                assert alive, (at / "dockerd.log").read_text()[-2_000:]
                time.sleep(0.1)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)

    def _client(self) -> Any:
        import docker

        return docker.APIClient(base_url=self.url, version="auto", timeout=PATIENCE_S)

"""A real Docker engine for tests, if there is one: a tiny image made of this machine's own files, and clean-up.

The image holds a shell, a few tools, this interpreter with its library, and jobsched itself: no registry is needed.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import jobsched

IMAGE = "jobsched-test/tiny:1"
TOOLS = ("sh", "sleep", "echo", "true", "false", "seq", "date", "setsid", "cat", "env", "ls", "id", "touch", "kill",
         "head", "dd", "tr", "yes", "stat")
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
                client = docker.APIClient(base_url=found, version="auto", timeout=10)
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
    """The tiny image, made anew: a second or two."""
    client = api()
    client.import_image_from_data(rootfs(), repository=IMAGE.split(":")[0], tag=IMAGE.split(":")[1], changes=[
        "ENV PATH=/usr/local/bin:/usr/bin:/bin", "ENV PYTHONPATH=/opt/jobsched"])
    return IMAGE


@cache
def api() -> Any:
    import docker

    return docker.APIClient(base_url=url(), version="auto", timeout=60)


def api_error() -> type[Exception]:
    import docker

    return docker.errors.APIError


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
    return {word for word in words if word.startswith("/") and os.path.exists(word)}


def leftovers(label: str) -> list[str]:
    """Names of containers and networks with this label."""
    client = api()
    found = [entry["Names"][0] for entry in client.containers(all=True, filters={"label": label})]
    return found + [network["Name"] for network in client.networks(filters={"label": label})]

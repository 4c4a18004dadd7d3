"""A real Kubernetes cluster for tests, if there is one, and an image for it made of this machine's own files.

    python -m tests.backends.kubernetes_stage image.tar [--torch]

writes a docker archive (`ctr -n k8s.io images import image.tar` on every node, or `docker load` and push) with a shell,
this interpreter and jobsched's training library; with `--torch` also this environment's torch, numpy and pyzmq.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.backends import docker_stage

IMAGE = os.environ.get("JOBSCHED_TEST_KUBERNETES_IMAGE", "localhost/jobsched-test:1")
TORCH = ("torch", "numpy", "pyzmq", "typing_extensions", "filelock", "sympy", "mpmath", "networkx", "jinja2", "fsspec",
         "markupsafe")
SITE = "opt/site"


@cache
def missing() -> str:
    """Why there is no cluster to test on; empty when there is one."""
    if os.environ.get("USE_EXISTING_CLUSTER") != "true" or not os.environ.get("KUBECONFIG"):
        return "no cluster: set KUBECONFIG and USE_EXISTING_CLUSTER=true"
    try:
        import kubernetes  # noqa: F401
    except ModuleNotFoundError:
        return "the package kubernetes is not installed"
    return ""


needs_cluster = pytest.mark.skipif(bool(missing()), reason=missing())


def kubectl(*words: str, given: str = "") -> str:
    """What kubectl says. CalledProcessError when it fails."""
    done = subprocess.run(["kubectl", *words], input=given, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
    return done.stdout


def write_image(path: Path, torch: bool) -> None:
    """The archive: one layer."""
    layer = path.with_suffix(".layer")
    layer.write_bytes(docker_stage.rootfs())
    with tarfile.open(layer, "a") as tar:
        for name in ("tar", "gzip", "grep", "bash"):
            _program(tar, name)
        if torch:
            _add_torch(tar)
    digest = _sha256(layer)
    env = [change.removeprefix("ENV ") for change in docker_stage.CHANGES if not change.startswith("ENV PYTHONPATH")]
    env.append(f"PYTHONPATH=/opt/jobsched:/{SITE}")
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z", "config": {"Env": env},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}}).encode()
    named = hashlib.sha256(config).hexdigest()
    manifest = json.dumps([
        {"Config": f"{named}.json", "RepoTags": [IMAGE], "Layers": [f"{digest}/layer.tar"]}]).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in ((f"{named}.json", config), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        tar.add(layer, f"{digest}/layer.tar")
    layer.unlink()


def _program(tar: tarfile.TarFile, name: str) -> None:
    program = next(f"{place}/{name}" for place in ("/bin", "/usr/bin") if os.path.exists(f"{place}/{name}"))
    tar.add(os.path.realpath(program), f"usr/bin/{name}")
    for shared in docker_stage._libraries([program]):
        tar.add(os.path.realpath(shared), shared.lstrip("/"))


def _add_torch(tar: tarfile.TarFile) -> None:
    programs: list[str] = []
    for name in TORCH:
        found = distribution(name)
        for file in found.files or ():
            source = Path(str(found.locate_file(file)))
            parts = file.parts
            if parts[0] == ".." or "include" in parts[:2] or source.suffix in (".a", ".h"):
                continue
            tar.add(source, f"{SITE}/{file}")
            if ".so" in source.name:
                programs.append(str(source))
    inside = {os.path.basename(program) for program in programs}
    for shared in docker_stage._libraries(programs):
        if os.path.basename(shared) not in inside:
            tar.add(os.path.realpath(shared), shared.lstrip("/"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    write_image(Path(sys.argv[1]), "--torch" in sys.argv)
    print(f"{sys.argv[1]}: {IMAGE}, {Path(sys.argv[1]).stat().st_size >> 20} MiB")

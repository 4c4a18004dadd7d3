"""A real Kubernetes API server for tests, found by the variables of controller-runtime's envtest.

`KUBEBUILDER_ASSETS` (a directory with `etcd` and `kube-apiserver`) starts one of its own: no scheduler, no kubelets.
`USE_EXISTING_CLUSTER=true` with `KUBECONFIG` uses that cluster. Else tests are skipped and say so.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ports import own_ports

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "configs" / "manifests"
READY_S = 120.0


def missing() -> str:
    """Why there is no API server to test with; empty when there is one."""
    if _existing():
        return ""
    assets = os.environ.get("KUBEBUILDER_ASSETS", "")
    lacking = [name for name in ("etcd", "kube-apiserver") if not os.access(Path(assets, name), os.X_OK)]
    if not assets or lacking:
        return "no API server: set KUBEBUILDER_ASSETS (etcd, kube-apiserver), or USE_EXISTING_CLUSTER and KUBECONFIG"
    return ""


def kubectl() -> str:
    """Path of kubectl, beside the API server or on PATH; skips the test where there is none."""
    found = shutil.which("kubectl", path=os.environ.get("KUBEBUILDER_ASSETS", "")) or shutil.which("kubectl")
    if found is None:
        pytest.skip("there is no kubectl, in KUBEBUILDER_ASSETS or on PATH")
    return found


def _existing() -> bool:
    return os.environ.get("USE_EXISTING_CLUSTER") == "true" and bool(os.environ.get("KUBECONFIG"))


@contextmanager
def api_server() -> Iterator[str]:
    """Path of a kubeconfig that may do everything. Skips the test where there is none to be had."""
    if why := missing():
        pytest.skip(why)
    if _existing():
        yield os.environ["KUBECONFIG"]
        return
    with tempfile.TemporaryDirectory(prefix="jobsched-kube-") as place:
        yield from _started(Path(place), Path(os.environ["KUBEBUILDER_ASSETS"]))


def _started(place: Path, assets: Path) -> Iterator[str]:
    client, peer, port = own_ports(3)
    token = secrets.token_hex(16)
    (place / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
    subprocess.run(["openssl", "genrsa", "-out", place / "sa.key", "2048"], check=True, stderr=subprocess.DEVNULL)
    etcd = [
        assets / "etcd", "--data-dir", place / "etcd", "--unsafe-no-fsync",
        f"--listen-client-urls=http://127.0.0.1:{client}", f"--advertise-client-urls=http://127.0.0.1:{client}",
        f"--listen-peer-urls=http://127.0.0.1:{peer}",
    ]  # fmt: skip
    server = [
        assets / "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{client}", "--bind-address=127.0.0.1",
        f"--secure-port={port}", f"--cert-dir={place / 'certs'}", f"--token-auth-file={place / 'tokens.csv'}",
        "--authorization-mode=RBAC", "--service-cluster-ip-range=10.0.0.0/24", "--endpoint-reconciler-type=none",
        "--service-account-issuer=https://127.0.0.1/", f"--service-account-key-file={place / 'sa.key'}",
        f"--service-account-signing-key-file={place / 'sa.key'}", "--disable-admission-plugins=ServiceAccount",
    ]  # fmt: skip
    processes = []
    try:
        for name, command in (("etcd", etcd), ("server", server)):
            with (place / f"{name}.log").open("w") as out:
                processes.append(subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True))
        authority = place / "certs" / "apiserver.crt"
        _await_ready(f"https://127.0.0.1:{port}", authority, token, processes[1], place / "server.log")
        (place / "kubeconfig").write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": f"https://127.0.0.1:{port}", "certificate-authority": str(authority)}}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }))  # fmt: skip
        yield str(place / "kubeconfig")
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(processes):
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_ready(url: str, authority: Path, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + READY_S
    request = urllib.request.Request(f"{url}/readyz", headers={"Authorization": f"Bearer {token}"})
    while True:
        try:
            context = ssl.create_default_context(cafile=str(authority))
            urllib.request.urlopen(request, context=context, timeout=5).close()
            return
        except (OSError, ssl.SSLError):
            if time.monotonic() > until or process.poll() is not None:
                raise AssertionError(f"the API server did not start:\n{log.read_text()[-3_000:]}") from None
            time.sleep(0.1)


class Kubectl:
    """kubectl with one kubeconfig."""

    def __init__(self, kubeconfig: str) -> None:
        self.kubeconfig = kubeconfig
        self._binary, self._env = kubectl(), os.environ | {"KUBECONFIG": kubeconfig}

    def run(self, *words: str, given: object = None) -> subprocess.CompletedProcess[str]:
        """Whatever its exit code; `given` (text, or plain values) is its standard input."""
        text = given if isinstance(given, str) or given is None else json.dumps(given)
        return subprocess.run([self._binary, *words], input=text, text=True, capture_output=True, env=self._env,
                              timeout=300)

    def __call__(self, *words: str, given: object = None) -> str:
        """What it prints; it must succeed."""
        done = self.run(*words, given=given)
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
        return done.stdout

    def path(self, rest: str) -> str:
        """Of an object of ours, for `get --raw`."""
        return f"/apis/jobsched.dev/v1alpha1/namespaces/default/{rest}"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Kubectl]:
    """An API server that knows jobsched's objects."""
    with api_server() as kubeconfig:
        talk = Kubectl(kubeconfig)
        talk("apply", "--server-side", "-f", str(MANIFESTS / "base" / "crds.yaml"))
        talk("wait", "--for=condition=Established", "--timeout=240s", "crd/trainingjobs.jobsched.dev",
             "crd/trainingqueues.jobsched.dev")
        yield talk

"""The manifests in configs/manifests: sane as they stand, rendered by kubectl, accepted by a real API server, and what
the server's account may and may not do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from jobsched.load import load_server_config_file
from tests.control_plane import MANIFESTS, Kubectl, cluster, kubectl

__all__ = ["cluster"]

Json = dict[str, Any]
OVERLAYS = ("eks", "gke", "aks", "onprem")
COMPONENTS = ("postgres", "service-monitor")


def documents(path: Path) -> Iterator[Json]:
    for one in YAML(typ="safe").load_all(path.read_text()):
        assert isinstance(one, dict), path
        yield one


def manifests() -> Iterator[tuple[Path, Json]]:
    for path in sorted(MANIFESTS.rglob("*.yaml")):
        if path.parent.name != "config":
            for one in documents(path):
                yield path, one


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("**/config/server.yaml")), ids=lambda path: path.parts[-3])
def test_the_configurations_are_valid(path: Path) -> None:
    config = load_server_config_file(path)
    assert config.kubernetes_objects is not None
    assert config.backend.kubernetes is not None
    assert config.backend.kubernetes.working_dir == "image"


def test_everything_has_a_kind_and_a_namespace() -> None:
    clusterwide = {"Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "NodePool",
                   "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "EC2NodeClass"}  # fmt: skip
    for path, one in manifests():
        assert one["apiVersion"], path
        if one["kind"] not in {*clusterwide, "Kustomization", "Component"}:
            assert one["metadata"]["namespace"] in ("jobsched", "kube-node-lease", "default"), (path, one["kind"])


def test_no_right_is_given_wholesale() -> None:
    rules = [rule for _, one in manifests() if one["kind"] in ("Role", "ClusterRole") for rule in one["rules"]]
    assert rules
    for rule in rules:
        assert "*" not in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])
        assert "secrets" not in rule["resources"]
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


def test_the_servers_pod_keeps_to_the_restricted_standard() -> None:
    [deployment] = [one for path, one in manifests() if one["kind"] == "Deployment" and "base" in path.parts]
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True


def kustomized(tmp_path: Path, overlay: str, *components: str) -> str:
    """A kustomization of one's own on top of ours, as users write them."""
    place = tmp_path / "mine"
    place.mkdir()
    up = Path("../" * 12 + str(MANIFESTS).lstrip("/"))
    assert (place / up).is_dir()
    (place / "kustomization.yaml").write_text("\n".join([
        "apiVersion: kustomize.config.k8s.io/v1beta1", "kind: Kustomization", f"resources: [{up}/{overlay}]",
        f"components: [{', '.join(f'{up}/components/{name}' for name in components)}]",
        "images: [{name: jobsched/server, newName: registry.example/jobsched-server, newTag: '1'}]",
    ]))  # fmt: skip
    return str(place)


def rendered(text: str) -> list[Json]:
    return [one for one in YAML(typ="safe").load_all(text) if one]


@pytest.mark.parametrize("place", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_kubectl_renders_it(place: str, tmp_path: Path) -> None:
    kubectl()
    found = rendered(Kubectl(str(tmp_path / "none"))("kustomize", str(MANIFESTS / place)))
    kinds = [one["kind"] for one in found]
    assert {"Deployment", "Service", "PersistentVolumeClaim", "NetworkPolicy", "CustomResourceDefinition"} <= set(kinds)
    [config] = [one for one in found if one["kind"] == "ConfigMap"]
    [deployment] = [one for one in found if one["kind"] == "Deployment"]
    volumes = {one["name"]: one for one in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["config"]["configMap"]["name"] == config["metadata"]["name"]
    assert config["metadata"]["name"] != "jobsched-config", "a new configuration must start the server anew"


def test_the_components_are_laid_over(tmp_path: Path) -> None:
    kubectl()
    place = kustomized(tmp_path, "overlays/onprem", *COMPONENTS)
    found = rendered(Kubectl(str(tmp_path / "none"))("kustomize", place, "--load-restrictor=LoadRestrictionsNone"))
    kinds = [one["kind"] for one in found]
    assert "PersistentVolumeClaim" not in kinds
    assert "ServiceMonitor" in kinds
    [deployment] = [one for one in found if one["kind"] == "Deployment"]
    spec = deployment["spec"]
    assert spec["replicas"] == 2
    pod = spec["template"]["spec"]
    assert "persistentVolumeClaim" not in next(one for one in pod["volumes"] if one["name"] == "home")
    images = {one["image"] for one in (*pod["containers"], *pod["initContainers"])}
    assert images == {"registry.example/jobsched-server:1"}
    assert "--db" in pod["containers"][0]["args"]


# ---- a real API server ----


@pytest.fixture
def namespaces(cluster: Kubectl) -> Kubectl:
    """What a dry run cannot make for itself."""
    for name in ("jobsched", "kube-node-lease"):
        done = cluster.run("create", "namespace", name)
        assert done.returncode == 0 or "AlreadyExists" in done.stderr
    return cluster


@pytest.mark.e2e
@pytest.mark.parametrize("place", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_an_api_server_accepts_it(namespaces: Kubectl, place: str) -> None:
    text = namespaces("kustomize", str(MANIFESTS / place))
    said = namespaces("apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-", given=text)
    assert said.count("serverside-applied") == len(rendered(text))


@pytest.mark.e2e
def test_an_api_server_accepts_several_servers_on_postgres(namespaces: Kubectl, tmp_path: Path) -> None:
    place = kustomized(tmp_path, "overlays/onprem", "postgres")
    text = namespaces("kustomize", place, "--load-restrictor=LoadRestrictionsNone")
    namespaces("apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-", given=text)


MAY = ("list nodes", "watch pods --all-namespaces", "create pods", "delete pods", "get pods --subresource=log",
       "create pods --subresource=exec", "create services", "create configmaps", "create events",
       "list podtemplates", "create podtemplates", "delete podtemplates",
       "patch trainingjobs.jobsched.dev", "patch trainingjobs.jobsched.dev --subresource=status",
       "watch trainingqueues.jobsched.dev")  # fmt: skip
MAY_NOT = ("get secrets", "list secrets", "list configmaps", "update nodes", "create pods -n default",
           "create podtemplates -n default", "patch podtemplates",
           "delete pods -n kube-system", "create deployments.apps", "create trainingjobs.jobsched.dev",
           "delete trainingjobs.jobsched.dev", "create clusterroles.rbac.authorization.k8s.io",
           "impersonate serviceaccounts", "create serviceaccounts --subresource=token")  # fmt: skip


@pytest.mark.e2e
def test_the_server_may_do_what_it_does_and_nothing_else(namespaces: Kubectl, tmp_path: Path) -> None:
    namespaces("apply", "--server-side", "--force-conflicts", "-f", str(MANIFESTS / "base" / "rbac.yaml"))

    def allowed(what: str, account: str) -> bool:
        words = what.split()
        where = () if "-n" in words or "--all-namespaces" in words or "nodes" in words else ("-n", "jobsched")
        return namespaces.run("auth", "can-i", *words, *where, f"--as=system:serviceaccount:jobsched:{account}",
                              "--as-group=system:serviceaccounts").returncode == 0

    assert [what for what in MAY if not allowed(what, "jobsched")] == []
    assert [what for what in MAY_NOT if allowed(what, "jobsched")] == []
    assert [what for what in (*MAY, *MAY_NOT) if allowed(what, "jobsched-replica")] == []

    token = namespaces("create", "token", "jobsched", "-n", "jobsched").strip()
    nobody = tmp_path / "no-credentials"
    nobody.write_text(namespaces("config", "view", "--minify", "--flatten", "--raw"))
    as_server = Kubectl(str(nobody))
    as_server("config", "unset", f"users.{_user(namespaces)}")
    as_server("get", "nodes", f"--token={token}")
    denied = as_server.run("get", "secrets", "-n", "jobsched", f"--token={token}")
    assert denied.returncode
    assert 'User "system:serviceaccount:jobsched:jobsched" cannot list resource "secrets"' in denied.stderr


def _user(talk: Kubectl) -> str:
    return str(rendered(talk("config", "view", "--minify"))[0]["users"][0]["name"])



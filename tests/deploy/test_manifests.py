"""The Kubernetes files: against KubeRay's own schemas where they are at hand, and against the package everywhere."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from ray.serve.schema import ServeDeploySchema

from ma_cluster.cli.app import app
from ma_cluster.cluster.fleet.replicas import Fleet
from ma_cluster.cluster.fleet.workers import workers_for
from ma_cluster.cluster.service.gateway import FLEET_NAME, ServiceArguments
from ma_cluster.storage.identity import SALT_VARIABLE

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = sorted(KUBERAY.rglob("*.yaml"))
FOLDERS = sorted(path.parent for path in FILES if path.name == "kustomization.yaml")
KUBERNETES = ("1.31", "1.34", "1.37")
"""Versions whose schemas what is deployed is held against."""
Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(kind: str) -> list[Document]:
    return [document for path in FILES for document in documents(path) if document["kind"] == kind]


def cluster_specs() -> dict[str, Document]:
    (cluster,), (service,) = of_kind("RayCluster"), of_kind("RayService")
    return {"RayCluster": cluster["spec"], "RayService": service["spec"]["rayClusterConfig"]}


def pods(spec: Document) -> dict[str, Document]:
    groups = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"]["spec"]} | groups


def all_pods() -> list[Any]:
    return [
        pytest.param(pod, id=f"{kind} {name}")
        for kind, spec in cluster_specs().items()
        for name, pod in pods(spec).items()
    ]


@pytest.fixture(scope="module")
def schemas() -> dict[str, Document]:
    """Of each kind, strict: a field that the API server does not know is an error."""
    folder = Path(os.environ.get("MA_CLUSTER_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-crds"))
    if not folder.is_dir():
        pytest.skip("no KubeRay schemas: set MA_CLUSTER_KUBERAY_CRDS to a folder with its CRDs")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte each
    known = [yaml.load(path.read_text(), Loader=loader)["spec"] for path in sorted(folder.glob("*.yaml"))]
    return {crd["names"]["kind"]: strict(v1(crd)["schema"]["openAPIV3Schema"]) for crd in known}


def v1(crd: Document) -> Document:
    return next(version for version in crd["versions"] if version["name"] == "v1" and version["served"])


def strict(schema: Document) -> Document:
    """A structural schema of Kubernetes as JSON Schema, with the API server's strict validation of fields."""
    converted = {name: value for name, value in schema.items() if not name.startswith("x-kubernetes-")}
    if "properties" in schema:
        converted["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        converted.setdefault("additionalProperties", schema.get("x-kubernetes-preserve-unknown-fields", False))
    elif isinstance(schema.get("additionalProperties"), dict):
        converted["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        converted["items"] = strict(schema["items"])
    if schema.get("nullable"):
        converted["type"] = [schema["type"], "null"]
    return converted


def complaints(document: Document, schemas: dict[str, Document]) -> list[str]:
    if not document["apiVersion"].startswith("ray.io/"):
        return []
    validator = jsonschema.Draft202012Validator(schemas[document["kind"]])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(KUBERAY).as_posix())
def test_each_file_is_what_kuberay_takes(path: Path, schemas: dict[str, Document]) -> None:
    assert [complaint for document in documents(path) for complaint in complaints(document, schemas)] == []


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("RayCluster", "rayversion", "2.60.0"),
        ("RayCluster", "headGroupSpec template spec containers 0 image_", "x"),
        ("RayCluster", "workerGroupSpecs 1 template spec containers 0 livenessProbe httpGet portal", 1),
        ("RayCluster", "authOptions mode", "password"),
        ("RayService", "rayClusterConfig workerGroupSpecs 0 maxReplicas", "10"),
        ("RayService", "rayClusterConfig gcsFaultToleranceOptions redisPassword secret", "x"),
        ("RayJob", "entrypoint", ["python", "job.py"]),
    ],
)
def test_a_slip_in_a_file_is_noticed(kind: str, place: str, value: Any, schemas: dict[str, Document]) -> None:
    document = copy.deepcopy(of_kind(kind)[0])
    *way, last = place.split()
    inner: Any = document["spec"]
    for step in way:
        inner = inner[int(step) if step.isdecimal() else step]
    inner[last] = value
    found = complaints(document, schemas)  # more than one where the place is shared by an anchor
    assert found
    assert all(last in complaint for complaint in found)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_kustomization_names_what_is_there(folder: Path) -> None:
    (kustomization,) = documents(folder / "kustomization.yaml")
    named = {(folder / resource).resolve() for resource in kustomization["resources"]}
    assert all(path.exists() for path in named)
    assert {path for path in folder.glob("*.yaml") if path.name != "kustomization.yaml"} <= named


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_kustomize_builds_what_kuberay_takes(folder: Path, schemas: dict[str, Document]) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on the PATH")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    built = list(yaml.safe_load_all(done.stdout))
    assert built
    assert [complaint for document in built for complaint in complaints(document, schemas)] == []


def pod_templates(value: Any, path: str = "") -> Iterator[tuple[str, Document]]:
    """Each template of a pod in a document, and where it stands: KubeRay's schemas copy those of one Kubernetes."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key == "template" and "containers" in inner.get("spec", {}):
            yield f"{path} {key}", inner
        else:
            yield from pod_templates(inner, f"{path} {key}")


def as_kubernetes_sees(document: Document) -> list[Document]:
    """What of a document Kubernetes itself knows: all of its own kinds, and of others their pods."""
    if "." not in document["apiVersion"].partition("/")[0] or ".k8s.io/" in document["apiVersion"]:
        return [document]
    pods = (template for _, template in pod_templates(document))
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {}} | template for template in pods]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_kustomize_builds_what_kubernetes_takes(folder: Path, version: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on the PATH")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    for document in yaml.safe_load_all(done.stdout):
        seen = as_kubernetes_sees(document)
        assert seen or document["kind"] == "RayJob"  # which has no pods of its own where it names a cluster
        for each in seen:
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("place", ["containers 0 resources limit", "volumes 0 emptyDirectory", "restartpolicy"])
def test_a_slip_in_a_pod_is_noticed_by_kubernetes(place: str) -> None:
    ((_, template), *_) = pod_templates(copy.deepcopy(of_kind("RayCluster")[0]))
    *way, last = place.split()
    inner: Any = template["spec"]
    for step in way:
        inner = inner[int(step) if step.isdecimal() else step]
    inner[last] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod"} | template, KUBERNETES[-1], strict=True)


def test_versions_are_those_of_the_package() -> None:
    requirement = next(each for each in PROJECT["dependencies"] if each.startswith("ray["))
    found = re.search(r">=(\d+\.\d+),", requirement)
    assert found is not None
    images = {container["image"] for spec in cluster_specs().values() for container in containers(spec)}
    assert {spec["rayVersion"] for spec in cluster_specs().values()} == {f"{found[1]}.0"}
    assert images == {f"ma-cluster-{kind}:{PROJECT['version']}" for kind in ("cpu", "gpu")}


def containers(spec: Document) -> Iterator[Document]:
    for pod in pods(spec).values():
        yield from pod["containers"]


@pytest.mark.parametrize("kind", ["RayCluster", "RayService"])
def test_a_cluster_asks_for_a_token_and_takes_every_secret_by_reference(kind: str) -> None:
    spec = cluster_specs()[kind]
    assert spec["authOptions"] == {"mode": "token", "secretName": "ma-cluster"}
    secret = re.compile("TOKEN|SECRET|PASSWORD|KEY", re.IGNORECASE)
    variables = [variable for container in containers(spec) for variable in container.get("env", [])]
    assert [variable for variable in variables if secret.search(variable["name"]) and "value" in variable] == []
    assert "value" not in spec.get("gcsFaultToleranceOptions", {}).get("redisPassword", {})


@pytest.mark.parametrize("pod", all_pods())
def test_a_pod_is_confined_watched_and_measured(pod: Document) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
        # Ray counts what a pod may have at most, and memory beyond its request is another pod's
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert "metrics" in {port["name"] for port in container["ports"]}


@pytest.mark.parametrize("pod", all_pods())
def test_the_salt_of_pseudonyms_outlives_the_pod_that_drives_a_run(pod: Document) -> None:
    for container in pod["containers"]:
        (salt,) = (each["valueFrom"] for each in container["env"] if each["name"] == SALT_VARIABLE)
        assert salt["secretKeyRef"]["name"] == "ma-cluster"


@pytest.mark.parametrize("kind", ["RayCluster", "RayService"])
def test_cpu_and_gpu_nodes_come_and_go_apart(kind: str) -> None:
    spec = cluster_specs()[kind]
    assert spec["enableInTreeAutoscaling"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu"}
    assert all(group["minReplicas"] < group["maxReplicas"] for group in groups.values())
    assert groups["gpu"]["minReplicas"] == 0
    gpus = {name: "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"] for name, pod in pods(spec).items()}
    assert gpus == {"head": False, "cpu": False, "gpu": True}


def test_the_nodes_of_the_example_hold_its_run() -> None:
    overlay = yaml.safe_load((KUBERAY / "example" / "kustomization.yaml").read_text())
    nodes, entrypoint = (yaml.safe_load(patch["patch"])[0]["value"] for patch in overlay["patches"])
    options = dict(re.findall(r"--(replicas|readers) (\d+)", entrypoint))
    fleet = Fleet(segmenters=int(options["replicas"]), readers=int(options["readers"]))
    cpu = pods(cluster_specs()["RayCluster"])["cpu"]["containers"][0]["resources"]["limits"]["cpu"]
    workers, _ = workers_for(10**6, fleet)
    assert fleet.segmenters + fleet.readers + 0.1 * workers <= nodes * int(cpu)


def test_the_service_survives_its_head_and_sends_calls_to_nodes_with_a_proxy() -> None:
    spec = cluster_specs()["RayService"]
    assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "ma-cluster-redis"
    ready = {name: pod["containers"][0]["readinessProbe"]["httpGet"]["path"] for name, pod in pods(spec).items()}
    assert ready == {"head": "/api/gcs_healthz", "cpu": "/-/healthz", "gpu": "/-/healthz"}


def test_clusters_for_jobs_and_for_the_service_differ_where_they_must_alone() -> None:
    cluster, service = cluster_specs()["RayCluster"], cluster_specs()["RayService"]
    names = [document["metadata"]["name"] for kind in cluster_specs() for document in of_kind(kind)]
    assert len(set(names)) == 2, "each has a Service of its name in the same namespace"
    for spec in (cluster, service):
        spec.pop("gcsFaultToleranceOptions", None)
        for container in containers(spec):
            container["ports"] = [port for port in container["ports"] if port["name"] != "serve"]
            container["env"] = [each for each in container["env"] if each["name"] != "MA_CLUSTER_TOKEN"]
        for name, pod in pods(spec).items():
            if name != "head":
                del pod["containers"][0]["readinessProbe"]
        for group in spec["workerGroupSpecs"]:
            del group["minReplicas"]
    assert cluster == service


def test_the_service_is_the_gateway_with_its_fleet() -> None:
    (service,) = of_kind("RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert [each.name for each in config.applications] == [
        f"{FLEET_NAME}-{part}" for part in ("reader", "segmenter", "gateway")
    ]
    for application in config.applications:
        module, _, builder = application.import_path.partition(":")
        assert callable(getattr(import_module(module), builder))
        assert application.args.keys() <= ServiceArguments.model_fields.keys()
        assert ServiceArguments(**application.args) == ServiceArguments(**config.applications[0].args)


def entrypoints() -> list[str]:
    own = [job["spec"]["entrypoint"] for job in of_kind("RayJob")]
    patches = [patch for document in of_kind("Kustomization") for patch in document.get("patches", [])]
    changes = [change for patch in patches for change in yaml.safe_load(patch["patch"])]
    return own + [change["value"] for change in changes if change["path"] == "/spec/entrypoint"]


@pytest.mark.parametrize("entrypoint", entrypoints())
def test_a_job_is_a_command_that_the_package_has(entrypoint: str) -> None:
    python, script, *words = shlex.split(entrypoint.partition("||")[0])
    assert (python, Path(script).parent) == ("python", image_folder() / "jobs")
    fixed = re.search(r"main\(\[(.*), \*sys", (ROOT / "jobs" / Path(script).name).read_text())
    assert fixed is not None
    arguments = [*fixed[1].replace('"', "").split(", "), *words]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):  # a group: `train` has two
        command = command.commands[arguments.pop(0)]
    assert command.make_context(command.name, arguments).args == []


@cache
def image_folder() -> Path:
    """Where the image has the package's jobs."""
    found = re.search(r"^COPY .*jobs (\S+)/jobs$", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    return Path(found[1])


def test_every_pod_of_a_cluster_is_under_the_network_policy() -> None:
    (policy,) = of_kind("NetworkPolicy")
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    for spec in cluster_specs().values():
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        assert all(chosen.items() <= group["template"]["metadata"]["labels"].items() for group in groups)
        ports = {port["containerPort"] for container in containers(spec) for port in container["ports"]}
        opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
        assert opened - {8000} <= ports

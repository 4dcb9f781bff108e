"""The manifests of `deploy/kuberay`: structure, versions, entrypoints; against Kubernetes' schemas and KubeRay's own.

`GT_RAY_KUBERAY_CRDS` names a folder of them (`ray-operator/config/crd/bases` of KubeRay's repository).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.serve.schema import ServeDeploySchema

from tests.test_environment import pins

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
CRDS = os.environ.get("GT_RAY_KUBERAY_CRDS")
CLUSTER_IN = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
MANIFESTS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.yaml"))}
RAY = {name: one for name, one in MANIFESTS.items() if one["kind"] in CLUSTER_IN}
SECRET = re.compile(r"(^|_)(token|secret|password|key)s?($|_)", re.IGNORECASE)
of_ray = pytest.mark.parametrize("name", RAY)


def cluster_of(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = RAY[name]["spec"]
    for key in CLUSTER_IN[RAY[name]["kind"]]:
        spec = spec[key]
    return spec


def groups_of(name: str) -> list[dict[str, Any]]:
    return [cluster_of(name)["headGroupSpec"], *cluster_of(name)["workerGroupSpecs"]]


def containers_of(name: str) -> Iterator[dict[str, Any]]:
    for group in groups_of(name):
        yield from group["template"]["spec"]["containers"]


def strict(schema: Any) -> Any:
    """A schema that refuses unknown fields, which Kubernetes drops with a warning."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(one) for key, one in schema.items()}
    fields = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if fields and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found["additionalProperties"] = False
    return found


def schemas(folder: Path) -> dict[str, Any]:
    """Schema of version v1 of each kind that the folder defines."""
    found = {}
    for file in folder.glob("*.yaml"):
        for crd in filter(None, yaml.safe_load_all(file.read_text())):
            for version in crd["spec"]["versions"]:
                if version["name"] == "v1":
                    found[crd["spec"]["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])
    for schema in found.values():
        schema["properties"]["metadata"] = {"type": "object"}
    return found


def problems(schema: Any, manifest: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(manifest)]


@pytest.mark.skipif(CRDS is None, reason="GT_RAY_KUBERAY_CRDS names no folder")
def test_kuberay_takes_them() -> None:
    kinds = schemas(Path(str(CRDS)))
    assert {name: problems(kinds[one["kind"]], one) for name, one in RAY.items()} == {name: [] for name in RAY}


@pytest.mark.parametrize("kubernetes", ["1.30", "1.37"])
def test_kubernetes_takes_their_pods_and_the_volume(kubernetes: str) -> None:
    pods = [{"apiVersion": "v1", "kind": "Pod", **group["template"]} for name in RAY for group in groups_of(name)]
    volumes = [one for one in MANIFESTS.values() if one["kind"] == "PersistentVolumeClaim"]
    assert len(volumes) == 1
    for one in pods + volumes:
        kubernetes_validate.validate(one, kubernetes, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError, match="hostnetwork"):
        kubernetes_validate.validate(
            {**pods[0], "spec": {**pods[0]["spec"], "hostnetwork": True}}, kubernetes, strict=True
        )


def test_a_wrong_field_and_a_wrong_type_are_found(tmp_path: Path) -> None:
    spec = {"type": "object", "properties": {"suspend": {"type": "boolean"}}}
    schema = {"type": "object", "properties": {"apiVersion": {}, "kind": {}, "spec": spec}}
    version = {"name": "v1", "schema": {"openAPIV3Schema": schema}}
    crd = {"spec": {"names": {"kind": "RayCluster"}, "versions": [version]}}
    (tmp_path / "crd.yaml").write_text(yaml.safe_dump(crd))
    made = schemas(tmp_path)["RayCluster"]
    manifest = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "x"}}
    assert problems(made, {**manifest, "spec": {"suspend": True}}) == []
    assert len(problems(made, {**manifest, "spec": {"suspend": "yes", "suspended": True}})) == 2


def test_no_name_is_that_of_what_kuberay_makes() -> None:
    """It keeps a cluster's token in a secret, and reaches its head by a service, that have the cluster's name."""
    own = [one["metadata"]["name"] for one in RAY.values()]
    assert len(set(own)) == len(own)
    for name in RAY:
        variables = [one for container in containers_of(name) for one in container["env"] if "valueFrom" in one]
        assert variables and not {one["valueFrom"]["secretKeyRef"]["name"] for one in variables} & set(own)


def test_there_is_one_of_each_kind() -> None:
    assert sorted(one["kind"] for one in RAY.values()) == sorted(CLUSTER_IN)
    assert {one["apiVersion"] for one in RAY.values()} == {"ray.io/v1"}


@of_ray
def test_ray_is_the_pinned_one(name: str) -> None:
    version = pins()["ray"]
    assert cluster_of(name)["rayVersion"] == version
    assert all(one["image"].endswith(f"-ray{version}") for one in containers_of(name))


@of_ray
def test_no_work_lands_on_the_head(name: str) -> None:
    assert cluster_of(name)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all("nvidia.com/gpu" in one["resources"]["limits"] for one in list(containers_of(name))[1:])


@of_ray
def test_workers_come_and_go(name: str) -> None:
    assert cluster_of(name)["enableInTreeAutoscaling"] is True
    assert all(one["minReplicas"] < one["maxReplicas"] for one in cluster_of(name)["workerGroupSpecs"])


@of_ray
def test_every_mounted_volume_is_declared_and_claimed(name: str) -> None:
    claims = {one["metadata"]["name"] for one in MANIFESTS.values() if one["kind"] == "PersistentVolumeClaim"}
    for group in groups_of(name):
        pod = group["template"]["spec"]
        declared = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["volumeMounts"] and {mount["name"] for mount in container["volumeMounts"]} <= set(declared)
        assert {volume["persistentVolumeClaim"]["claimName"] for volume in declared.values()} <= claims


@of_ray
def test_pods_are_not_root_and_secrets_are_references(name: str) -> None:
    for group in groups_of(name):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
    for container in containers_of(name):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all("valueFrom" in one for one in container["env"] if SECRET.search(one["name"]))
    assert cluster_of(name)["authOptions"] == {"mode": "token"}


def test_a_trainer_that_asks_for_many_cpus_fits_one_group_alone() -> None:
    for name in ("raycluster", "rayjob"):
        curation, training = cluster_of(name)["workerGroupSpecs"]
        gpus = [
            int(one["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
            for one in (curation, training)
        ]
        assert (
            int(curation["rayStartParams"]["num-cpus"]) == 2 * gpus[0] and "num-cpus" not in training["rayStartParams"]
        )
        cpus = int(training["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        assert cpus == 10 * gpus[1]


def test_the_job_runs_a_job_of_this_repository() -> None:
    spec = MANIFESTS["rayjob"]["spec"]
    python, script, *arguments = spec["entrypoint"].split()
    assert python == "python" and (ROOT / Path(script).relative_to("/home/ray/gt-ray")).is_file()
    home = next(containers_of("rayjob"))["volumeMounts"][0]["mountPath"]
    assert {argument.partition("=")[2].startswith(home) for argument in arguments if "=" in argument} == {True}
    assert int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["GT_RAY_GPUS"]) > 0


def test_the_service_is_the_endpoint_of_serve_configs() -> None:
    config = yaml.safe_load(MANIFESTS["rayservice"]["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    ours = yaml.safe_load((ROOT / "serve_configs" / "gpu-autoscale.yaml").read_text())
    assert config.pop("http_options") == {**ours.pop("http_options"), "host": "0.0.0.0"}
    assert config == ours

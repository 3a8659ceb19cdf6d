"""The manifests as a cluster would get them: of the API's own shape, and allowed by policy."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.conftest import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
DOCKERFILE = ROOT / "deploy" / "container" / "Dockerfile"
OVERLAYS = ("base", "gpu")
OTHERS_KINDS = {"ServiceMonitor"}
"""Of Prometheus' operator, whose shape Kubernetes does not know."""

CHECKOV = ROOT / ".venv-policy" / "bin" / "checkov"

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, which renders the manifests, is not installed here"
)
needs_checkov = pytest.mark.skipif(
    not (CHECKOV.exists() or shutil.which("checkov")), reason="checkov is not installed here: make policy"
)


@pytest.fixture(params=OVERLAYS)
def rendered(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with one file: what `kubectl apply -k` sends."""
    command = ["kubectl", "kustomize", str(KUBERNETES / request.param)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    path = tmp_path / f"{request.param}.yaml"
    path.write_text(ran.stdout)
    return path


def resources(path: Path) -> dict[str, dict[str, Any]]:
    """By kind; there is one of each."""
    found = list(yaml.safe_load_all(path.read_text()))
    kinds = {one["kind"]: one for one in found}
    assert len(kinds) == len(found)
    return kinds


@needs_kubectl
def test_every_resource_has_the_shape_of_the_api(rendered: Path) -> None:
    kinds = resources(rendered)
    for kind, resource in kinds.items():
        if kind not in OTHERS_KINDS:
            kubernetes_validate.validate(resource, "1.34", strict=True)
    assert set(kinds) == {
        "Namespace", "Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget",
        "NetworkPolicy", "ServiceMonitor",
    }  # fmt: skip


@needs_kubectl
def test_a_wrong_shape_would_be_found(rendered: Path) -> None:
    deployment = resources(rendered)["Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.34", strict=True)


@needs_kubectl
def test_the_resources_speak_of_the_same_things(rendered: Path) -> None:
    kinds = resources(rendered)
    pod = kinds["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    assert kinds["Service"]["spec"]["selector"].items() <= labels
    assert kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert kinds["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels
    assert (
        kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == kinds["Deployment"]["metadata"]["name"]
    )
    assert (
        kinds["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
        <= kinds["Service"]["metadata"]["labels"].items()
    )
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"] for port in kinds["Service"]["spec"]["ports"]} == set(ports)
    named = [
        container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    ]
    assert {*named, kinds["ServiceMonitor"]["spec"]["endpoints"][0]["port"]} <= set(ports)
    # The autoscaler's own metric is one that the adapter's rule makes.
    (rule,) = yaml.safe_load((KUBERNETES / "adapter-rule.yaml").read_text())
    asked = [
        one["pods"]["metric"]["name"]
        for one in kinds["HorizontalPodAutoscaler"]["spec"]["metrics"]
        if "pods" in one
    ]
    assert asked == [rule["name"]["as"]]


@needs_kubectl
def test_a_pod_has_the_time_that_draining_takes(rendered: Path) -> None:
    spec = resources(rendered)["Deployment"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    settings = Settings()
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + settings.drain_seconds + settings.grace_seconds
    # A rollout never has fewer than there should be.
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    known = {f"QUINTET_{name.upper()}" for name in Settings.model_fields}
    assert {variable["name"] for variable in container["env"]} <= known


@needs_kubectl
@needs_checkov
def test_policy_allows_the_manifests(rendered: Path) -> None:
    assert failures("--directory", str(rendered.parent), "--framework", "kubernetes") == []


@needs_checkov
def test_policy_allows_the_image() -> None:
    assert failures("--file", str(DOCKERFILE), "--framework", "dockerfile") == []


def failures(*arguments: str) -> list[str]:
    """What checkov objects to."""
    program = str(CHECKOV) if CHECKOV.exists() else "checkov"
    ran = subprocess.run(
        [program, *arguments, "--skip-download", "--compact", "--output", "json"],
        capture_output=True,
        text=True,
    )
    report = json.loads(ran.stdout)
    assert report["summary"]["passed"] > 20
    assert report["summary"]["parsing_errors"] == 0
    return [f"{one['check_id']}: {one['check_name']}" for one in report["results"]["failed_checks"]]

"""What a cluster would refuse, asked offline: Kubernetes' own schemas and rules.

The schemas of ConfigMap and Job come with kubernetes-validate, strict (no unknown field). The
JobSet's come as the Python models that Kubeflow's trainer generates from the JobSet API; they
leave out what they don't know, so a document must come back whole. The rules that the API server
and the JobSet webhook check in code are written out in `check_rules`.
"""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

VERSIONS = ("1.29", "1.37")
_DNS_1035 = r"[a-z]([-a-z0-9]*[a-z0-9])?"


def check(document: dict[str, Any]) -> None:
    """Raise unless a document is one that Kubernetes takes."""
    if document["kind"] != "JobSet":
        check_schema(document)
        return
    read = JobsetV1alpha2JobSet.from_dict(document)
    assert read is not None
    assert read.to_dict() == document, "the JobSet API has no such field"
    for replicated in document["spec"]["replicatedJobs"]:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": replicated["template"].get("metadata", {}),
            "spec": replicated["template"]["spec"],
        }
        check_schema(job)
    check_rules(document)


def check_schema(document: dict[str, Any]) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


def check_rules(job_set: dict[str, Any]) -> None:
    name, spec = job_set["metadata"]["name"], job_set["spec"]
    subdomain = spec["network"]["subdomain"]
    assert re.fullmatch(_DNS_1035, subdomain)
    assert len(subdomain) <= 63
    for rule in spec["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["action"] in ("FailJobSet", "RestartJobSet")
        assert set(rule["onJobFailureReasons"]) <= {"PodFailurePolicy", "BackoffLimitExceeded"}
    for replicated in spec["replicatedJobs"]:
        job = replicated["template"]["spec"]
        assert job["completionMode"] == "Indexed"
        last = (replicated["replicas"] - 1, job["completions"] - 1)
        pod_name = f"{name}-{replicated['name']}-{last[0]}-{last[1]}-abcde"
        assert re.fullmatch(_DNS_1035, pod_name)
        assert len(pod_name) <= 63
        _check_pod(job["template"]["spec"], job["podFailurePolicy"]["rules"])


def _check_pod(pod: dict[str, Any], failure_rules: list[dict[str, Any]]) -> None:
    assert pod["restartPolicy"] == "Never", "a pod failure policy asks for it"
    for rule in failure_rules:
        codes = rule.get("onExitCodes")
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule), "one of the two"
        if codes is not None:
            assert 0 not in codes["values"]
            assert codes["values"] == sorted(set(codes["values"]))
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    assert len({one["name"] for one in containers}) == len(containers)
    assert all("lifecycle" not in one for one in pod.get("initContainers", []))
    volumes = [one["name"] for one in pod["volumes"]]
    assert len(set(volumes)) == len(volumes)
    for container in containers:
        _check_container(container, volumes)


def _check_container(container: dict[str, Any], volumes: list[str]) -> None:
    mounts = [one["mountPath"] for one in container["volumeMounts"]]
    assert len(set(mounts)) == len(mounts)
    assert {one["name"] for one in container["volumeMounts"]} == set(volumes)
    variables = [one["name"] for one in container["env"]]
    assert len(set(variables)) == len(variables)
    resources = container.get("resources", {})
    for name, value in resources.get("limits", {}).items():
        assert resources["requests"][name] == value, "devices can't be overcommitted"

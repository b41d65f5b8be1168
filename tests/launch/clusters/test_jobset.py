"""The manifests: valid to Kubernetes, true to the config, safe whatever a user types."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from activation_cache.runtime import processes
from activation_cache.runtime.errors import UserError
from launch import cli, exit_codes
from launch.clusters.jobset import Manifest, render, write_manifests
from launch.clusters.jobset_pod import WAIT_FOR_HANDLER
from launch.clusters.kubectl import manifest_folder
from launch.config.job import Job, load_job
from launch.sweep.expand import expand
from sae_train.config.file import with_values
from tests.support.configs import as_job, make_config
from tests.support.servers.kubernetes_checks import check

# Two cohorts: of two runs and of one.
SWEEP = {
    "sweep.grid": {"train.sparsity.coefficient": [1e-3, 1e-4, 1e-5]},
    "sweep.cohort.max_members": 2,
}
CLAIM = {"kind": "claim", "claim": "sae-data", "mount": "/data"}
TPU_SLICE = {"kind": "tpu", "accelerator": "tpu-v5-lite-podslice", "topology": "4x4"}
EVERYTHING = {
    "nodes": {"kind": "gpu", "accelerator": "nvidia-h100-80gb", "per_node": 8, "count": 2},
    "namespace": "interp",
    "volumes": [
        CLAIM,
        {"kind": "host_path", "path": "/mnt/nfs", "mount": "/nfs", "read_only": True},
        {"kind": "empty", "mount": "/dev/shm", "memory": True, "size": "64Gi"},
        {"kind": "empty", "mount": "/scratch"},
        {"kind": "secret", "secret": "bucket-key", "mount": "/var/keys"},
    ],
    "cpu": 96,
    "memory": "800Gi",
    "ephemeral_storage": "100Gi",
    "node_selector": {"cloud.google.com/gke-spot": "true"},
    "tolerations": [
        {"taint": "cloud.google.com/gke-spot", "value": "true", "effect": "NoSchedule"},
        {"taint": "dedicated"},
    ],
    "labels": {"kueue.x-k8s.io/queue-name": "sae", "team": "1e3"},
    "annotations": {"example.org/why": "on: {a sweep} # 100 %"},
    "priority_class": "low",
    "service_account": "sae-writer",
    "image_pull_secrets": ["registry"],
    "env": {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true", "PRICE": "$(HOME) $5"},
    "secrets": {"HF_TOKEN": {"secret": "hf", "key": "token"}},
    "env_from_secrets": ["wandb"],
}
NODES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "tpu slice": ({"nodes": TPU_SLICE}, (2, 8)),
    "tpu host": ({"nodes": {**TPU_SLICE, "topology": "2x4", "per_node": 8}}, (1, 8)),
    "gpu": ({"nodes": {"kind": "gpu"}}, (1, 8)),
    "cpu": ({"nodes": {"kind": "cpu", "count": 2}}, (2, 1)),
    "everything": (EVERYTHING, (2, 8)),
}


def cluster_config(
    launch: dict[str, Any] | None = None, *, mesh: tuple[int, int] = (2, 8), **values: Any
) -> Job:
    section = {
        "on": "kubernetes",
        "image": "europe-docker.pkg.dev/project/sae/sae:1.0",
        "nodes": TPU_SLICE,
        "working_dir": "/data",
        "volumes": [CLAIM],
        **(launch or {}),
    }
    values = {"launch": section, **values}
    return with_values(as_job(make_config(mesh=mesh)), values, source="test")


def pod_of(manifest: Manifest) -> dict[str, Any]:
    job = manifest.documents[1]["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]


def container_of(manifest: Manifest) -> dict[str, Any]:
    (container,) = pod_of(manifest)["containers"]
    return container


@pytest.mark.parametrize("kind", NODES)
def test_kubernetes_takes_every_manifest(kind: str) -> None:
    launch, mesh = NODES[kind]
    config = cluster_config(launch, mesh=mesh, **SWEEP)
    manifests = render(config, command="sweep")
    assert [one.stage for one in manifests] == ["harvest", "train", "train", "evaluate", "report"]
    for manifest in manifests:
        documents = list(yaml.safe_load_all(manifest.text))
        assert documents == list(manifest.documents), "the file says what was meant"
        for document in documents:
            check(document)


def test_the_checks_refuse_what_a_cluster_would() -> None:
    (manifest,) = render(cluster_config(), command="train")
    config_map, job_set = manifest.documents

    def refused(change: Any, error: type[Exception]) -> None:
        broken = copy.deepcopy(job_set)
        change(broken, broken["spec"]["replicatedJobs"][0]["template"]["spec"])
        with pytest.raises(error):
            check(broken)

    invalid = jsonschema.ValidationError
    refused(lambda js, job: js["spec"].update(failurePolicies={}), AssertionError)
    refused(lambda js, job: job.update(completion=4), AssertionError)
    refused(lambda js, job: job["template"]["spec"].update(volumes=[{"nam": "x"}]), Exception)
    refused(lambda js, job: job.update(backoffLimit="0"), Exception)
    refused(lambda js, job: job["template"]["spec"].update(restartPolicy="Always"), Exception)
    refused(lambda js, job: js["metadata"].update(name="x" * 60), AssertionError)
    with pytest.raises(invalid):
        check({**config_map, "dat": {}})


def test_exit_statuses_and_restarts() -> None:
    (manifest,) = render(cluster_config({"restarts": 7, "grace_seconds": 90}), command="train")
    spec = manifest.documents[1]["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    actions = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {"values": ["disruption"]})["values"]
    }
    assert actions == {exit_codes.MISTAKE: "FailJob", exit_codes.STOPPED: "Ignore"} | {
        "disruption": "Ignore"
    }
    assert job["backoffLimit"] == 0, "any other end of one pod ends the Job: all start again"
    assert spec["failurePolicy"]["maxRestarts"] == 7
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert pod_of(manifest)["terminationGracePeriodSeconds"] == 90


def test_processes_find_each_other() -> None:
    (manifest,) = render(cluster_config({"heartbeat_seconds": 30}), command="train")
    spec = manifest.documents[1]["spec"]
    job = spec["replicatedJobs"][0]
    assert job["template"]["spec"]["completions"] == job["template"]["spec"]["parallelism"] == 4
    variables = {one["name"]: one for one in container_of(manifest)["env"]}
    host, _, port = variables[processes.COORDINATOR]["value"].partition(":")
    assert host == f"{manifest.name}-{job['name']}-0-0.{spec['network']['subdomain']}"
    assert port.isdecimal()
    assert variables[processes.NUM_PROCESSES]["value"] == "4"
    assert variables[processes.HEARTBEAT]["value"] == "30"
    field = variables[processes.PROCESS_ID]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_one_node_is_one_process_on_its_own() -> None:
    (manifest,) = render(cluster_config({"nodes": {"kind": "gpu"}}, mesh=(1, 8)), command="train")
    names = [one["name"] for one in container_of(manifest)["env"]]
    assert names == [processes.HEARTBEAT]


def test_release_and_report_need_no_accelerator() -> None:
    manifest = render(cluster_config(EVERYTHING, **SWEEP), command="sweep")[-1]
    pod, job = pod_of(manifest), manifest.documents[1]["spec"]["replicatedJobs"][0]["template"]
    assert job["spec"]["completions"] == 1
    assert "nodeSelector" not in pod
    containers = [*pod["initContainers"], *pod["containers"]]
    assert [one["command"][1] for one in containers] == ["export", "report"]
    for container in containers:
        assert container["resources"]["limits"] == {"memory": "16Gi"}
        variables = {one["name"]: one.get("value") for one in container["env"]}
        assert variables["JAX_PLATFORMS"] == "cpu"
        assert processes.NUM_PROCESSES not in variables


def test_accelerators() -> None:
    def found(name: str) -> tuple[dict[str, str], dict[str, str]]:
        launch, mesh = NODES[name]
        (manifest,) = render(cluster_config(launch, mesh=mesh), command="harvest")
        resources = container_of(manifest)["resources"]
        return pod_of(manifest).get("nodeSelector", {}), resources.get("limits", {})

    assert found("tpu slice") == (
        {
            "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
            "cloud.google.com/gke-tpu-topology": "4x4",
        },
        {"google.com/tpu": "4"},
    )
    assert found("gpu") == ({}, {"nvidia.com/gpu": "8"})
    selector, limits = found("everything")
    assert selector == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
        "cloud.google.com/gke-spot": "true",
    }
    assert limits == {"nvidia.com/gpu": "8", "memory": "800Gi"}


def test_a_slice_stays_in_one_node_pool() -> None:
    def topology(launch: dict[str, Any], mesh: tuple[int, int]) -> bool:
        (manifest,) = render(cluster_config(launch, mesh=mesh), command="train")
        annotations = manifest.documents[1]["metadata"]["annotations"]
        return any("exclusive-topology" in name for name in annotations)

    assert topology(*NODES["tpu slice"])
    assert not topology(*NODES["tpu host"])
    assert not topology(*NODES["gpu"])


def test_the_config_travels_and_runs_there(tmp_path: Path) -> None:
    config = cluster_config(EVERYTHING, **SWEEP)
    manifests = render(config, command="sweep")
    runs = [run.config for run in expand(config)]
    expected = [[config], runs[:2], runs[2:], [config], [config]]
    for manifest, configs in zip(manifests, expected, strict=True):
        container = container_of(manifest)
        executable, command, *paths = container["command"]
        assert (executable, command) == ("sae", manifest.stage)
        assert cli._parse(container["command"][1:]).command == command
        assert container["workingDir"] == "/data"
        (folder,) = {path.rpartition("/")[0] for path in paths}
        volume = next(one for one in container["volumeMounts"] if one["mountPath"] == folder)
        assert pod_of(manifest)["volumes"][0]["name"] == volume["name"]
        config_map = pod_of(manifest)["volumes"][0]["configMap"]["name"]
        assert config_map == manifest.documents[0]["metadata"]["name"]
        data = manifest.documents[0]["data"]
        assert len(data) == len(paths)
        for path, one in zip(paths, configs, strict=True):
            file = tmp_path / "config.yaml"
            file.write_text(data[path.rpartition("/")[2]])
            there = load_job(file)
            assert there.launch.on == "local"
            assert there.model_copy(update={"launch": config.launch}) == one


def test_a_cohort_is_known_by_its_first_run() -> None:
    """So that one which has grown is not taken for another, and trained beside itself."""
    before = render(cluster_config(**SWEEP), command="sweep")[1]
    grown = cluster_config(**SWEEP | {"sweep.cohort.max_members": 3})
    after = render(grown, command="sweep")[1]
    assert (after.name, after.file_name) == (before.name, before.file_name)
    assert after.digest != before.digest
    assert (before.run, after.run) == (
        "test-coefficient_0.001 and 1 more",
        "test-coefficient_0.001 and 2 more",
    )
    beside = "open-gemma-scope/beside"
    annotations = after.documents[1]["metadata"]["annotations"]
    assert annotations[beside] == "run/coefficient_0.0001\nrun/coefficient_1e-05"


def test_secrets_are_named_never_given() -> None:
    (manifest,) = render(cluster_config(EVERYTHING), command="train")
    container, pod = container_of(manifest), pod_of(manifest)
    variables = {one["name"]: one for one in container["env"]}
    assert variables["HF_TOKEN"] == {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}},
    }
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert {"secretName": "bucket-key"} in [one.get("secret") for one in pod["volumes"]]
    kinds = [document["kind"] for document in manifest.documents]
    assert kinds == ["ConfigMap", "JobSet"], "no Secret is ever made"


REFUSED = [
    ({"env": {"HF_TOKEN": "hf_abc"}}, "HF_TOKEN looks like a secret"),
    ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "looks like a secret"),
    ({"env": {"SAE_PROCESS_ID": "1"}}, "set by the manifests themselves"),
    ({"env": {"A": "1"}, "secrets": {"A": {"secret": "s", "key": "k"}}}, "not both"),
    ({"labels": {"open-gemma-scope/stage": "x"}}, "the prefix of our own labels"),
    ({"image": ""}, "launch.image: must not be empty"),
    ({"nodes": {**TPU_SLICE, "topology": "4x"}}, "'4x' is not a TPU topology"),
    ({"nodes": {**TPU_SLICE, "per_node": 3}}, "topology 4x4 has 16 chips"),
    ({"nodes": {"kind": "gp"}}, "'gp' is not one of tpu, gpu, cpu; did you mean 'gpu'?"),
    ({"tolerations": [{"taint": "a", "effect": "Never"}]}, "not one of NoSchedule, Prefer"),
    ({"volumes": [CLAIM, CLAIM]}, "mounts two things at /data"),
    ({"volumes": [{**CLAIM, "mount": "/etc/open-gemma-scope/"}]}, "mounts two things at /etc"),
    ({"volumes": [{**CLAIM, "mount": "data"}]}, "'data' is not an absolute path"),
    ({"grace_seconds": 0}, "at least 1"),
    ({"at_once": 0}, "at least 1"),
    ({"procesess": 3}, "unknown key with kubernetes"),
]


@pytest.mark.parametrize(("launch", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_mistakes_in_the_section(launch: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        cluster_config(launch)


@pytest.mark.parametrize(
    ("launch", "values", "words"),
    [
        ({}, {"output": "/tmp/run"}, "output /tmp/run would be lost with its pod"),
        ({}, {"cache.path": "/database/x"}, "cache.path /database/x would be lost"),
        ({"working_dir": None}, {}, "cache.path store is relative: say with launch.working_dir"),
        ({"volumes": []}, {}, "cache.path /data/store would be lost with its pod"),
        ({"volumes": [{"kind": "empty", "mount": "/data"}]}, {}, "would be lost with its pod"),
        ({"volumes": [{**CLAIM, "read_only": True}]}, {}, "(found: none)"),
        ({}, {"mesh.model": 4}, "mesh.data * mesh.model must be 16"),
        ({"nodes": {"kind": "gpu"}}, {}, "mesh.data * mesh.model can be at most 8"),
    ],
)
def test_a_config_that_cannot_run_there(
    launch: dict[str, Any], values: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        render(cluster_config(launch, **values), command="train")


def test_a_bucket_needs_no_volume() -> None:
    values = {"output": "gs://bucket/x", "cache.path": "s3://bucket/store"}
    config = cluster_config({"volumes": [], "working_dir": None}, **values)
    [manifest] = render(config, command="train")
    config_map, job_set = manifest.documents
    assert "output: gs://bucket/x" in config_map["data"]["config.yaml"]
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert [volume["name"] for volume in pod["volumes"]] == ["config"]
    assert manifest_folder(config) == Path("kubernetes") / config.name


def test_the_pod_that_trains_on_a_rolling_store_harvests_it() -> None:
    rolling = {"cache.rolling": {"buckets": 4}, "cache.tokens": 10**6}
    config = cluster_config({"nodes": {"kind": "gpu"}}, mesh=(1, 1), **SWEEP, **rolling)
    stages = [manifest.stage for manifest in render(config, command="sweep")]
    assert stages == ["train", "train", "evaluate", "report"]
    several = cluster_config({"nodes": {"kind": "gpu", "count": 2}}, mesh=(2, 1), **rolling)
    with pytest.raises(UserError, match="one job of a single process, and launch starts 2"):
        render(several, command="train")


def test_a_harvest_has_a_mesh_of_its_own() -> None:
    config = cluster_config(mesh=(2, 8), **{"cache.mesh": {"data": 16, "model": 1}})
    render(config, command="harvest")
    config = cluster_config(mesh=(2, 8), **{"cache.mesh": {"data": 8, "model": 1}})
    with pytest.raises(UserError, match=re.escape("cache.mesh.data * cache.mesh.model must be 16")):
        render(config, command="harvest")
    render(config, command="train")


def test_a_manifest_s_digest_is_of_what_it_says() -> None:
    def digest(launch: dict[str, Any] | None = None, **values: Any) -> str:
        (manifest,) = render(cluster_config(launch, **values), command="train")
        return manifest.digest

    assert digest() == digest({"context": "other", "manifests": "elsewhere", "at_once": 3})
    others = [digest({"grace_seconds": 1}), digest(**{"train.seed": 5}), digest({"cpu": 1})]
    assert len({digest(), *others}) == 4


def test_files_sort_in_the_order_of_submission(tmp_path: Path) -> None:
    config = cluster_config(**{"sweep.grid": {"train.seed": list(range(12))}})
    files = write_manifests(render(config, command="sweep"), tmp_path)
    assert [file.name for file in files] == sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 15


def test_the_hook_waits_until_sigterm_is_heard() -> None:
    child = "import signal, time; time.sleep(2); signal.signal(15, print); time.sleep(600)"
    started = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", child]) as process:
        try:
            script = WAIT_FOR_HANDLER.replace("/proc/1/", f"/proc/{process.pid}/")
            assert script != WAIT_FOR_HANDLER
            assert subprocess.run(["/bin/sh", "-c", script], timeout=300).returncode == 0
            assert time.monotonic() - started > 1.5
            process.terminate()
            time.sleep(0.2)
            assert process.poll() is None, "the handler was there: the signal did not kill it"
        finally:
            process.kill()

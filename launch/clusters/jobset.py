"""JobSet manifests from a config: one file per stage, each a ConfigMap and a JobSet that reads it.

A stage is an Indexed Job with one pod, and so one process, per node. A pod can fail in two ways:

- Exit 75 (saved, run me again) and pods that a drained node took are ignored by the Job's pod
  failure policy: the pod is created again with its index, and no restart is counted.
- Anything else fails the Job at once, for the processes of a stage live and die together. Exit 2
  (the user's mistake) fails the JobSet, which recognises it by the reason; the rest, a lost machine
  or a bug, restarts all pods of the stage, at most `launch.restarts` times.

Each cohort of a sweep is a JobSet of its own rather than one of many jobs in a single JobSet, for
there the last failure of one would end all. `launch.clusters.kubectl` submits them in order.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from activation_cache.runtime.errors import UserError
from launch import exit_codes
from launch.clusters.common import Command, Stage, harvests_in_training, mesh_of
from launch.clusters.jobset_pod import pod_template
from launch.config.job import Job
from launch.config.kubernetes import OUR_PREFIX, KubernetesLaunch, TpuNodes
from launch.config.local import LocalLaunch
from launch.sweep.cohorts import cohorts_of
from launch.sweep.expand import expand
from sae_train.config.file import resolved_yaml

REPLICATED_JOB = "node"  # pods are <JobSet>-node-0-<index>
_LONGEST_LABEL = 63
# A pod's full name, <JobSet>-node-0-<index>-<5 letters>, has to be a DNS label too.
_LONGEST_NAME = _LONGEST_LABEL - len(f"-{REPLICATED_JOB}-0-9999-abcde")
_LONGEST_CONFIG = 1_000_000  # bytes; etcd takes objects of up to 1 MiB


class _Dumper(yaml.SafeDumper):
    """Quotes all text that some YAML reader would not read as text (1e3, 0o7, on)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    words = ("true", "false", "yes", "no", "on", "off", "y", "n", "null")
    plain = re.fullmatch(r"[A-Za-z/][-A-Za-z0-9_./]*", text) and text.lower() not in words
    style = "|" if "\n" in text else None if plain else "'"
    if re.search("[\x85\u2028\u2029]", text):
        style = '"'  # YAML's rarer line breaks survive only there, escaped
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


@dataclass(frozen=True)
class Manifest:
    """One stage as it is submitted.

    Attributes:
        run: the config's name: of the run, of the first of a cohort's, or of the sweep.
        name: of the JobSet.
        file_name: sorts in the order of submission.
        documents: the ConfigMap and the JobSet, as plain data.
    """

    run: str
    stage: Stage
    name: str
    file_name: str
    documents: tuple[dict[str, Any], dict[str, Any]]

    @property
    def digest(self) -> str:
        """A hash of the whole manifest: is the JobSet at work the one that this config asks for?"""
        return self.documents[1]["metadata"]["annotations"][f"{OUR_PREFIX}digest"]

    @property
    def text(self) -> str:
        """The file: YAML that says in a comment how to submit it by hand."""
        return f"# {self.stage}: kubectl apply -f {self.file_name}\n" + yaml.dump_all(
            self.documents,
            Dumper=_Dumper,
            explicit_start=True,
            sort_keys=False,
            allow_unicode=True,
            width=100,
        )


def render(config: Job, *, command: Command) -> list[Manifest]:
    """The manifests of a command, in the order in which their stages run.

    `sweep` gives a harvest, one training per cohort, the evaluation of all runs in one pass of the
    model, and their release and report, for which one pod without accelerators is enough.

    Raises:
        UserError: a path that no volume keeps, or a mesh that the nodes don't have.
    """
    launch = kubernetes_launch(config)
    _check_paths(config, launch)
    rolling = harvests_in_training(config, processes=launch.nodes.count)
    if command == "sweep":
        cohorts = cohorts_of(config, expand(config))
        digits = len(str(len(cohorts)))
        harvest: tuple[Stage, str, list[Job]] = ("harvest", "0-harvest.yaml", [config])
        stages: list[tuple[Stage, str, list[Job]]] = [
            *([] if rolling else [harvest]),
            *(
                ("train", f"1-train-{number:0{digits}}.yaml", cohort.configs)
                for number, cohort in enumerate(cohorts, 1)
            ),
            ("evaluate", "2-evaluate.yaml", [config]),
            ("report", "3-report.yaml", [config]),
        ]
    else:
        stages = [(command, f"{command}.yaml", [config])]
    for stage, _, configs in stages:
        for one in configs:
            _check_mesh(one, launch, stage=stage)
    group = dns_name(config.name, identity=config.output)
    return [
        _manifest(configs, stage=stage, file_name=name, group=group)
        for stage, name, configs in stages
    ]


def kubernetes_launch(config: Job) -> KubernetesLaunch:
    """The config's launch section, as the Kubernetes class that it is."""
    assert isinstance(config.launch, KubernetesLaunch), config.launch
    return config.launch


def write_manifests(manifests: Sequence[Manifest], folder: Path) -> list[Path]:
    """Write the files; raises `UserError` if the disk refuses."""
    from activation_cache.storage.files import make_folder, write_text

    make_folder(folder)
    for manifest in manifests:
        write_text(folder / manifest.file_name, manifest.text)
    return [folder / manifest.file_name for manifest in manifests]


def dns_name(text: str, *, identity: str, longest: int = _LONGEST_NAME) -> str:
    """A DNS-1035 label that reads like `text` and is as distinct as `identity`.

    Lower-case letters, digits and '-', a letter first, at most `longest` characters, the last 7
    of them '-' and 6 hexadecimal digits of the identity's SHA-256.
    """
    digest = hashlib.sha256(identity.encode()).hexdigest()[:6]
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not re.match(r"[a-z]", words):
        words = f"sae-{words}".rstrip("-")
    return f"{words[: longest - 7].rstrip('-')}-{digest}"


def _manifest(configs: Sequence[Job], *, stage: Stage, file_name: str, group: str) -> Manifest:
    """The manifest of a stage; runs that train together are named after the first of them."""
    config, *beside = configs
    launch = kubernetes_launch(config)
    data = _travelling_configs(configs, launch)
    identity = f"{config.output}\n{stage}"  # a run's folder is its own, so this is unique
    name = dns_name(
        config.name if stage == "train" else f"{stage}-{config.name}", identity=identity
    )
    # Immutable, so another config is another object.
    config_map = f"{name}-{_digest(chr(0).join(data.values()))[:8]}"
    labels = {f"{OUR_PREFIX}group": group, f"{OUR_PREFIX}stage": stage, **launch.labels}
    annotations = {
        f"{OUR_PREFIX}name": config.name,
        f"{OUR_PREFIX}output": config.output,
        **({f"{OUR_PREFIX}beside": "\n".join(one.output for one in beside)} if beside else {}),
        **_exclusive_topology(launch),
        **launch.annotations,
    }
    spec = _job_set_spec(
        name, launch, stage=stage, config_map=config_map, keys=list(data), labels=labels
    )
    annotations[f"{OUR_PREFIX}digest"] = _digest(json.dumps([labels, annotations, spec]))
    namespace = {"namespace": launch.namespace} if launch.namespace else {}
    documents = (
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": config_map, **namespace, "labels": labels},
            "immutable": True,
            "data": data,
        },
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {
                "name": name,
                **namespace,
                "labels": labels,
                "annotations": annotations,
            },
            "spec": spec,
        },
    )
    return Manifest(
        run=f"{config.name} and {len(beside)} more" if beside else config.name,
        stage=stage,
        name=name,
        file_name=file_name,
        documents=documents,
    )


def _travelling_configs(configs: Sequence[Job], launch: KubernetesLaunch) -> dict[str, str]:
    """The data of the ConfigMap: one key per config, in order."""
    there = LocalLaunch(heartbeat_seconds=launch.heartbeat_seconds)
    data = {
        f"config{number or ''}.yaml": resolved_yaml(one.model_copy(update={"launch": there}))
        for number, one in enumerate(configs)
    }
    size = sum(len(text.encode()) for text in data.values())
    if size > _LONGEST_CONFIG:
        raise UserError(
            f"{configs[0].name}: the resolved configs have {size:,} bytes and a ConfigMap holds at "
            f"most {_LONGEST_CONFIG:,}: split the sweep, lower sweep.cohort.max_members, or list "
            "sources with globs"
        )
    return data


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _exclusive_topology(launch: KubernetesLaunch) -> dict[str, str]:
    """Put all pods of a stage on the nodes of one TPU slice."""
    if not isinstance(launch.nodes, TpuNodes) or launch.nodes.count == 1:
        return {}
    return {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}


def _job_set_spec(
    name: str,
    launch: KubernetesLaunch,
    *,
    stage: Stage,
    config_map: str,
    keys: Sequence[str],
    labels: dict[str, str],
) -> dict[str, Any]:
    light = stage == "report"
    processes = 1 if light else launch.nodes.count
    pod = pod_template(
        launch,
        commands=["export", "report"] if light else [stage],
        light=light,
        config_map=config_map,
        keys=keys,
        coordinator=f"{name}-{REPLICATED_JOB}-0-0.{name}",
        labels=labels,
    )
    return {
        "network": {"enableDNSHostnames": True, "subdomain": name},
        "failurePolicy": {
            "maxRestarts": launch.restarts,
            "rules": [
                {
                    "name": "mistake",
                    "action": "FailJobSet",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                }
            ],
        },
        "replicatedJobs": [
            {
                "name": REPLICATED_JOB,
                "replicas": 1,
                "template": {
                    "spec": {
                        "completionMode": "Indexed",
                        "completions": processes,
                        "parallelism": processes,
                        "backoffLimit": 0,
                        "podFailurePolicy": {"rules": _pod_failure_rules()},
                        "template": pod,
                    }
                },
            }
        ],
    }


def _pod_failure_rules() -> list[dict[str, Any]]:
    """The first rule that matches counts; a pod that none matches fails the Job."""
    return [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [exit_codes.MISTAKE]}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [exit_codes.STOPPED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def _check_paths(config: Job, launch: KubernetesLaunch) -> None:
    """What a stage writes must outlive its pod: in a bucket, or on a volume that is kept."""
    kept = [v.mount for v in launch.volumes if v.kind in ("claim", "host_path") and not v.read_only]
    for key, path in (("cache.path", config.cache.path), ("output", config.output)):
        if "://" in path:
            continue
        if not path.startswith("/") and launch.working_dir is None:
            raise UserError(
                f"{key} {path} is relative: say with launch.working_dir to which folder of the "
                "pods, or give an absolute path or a bucket"
            )
        whole = posixpath.normpath(posixpath.join(launch.working_dir or "/", path))
        if not any(whole == mount or whole.startswith(f"{mount}/") for mount in kept):
            raise UserError(
                f"{key} {whole} would be lost with its pod: no volume of kind claim or host_path "
                f"that may be written is mounted there (found: {', '.join(kept) or 'none'}). Mount "
                "one with launch.volumes, or give a gs:// or s3:// path"
            )


def _check_mesh(config: Job, launch: KubernetesLaunch, *, stage: Stage) -> None:
    """Refuse a mesh with more devices than the nodes have, or one that leaves processes idle."""
    key, mesh = mesh_of(config, stage=stage)
    nodes = launch.nodes
    devices = mesh.data * mesh.model
    if devices > nodes.devices or (nodes.count > 1 and devices != nodes.devices):
        rule = "must be" if nodes.count > 1 else "can be at most"
        raise UserError(
            f"{config.name}: {key} {mesh.data} x {mesh.model} (data x model) needs {devices} "
            f"devices and launch.nodes gives {nodes.devices} on {nodes.count} nodes: {key}.data * "
            f"{key}.model {rule} {nodes.devices}"
        )

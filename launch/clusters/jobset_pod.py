"""The pod of a stage: the containers that run `sae`, their resources and their environment.

The processes find each other by the DNS name of pod 0 and count themselves by the Job's
completion index (`activation_cache/runtime/processes.py` reads the SAE_* variables).
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import Any

from launch.config.kubernetes import (
    CONFIG_FOLDER,
    ClaimVolume,
    EmptyVolume,
    GpuNodes,
    HostPathVolume,
    KubernetesLaunch,
    Toleration,
    TpuNodes,
    Volume,
)

_CONFIG_VOLUME = "config"
_COORDINATOR_PORT = 8476  # JAX's customary one
_COMPLETION_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_WAIT_SECONDS = 20

# `sae` is process 1 of its container, and the kernel drops a SIGTERM that process 1 has no
# handler for yet: a pod evicted while Python still starts would never hear of it and lose what
# it does until the grace period ends. So wait, before the signal is sent, until bit 14 of the
# mask of caught signals says that SIGTERM (15) is handled.
WAIT_FOR_HANDLER = (
    f"i=0; while [ $i -lt {_WAIT_SECONDS} ]; do "
    "grep -Eq '^SigCgt:.*[4-7c-f][0-9a-f]{3}$' /proc/1/status && exit 0; "
    "i=$((i+1)); sleep 1; done"
)


def pod_template(
    launch: KubernetesLaunch,
    *,
    commands: Sequence[str],
    light: bool,
    config_map: str,
    keys: Sequence[str],
    coordinator: str,
    labels: dict[str, str],
) -> dict[str, Any]:
    """The pod template of a stage's Job, as plain data.

    Args:
        commands: `sae` commands, run one after the other.
        light: one pod that needs no accelerator, and may run on any node.
        config_map: the ConfigMap that is mounted at `CONFIG_FOLDER`.
        keys: of the configs in it that the commands are given.
        coordinator: the DNS name of pod 0, in the namespace.
        labels: of the pod, so that `kubectl logs -l` finds it.
    """
    containers = [
        _container(launch, command=command, light=light, keys=keys, coordinator=coordinator)
        for command in commands
    ]
    *first, last = containers
    spec: dict[str, Any] = {
        "restartPolicy": "Never",  # the Job's pod failure policy decides, and asks for this
        "terminationGracePeriodSeconds": launch.grace_seconds,
        "nodeSelector": {} if light else {**_accelerator_selector(launch), **launch.node_selector},
        "tolerations": [_toleration(one) for one in launch.tolerations],
        "priorityClassName": launch.priority_class,
        "serviceAccountName": launch.service_account,
        "imagePullSecrets": [{"name": name} for name in launch.image_pull_secrets],
        "initContainers": first,
        # An init container may have no hooks.
        "containers": [{**last, "lifecycle": {"preStop": _run_in_shell(WAIT_FOR_HANDLER)}}],
        "volumes": [
            {"name": _CONFIG_VOLUME, "configMap": {"name": config_map}},
            *(
                {"name": _volume_name(number), **_volume_source(volume)}
                for number, volume in enumerate(launch.volumes)
            ),
        ],
    }
    return {"metadata": {"labels": labels}, "spec": _without_empty(spec)}


def _container(
    launch: KubernetesLaunch, *, command: str, light: bool, keys: Sequence[str], coordinator: str
) -> dict[str, Any]:
    return _without_empty(
        {
            "name": command,
            "image": launch.image,
            "command": ["sae", command, *(posixpath.join(CONFIG_FOLDER, key) for key in keys)],
            "workingDir": launch.working_dir,
            "env": _environment(launch, light=light, coordinator=coordinator),
            "envFrom": [{"secretRef": {"name": name}} for name in launch.env_from_secrets],
            "resources": _light_resources(launch) if light else _resources(launch),
            "volumeMounts": [
                {"name": _CONFIG_VOLUME, "mountPath": CONFIG_FOLDER, "readOnly": True},
                *(_mount(number, volume) for number, volume in enumerate(launch.volumes)),
            ],
        }
    )


def _run_in_shell(script: str) -> dict[str, Any]:
    return {"exec": {"command": ["/bin/sh", "-c", script]}}


def _without_empty(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value not in (None, [], {})}


def _accelerator_selector(launch: KubernetesLaunch) -> dict[str, str]:
    nodes = launch.nodes
    if isinstance(nodes, TpuNodes):
        return {
            "cloud.google.com/gke-tpu-accelerator": nodes.accelerator,
            "cloud.google.com/gke-tpu-topology": nodes.topology,
        }
    if isinstance(nodes, GpuNodes) and nodes.accelerator is not None:
        return {"cloud.google.com/gke-accelerator": nodes.accelerator}
    return {}


def _resources(launch: KubernetesLaunch) -> dict[str, Any]:
    """Requests, and limits for memory and devices, which pods of a node can't share."""
    nodes = launch.nodes
    devices = {}
    if isinstance(nodes, TpuNodes):
        devices = {"google.com/tpu": str(nodes.per_node)}
    elif isinstance(nodes, GpuNodes):
        devices = {"nvidia.com/gpu": str(nodes.per_node)}
    memory = {"memory": launch.memory} if launch.memory else {}
    disk = {"ephemeral-storage": launch.ephemeral_storage} if launch.ephemeral_storage else {}
    cpu = {"cpu": launch.cpu} if launch.cpu else {}
    return _without_empty(
        {"requests": {**cpu, **memory, **disk, **devices}, "limits": {**memory, **devices}}
    )


def _light_resources(launch: KubernetesLaunch) -> dict[str, Any]:
    memory = {"memory": launch.report_memory}
    return {"requests": dict(memory), "limits": memory}


def _environment(
    launch: KubernetesLaunch, *, light: bool, coordinator: str
) -> list[dict[str, Any]]:
    own: list[dict[str, Any]] = [
        {"name": "SAE_HEARTBEAT_SECONDS", "value": str(launch.heartbeat_seconds)}
    ]
    if light:
        own.append({"name": "JAX_PLATFORMS", "value": "cpu"})
    elif launch.nodes.count > 1:
        own += [
            {"name": "SAE_COORDINATOR", "value": f"{coordinator}:{_COORDINATOR_PORT}"},
            {"name": "SAE_NUM_PROCESSES", "value": str(launch.nodes.count)},
            {
                "name": "SAE_PROCESS_ID",
                "valueFrom": {"fieldRef": {"fieldPath": _COMPLETION_INDEX}},
            },
        ]
    # Kubernetes expands $(NAME) in a value; $$ is how it spells a plain $.
    plain = [
        {"name": name, "value": value.replace("$", "$$")}
        for name, value in launch.env.items()
        if name not in [one["name"] for one in own]
    ]
    secret = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": one.secret, "key": one.key}}}
        for name, one in launch.secrets.items()
    ]
    return [*own, *plain, *secret]


def _toleration(toleration: Toleration) -> dict[str, Any]:
    operator = "Exists" if toleration.value is None else "Equal"
    return _without_empty(
        {
            "key": toleration.taint,
            "operator": operator,
            "value": toleration.value,
            "effect": toleration.effect,
        }
    )


def _volume_name(number: int) -> str:
    return f"volume-{number}"


def _mount(number: int, volume: Volume) -> dict[str, Any]:
    read_only = {"readOnly": True} if getattr(volume, "read_only", volume.kind == "secret") else {}
    return {"name": _volume_name(number), "mountPath": volume.mount, **read_only}


def _volume_source(volume: Volume) -> dict[str, Any]:
    if isinstance(volume, ClaimVolume):
        read_only = {"readOnly": True} if volume.read_only else {}
        return {"persistentVolumeClaim": {"claimName": volume.claim, **read_only}}
    if isinstance(volume, HostPathVolume):
        return {"hostPath": {"path": volume.path, "type": "Directory"}}
    if isinstance(volume, EmptyVolume):
        settings = {"medium": "Memory" if volume.memory else None, "sizeLimit": volume.size}
        return {"emptyDir": _without_empty(settings)}
    return {"secret": {"secretName": volume.secret}}

"""`launch: {on: kubernetes}`: what a manifest needs that the rest of the config doesn't say.

Checked here is what nobody else can: secrets are named and never given, and names that the
manifests set themselves are free. Kubernetes' own rules are left to its server, which is asked
before anything is submitted (`launch.clusters.kubectl`).
"""

from __future__ import annotations

import math
import posixpath
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from activation_cache.config import PositiveSmallCount, Section, SmallCount, expanded

OUR_PREFIX = "open-gemma-scope/"  # of the labels and annotations that we set ourselves
CONFIG_FOLDER = "/etc/open-gemma-scope"  # where the pods find their config
_OUR_ENVIRONMENT = ("SAE_", "JOB_COMPLETION_INDEX")
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY(_ID)?)$", re.I)


def _environment_name(name: str) -> str:
    if name.startswith(_OUR_ENVIRONMENT):
        raise ValueError(f"{name} is set by the manifests themselves: choose another name")
    return name


def _label_name(name: str) -> str:
    if name.startswith(OUR_PREFIX):
        raise ValueError(f"{name}: {OUR_PREFIX} is the prefix of our own labels")
    return name


def _no_secret(environment: dict[str, str]) -> dict[str, str]:
    for name in environment:
        if _SECRET_NAME.search(name):
            raise ValueError(
                f"{name} looks like a secret, and manifests are plain files: make a Kubernetes "
                f"Secret and name it, launch.secrets: {{{name}: {{secret: NAME, key: KEY}}}}"
            )
    return environment


def _absolute(path: str) -> str:
    if not path.startswith("/") or path.strip("/") == "":
        raise ValueError(f"{path!r} is not an absolute path below /")
    return posixpath.normpath(path)


def _as_quantity(value: Any) -> Any:
    """`cpu: 8` is written as a number and means the text '8'."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


def _topology(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){1,2}", text):
        raise ValueError(f"{text!r} is not a TPU topology such as 2x4 or 4x4x8")
    return text


Name = Annotated[str, Field(min_length=1)]
LabelName = Annotated[Name, AfterValidator(_label_name)]
EnvironmentName = Annotated[Name, AfterValidator(_environment_name)]
Quantity = Annotated[Name, BeforeValidator(_as_quantity)]
FolderPath = Annotated[str, AfterValidator(_absolute)]


class TpuNodes(Section):
    """A TPU slice of GKE: one process on each of its nodes.

    `accelerator` and `topology` are the values of the node labels cloud.google.com/gke-tpu-*.
    """

    kind: Literal["tpu"]
    accelerator: Name
    topology: Annotated[str, AfterValidator(_topology)]
    per_node: PositiveSmallCount = 4

    @model_validator(mode="after")
    def _whole_nodes(self) -> TpuNodes:
        if self.devices % self.per_node:
            raise ValueError(
                f"topology {self.topology} has {self.devices} chips, which nodes of "
                f"per_node {self.per_node} chips don't make up: GKE's multi-host slices have 4 "
                "chips a node, single-host ones 1, 4 or 8"
            )
        return self

    @property
    def devices(self) -> int:
        """Chips of the slice."""
        return math.prod(int(side) for side in self.topology.split("x"))

    @property
    def count(self) -> int:
        """Nodes of the slice, one process on each."""
        return self.devices // self.per_node


class GpuNodes(Section):
    """Nodes with NVIDIA GPUs: one process on each node drives all GPUs asked for there."""

    kind: Literal["gpu"]
    accelerator: Name | None = None  # of the node label cloud.google.com/gke-accelerator
    per_node: PositiveSmallCount = 8
    count: PositiveSmallCount = 1

    @property
    def devices(self) -> int:
        """GPUs of all nodes."""
        return self.per_node * self.count


class CpuNodes(Section):
    """Nodes without accelerators, for trying things out."""

    kind: Literal["cpu"]
    count: PositiveSmallCount = 1

    @property
    def devices(self) -> int:
        """One per node: the CPUs of a process are one device."""
        return self.count


class ClaimVolume(Section):
    """A PersistentVolumeClaim that exists; for several nodes it must be ReadWriteMany."""

    kind: Literal["claim"]
    mount: FolderPath
    claim: Name
    read_only: bool = False


class HostPathVolume(Section):
    """A folder of the nodes themselves, such as a mounted network file system."""

    kind: Literal["host_path"]
    mount: FolderPath
    path: FolderPath
    read_only: bool = False


class EmptyVolume(Section):
    """Scratch space that goes with the pod; `memory` keeps it in RAM (/dev/shm)."""

    kind: Literal["empty"]
    mount: FolderPath
    size: Quantity | None = None
    memory: bool = False


class SecretVolume(Section):
    """A Secret's keys as files, for instance a service account's key."""

    kind: Literal["secret"]
    mount: FolderPath
    secret: Name


class SecretKey(Section):
    """One key of a Secret that exists in the namespace."""

    secret: Name
    key: Name


class Toleration(Section):
    """A node taint the pods tolerate, with any value unless `value` is given."""

    taint: LabelName
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


Nodes = Annotated[TpuNodes | GpuNodes | CpuNodes, Field(discriminator="kind")]
Volume = Annotated[
    ClaimVolume | HostPathVolume | EmptyVolume | SecretVolume, Field(discriminator="kind")
]


class KubernetesLaunch(Section):
    """A Kubernetes cluster with the JobSet controller: GKE TPU slices, GPU nodes, or neither."""

    on: Literal["kubernetes"]
    image: Name
    nodes: Nodes
    context: Name | None = None  # null: kubectl's current one
    namespace: Name | None = None
    at_once: PositiveSmallCount | None = None  # runs of a sweep; null: all
    # Over a stage's whole life: the JobSet controller never resets its count.
    restarts: SmallCount = 10
    heartbeat_seconds: Annotated[PositiveSmallCount, Field(ge=5)] = 60
    grace_seconds: PositiveSmallCount = 120  # from SIGTERM to SIGKILL: what a save may take
    working_dir: FolderPath | None = None  # relative paths of the config are below it
    volumes: list[Volume] = Field(default_factory=list)
    cpu: Quantity | None = None
    memory: Quantity | None = None
    ephemeral_storage: Quantity | None = None
    report_memory: Quantity = "16Gi"  # of the pod without accelerators that exports and reports
    node_selector: dict[LabelName, str] = Field(default_factory=dict)
    tolerations: list[Toleration] = Field(default_factory=list)
    labels: dict[LabelName, str] = Field(default_factory=dict)
    annotations: dict[LabelName, str] = Field(default_factory=dict)
    priority_class: Name | None = None
    service_account: Name | None = None
    image_pull_secrets: list[Name] = Field(default_factory=list)
    env: Annotated[dict[EnvironmentName, str], AfterValidator(_no_secret)] = Field(
        default_factory=dict
    )
    secrets: dict[EnvironmentName, SecretKey] = Field(default_factory=dict)
    env_from_secrets: list[Name] = Field(default_factory=list)
    manifests: Annotated[Name, AfterValidator(expanded)] | None = None  # null: <output>/kubernetes

    @model_validator(mode="after")
    def _coherent(self) -> KubernetesLaunch:
        mounts = [CONFIG_FOLDER, *(volume.mount for volume in self.volumes)]
        twice = sorted({mount for mount in mounts if mounts.count(mount) > 1})
        if twice:
            raise ValueError(
                f"launch.volumes mounts two things at {', '.join(twice)} ({CONFIG_FOLDER} is the "
                "config's): give each a mount of its own"
            )
        both = sorted(set(self.env) & set(self.secrets))
        if both:
            raise ValueError(f"{', '.join(both)} can be in launch.env or launch.secrets, not both")
        return self

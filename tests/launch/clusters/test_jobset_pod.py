"""The pods of a rendered stage, run here as processes: what the manifest says is enough to train.

A small Job controller reads the same documents a cluster would: image and node aside it starts the
container's command with its environment and its config, and obeys the pod failure policy.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.clusters.jobset import Manifest, render
from sae_train.runs.folder import newest_checkpoint
from sae_train.train.loop import train
from tests.support.children.processes import child_environment, free_port
from tests.support.configs import as_job
from tests.support.training import assert_same_run, lines_logged, make_run

pytestmark = pytest.mark.slow

STEPS = 400  # seconds of work: a signal needs one to be agreed upon
SAVES = {"every_steps": 100, "keep": 2}
_DEADLINE_SECONDS = 400


class Job:
    """The one Job of a JobSet, its pods as processes of this machine."""

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        config_map, job_set = manifest.documents
        self.spec = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
        (self.container,) = self.spec["template"]["spec"]["containers"]
        self.host = f"{manifest.name}-node-0-0.{job_set['spec']['network']['subdomain']}"
        self.folder = folder
        self.port = free_port()
        self.ignored = 0
        self.config = folder / "mounted.yaml"
        self.config.write_text(config_map["data"]["config.yaml"], encoding="utf-8")

    def start_pod(self, index: int) -> subprocess.Popen[bytes]:
        _, *arguments, _ = self.container["command"]
        variables = {one["name"]: self.value(one, index=index) for one in self.container["env"]}
        with open(self.folder / f"pod-{index}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "launch.cli", *arguments, str(self.config)],
                env=child_environment(JAX_NUM_CPU_DEVICES="1", **variables),
                cwd=self.container["workingDir"],
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def value(self, variable: dict[str, Any], *, index: int) -> str:
        if "valueFrom" in variable:
            field = variable["valueFrom"]["fieldRef"]["fieldPath"]
            assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            return str(index)
        host, colon, _ = variable["value"].partition(":")
        if host == self.host and colon:
            return f"127.0.0.1:{self.port}"  # the name service's part
        return variable["value"].replace("$$", "$")

    def run(self, *, preempt_at: int, run_folder: Path) -> str:
        """Start all pods, send one SIGTERM on the way; returns how the Job ended."""
        pods = {index: self.start_pod(index) for index in range(self.spec["completions"])}
        until = time.monotonic() + _DEADLINE_SECONDS
        try:
            while pods and time.monotonic() < until:
                if not self.ignored and preempt_at and lines_logged(run_folder) >= preempt_at:
                    pods[1].send_signal(signal.SIGTERM)
                    preempt_at = 0
                for index, pod in list(pods.items()):
                    if pod.poll() is None:
                        continue
                    action = self.action(pod.returncode) if pod.returncode else "Succeeded"
                    if action == "Ignore":
                        self.ignored += 1
                        pods[index] = self.start_pod(index)
                    elif action == "Succeeded":
                        del pods[index]
                    else:
                        return action
                time.sleep(0.05)
            return "Complete" if not pods else "took too long"
        finally:
            for pod in pods.values():
                pod.kill()
                pod.wait()

    def action(self, status: int) -> str:
        for rule in self.spec["podFailurePolicy"]["rules"]:
            if status in rule.get("onExitCodes", {}).get("values", []):
                return rule["action"]
        return "BackoffLimitExceeded"


def pods_config(folder: Path, *, output: str, **options: Any) -> Job:
    config = make_run(folder, steps=STEPS, output=output, mesh=(2, 1), checkpoint=SAVES, **options)
    section = {
        "on": "kubernetes",
        "image": "sae",
        "nodes": {"kind": "cpu", "count": 2},
        "working_dir": str(folder),
        "volumes": [{"kind": "claim", "claim": "data", "mount": str(folder)}],
    }
    return as_job(config, launch=section)


def test_an_evicted_pod_costs_nothing(tmp_path: Path) -> None:
    (manifest,) = render(pods_config(tmp_path, output="evicted"), command="train")
    job = Job(manifest, tmp_path)
    ended = job.run(preempt_at=5, run_folder=tmp_path / "evicted")
    logs = "".join(file.read_text() for file in tmp_path.glob("pod-*.log"))
    assert ended == "Complete", logs
    assert job.ignored == 2, "both saved and exited with 75"
    assert newest_checkpoint(tmp_path / "evicted") == STEPS

    train(make_run(tmp_path, steps=STEPS, output="undisturbed", mesh=(2, 1), checkpoint=SAVES))
    assert_same_run(tmp_path / "evicted", tmp_path / "undisturbed", step=STEPS)


def test_a_mistake_fails_the_job_at_once(tmp_path: Path) -> None:
    config = pods_config(tmp_path, output="wrong", layer=0)
    (manifest,) = render(config, command="train")
    assert Job(manifest, tmp_path).run(preempt_at=0, run_folder=tmp_path / "wrong") == "FailJob"

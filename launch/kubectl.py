"""Submitting manifests with kubectl, and following them: harvest, then the runs, then the report.

JobSets know nothing of each other, so what keeps their order is the `sae sweep` that submitted
them. It holds no state: stopped and started again it finds on the cluster what it submitted
before, leaves what runs or has run from the same manifest, and goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from activation_cache.errors import Interrupted, UserError
from launch.backends import Command
from launch.kubernetes import (
    Manifest,
    dns_name,
    kubernetes_launch,
    render,
    write_manifests,
)
from sae_train.config import Config
from sae_train.launch_kubernetes import OUR_PREFIX, KubernetesLaunch

logger = logging.getLogger(__name__)

State = Literal["absent", "at work", "done", "failed"]

_POLL_SECONDS = 15.0
_STOP_SECONDS = 0.5  # how soon a signal is answered
_TRIES = 5  # of a question to the cluster, which may be away for a while


def submit(config: Config, *, command: Command, dry_run: bool, stop: Callable[[], bool]) -> int:
    """Write a command's manifests and submit them, or, with `dry_run`, print them.

    One stage is handed over and left to the cluster; a sweep is followed to its end, for its
    stages wait for each other.

    Returns:
        0, or 1 if a stage failed on the cluster.

    Raises:
        UserError: the config can't run there, kubectl is missing or refuses.
        Interrupted: a signal came while following.
    """
    launch = kubernetes_launch(config)
    manifests = render(config, command=command)
    folder = manifest_folder(config)
    files = list(zip(manifests, write_manifests(manifests, folder), strict=True))
    logger.info("%d manifests are in %s", len(files), folder)
    if dry_run:
        sys.stdout.write("".join(manifest.text for manifest in manifests))
        return 0
    kubectl = Kubectl(launch)
    if command != "sweep":
        [(manifest, file)] = files
        kubectl.submit(manifest, file)
        logger.info("follow it with `%s`", kubectl.logs_command(manifest, follow=True))
        return 0
    return _run_sweep(files, Follower(kubectl, stop=stop), at_once=launch.at_once)


def manifest_folder(config: Config) -> Path:
    """Where the manifests go on this machine: beside the runs, unless those are in a bucket."""
    chosen = kubernetes_launch(config).manifests
    if chosen is not None:
        return Path(chosen)
    if "://" in config.output:
        return Path("kubernetes") / dns_name(config.name, identity=config.output)
    return Path(config.output) / "kubernetes"


def _run_sweep(
    files: Sequence[tuple[Manifest, Path]], follower: Follower, *, at_once: int | None
) -> int:
    of_stage = {
        stage: [pair for pair in files if pair[0].stage == stage]
        for stage in ("harvest", "train", "report")
    }
    if follower.run(of_stage["harvest"]):
        logger.error("nothing was trained: mend the cause and give the same command")
        return 1
    failed = follower.run(of_stage["train"], at_once=at_once)
    failed += follower.run(of_stage["report"])
    if failed:
        names = ", ".join(f"{one.stage} {one.run}" for one in failed)
        logger.error("failed: %s. The same command does only what is missing", names)
    return 1 if failed else 0


class Kubectl:
    """kubectl on the PATH, for one context and namespace.

    Raises:
        UserError: there is none.
    """

    def __init__(self, launch: KubernetesLaunch) -> None:
        path = shutil.which("kubectl")
        if path is None:
            raise UserError(
                "kubectl was not found on the PATH, so nothing was submitted. Install it, or take "
                "the manifests (`--dry-run` writes and prints them) to a machine that has it and "
                "give there `kubectl apply -f FILE`"
            )
        self.command = [path]
        if launch.context is not None:
            self.command += ["--context", launch.context]
        if launch.namespace is not None:
            self.command += ["--namespace", launch.namespace]

    def run(self, *arguments: str) -> str:
        """Run kubectl and return its standard output; raises `UserError` with its own words."""
        done = subprocess.run(
            [*self.command, *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            words = done.stderr.strip() or f"exit status {done.returncode}"
            raise UserError(f"kubectl {' '.join(arguments)} failed: {words}")
        return done.stdout

    def look(self, manifest: Manifest) -> tuple[State, str | None]:
        """Where a manifest's JobSet stands, and the digest of the manifest that made it."""
        text = self.run("get", "jobset", manifest.name, "--ignore-not-found", "-o", "json")
        if not text.strip():
            return "absent", None
        found = json.loads(text)
        digest = found["metadata"].get("annotations", {}).get(f"{OUR_PREFIX}digest")
        conditions = found.get("status", {}).get("conditions", [])
        true = {one["type"] for one in conditions if one.get("status") == "True"}
        state: State = (
            "failed" if "Failed" in true else "done" if "Completed" in true else "at work"
        )
        return state, digest

    def submit(self, manifest: Manifest, file: Path) -> bool:
        """Apply a manifest unless its JobSet is at work or done; returns whether it was applied.

        One that failed, or that is done and came from another config, is deleted first.

        Raises:
            UserError: one from another config is at work, or kubectl refuses.
        """
        state, digest = self.look(manifest)
        same = digest == manifest.digest
        if state == "at work" and not same:
            raise UserError(
                f"JobSet {manifest.name} is at work with another config, and both would write to "
                "the same folder: wait for it, or end it with "
                f"`{self.shown('delete', 'jobset', manifest.name)}`"
            )
        if same and state in ("at work", "done"):
            logger.info("%s %s is %s already", manifest.stage, manifest.run, state)
            return False
        if state != "absent":
            self.run("delete", "jobset", manifest.name, "--wait=true")
        self.run("apply", "-f", os.fspath(file))
        logger.info("submitted %s %s as JobSet %s", manifest.stage, manifest.run, manifest.name)
        return True

    def logs_command(self, manifest: Manifest, *, follow: bool = False) -> str:
        """The command line that shows what the pods of a stage say."""
        selector = f"jobset.sigs.k8s.io/jobset-name={manifest.name}"
        return self.shown("logs", "-l", selector, "--follow" if follow else "--tail=-1")

    def shown(self, *arguments: str) -> str:
        """A command line for the user to give."""
        return shlex.join(["kubectl", *self.command[1:], *arguments])


class Follower:
    """Submits stages in order and waits for them."""

    def __init__(self, kubectl: Kubectl, *, stop: Callable[[], bool]) -> None:
        self.kubectl = kubectl
        self.stop = stop

    def run(
        self, files: Sequence[tuple[Manifest, Path]], *, at_once: int | None = None
    ) -> list[Manifest]:
        """Submit manifests, at most `at_once` at a time, and return those that failed.

        Raises:
            Interrupted: a signal came; what is submitted goes on.
        """
        waiting = list(files)
        at_work: list[Manifest] = []
        failed: list[Manifest] = []
        while waiting or at_work:
            while waiting and (at_once is None or len(at_work) < at_once):
                manifest, file = waiting.pop(0)
                self.kubectl.submit(manifest, file)
                at_work.append(manifest)
            states = {one.name: self._state(one) for one in at_work}
            for one in at_work:
                if states[one.name] in ("failed", "absent"):
                    failed.append(one)
                    self._tell_failure(one, states[one.name])
                elif states[one.name] == "done":
                    logger.info("%s %s is done", one.stage, one.run)
            finished = [one for one in at_work if states[one.name] != "at work"]
            at_work = [one for one in at_work if states[one.name] == "at work"]
            if at_work and not finished:
                self._pause()
        return failed

    def _state(self, manifest: Manifest) -> State:
        for left in reversed(range(_TRIES)):
            try:
                return self.kubectl.look(manifest)[0]
            except UserError as error:
                if not left:
                    raise
                logger.warning("%s; asking again", error)
                self._pause()
        raise AssertionError("the loop returns or raises")

    def _tell_failure(self, manifest: Manifest, state: State) -> None:
        why = "was deleted" if state == "absent" else "failed"
        logger.error(
            "%s %s %s; `%s` and `%s` say more",
            manifest.stage,
            manifest.run,
            why,
            self.kubectl.shown("describe", "jobset", manifest.name),
            self.kubectl.logs_command(manifest),
        )

    def _pause(self) -> None:
        until = time.monotonic() + _POLL_SECONDS
        while not self.stop():
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, _STOP_SECONDS))
        raise Interrupted("stopped following; what was submitted to the cluster goes on there")

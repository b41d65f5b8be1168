"""Submitting manifests with kubectl and following them: harvest, runs, evaluation, report.

JobSets can't wait for each other, so the `sae sweep` that submits them keeps their order. It has no
state of its own: run again after a stop, it finds on the cluster what it submitted before, leaves
alone what runs or has run from the same manifest, and continues.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from activation_cache.runtime.errors import Interrupted, StorageError, UserError
from launch import run_state
from launch.clusters.common import Command, Stage, local_folder
from launch.clusters.jobset import Manifest, kubernetes_launch, render, write_manifests
from launch.config.job import Job
from launch.config.kubernetes import OUR_PREFIX, KubernetesLaunch
from launch.console import print_text
from launch.sweep.expand import expand

logger = logging.getLogger(__name__)

State = Literal["absent", "at work", "done", "failed"]

_ORDER: tuple[Stage, ...] = ("harvest", "train", "evaluate", "report")
_POLL_SECONDS = 15.0
_STOP_SECONDS = 0.5  # until a signal takes effect
_TRIES = 5  # to ask the cluster, which may be unreachable for a while


@dataclass(frozen=True)
class Found:
    """A JobSet as the cluster reports it.

    Attributes:
        digest: of the manifest that made it (`Manifest.digest`).
        created: when, in a form that sorts.
    """

    state: State
    digest: str | None = None
    created: str = ""


def submit(config: Job, *, command: Command, dry_run: bool, stop: Callable[[], bool]) -> int:
    """Write a command's manifests and submit them, or, with `dry_run`, print them.

    One stage is submitted and left to the cluster; a sweep is followed to its end, because each
    stage waits for the one before.

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
        print_text("".join(manifest.text for manifest in manifests).removesuffix("\n"))
        return 0
    kubectl = Kubectl(launch)
    kubectl.check(files)
    if command == "sweep":
        with contextlib.suppress(StorageError):  # a bucket that only the cluster may read
            run_state.check_begun([run.config for run in expand(config)])
    else:
        [(manifest, file)] = files
        kubectl.submit(manifest, file)
        logger.info("follow it with `%s`", kubectl.logs_command(manifest, follow=True))
        return 0
    at_once = 1 if config.cache.rolling else launch.at_once  # they share one window
    return _run_sweep(files, Follower(kubectl, stop=stop), at_once=at_once)


def manifest_folder(config: Job) -> Path:
    """The folder here for manifests: `launch.manifests`, or else that of `local_folder`."""
    chosen = kubernetes_launch(config).manifests
    if chosen is not None:
        return Path(chosen)
    return local_folder(config, "kubernetes")


def _run_sweep(
    files: Sequence[tuple[Manifest, Path]], follower: Follower, *, at_once: int | None
) -> int:
    """Run stage after stage. A failed harvest ends the sweep; a failed run stops no other."""
    failed: list[Manifest] = []
    newest = ""
    for stage in _ORDER:
        of_stage = [pair for pair in files if pair[0].stage == stage]
        # An evaluation or report counts as done only if nothing was trained since.
        after = newest if stage in ("evaluate", "report") else ""
        failed += follower.run(of_stage, at_once=at_once, after=after)
        newest = max(newest, follower.newest)
        if stage == "harvest" and failed:
            break
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
        """Run kubectl and return its standard output; raises `UserError` with kubectl's message."""
        done = subprocess.run(
            [*self.command, *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            words = done.stderr.strip() or f"exit status {done.returncode}"
            raise UserError(f"kubectl {' '.join(arguments)} failed: {words}")
        return done.stdout

    def look(self, manifest: Manifest) -> Found:
        """The state of a manifest's JobSet on the cluster."""
        text = self.run("get", "jobset", manifest.name, "--ignore-not-found", "-o", "json")
        if not text.strip():
            return Found(state="absent")
        found = json.loads(text)
        conditions = found.get("status", {}).get("conditions", [])
        true = {one["type"] for one in conditions if one.get("status") == "True"}
        state: State = (
            "failed" if "Failed" in true else "done" if "Completed" in true else "at work"
        )
        return Found(
            state=state,
            digest=found["metadata"].get("annotations", {}).get(f"{OUR_PREFIX}digest"),
            created=found["metadata"].get("creationTimestamp", ""),
        )

    def check(self, files: Sequence[tuple[Manifest, Path]]) -> None:
        """Ask the server whether it takes the manifests that aren't there yet; nothing changes.

        Raises:
            UserError: it doesn't, in its own words; nothing has been submitted.
        """
        new = [file for manifest, file in files if self.look(manifest).state == "absent"]
        if new:
            named = [word for file in new for word in ("-f", os.fspath(file))]
            self.run("apply", "--dry-run=server", *named)

    def submit(self, manifest: Manifest, file: Path, *, after: str = "") -> None:
        """Apply a manifest unless its JobSet is at work or done.

        One that failed is deleted first, and so is one that is done but came from another config or
        is not newer than `after`.

        Raises:
            UserError: one from another config is at work, or kubectl refuses.
        """
        found = self.look(manifest)
        same = found.digest == manifest.digest
        if found.state == "at work" and not same:
            raise UserError(
                f"JobSet {manifest.name} is at work with another config, and both would write to "
                "the same folder: wait for it, or end it with "
                f"`{self.shown('delete', 'jobset', manifest.name)}`"
            )
        if found.state == "at work" or (found.state == "done" and same and found.created >= after):
            logger.info("%s %s is %s already", manifest.stage, manifest.run, found.state)
            return
        if found.state != "absent":
            self.run("delete", "jobset", manifest.name, "--wait=true")
        self.run("apply", "-f", os.fspath(file))
        logger.info("submitted %s %s as JobSet %s", manifest.stage, manifest.run, manifest.name)

    def logs_command(self, manifest: Manifest, *, follow: bool = False) -> str:
        """The command line that shows the logs of a stage's pods."""
        selector = f"jobset.sigs.k8s.io/jobset-name={manifest.name}"
        return self.shown("logs", "-l", selector, "--follow" if follow else "--tail=-1")

    def shown(self, *arguments: str) -> str:
        """A command line for the user to run."""
        return shlex.join(["kubectl", *self.command[1:], *arguments])


class Follower:
    """Submits stages in order and waits for them."""

    def __init__(self, kubectl: Kubectl, *, stop: Callable[[], bool]) -> None:
        self.kubectl = kubectl
        self.stop = stop
        self.newest = ""  # when the newest JobSet that was followed was made

    def run(
        self, files: Sequence[tuple[Manifest, Path]], *, at_once: int | None, after: str = ""
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
                self.kubectl.submit(manifest, file, after=after)
                at_work.append(manifest)
            still = []
            for one in at_work:
                state = self._state(one)
                if state == "at work":
                    still.append(one)
                elif state == "done":
                    logger.info("%s %s is done", one.stage, one.run)
                else:
                    failed.append(one)
                    self._tell_failure(one, state)
            if len(still) == len(at_work):
                self._pause()
            at_work = still
        return failed

    def _state(self, manifest: Manifest) -> State:
        for left in reversed(range(_TRIES)):
            try:
                found = self.kubectl.look(manifest)
            except UserError as error:
                if not left:
                    raise
                logger.warning("%s; asking again", error)
                self._pause()
            else:
                self.newest = max(self.newest, found.created)
                return found.state
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
        raise Interrupted("stopped following; what was submitted to the cluster continues there")

"""A stage that several processes share: starting them, and joining them from inside one."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from activation_cache.runtime import exchange, processes
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage.files import StoragePath
from launch import exit_codes
from launch.config.job import Job
from launch.config.local import LocalLaunch
from launch.processes.supervise import SUPERVISOR, stop_with_supervisor, supervise
from sae_train.config.file import resolved_yaml

WORDS = "SAE_WORDS"  # the file in which a process writes for its supervisor why it ended


def starts_here(config: Job) -> bool:
    """Does this process start a group for the stages of this config, not being in one itself?"""
    alone = processes.NUM_PROCESSES not in os.environ
    return isinstance(config.launch, LocalLaunch) and config.launch.processes > 1 and alone


def run_stage(
    stage: str,
    config: Job,
    *,
    devices: int,
    beside: Sequence[Job] = (),
    target: StoragePath | None = None,
    options: Sequence[str] = (),
    gpus: Sequence[str] | None = None,
    progress: Callable[[], Any] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run `sae <stage>` in as many processes as the config's `launch` section says.

    Args:
        devices: how many they need together, for CPUs made to look like several.
        beside: further configs for the command, of runs that train in the same processes.
        target: the command's target instead of a file with this config.
        options: overrides and flags.
        gpus: that they share; None: all that this process sees.
        progress: a value that changes when work has been saved (`supervise`).

    Raises:
        UserError: a process reported the user's mistake.
        Interrupted: all were stopped; everything is saved.
        RuntimeError: processes were lost too often without saving anything new.
    """
    assert isinstance(config.launch, LocalLaunch)
    with tempfile.TemporaryDirectory(prefix="sae-") as scratch:
        words = Path(scratch, "words")
        targets = [] if target is None else [str(target)]
        for number, one in enumerate([] if target else [config, *beside]):
            file = Path(scratch, f"config{number or ''}.yaml")
            file.write_text(resolved_yaml(one), encoding="utf-8")
            targets.append(str(file))
        command = [sys.executable, "-m", "launch.cli", stage, *targets, *options]
        code = supervise(
            command + _verbosity(),
            launch=config.launch,
            devices=devices,
            environment={WORDS: str(words)},
            gpus=gpus,
            progress=progress,
            stop=stop,
        )
        reason = words.read_text(encoding="utf-8") if words.exists() else ""
    if code == exit_codes.MISTAKE:
        raise UserError(reason or f"a process of `sae {stage}` refused its command line")
    if code == exit_codes.STOPPED:
        raise Interrupted(reason or f"`sae {stage}` was stopped by a signal; what is saved stays")
    if code != exit_codes.DONE:
        raise RuntimeError(
            f"`sae {stage}` lost processes again and again (the last with status {code}); its "
            "last lines are above. What is saved stays: the same command continues"
        )


def _verbosity() -> list[str]:
    level = logging.getLogger("launch").getEffectiveLevel()
    return ["-v"] if level <= logging.DEBUG else ["-q"] if level >= logging.WARNING else []


def join(*configs: Job, stop: Callable[[], bool]) -> None:
    """Join the group this process was started in, if any, and compare configs and code versions.

    Raises:
        UserError: the processes were started with different configs or code.
        Interrupted: `stop` turned true while this process waited for the others.
    """
    processes.join(stop=stop)
    if processes.process_count() > 1:
        import activation_cache
        import launch
        import sae_train

        version = processes.code_version(activation_cache, sae_train, launch)
        exchange.same_everywhere("code version", version)
        exchange.same_everywhere("config", "".join(map(resolved_yaml, configs)))
        if os.environ.get(SUPERVISOR):
            stop_with_supervisor()


def tell(command: str, reason: str, *, remedy: str = "") -> None:
    """Report why this process ends: to its supervisor, which prints it once, or on stderr."""
    if file := os.environ.get(WORDS):
        Path(file).write_text(reason, encoding="utf-8")
    else:
        sys.stderr.write(f"sae {command}: {reason}{remedy}\n")


def end(code: int) -> int:
    """The exit status of a command; in a group, leave the group first.

    Done or stopped, all processes get here and leave together. Otherwise this one ends at once,
    without waiting for the others: they notice, and end too.
    """
    if processes.process_count() > 1:
        if code not in (exit_codes.DONE, exit_codes.STOPPED):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        processes.leave()
    return code


def end_broken() -> None:
    """After an unexpected exception: in a group print it and end at once, alone do nothing."""
    if processes.process_count() > 1:
        traceback.print_exc()
        end(exit_codes.BUG)

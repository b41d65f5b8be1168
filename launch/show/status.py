"""`sae status`: how far each run of a folder is, from its files alone."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from activation_cache.storage.files import storage_path
from activation_cache.storage.locks import is_locked
from launch.clusters.slurm_queue import QueueView, queue_view
from launch.config.job import Job
from launch.run_state import needs_evaluation, needs_release
from launch.show.rolling_line import rolling_line
from launch.sweep.expand import expand
from launch.targets import other_runs
from sae_train.config.file import FILE_NAME
from sae_train.latents.reader import has_latents, open_latents
from sae_train.probe.record import ProbeRecord, read_probe
from sae_train.runs.folder import RunFolder, State, read_run

_STYLES = {"trained": "green", "running": "cyan", "stopped": "yellow", "failed": "red"}


def status_table(config: Job) -> Table:
    """One row per run, those of a sweep that have not started included, then an earlier config's.

    Raises:
        UserError: a run's folder holds damaged files.
    """
    alone = storage_path(config.output)
    runs = [(alone.name, alone, config)]
    if config.sweep is not None:
        made = expand(config)
        runs = [(run.name, run.folder, run.config) for run in made]
        runs += [(name, folder, config) for name, folder in other_runs(config, made).items()]
    lines = (
        [] if (line := rolling_line(config, [folder for _, folder, _ in runs])) is None else [line]
    )
    busy = ", a process is at work" if is_locked(storage_path(config.output)) else ""
    queue = queue_view(config)
    table = Table(title=f"{config.name} in {config.output}{busy}", title_justify="left")
    lines += [queue.others] if queue is not None and queue.others else []
    if lines:
        table.caption, table.caption_justify = Text("\n".join(lines)), "left"
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for heading in ("step", "loss", "L0", "FVU", "tokens/s", "restarts", "checkpoint"):
        table.add_column(heading, justify="right")
    table.add_column("evaluated")
    table.add_column("released")
    # A terminal is narrow: one more column only where it says something.
    with_latents = any(has_latents(folder) for _, folder, _ in runs)
    if with_latents:
        table.add_column("latents")
    begun = {folder: read_run(folder) for _, folder, _ in runs if (folder / FILE_NAME).exists()}
    fvus = {folder: found for folder, run in begun.items() if (found := _measured_fvus(run))}
    if fvus:
        table.add_column("evaluated FVU, not of outliers, median")
    probed = {folder: record for _, folder, _ in runs if (record := read_probe(folder))}
    if probed:
        table.add_column("probed")
    if queue is not None:
        table.add_column("Slurm job", no_wrap=True)
    for name, folder, run_config in runs:
        if run := begun.get(folder):
            row = [*_row(name, run, queue), *([_latents(run)] if with_latents else [])]
            row += [fvus.get(folder, "-")] if fvus else []
            row += [_probed(run, probed.get(folder))] if probed else []
        else:
            row = [name, "not started", f"0/{run_config.train.steps}"]
            row += ["-"] * (8 + with_latents + bool(fvus) + bool(probed))
        if queue is not None:
            row.append(queue.runs.get(name, "-"))
        table.add_row(*row)
    return table


def _row(name: str, run: RunFolder, queue: QueueView | None) -> list[str | Text]:
    last: dict[str, Any] = dict(run.metrics[-1]) if run.metrics else {}
    now: State = run.state
    if now in ("not started", "stopped") and queue is not None and queue.is_running(name):
        now = "running"  # on another machine, whose lock may not be seen from here
    state = Text(now, style=_STYLES.get(now, ""))
    if run.failure is not None:
        state.append(f": {run.failure}", style="default")
    return [
        name,
        state,
        f"{max(last.get('step', 0), run.checkpoint_step or 0)}/{run.config.train.steps}",
        _number(last.get("loss"), ".4g"),
        _number(last.get("l0"), ".1f"),
        _number(last.get("fvu"), ".3f"),
        _number(last.get("tokens_per_second"), ",.0f"),
        str(run.restarts),
        "-" if run.checkpoint_step is None else str(run.checkpoint_step),
        _evaluated(run),
        _fresh(bool(run.release), stale=run.state == "trained" and needs_release(run.path)),
    ]


def _evaluated(run: RunFolder) -> str:
    if run.evaluation is None:
        return "no"
    if needs_evaluation(run.path):
        return "outdated"
    delta = run.evaluation.get("delta_loss")
    return "yes" if delta is None else f"delta loss {delta:.3f}"


def _measured_fvus(run: RunFolder) -> str:
    """The three FVUs of evaluation.json; "" where it lacks one."""
    keys = ("fvu", "fvu_without_outlying", "fvu_median_token")
    values = [(run.evaluation or {}).get(key) for key in keys]
    return "" if None in values else " / ".join(f"{value:.3f}" for value in values)


def _latents(run: RunFolder) -> str:
    if not has_latents(run.path):
        return "no"
    # Those of a released SAE, which has no checkpoint yet, are of step 0.
    step = open_latents(run.path).record.step
    return _fresh(True, stale=step != (run.checkpoint_step or 0))


def _probed(run: RunFolder, record: ProbeRecord | None) -> str:
    if record is None:
        return "no"
    if record.step != (run.checkpoint_step or 0):
        return "outdated"
    return f"{len(record.data_sets)} data sets"


def _fresh(present: bool, *, stale: bool) -> str:
    return "no" if not present else "outdated" if stale else "yes"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"

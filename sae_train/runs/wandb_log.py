"""A run's metrics at Weights & Biases (`train.wandb`): sent from metrics.jsonl by another process.

Nothing of W&B is imported where training runs, so that nothing of it can fail, hang or catch a
signal there. The other process reads the rows that metrics.jsonl gets and ends once training has:
its standard input is then closed. It is given some seconds for the last rows; after that it is
killed, and `sae log RUN --wandb` sends what is missing.

    python -m sae_train.runs.wandb_log RUN STEP      what training starts, STEP being where it began
"""

from __future__ import annotations

import logging
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from activation_cache.runtime.closing import Closing
from activation_cache.runtime.errors import UserError
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.files import StoragePath, read_json, storage_path, write_json
from sae_train.config.file import read_run_config
from sae_train.config.run import Config
from sae_train.runs.metrics_file import read_metrics

logger = logging.getLogger(__name__)

FILE = "wandb.json"
_SECONDS_FOR_THE_LAST_ROWS = 20.0
_SECONDS_BETWEEN_LOOKS = 10.0
_SECONDS_TO_CONNECT = 60.0


class WandbSender(Closing):
    """The other process, from `start` to `close`; whatever becomes of it, training goes on."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, from_step: int, anew: bool) -> None:
        """Begin to send, if the config asks for it.

        Args:
            from_step: the step of the checkpoint that training goes on from.
            anew: the run is started from scratch, and gets a new id at W&B.
        """
        if self._config.train.wandb is None:
            return
        folder = storage_path(self._config.output)
        try:
            if anew:
                (folder / FILE).unlink(missing_ok=True)
            self._process = subprocess.Popen(
                _command(str(folder), from_step),
                stdin=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is for training, which then ends it
            )
        except (OSError, UserError) as error:
            logger.warning("%s: nothing is sent to W&B: %s", folder, error)

    def close(self) -> None:
        """Wait for the last rows to be sent, but not long."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_SECONDS_FOR_THE_LAST_ROWS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            logger.warning(
                "%s: W&B did not take the last rows within %g s: `sae log %s --wandb` sends them",
                self._config.output,
                _SECONDS_FOR_THE_LAST_ROWS,
                self._config.output,
            )


def _command(folder: str, from_step: int) -> list[str]:
    return [sys.executable, "-m", "sae_train.runs.wandb_log", folder, str(from_step)]


def send(
    folder: StoragePath,
    *,
    config: Config,
    from_step: int = 0,
    wait: Callable[[], bool] = lambda: True,
) -> int:
    """Send a run's rows under the run's own id at W&B, those it has already left out.

    Args:
        config: of the run; `train.wandb` says where to.
        from_step: the step up to which rows were sent, where W&B can't tell: offline.
        wait: return when it is time to look for further rows, and whether these are the last.

    Returns:
        How many rows were sent.

    Raises:
        UserError: the package wandb isn't installed.
        Exception: whatever W&B raises.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "W&B needs the package wandb: install the extra 'wandb' "
            "(pip install 'open-gemma-scope[wandb]')"
        ) from error
    section = config.train.wandb
    assert section is not None
    run_id, is_new = _run_id(folder)
    run = wandb.init(
        project=section.project,
        entity=section.entity,
        name=section.name or config.name,
        group=section.group,
        tags=section.tags,
        mode=section.mode,
        id=run_id,
        resume="allow",
        dir=None if isinstance(folder, BucketPath) else str(folder),
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(console="off", silent=True, init_timeout=_SECONDS_TO_CONNECT),
    )
    # W&B counts on from the step after its last; an offline run begins at 0 each time.
    sent = max(run.starting_step - 1, 0 if is_new or not run.offline else from_step)
    number, is_last = 0, False
    while not is_last:
        is_last = wait()
        for row in read_metrics(folder):
            if row["step"] > sent:
                run.log(_without_step(row), step=row["step"])
                number, sent = number + 1, row["step"]
    run.finish()
    return number


def send_finished(folder: StoragePath, *, config: Config) -> int:
    """`send` all rows that a run has; returns how many were sent.

    Raises:
        UserError: `train.wandb` isn't set, or W&B doesn't take them.
    """
    if config.train.wandb is None:
        raise UserError(
            f"{folder}: its config has no train.wandb, which says where to send its metrics: give "
            "train.wandb.project=NAME too"
        )
    try:
        return send(folder, config=config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder}: W&B did not take its metrics: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0]} ({type(error).__name__})" if lines else type(error).__name__


def _without_step(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "step"}


def _run_id(folder: StoragePath) -> tuple[str, bool]:
    """The run's id at W&B, kept in its folder, and whether it was made just now."""
    path = folder / FILE
    if path.exists():
        return str(read_json(path)["id"]), False
    made = secrets.token_hex(8)
    write_json(path, {"id": made})
    return made, True


def _main(folder: str, from_step: str) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for training, which ends this process
    ended = threading.Event()

    def until_training_ends() -> None:
        sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=until_training_ends, daemon=True).start()
    run = storage_path(folder)
    try:
        send(
            run,
            config=read_run_config(run),
            from_step=int(from_step),
            wait=lambda: ended.wait(_SECONDS_BETWEEN_LOOKS),
        )
    except Exception as error:
        sys.stderr.write(
            f"{folder}: nothing more is sent to W&B, training goes on: {_reason(error)}. "
            f"`sae log {folder} --wandb` sends the rows later\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))

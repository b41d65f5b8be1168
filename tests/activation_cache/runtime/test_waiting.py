"""A process that waits for others says for whom, and hears a signal."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable

import pytest

from activation_cache.runtime import processes, waiting
from activation_cache.runtime.errors import Interrupted, UserError

SLURM = {
    "SLURM_PROCID": "0",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "2",
}
OURS = {"SAE_NUM_PROCESSES": "2", "SAE_PROCESS_ID": "1", "SAE_COORDINATOR": "there:8476"}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b,c"}


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Stands for JAX's own wait: the other processes come only when the test is over."""
    monkeypatch.setattr(waiting, "TELL_SECONDS", 0.05)
    over = threading.Event()
    return lambda: over.wait(60) and None


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (SLURM, "3 more processes of Slurm step 17.2"),
        (OURS, "1 more process at there:8476"),
        (TPU, "2 more processes of the TPU slice a,b,c"),
        ({"SAE_AUTO_JOIN": "1"}, "the other processes of the TPU slice"),
    ],
)
def test_it_is_said_for_whom(
    variables: dict[str, str],
    words: str,
    others: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    for name in (*SLURM, *OURS, *TPU, "SAE_AUTO_JOIN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes._started_in_a_group()
    caplog.set_level(logging.WARNING)
    with pytest.raises(Interrupted, match=f"stopped while it waited for {words}"):
        processes._wait_for_others(others, stop=lambda: len(caplog.records) == 2)
    said = rf"waiting for {words}, \d+ s now\. To work alone set SAE_NUM_PROCESSES=1"
    assert re.search(said, caplog.text)


def test_it_ends_when_they_do_not_come(others: Callable[[], None], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "_JOIN_SECONDS", 0.2)
    with pytest.raises(TimeoutError, match=r"didn't come within 0\.2 s\. To work alone"):
        processes._wait_for_others(others, stop=lambda: False)


def test_what_fails_while_connecting_is_raised_where_it_was_asked():
    def connect() -> None:
        raise UserError("SAE_COORDINATOR must be host:port")

    with pytest.raises(UserError, match="SAE_COORDINATOR"):
        processes._wait_for_others(connect, stop=lambda: False)
    processes._wait_for_others(lambda: None, stop=lambda: False)

"""Processes that work as one: joining them, agreeing, and telling the others.

The only file that knows of processes. Everything below works unchanged, and costs nothing, in a
command that runs as a single process. JAX's distributed runtime does the work: its coordination
service (in process 0) carries the words that are exchanged here, notices processes that are lost,
and agrees on the step at which all stop.

Whatever involves several processes must be called by all of them in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from activation_cache.runtime.errors import Interrupted, UserError

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

# Set for every process of a group by whatever starts it: our launcher, a Kubernetes manifest.
COORDINATOR = "SAE_COORDINATOR"  # host:port of process 0
NUM_PROCESSES = "SAE_NUM_PROCESSES"
PROCESS_ID = "SAE_PROCESS_ID"
HEARTBEAT = "SAE_HEARTBEAT_SECONDS"
AUTO_JOIN = "SAE_AUTO_JOIN"  # 1: let JAX find the group where nothing here tells that there is one

_HEARTBEAT_SECONDS = 60
_JOIN_SECONDS = 300  # machines of one job start minutes apart
_WAIT_MS = 24 * 3600 * 1000  # a wait for another process ends when that process is lost
SEE_OFF_MS = 30 * 1000
POLL_MS = 500
_STOP_KEY = "sae/stop_at"
ASKED_KEY = "sae/asked"  # set once, by the first process that is asked to stop or can't go on
_STOP_NOTICE = 4  # calls: twice what two processes can be apart

Value = TypeVar("Value")


@dataclasses.dataclass
class _Group:
    """What this process knows of its group."""

    joined: bool = False
    exchanges: int = 0  # numbers what is exchanged; all processes count alike
    stop_questions: dict[str, int] = dataclasses.field(default_factory=dict)  # by scope
    stop_at: dict[str, int] = dataclasses.field(default_factory=dict)


_group = _Group()


def join() -> None:
    """Join the group of processes this one was started in, if it was started in one.

    Called once per command, before any device is used. A group is named by the variables above,
    or found by JAX on Slurm (in a step of several tasks) and on TPU slices of several hosts.

    Raises:
        UserError: a variable is missing or wrong.
    """
    if _group.joined or not _started_in_a_group():
        return
    heartbeat = _integer(HEARTBEAT, minimum=5, default=_HEARTBEAT_SECONDS)
    # A process is given up after `heartbeat_timeout_seconds`; the news takes a moment more.
    timings: dict[str, Any] = {
        "heartbeat_timeout_seconds": max(3, heartbeat - 5),
        "initialization_timeout": _JOIN_SECONDS,
        "shutdown_timeout_seconds": heartbeat,
    }
    with _own_signal_handlers():
        _initialize(timings)
    _group.joined = True
    if process_count() > 1:
        logger.info("joined: process %d of %d", process_index(), process_count())


def _initialize(timings: dict[str, Any]) -> None:
    import jax

    if os.environ.get(NUM_PROCESSES):
        count = _integer(NUM_PROCESSES, minimum=1)
        index = _integer(PROCESS_ID, minimum=0, maximum=count - 1)
        address = os.environ.get(COORDINATOR, "")
        if ":" not in address:
            raise UserError(f"{COORDINATOR} must be host:port of process 0; it is {address!r}")
        jax.distributed.initialize(address, count, index, **timings)
    else:
        jax.distributed.initialize(**timings)


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Put back the signal handlers that JAX's runtime replaces with its own as it joins.

    Its own notice of a SIGTERM reaches the others up to seconds later; `agree_to_stop` doesn't use
    it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, handler)


def leave() -> None:
    """Leave the group after work that all have finished; waits for the others."""
    if _group.joined:
        import jax

        jax.distributed.shutdown()
        _group.joined = False


def _started_in_a_group() -> bool:
    environment = os.environ
    if environment.get(NUM_PROCESSES):
        return _integer(NUM_PROCESSES, minimum=1) > 1
    if environment.get(AUTO_JOIN) == "1":
        return True
    # A batch script has SLURM_PROCID too; only a step that srun started has its nodes.
    slurm_step = "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment
    if slurm_step and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def launched_index() -> int:
    """This process's number as far as the environment tells it, without JAX; 0 if alone."""
    if not _started_in_a_group():
        return 0
    names = (PROCESS_ID, "SLURM_PROCID", "TPU_WORKER_ID")
    numbers = (os.environ.get(name, "") for name in names)
    return next((int(number) for number in numbers if number.isdecimal()), 0)


def _integer(
    name: str, *, minimum: int, maximum: int | None = None, default: int | None = None
) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or int(text) < minimum:
        raise UserError(f"{name} must be a whole number of at least {minimum}; it is {text!r}")
    if maximum is not None and int(text) > maximum:
        raise UserError(f"{name} must be at most {maximum}; it is {text!r}")
    return int(text)


def process_index() -> int:
    """This process's number, from 0."""
    if not _group.joined:
        return 0
    import jax

    return jax.process_index()


def process_count() -> int:
    """How many processes work together."""
    if not _group.joined:
        return 1
    import jax

    return jax.process_count()


def is_main() -> bool:
    """Is this process 0, the one that writes what only one may write?"""
    return process_index() == 0


def barrier(name: str) -> None:
    """Return when all processes are here."""
    if process_count() > 1:
        number = next_exchange()
        _client().wait_at_barrier(f"sae/{number}/{name}", _WAIT_MS)


def told_by_main(
    name: str, work: Callable[[], Value], *, stop: Callable[[], bool] | None = None
) -> Value:
    """Do `work` in process 0 alone; all processes return its result, which JSON can carry.

    Args:
        stop: for work that takes long and asks `stop_asked` now and then: asked in the processes
            that wait, so that a signal to one of them reaches process 0.

    Raises:
        UserError: `work` did; raised in every process, in the same words.
        Interrupted: the same.
    """
    if process_count() == 1:
        return work()
    key = f"sae/{next_exchange()}/{name}"
    if not is_main():
        return wait_for_main(key, stop=stop)
    try:
        result = work()
    except UserError as error:
        say(key, {"mistake": str(error)})
        _see_off(key)
        raise
    except Interrupted as stopped:
        say(key, {"stopped": str(stopped)})
        raise
    say(key, {"result": result})
    return result


def wait_for_main(
    key: str, *, stop: Callable[[], bool] | None = None, patience_ms: int = _WAIT_MS
) -> Any:
    """The result that process 0 tells, or the exception."""
    told, waited = None, 0
    while told is None:
        if waited >= patience_ms:
            raise TimeoutError(f"no word from process 0 in {patience_ms} ms: {key}")
        told = hear(key, wait_ms=POLL_MS)
        waited += POLL_MS
        if stop is not None:
            stop_asked(stop)
    if "mistake" in told:
        _see_off(key)
        raise UserError(told["mistake"])
    if "stopped" in told:
        raise Interrupted(told["stopped"])
    return told["result"]


def say(key: str, words: dict[str, Any]) -> None:
    """Tell everybody, under a key that is used once."""
    _client().key_value_set(key, json.dumps(words))


def say_first(key: str, words: dict[str, Any]) -> None:
    """Tell everybody, unless somebody was first: then their words stay."""
    with contextlib.suppress(Exception):
        say(key, words)


def hear(key: str, *, wait_ms: int = 0) -> dict[str, Any] | None:
    """What was said under a key, if it is within this time."""
    import jax

    try:
        if wait_ms:
            return json.loads(_client().blocking_key_value_get(key, wait_ms))
        return json.loads(_client().key_value_try_get(key))
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith(("DEADLINE_EXCEEDED", "NOT_FOUND")):
            return None
        raise


def gathered(name: str, value: Any) -> list[Any]:
    """What every process gave, in the order of their numbers; small values that JSON can carry."""
    if process_count() == 1:
        return [value]
    return gathered_under(f"{next_exchange()}/{name}", value)


def gathered_under(name: str, value: Any) -> list[Any]:
    """`gathered`, from any thread: `name` is one that no other exchange has."""
    if process_count() == 1:
        return [value]
    folder = f"sae/{name}"
    _client().key_value_set(f"{folder}/{process_index()}", json.dumps(value))
    return [
        json.loads(_client().blocking_key_value_get(f"{folder}/{index}", _WAIT_MS))
        for index in range(process_count())
    ]


def same_everywhere(label: str, value: str) -> None:
    """Check that all processes were started alike.

    Args:
        label: what is compared, as in "was started with another {label}".
        value: a text with a line for each thing that can differ.

    Raises:
        UserError: in every process, naming the first line that differs and where.
    """
    values = gathered(label, value)
    for index, other in enumerate(values):
        if other != values[0]:
            here, there = _first_difference(values[0], other)
            _see_off(f"sae/{next_exchange()}/{label}")
            raise UserError(
                f"process {index} was started with another {label} than process 0: it has "
                f"{there!r} where process 0 has {here!r}. All processes of a group need the same "
                f"{label}: start them with the same command from the same installation."
            )


def _see_off(key: str) -> None:
    """Before all end with the same mistake: the words pass through process 0, which goes last."""
    with contextlib.suppress(Exception):
        _client().wait_at_barrier(f"{key}/seen", SEE_OFF_MS)
    if is_main():
        time.sleep(1.0)


def _first_difference(a: str, b: str) -> tuple[str, str]:
    lines = zip((*a.splitlines(), "nothing"), (*b.splitlines(), "nothing"), strict=False)
    return next(((x.strip(), y.strip()) for x, y in lines if x != y), (a, b))


def sums_of_all(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array summed over the processes, in their order, so that all get the same bits.

    Names, shapes and dtypes must be the same everywhere.
    """
    if process_count() == 1:
        return dict(arrays)
    import numpy as np
    from jax.experimental import multihost_utils

    summed = {}
    for name, array in arrays.items():
        # As bytes: JAX would make 32-bit numbers of 64-bit ones.
        flat = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(flat))
        parts = [np.frombuffer(row.tobytes(), array.dtype).reshape(array.shape) for row in rows]
        summed[name] = np.sum(parts, axis=0, dtype=array.dtype)
    return summed


def stop_asked(stop: Callable[[], bool]) -> bool:
    """Has any process been asked to stop, or found a mistake? Any may ask, at any time."""
    if process_count() == 1:
        return stop()
    if stop():
        say_first(ASKED_KEY, {})
        return True
    return hear(ASKED_KEY) is not None


def agree_to_stop(stop: Callable[[], bool], *, scope: str = "all") -> bool:
    """Should the processes of a scope stop now? The same answer in all, at the same call.

    All of them call it equally often, and with work between the calls that keeps any two of them
    within two calls of each other. The first whose `stop` says yes names a call that none can have
    reached yet; everybody learns of it on the way there.
    """
    if process_count() == 1:
        return stop()
    question = _group.stop_questions[scope] = _group.stop_questions.get(scope, 0) + 1
    key = f"{_STOP_KEY}/{scope}"
    if scope not in _group.stop_at and stop():
        # Somebody else may have been first: then theirs counts.
        say_first(key, {"question": question + _STOP_NOTICE})
    if scope not in _group.stop_at and (said := hear(key)):
        _group.stop_at[scope] = said["question"]
    return scope in _group.stop_at and question >= _group.stop_at[scope]


def code_version(*packages: Any) -> str:
    """A line for each package with a hash of its source files, and one with JAX's version."""
    import jax

    lines = [f"jax {jax.__version__}"]
    for package in packages:
        digest = hashlib.sha256()
        folder = Path(package.__file__).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
        lines.append(f"{package.__name__} {digest.hexdigest()[:16]}")
    return "\n".join(lines)


def next_exchange() -> int:
    """A number for the key of what is exchanged next: the same in all processes."""
    _group.exchanges += 1
    return _group.exchanges


def _client() -> Any:
    from jax._src import distributed  # the only way to the coordination service's words

    return distributed.global_state.client

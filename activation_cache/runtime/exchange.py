"""Messages between the processes of a group: barriers, values, shared work, when to stop.

JAX's coordination service, in process 0, carries them (`coordination`). Every function here that
waits for other processes must be called by all of them in the same order. In a single process all
of them return at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from activation_cache.runtime.coordination import client
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.processes import is_main, process_count, process_index
from activation_cache.runtime.waiting import Waiting

if TYPE_CHECKING:
    import numpy as np


_WAIT_MS = 24 * 3600 * 1000  # a wait for another process ends when that process is lost
SEE_OFF_MS = 30 * 1000
POLL_MS = 500
_STOP_KEY = "sae/stop_at"
ASKED_KEY = "sae/asked"  # set once, by the first process that must stop or has failed
_STOP_NOTICE = 4  # calls of `agree_to_stop`: twice as many as two processes can be apart
Value = TypeVar("Value")


@dataclasses.dataclass
class _State:
    """Counters that make keys unique; they are the same in all processes of a group."""

    exchanges: int = 0
    stop_questions: dict[str, int] = dataclasses.field(default_factory=dict)  # by scope
    stop_at: dict[str, int] = dataclasses.field(default_factory=dict)


_state = _State()


def barrier(name: str) -> None:
    """Return when all processes have called this."""
    if process_count() > 1:
        number = next_exchange()
        client().wait_at_barrier(f"sae/{number}/{name}", _WAIT_MS)


def run_on_main_and_broadcast(
    name: str, work: Callable[[], Value], *, stop: Callable[[], bool] | None = None
) -> Value:
    """Do `work` in process 0 alone; all processes return its result, which JSON must carry.

    Args:
        stop: for long work that calls `stop_asked` from time to time. The waiting processes call
            it too, so that a signal to one of them reaches process 0.

    Raises:
        UserError: `work` raised it; raised in every process, with the same message.
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
        publish(key, {"mistake": str(error)})
        _see_off(key)
        raise
    except Interrupted as stopped:
        publish(key, {"stopped": str(stopped)})
        raise
    publish(key, {"result": result})
    return result


def wait_for_main(
    key: str, *, stop: Callable[[], bool] | None = None, patience_ms: int = _WAIT_MS
) -> Any:
    """The result that process 0 publishes under a key.

    Raises:
        UserError: process 0 published a mistake.
        Interrupted: process 0 was asked to stop.
        TimeoutError: it published nothing in `patience_ms`.
    """
    published, waited = None, 0
    waiting = Waiting(f"process 0, for the {key.rpartition('/')[2]}")
    while published is None:
        if waited >= patience_ms:
            raise TimeoutError(f"process 0 published nothing in {patience_ms} ms: {key}")
        published = poll(key, wait_ms=POLL_MS)
        waited += POLL_MS
        waiting.tell()
        if stop is not None:
            stop_asked(stop)
    if "mistake" in published:
        _see_off(key)
        raise UserError(published["mistake"])
    if "stopped" in published:
        raise Interrupted(published["stopped"])
    return published["result"]


def publish(key: str, message: dict[str, Any]) -> None:
    """Send a message to all processes, under a key that is used once."""
    client().key_value_set(key, json.dumps(message))


def publish_first(key: str, message: dict[str, Any]) -> None:
    """`publish`, unless another process has already published under this key."""
    with contextlib.suppress(Exception):
        publish(key, message)


def poll(key: str, *, wait_ms: int = 0) -> dict[str, Any] | None:
    """The message published under a key; None if there is none after `wait_ms`."""
    import jax

    try:
        if wait_ms:
            return json.loads(client().blocking_key_value_get(key, wait_ms))
        return json.loads(client().key_value_try_get(key))
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith(("DEADLINE_EXCEEDED", "NOT_FOUND")):
            return None
        raise


def gathered(name: str, value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers; JSON must carry them."""
    return gathered_under(f"{next_exchange()}/{name}", value)


def gathered_under(name: str, value: Any) -> list[Any]:
    """`gathered`, from any thread; `name` must be one that no other exchange uses."""
    if process_count() == 1:
        return [value]
    folder = f"sae/{name}"
    client().key_value_set(f"{folder}/{process_index()}", json.dumps(value))
    return [
        json.loads(client().blocking_key_value_get(f"{folder}/{index}", _WAIT_MS))
        for index in range(process_count())
    ]


def same_everywhere(label: str, value: str) -> None:
    """Check that all processes were started with the same config or code.

    Args:
        label: what is compared, as in "was started with another {label}".
        value: a text with one line for each setting that can differ.

    Raises:
        UserError: in every process, naming the first line that differs and the process.
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
    """When all processes end with one mistake, let process 0, which carries it, end last."""
    with contextlib.suppress(Exception):
        client().wait_at_barrier(f"{key}/seen", SEE_OFF_MS)
    if is_main():
        time.sleep(1.0)


def _first_difference(a: str, b: str) -> tuple[str, str]:
    lines = zip((*a.splitlines(), "nothing"), (*b.splitlines(), "nothing"), strict=False)
    return next(((x.strip(), y.strip()) for x, y in lines if x != y), (a, b))


def sums_of_all(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array summed over the processes, in their order, so that all compute the same bits.

    Names, shapes and dtypes must be the same everywhere.
    """
    if process_count() == 1:
        return dict(arrays)
    import numpy as np
    from jax.experimental import multihost_utils

    summed = {}
    for name, array in arrays.items():
        # As bytes, since JAX would turn 64-bit numbers into 32-bit ones.
        flat = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(flat))
        parts = [np.frombuffer(row.tobytes(), array.dtype).reshape(array.shape) for row in rows]
        summed[name] = np.sum(parts, axis=0, dtype=array.dtype)
    return summed


def stop_asked(stop: Callable[[], bool]) -> bool:
    """Has any process been asked to stop, or failed? Any process may call this at any time."""
    if process_count() == 1:
        return stop()
    if stop():
        publish_first(ASKED_KEY, {})
        return True
    return poll(ASKED_KEY) is not None


def agree_to_stop(stop: Callable[[], bool], *, scope: str = "all") -> bool:
    """Should the processes of a scope stop now? The same answer in all, at the same call.

    All of them call it equally often, with work between the calls that keeps any two of them within
    two calls of each other. The first whose `stop` says yes publishes the number of a call that no
    process can have reached yet, and the others read it before they reach it.
    """
    if process_count() == 1:
        return stop()
    question = _state.stop_questions[scope] = _state.stop_questions.get(scope, 0) + 1
    key = f"{_STOP_KEY}/{scope}"
    if scope not in _state.stop_at and stop():
        # If another process was first, its number counts.
        publish_first(key, {"question": question + _STOP_NOTICE})
    if scope not in _state.stop_at and (agreed := poll(key)):
        _state.stop_at[scope] = agreed["question"]
    return scope in _state.stop_at and question >= _state.stop_at[scope]


def next_exchange() -> int:
    """A number for the key of the next exchange, the same in all processes."""
    _state.exchanges += 1
    return _state.exchanges


def shared(
    name: str,
    work: Callable[[], None],
    *,
    finish: Callable[[], Value],
    stop: Callable[[], bool],
) -> Value:
    """Have every process do its share, `work`; when all have, process 0 calls `finish`.

    The shares may be of any length, and have no step in common. `work` calls `stop_asked` often,
    and raises `Interrupted` when that says yes.

    Returns:
        What `finish` returned, in every process.

    Raises:
        Interrupted: a process was asked to stop before all had done their share. Either all
            processes raise it or none.
        UserError: `work` or `finish` raised it in one process; raised in every process.
    """
    if process_count() == 1:
        work()
        return finish()
    folder = f"sae/{next_exchange()}/{name}"

    def whole() -> Value:
        try:
            work()
            for index in range(1, process_count()):
                key = f"{folder}/done/{index}"
                waiting = Waiting(f"process {index}, which does its share of the {name}")
                while poll(key, wait_ms=POLL_MS) is None:
                    waiting.tell()
                    if stop_asked(stop):
                        raise Interrupted(f"stopped: process {index} has not done its share")
        except UserError as error:
            publish_first(ASKED_KEY, {"mistake": str(error)})
            raise
        except Interrupted:
            if mistake := (poll(ASKED_KEY) or {}).get("mistake"):
                raise UserError(mistake) from None
            raise
        return finish()

    if is_main():
        return run_on_main_and_broadcast(name, whole)
    return _share(f"{folder}/done/{process_index()}", name, work, stop=stop)


def _share(done: str, name: str, work: Callable[[], None], *, stop: Callable[[], bool]) -> Any:
    """`shared` in the processes other than process 0, whose outcome is everybody's."""
    key = f"sae/{next_exchange()}/{name}"
    try:
        work()
    except Interrupted:
        pass  # process 0 stops as well, and publishes that
    except UserError as error:
        publish_first(ASKED_KEY, {"mistake": str(error)})
        # Process 0 can't publish while it waits for this one inside a computation.
        with contextlib.suppress(TimeoutError):
            wait_for_main(key, patience_ms=SEE_OFF_MS)
        raise
    else:
        publish(done, {})
    return wait_for_main(key, stop=stop)

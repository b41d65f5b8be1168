"""Work that several processes share without keeping step, and that ends alike in all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from activation_cache.runtime import processes
from activation_cache.runtime.errors import Interrupted, UserError

Value = TypeVar("Value")


def shared(
    name: str,
    work: Callable[[], None],
    *,
    finish: Callable[[], Value],
    stop: Callable[[], bool],
) -> Value:
    """Have every process do its share, `work`; when all have, process 0 does `finish`.

    The shares may be of any length and the processes at any place in them: no step is common to
    them. `work` asks `stop_asked` often, and raises `Interrupted` when that says yes.

    Returns:
        What `finish` gave, everywhere.

    Raises:
        Interrupted: a process was asked to stop before all had done their share. Either all raise
            it or none.
        UserError: a process found a mistake, or `finish` did; raised in every process.
    """
    if processes.process_count() == 1:
        work()
        return finish()
    folder = f"sae/{processes.next_exchange()}/{name}"

    def whole() -> Value:
        try:
            work()
            for index in range(1, processes.process_count()):
                key = f"{folder}/done/{index}"
                while processes.hear(key, wait_ms=processes.POLL_MS) is None:
                    if processes.stop_asked(stop):
                        raise Interrupted(f"stopped: process {index} has not done its share")
        except UserError as error:
            processes.say_first(processes.ASKED_KEY, {"mistake": str(error)})
            raise
        except Interrupted:
            if mistake := (processes.hear(processes.ASKED_KEY) or {}).get("mistake"):
                raise UserError(mistake) from None
            raise
        return finish()

    if processes.is_main():
        return processes.told_by_main(name, whole)
    return _share(f"{folder}/done/{processes.process_index()}", name, work, stop=stop)


def _share(done: str, name: str, work: Callable[[], None], *, stop: Callable[[], bool]) -> Any:
    """The part of `shared` of the processes that aren't process 0, which has the last word."""
    key = f"sae/{processes.next_exchange()}/{name}"
    try:
        work()
    except Interrupted:
        pass  # process 0 is asked to stop as well, and tells everybody
    except UserError as error:
        processes.say_first(processes.ASKED_KEY, {"mistake": str(error)})
        # Process 0 can't tell while it waits for this one in the middle of a computation.
        with contextlib.suppress(TimeoutError):
            processes.wait_for_main(key, patience_ms=processes.SEE_OFF_MS)
        raise
    else:
        processes.say(done, {})
    return processes.wait_for_main(key, stop=stop)

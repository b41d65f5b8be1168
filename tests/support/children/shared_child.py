"""`python -m tests.support.children.shared_child CASE`: work shared by processes, without a model.

Every process prints how work ended that all can do, and then how the case did. The cases:
`stopped_waiting`, in which process 1 has done its share when it is asked to stop;
`stopped_working`, in which it hasn't; `mistaken`, in which process 1 raises a `UserError`;
`main_mistaken`, in which process 0 does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from activation_cache.runtime import exchange, processes
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.exchange import shared

asked = threading.Event()


def work_long() -> None:
    """A share that ends only by being stopped."""
    for _ in range(12_000):
        if exchange.stop_asked(asked.is_set):
            raise Interrupted("stopped at work")
        time.sleep(0.01)
    raise AssertionError("no process was asked to stop")


def main(case: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    processes.join()
    index = processes.process_index()

    def work() -> None:
        if (case == "mistaken" and index == 1) or (case == "main_mistaken" and index == 0):
            raise UserError(f"process {index} is mistaken")
        if case == "stopped_waiting" and index == 1:
            # The signal comes when this process waits for the others, in a call into C++.
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
            return
        if case == "stopped_working" and index == 1:
            asked.set()
        work_long()

    def finish() -> str:
        return f"finished by {index}"

    ended = [shared("easy", lambda: None, finish=finish, stop=asked.is_set)]
    try:
        ended.append(shared("case", work, finish=finish, stop=asked.is_set))
    except Interrupted:
        ended.append("Interrupted")
    except UserError as error:
        ended.append(f"UserError: {error}")
    for line in ended:
        sys.stdout.write(f"ended: {line}\n")
    processes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])

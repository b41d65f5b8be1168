"""Ways to be compared, each set in a process of its own.

Two libraries in one process share its cores with each other's idle threads: OpenMP's spin for a
while after every product, and a library that counts cores counts the others' threads for nothing.
Where each has a process, the one whose turn it isn't sleeps.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import jax

from benchmarks.support.measure import prepare

Ways = Mapping[str, Callable[[], Any]]


@contextmanager
def apart(
    make: Callable[..., Ways], *args: Any, keep_memory: bool = True
) -> Iterator[dict[str, Callable[..., Any]]]:
    """The ways that `make(*args)` gives in another process, to be called from this one.

    Each call returns when the other process has done it: None, or with `result=True` what the way
    returned. `make` and its arguments must be picklable, hence a function of a module. Memory that
    is freed there is kept as a stage of `sae` keeps it; with `keep_memory=False` the C library does
    as it does by itself.

    Raises:
        RuntimeError: if `make` or a way fails; with the other process's traceback.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, args, keep_memory), daemon=True)
    process.start()
    there.close()
    try:
        names = _answer(here)
        yield {name: partial(_ask, here, name) for name in names}
        here.send(None)
        process.join()
    finally:
        process.kill()
        here.close()


def _ask(connection: Connection, name: str, *, result: bool = False) -> Any:
    connection.send((name, result))
    return _answer(connection)


def _answer(connection: Connection) -> Any:
    worked, value = connection.recv()
    if not worked:
        raise RuntimeError(value)
    return value


def _serve(
    connection: Connection, make: Callable[..., Ways], args: tuple[Any, ...], keep_memory: bool
) -> None:
    prepare(keep_memory=keep_memory)
    try:
        ways = make(*args)
        connection.send((True, list(ways)))
        while (told := connection.recv()) is not None:
            name, result = told
            found = jax.block_until_ready(ways[name]())
            connection.send((True, found if result else None))
    except Exception:
        connection.send((False, traceback.format_exc()))

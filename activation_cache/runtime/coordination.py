"""The client of JAX's coordination service: the one file that uses a private module of JAX.

Process 0 of a group runs the service, `jax.distributed.initialize` connects the others. It carries
short texts under keys, and barriers, between processes whose devices are busy or are waiting for
each other; `jax.experimental.multihost_utils` needs those devices, at the same step in every
process. JAX (0.10) has no public name for the client.
"""

from __future__ import annotations

from typing import Any


def client() -> Any:
    """The client of this process, which must have joined a group (`processes.join`).

    Raises:
        RuntimeError: this version of JAX keeps its client elsewhere.
    """
    import jax

    try:
        from jax._src import distributed

        found = distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"JAX {jax.__version__} has no jax._src.distributed.global_state.client, by which "
            "processes exchange messages. Install jax 0.10, or run as a single process."
        ) from error
    assert found is not None, "the group was not joined"
    return found

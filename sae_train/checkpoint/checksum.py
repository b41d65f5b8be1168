"""Has a checkpoint stayed what was written? Checksums that no sharding changes.

A file's hash would say so too, but would cost another reading of all files at every save, and
those depend on the processes that wrote them. The sum below runs on the devices at memory speed:
Σ mix(bits(x) xor mix(place)) over all elements, modulo 2³². Sums of whole numbers don't depend on
their order, so the mesh, the processes and the compiler leave it as it is. mix is the finaliser
of MurmurHash3 (Appleby), a bijection: one changed element always changes the sum, more than one
with a probability of 1 - 2⁻³².
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from activation_cache.runtime.errors import UserError
from sae_train.model.sharding import mesh_of, sharding
from sae_train.step.state import TrainState

_SEAL = "sha256"
_PLACE_FACTORS = (0x9E3779B1, 0x85EBCA77)  # one odd number for each dim


class DamagedCheckpoint(UserError):
    """A checkpoint is not what was written; the one before may still be."""


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _checksum(x: Array) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for dim, factor in zip(range(x.ndim), _PLACE_FACTORS, strict=False):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(factor)
    return _mix(bits ^ _mix(place)).sum(dtype=jnp.uint32)


def _checksums(state: TrainState) -> list[UInt32[Array, ""]]:
    return [_checksum(leaf) for leaf in jax.tree.leaves(state)]


def state_checksums(state: TrainState) -> dict[str, int]:
    """The checksum of every array of a state, by its path there; waits for the devices.

    With several processes, all that hold a part of the state must call it.
    """
    named, _ = jax.tree_util.tree_flatten_with_path(state)
    everywhere = sharding(mesh_of(state.step), ())
    sums = jax.jit(_checksums, out_shardings=everywhere)(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): int(value)
        for (path, _), value in zip(named, sums, strict=True)
    }


def seal_meta(meta: Mapping[str, Any], *, checksums: Mapping[str, int]) -> dict[str, Any]:
    """The JSON of a checkpoint with the checksums of its arrays and a hash of itself."""
    content = {**meta, "checksums": dict(checksums)}
    return {**content, _SEAL: _hash(content)}


def unseal_meta(data: bytes) -> dict[str, Any]:
    """The reverse of `seal_meta`; raises `DamagedCheckpoint` if a bit of it has changed."""
    try:
        content = json.loads(data)
        seal = content.pop(_SEAL)
    except (ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint("its meta is not the JSON that was written") from error
    if seal != _hash(content):
        raise DamagedCheckpoint("its meta failed the checksum")
    return content


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

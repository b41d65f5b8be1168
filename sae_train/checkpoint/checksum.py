"""Is a checkpoint still what was written? Checksums that don't depend on the sharding.

Hashes of the files would cost another read of all files at every save, and the files depend on the
processes that wrote them. This checksum runs on the devices at memory speed: for each array
Σ mix(bits(x) xor mix(position)) over all elements, modulo 2³². A sum of integers doesn't depend on
its order, so neither the mesh, the processes nor the compiler changes it. mix is the finaliser of
MurmurHash3 (Appleby), a bijection: one changed element always changes the sum, more than one with a
probability of 1 - 2⁻³².
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
_POSITION_FACTORS = (0x9E3779B1, 0x85EBCA77)  # one odd number for each dim


class DamagedCheckpoint(UserError):
    """A checkpoint is missing a part or isn't what was written; an older one may be whole."""


def state_checksums(state: TrainState) -> dict[str, int]:
    """The checksum of every array of a state, by its path in the pytree; waits for the devices.

    With several processes, every one that holds a part of the state must call it.
    """
    named, _ = jax.tree_util.tree_flatten_with_path(state)
    everywhere = sharding(mesh_of(state.step), ())
    sums = jax.jit(_checksums, out_shardings=everywhere)(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): int(value)
        for (path, _), value in zip(named, sums, strict=True)
    }


def seal_meta(meta: Mapping[str, Any], *, checksums: Mapping[str, int]) -> dict[str, Any]:
    """A checkpoint's meta, with the checksums of its arrays and the SHA-256 of itself."""
    content = {**meta, "checksums": dict(checksums)}
    return {**content, _SEAL: _hash(content)}


def unseal_meta(data: bytes) -> dict[str, Any]:
    """The reverse of `seal_meta`; raises `DamagedCheckpoint` if a bit of the JSON changed."""
    try:
        content = json.loads(data)
        seal = content.pop(_SEAL)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint("its meta is not the JSON that was written") from error
    if seal != _hash(content):
        raise DamagedCheckpoint("its meta failed the checksum")
    return content


def _checksums(state: TrainState) -> list[UInt32[Array, ""]]:
    return [array_checksum(leaf) for leaf in jax.tree.leaves(state)]


def array_checksum(x: Array) -> UInt32[Array, ""]:
    """The checksum of one array, of any sharding."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for dim, factor in zip(range(x.ndim), _POSITION_FACTORS, strict=False):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(factor)
    return _mix(bits ^ _mix(position)).sum(dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

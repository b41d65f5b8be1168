"""What attention computes between its projections: RoPE, then causal grouped-query attention.

Both take float32 inside and round once, to the dtype they were given. `attend_in_order` does both
for whole sequences; `attend_cached` is a query's attention to keys that were computed before it.

Shapes: B sequences, S positions (queries), T keys, H query heads, G key-value heads, R = H / G,
Q = R * S queries of a group, E head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from activation_cache.precision import Precision
from activation_cache.products import einsum

MIN_QUERY_BLOCK = 256
MAX_QUERY_BLOCKS = 8


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap): within (-cap, cap), and about x where |x| is far below it."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend_in_order(
    q_BSHE: Float[Array, "B S H E"],
    k_BSGE: Float[Array, "B S G E"],
    v_BSGE: Float[Array, "B S G E"],
    *,
    base: float,
    factor: float,
    **how: Any,
) -> Float[Array, "B S H E"]:
    """RoPE and attention of whole sequences, whose positions count from 0; `how` as in `attend`."""
    q_BSHE = rope(q_BSHE, base=base, factor=factor)
    k_BSGE = rope(k_BSGE, base=base, factor=factor)
    return attend(q_BSHE, k_BSGE, v_BSGE, **how)


def rope(
    x_BSHE: Float[Array, "B S H E"],
    *,
    base: float,
    factor: float,
    positions: tuple[Int[Array, "B S"], int] | None = None,
) -> Float[Array, "B S H E"]:
    """Rotate pairs (i, i + E/2) by position / factor * base^(-2i/E).

    Args:
        positions: of each vector, and a number above all of them; None is 0, 1, 2, ...
    """
    _, length, _, head_dim = x_BSHE.shape
    cos: Array | np.ndarray
    sin: Array | np.ndarray
    if positions is None:
        cos, sin = _rotations(length, head_dim, base, factor)
    else:  # the same constants, looked up
        position_BS, limit = positions
        rows = [jnp.asarray(table[0, :, 0]) for table in _rotations(limit, head_dim, base, factor)]
        cos, sin = (row[position_BS][:, :, None, :] for row in rows)
    first, second = jnp.split(x_BSHE.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x_BSHE.dtype)


@functools.lru_cache(maxsize=8)
def _rotations(
    num_positions: int, head_dim: int, base: float, factor: float
) -> tuple[Float[np.ndarray, "1 S 1 half"], Float[np.ndarray, "1 S 1 half"]]:
    """Cosines and sines for `rope`, float32 throughout as in `transformers`.

    They are constants of the program. Left to XLA, a CPU computes them again for each sequence and
    head, at several times the cost of the rest of `rope`.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1.0) / np.float32(base) ** exponent / np.float32(factor)
    angle = np.arange(num_positions, dtype=np.float32)[:, None] * frequency[None, :]
    return np.cos(angle)[None, :, None, :], np.sin(angle)[None, :, None, :]


def attend(
    q_BSHE: Float[Array, "B S H E"],
    k_BSGE: Float[Array, "B S G E"],
    v_BSGE: Float[Array, "B S G E"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    precision: Precision,
) -> Float[Array, "B S H E"]:
    """Causal grouped-query attention; scores, cap and softmax in float32.

    Queries are split into blocks, each against the keys it may see. Most scores that the mask would
    hide are then not computed, and a block's scores fit a CPU's cache (for 1,024 positions 3 to 4
    times faster than all at once). `MAX_QUERY_BLOCKS` bounds the time to compile.

    Args:
        window: keys with 0 <= query - key < window are seen; None sees all earlier keys.
    """
    batch, length, num_heads, head_dim = q_BSHE.shape
    groups = k_BSGE.shape[2]
    q_BGRSE = q_BSHE.reshape(batch, length, groups, num_heads // groups, head_dim)
    q_BGRSE = q_BGRSE.transpose(0, 2, 3, 1, 4)
    k_BGSE, v_BGSE = k_BSGE.transpose(0, 2, 1, 3), v_BSGE.transpose(0, 2, 1, 3)
    block = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    out = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first_key = 0 if window is None else max(0, start - window + 1)
        keys = slice(first_key, stop)
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first_key, stop)[None, :]
        visible = (distance >= 0) & (distance < (window or length))
        out.append(
            _attend_block(
                q_BGRSE[:, :, :, start:stop],
                k_BGSE[:, :, keys],
                v_BGSE[:, :, keys],
                visible=visible[None, None, None],
                scale=scale,
                softcap=softcap,
                precision=precision,
            )
        )
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(q_BSHE.shape)


def attend_cached(
    q_B1HE: Float[Array, "B 1 H E"],
    k_BTGE: Float[Array, "B T G E"],
    v_BTGE: Float[Array, "B T G E"],
    position_B: Int[Array, " B"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    precision: Precision,
) -> Float[Array, "B 1 H E"]:
    """`attend` for one query of each sequence; keys are at their positions, 0 to T - 1."""
    batch, _, num_heads, head_dim = q_B1HE.shape
    length, groups = k_BTGE.shape[1:3]
    distance_BT = position_B[:, None] - jnp.arange(length)[None, :]
    visible_BT = (distance_BT >= 0) & (distance_BT < (window or length))
    out = _attend_block(
        q_B1HE.reshape(batch, groups, num_heads // groups, 1, head_dim),
        k_BTGE.transpose(0, 2, 1, 3),
        v_BTGE.transpose(0, 2, 1, 3),
        visible=visible_BT[:, None, None, None],
        scale=scale,
        softcap=softcap,
        precision=precision,
    )
    return out.reshape(q_B1HE.shape)


def _attend_block(
    q_BGRSE: Float[Array, "B G R S E"],
    k_BGTE: Float[Array, "B G T E"],
    v_BGTE: Float[Array, "B G T E"],
    *,
    visible: Bool[Array, "*any S T"],
    scale: float,
    softcap: float | None,
    precision: Precision,
) -> Float[Array, "B G R S E"]:
    """R query heads of each group against T keys; the softmax's division comes last."""
    batch, groups, repeats, length, head_dim = q_BGRSE.shape
    dot = functools.partial(einsum, precision=precision)
    # One matrix product per group, over the queries of all heads that share its keys.
    q_BGQE = q_BGRSE.reshape(batch, groups, repeats * length, head_dim)
    scores = soft_cap(dot("bgqe,bgte->bgqt", q_BGQE, k_BGTE) * scale, softcap)
    scores = scores.reshape(batch, groups, repeats, length, -1)
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.reshape(batch, groups, repeats * length, -1).astype(v_BGTE.dtype)
    out = dot("bgqt,bgte->bgqe", weights, v_BGTE).reshape(q_BGRSE.shape)
    return (out / total).astype(q_BGRSE.dtype)

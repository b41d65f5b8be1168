"""Scores of a language model's predictions: the loss, or the target token's mean-centred logit.

And how far the predictions are from others (`divergence`).

All are computed from what the final norm returns. Logits of all predictions would be larger than
anything else in memory, so they exist for a chunk of them at a time.

Legend: B sequences, P predictions of a sequence, N = B * P, C predictions of a chunk, D model
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from activation_cache.gemma.attention import soft_cap
from activation_cache.precision import Precision
from activation_cache.products import einsum, rounded

# Logits of this many elements are alive at once (float32: 256 MiB).
MAX_LOGIT_ELEMENTS = 2**26


# One number for each counted prediction, and 0 for the others; all have the arguments of
# `cross_entropy`.
Score = Callable[..., Array]


def cross_entropy(
    h_BPD: Float[Array, "B P D"],
    targets_BP: Int[Array, "B P"],
    counted_BP: Bool[Array, "B P"],
    embedding_VD: Float[Array, "V D"],
    *,
    softcap: float | None,
    precision: Precision,
) -> Float[Array, "B P"]:
    """Next-token loss in nats. It has no gradient: its loop ends with the last counted prediction.

    A row that equals the first sequence's at the same position takes its normaliser from there.
    With the residual stream at zero that is so wherever special tokens don't differ.
    """
    shape = counted_BP.shape
    same_BP = (h_BPD == h_BPD[:1]).all(axis=-1).at[0].set(False)
    needed_BP = counted_BP & ~same_BP
    needed_BP = needed_BP.at[0].set(needed_BP[0] | (counted_BP & same_BP).any(axis=0))
    normaliser_N, target_N = _normalisers(
        h_BPD.reshape(-1, h_BPD.shape[-1]),
        targets_BP.reshape(-1),
        needed_BP.reshape(-1),
        embedding_VD,
        softcap=softcap,
        precision=precision,
    )
    normaliser_BP = normaliser_N.reshape(shape)
    normaliser_BP = jnp.where(same_BP, normaliser_BP[:1], normaliser_BP)
    # Elsewhere both are of the same logits, so that their rounding errors cancel in part.
    operands = (one.astype(jnp.float32) for one in (h_BPD, embedding_VD[targets_BP]))
    alone_BP = soft_cap(_dots(*(rounded(one, precision=precision) for one in operands)), softcap)
    target_BP = jnp.where(same_BP, alone_BP, target_N.reshape(shape))
    return jnp.where(counted_BP, normaliser_BP - target_BP, 0.0)


def centred_logit(
    h_BPD: Float[Array, "B P D"],
    targets_BP: Int[Array, "B P"],
    counted_BP: Bool[Array, "B P"],
    embedding_VD: Float[Array, "V D"],
    *,
    softcap: float | None,
    precision: Precision,
) -> Float[Array, "B P"]:
    """The target token's logit minus the mean of all logits.

    Logits without a cap are linear, and their mean is the logit of the mean embedding. With a cap
    all are computed, a chunk at a time; a gradient takes two products with the vocabulary.
    """
    target_BPD = embedding_VD[targets_BP].astype(jnp.float32)
    if softcap is None:
        mean_D = embedding_VD.astype(jnp.float32).mean(axis=0)
        found_BP = _dots(h_BPD, target_BPD - mean_D[None, None, :])
    else:
        mean_BP = _capped_means(h_BPD, embedding_VD, softcap=softcap, precision=precision)
        found_BP = soft_cap(_dots(h_BPD, target_BPD), softcap) - mean_BP
    return jnp.where(counted_BP, found_BP, 0.0)


def divergence(
    h_BPD: Float[Array, "B P D"],
    original_BPD: Float[Array, "B P D"],
    counted_BP: Bool[Array, "B P"],
    embedding_VD: Float[Array, "V D"],
    *,
    softcap: float | None,
    precision: Precision,
) -> Float[Array, "B P"]:
    """KL(p || q) in nats of every counted prediction, p the original's and q that of `h_BPD`.

    p and q are distributions of the next token over the vocabulary. Only `h_BPD` has a gradient. It
    is computed together with the value, which takes three products with the vocabulary in all;
    a gradient that computed the logits again would take five.
    """
    width = h_BPD.shape[-1]
    rows = (one.reshape(-1, width) for one in (h_BPD, original_BPD))
    found_N = _divergences(*rows, embedding_VD, softcap, precision)
    return jnp.where(counted_BP, found_N.reshape(counted_BP.shape), 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _divergences(
    h_ND: Array, original_ND: Array, embedding_VD: Array, softcap: float | None, how: Precision
) -> Float[Array, " N"]:
    return _divergences_and_gradients(h_ND, original_ND, embedding_VD, softcap, how)[0]


def _divergences_and_gradients(
    h_ND: Array, original_ND: Array, embedding_VD: Array, softcap: float | None, how: Precision
) -> tuple[Float[Array, " N"], Float[Array, "N D"]]:
    num_rows, width = h_ND.shape
    chunk = divergence_chunk(num_rows, len(embedding_VD))

    def one_chunk(rows: tuple[Array, Array]) -> tuple[Array, Array]:
        logits_CV, original_CV = (
            project(one, embedding_VD, softcap=softcap, precision=how) for one in rows
        )
        log_q_CV, log_p_CV = jax.nn.log_softmax(logits_CV), jax.nn.log_softmax(original_CV)
        p_CV = jnp.exp(log_p_CV)
        kl_C = (p_CV * (log_p_CV - log_q_CV)).sum(axis=-1)
        g_CV = jnp.exp(log_q_CV) - p_CV
        if softcap is not None:
            g_CV = g_CV * (1.0 - jnp.square(logits_CV / softcap))
        g_CV = g_CV.astype(embedding_VD.dtype)
        return kl_C, einsum("cv,vd->cd", g_CV, embedding_VD, precision=how)

    padded = (jnp.pad(one, ((0, -num_rows % chunk), (0, 0))) for one in (h_ND, original_ND))
    chunks = tuple(one.reshape(-1, chunk, width) for one in padded)
    kl, gradient = jax.lax.map(one_chunk, chunks)
    return kl.reshape(-1)[:num_rows], gradient.reshape(-1, width)[:num_rows]


def _divergences_forwards(
    h_ND: Array, original_ND: Array, embedding_VD: Array, softcap: float | None, how: Precision
) -> tuple[Array, Array]:
    kl_N, g_ND = _divergences_and_gradients(h_ND, original_ND, embedding_VD, softcap, how)
    return kl_N, g_ND.astype(h_ND.dtype)


def _divergences_backwards(
    softcap: float | None, how: Precision, g_ND: Array, of_kl_N: Array
) -> tuple[Array, None, None]:
    return of_kl_N[:, None].astype(g_ND.dtype) * g_ND, None, None


_divergences.defvjp(_divergences_forwards, _divergences_backwards)


def project(
    h_D: Float[Array, "*batch D"],
    embedding_VD: Float[Array, "V D"],
    *,
    softcap: float | None,
    precision: Precision,
) -> Float[Array, "*batch V"]:
    """Logits, float32."""
    logits = einsum("...d,vd->...v", h_D, embedding_VD, precision=precision)
    return soft_cap(logits, softcap)


def _dots(a_BPD: Array, b_BPD: Array) -> Float[Array, "B P"]:
    return (a_BPD.astype(jnp.float32) * b_BPD.astype(jnp.float32)).sum(axis=-1)


def _chunk_size(num_rows: int, vocab_size: int) -> int:
    return max(1, min(num_rows, MAX_LOGIT_ELEMENTS // vocab_size))


def divergence_chunk(num_rows: int, vocab_size: int) -> int:
    """C of `divergence`: of size [C, V] there are both distributions and what becomes of them."""
    return _chunk_size(num_rows, 4 * vocab_size)


def _normalisers(
    rows_ND: Float[Array, "N D"],
    targets_N: Int[Array, " N"],
    needed_N: Bool[Array, " N"],
    embedding_VD: Float[Array, "V D"],
    *,
    softcap: float | None,
    precision: Precision,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """log Σ exp of the needed rows' logits, and their targets' logits; 0 for other rows.

    The needed rows are gathered into chunks, and the loop ends with the last of them.
    """
    num_rows = len(rows_ND)
    chunk = _chunk_size(num_rows, len(embedding_VD))
    order_N = jnp.argsort(~needed_N, stable=True)
    # A place past the end is read as zeros and written nowhere.
    order = jnp.pad(order_N, (0, -num_rows % chunk), constant_values=num_rows)
    num_chunks = (needed_N.sum(dtype=jnp.int32) + (chunk - 1)) // chunk

    def one_chunk(number: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        index_C = jax.lax.dynamic_slice_in_dim(order, number * chunk, chunk)
        rows_CD = rows_ND.at[index_C].get(mode="fill", fill_value=0)
        target_C1 = targets_N.at[index_C].get(mode="fill", fill_value=0)[:, None]
        logits_CV = project(rows_CD, embedding_VD, softcap=softcap, precision=precision)
        of_target_C = jnp.take_along_axis(logits_CV, target_C1, axis=-1)[:, 0]
        new = jax.nn.logsumexp(logits_CV, axis=-1), of_target_C
        written = [
            old_N.at[index_C].set(new_C, mode="drop")
            for old_N, new_C in zip(found, new, strict=True)
        ]
        return written[0], written[1]

    zeros_N = jnp.zeros(num_rows, jnp.float32)
    return jax.lax.fori_loop(0, num_chunks, one_chunk, (zeros_N, zeros_N))


def _capped_means(
    h_BPD: Float[Array, "B P D"],
    embedding_VD: Float[Array, "V D"],
    *,
    softcap: float,
    precision: Precision,
) -> Float[Array, "B P"]:
    batch, length, width = h_BPD.shape
    num_rows = batch * length
    chunk = _chunk_size(num_rows, len(embedding_VD))
    rows = jnp.pad(h_BPD.reshape(num_rows, width), ((0, -num_rows % chunk), (0, 0)))

    @jax.checkpoint
    def one_chunk(rows_CD: Array) -> Array:
        return project(rows_CD, embedding_VD, softcap=softcap, precision=precision).mean(axis=-1)

    means = jax.lax.map(one_chunk, rows.reshape(-1, chunk, width))
    return means.reshape(-1)[:num_rows].reshape(batch, length)

"""`latent_updates.touched_pass` in a kernel: gradients, projection, Adam, norm in one pass.

A program takes one latent after the other. It holds the latent's decoder row and the sums of both
gradients on the chip while it walks through the latent's pairs, of each of which it reads two rows
of the batch once; then it reads and writes the four rows of weights and second moments. Which
programs take which latents is fixed: program p has the latents p, p + G, p + 2G ... of those with a
pair, longest first, so that a latent that fires everywhere begins at once.

A row is held as pieces whose sizes are powers of two, which is all that Triton knows.

Legend: B rows, D model width, F latents, P positions for pairs, N segments, G programs, K columns
of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from activation_cache.precision import Precision
from activation_cache.products import rounded_in_kernel
from sae_train.config.run import AdamConfig, Config
from sae_train.sparse.kernels.pallas import launch, load, store
from sae_train.sparse.segment_sums import Segments
from sae_train.step.gradients import LatentSums, OutputGradients, Rows
from sae_train.step.tile_passes import Update

# Several for each multiprocessor of the largest GPUs. Each leaves a row that is yet to be added up.
PROGRAMS = 1024
_SMALLEST_PIECE = 128

# A row is held in pieces.
Pieces = tuple[Array, ...]

# The four matrices in the order in which a kernel gets them: weights, then second moments.
_MATRICES = (("W_enc", 0), ("W_dec", 0), ("W_enc", 1), ("W_dec", 1))


class _Read(NamedTuple):
    """What a program reads, as references."""

    ids_N: Any
    starts_N: Any
    counts_N: Any
    num_touched: Any
    row_P: Any
    pre_P: Any
    x_BD: Any
    g_BD: Any
    g_l0_B: Any
    g_count_F: Any
    theta_F: Any
    decay_F: Any
    first_g_F: Any
    scalars: Any


class _Matrices(NamedTuple):
    """Weights and second moments, as references or, of one latent, as rows."""

    W_enc: Any
    W_dec: Any
    v_enc: Any
    v_dec: Any


class _Written(NamedTuple):
    """What a program leaves, as references; before it runs, both vectors are 0."""

    bias_F: Any
    theta_F: Any
    encoded_GD: Any
    squares_G: Any
    projected_G: Any


def touched_pass(
    rows: Rows,
    segments: Segments,
    row_P: Int[Array, " P"],
    pre_P: Float[Array, " P"],
    *,
    output: OutputGradients,
    first_g_F: Int[Array, " F"] | None = None,
    update: Update | None,
    config: Config,
    precision: Precision,
) -> tuple[Rows, LatentSums]:
    """`latent_updates.touched_pass`; Adam is written out here, for optax isn't made of kernels."""
    matrices = tuple(rows[part][name] for name, part in _MATRICES)
    width, d_model = matrices[0].shape
    num_programs = min(PROGRAMS, segments.ids_N.shape[0])
    read = _what_is_read(
        segments, row_P, pre_P, output.operands(precision), first_g_F=first_g_F, update=update
    )
    vectors = jnp.zeros(width), jnp.zeros(width)
    sums = [
        ((width,), jnp.float32),
        ((width,), jnp.float32),
        ((num_programs, d_model), jnp.float32),
        ((num_programs,), jnp.float32),
        ((num_programs,), jnp.float32),
    ]
    in_place = tuple((array.shape, array.dtype) for array in matrices) if update is not None else ()
    aliases = {len(read): 0, len(read) + 1: 1}
    aliases |= {len(read) + 2 + nth: len(sums) + nth for nth in range(len(in_place))}
    found = launch(
        partial(
            _one_program,
            bandwidth=config.sae.bandwidth,
            config=config.train.adam,
            writes=update is not None,
            in_groups=first_g_F is not None,
            precision=precision,
        ),
        (*read, *vectors, *matrices),
        out=[*sums, *in_place],
        grid=(num_programs,),
        aliases=aliases,
        num_warps=_warps(d_model),
    )
    written = _Written(*found[: len(sums)])
    if in_place:
        rows = ({}, {})
        for (name, part), matrix_FD in zip(_MATRICES, found[len(sums) :], strict=True):
            rows[part][name] = matrix_FD
    return rows, LatentSums(
        bias_F=written.bias_F,
        theta_F=written.theta_F,
        encoded_D=written.encoded_GD.sum(axis=0),
        squares=written.squares_G.sum(),
        projected=written.projected_G.sum(),
    )


def _what_is_read(
    segments: Segments,
    row_P: Array,
    pre_P: Array,
    output: OutputGradients,
    *,
    first_g_F: Array | None,
    update: Update | None,
) -> _Read:
    """A kernel's operands but for the matrices; what it doesn't need is there in some form."""
    scalars, decay_F = jnp.ones(2), jnp.ones(output.theta_F.shape[0])
    if update is not None:
        scalars = jnp.stack([update[0].learning_rate, update[0].bias_correction])
        decay_F = update[1]
    return _Read(
        ids_N=segments.ids_N,
        starts_N=segments.starts_N,
        counts_N=segments.counts_N,
        num_touched=(segments.counts_N > 0).sum(dtype=jnp.int32)[None],
        row_P=row_P,
        pre_P=pre_P,
        x_BD=output.x_BD,
        g_BD=output.g_BD,
        g_l0_B=output.g_l0_B,
        g_count_F=output.g_count_F,
        theta_F=output.theta_F,
        decay_F=decay_F,
        first_g_F=jnp.zeros(1, jnp.int32) if first_g_F is None else first_g_F,
        scalars=scalars,
    )


def _warps(d_model: int) -> int:
    """8 to 16 numbers of a row in each thread; a row that is shorter than 256 is one warp's."""
    return min(16, 1 << max(0, (d_model // 256).bit_length() - 1))


def pieces_of(d_model: int) -> list[tuple[int, int]]:
    """Where each piece of a row begins and its size, a power of two; the last may end behind it."""
    found, first = [], 0
    while (left := d_model - first) > _SMALLEST_PIECE:
        found.append((first, 1 << left.bit_length() - 1))
        first += found[-1][1]
    if left:
        found.append((first, 1 << (left - 1).bit_length()))
    return found


class _Row:
    """Reads and writes rows of matrices [., D], in pieces."""

    def __init__(self, d_model: int) -> None:
        self._d_model = d_model
        self._columns = []
        for first, size in pieces_of(d_model):
            d_K = first + jnp.arange(size, dtype=jnp.int32)
            self._columns.append((d_K, None if first + size <= d_model else d_K < d_model))

    def read(self, ref: Any, row: Array) -> Pieces:
        found = []
        for d_K, there_K in self._columns:
            near_K = d_K if there_K is None else jnp.minimum(d_K, self._d_model - 1)
            piece_K = load(ref.at[jnp.full_like(d_K, row), near_K], there_K)
            found.append(piece_K.astype(jnp.float32))
        return tuple(found)

    def write(self, ref: Any, row: Array, pieces: Pieces) -> None:
        for (d_K, there_K), piece_K in zip(self._columns, pieces, strict=True):
            store(ref.at[jnp.full_like(d_K, row), d_K], piece_K, there_K)

    def zeros(self) -> Pieces:
        return tuple(jnp.zeros(d_K.shape, jnp.float32) for d_K, _ in self._columns)


class _Found(NamedTuple):
    """The gradients of one latent, `theta` not yet divided by the bandwidth."""

    enc: Pieces
    dec: Pieces
    bias: Array
    theta: Array


def _one_program(
    *refs: Any,
    bandwidth: float,
    config: AdamConfig,
    writes: bool,
    in_groups: bool,
    precision: Precision,
) -> None:
    read, refs = _Read(*refs[: len(_Read._fields)]), refs[len(_Read._fields) + 2 :]
    # Rows are written in place: then the operands are no longer to be read.
    own, written = _Matrices(*(refs[9:] if writes else refs[:4])), _Written(*refs[4:9])
    program, num_programs = pl.program_id(0), pl.num_programs(0)
    row = _Row(read.x_BD.shape[1])

    def one_latent(nth: Array, so_far: tuple[Pieces, Array, Array]) -> tuple[Pieces, Array, Array]:
        encoded, squares, projected_squares = so_far
        segment = program + nth * num_programs
        latent = read.ids_N[segment]
        W_enc, W_dec = row.read(own.W_enc, latent), row.read(own.W_dec, latent)
        found = _gradients(
            read,
            row,
            segment=segment,
            W_dec=W_dec,
            first_g=read.first_g_F[latent] if in_groups else None,
            bandwidth=bandwidth,
            precision=precision,
        )
        store(written.bias_F.at[latent], found.bias)
        store(written.theta_F.at[latent], found.theta / bandwidth)
        along = _dot(found.dec, W_dec)
        projected = _each(lambda g, w: g - along * w, found.dec, W_dec)
        if writes:
            _update(own, read, row, latent, (W_enc, W_dec), (found.enc, projected), config=config)
        of_enc = _dot(found.enc, found.enc)
        return (
            _each(lambda total, w: total + found.bias * w, encoded, W_enc),
            squares + of_enc + _dot(found.dec, found.dec),
            projected_squares + of_enc + _dot(projected, projected),
        )

    mine = jnp.maximum(read.num_touched[0] - program + num_programs - 1, 0) // num_programs
    start = row.zeros(), jnp.float32(0), jnp.float32(0)
    encoded, squares, projected_squares = jax.lax.fori_loop(0, mine, one_latent, start)
    row.write(written.encoded_GD, program, encoded)
    store(written.squares_G.at[program], squares)
    store(written.projected_G.at[program], projected_squares)


def _gradients(
    read: _Read,
    row: _Row,
    *,
    segment: Array,
    W_dec: Pieces,
    first_g: Array | None,
    bandwidth: float,
    precision: Precision,
) -> _Found:
    """See `sae_train.step.gradients` for the formulas."""
    latent, start = read.ids_N[segment], read.starts_N[segment]
    as_seen = partial(rounded_in_kernel, precision=precision)
    multiplied = _each(as_seen, W_dec)
    theta, g_count = read.theta_F[latent], read.g_count_F[latent]

    def add(nth: Array, so_far: _Found) -> _Found:
        b, pre = read.row_P[start + nth], read.pre_P[start + nth]
        active, window = pre > theta, jnp.abs(pre - theta) < bandwidth / 2
        x = row.read(read.x_BD, b)
        g = row.read(read.g_BD, b if first_g is None else b + first_g)
        g_f = _dot(g, multiplied)
        g_pre, f = jnp.where(active, g_f, 0.0), jnp.where(active, pre, 0.0)
        weight_x, weight_g = as_seen(g_pre), as_seen(f)
        g_theta = jnp.where(window, theta * g_f + (read.g_l0_B[b] + g_count), 0.0)
        return _Found(
            enc=_each(lambda total, one: total + weight_x * one, so_far.enc, x),
            dec=_each(lambda total, one: total + weight_g * one, so_far.dec, g),
            bias=so_far.bias + g_pre,
            theta=so_far.theta - g_theta,
        )

    none = _Found(row.zeros(), row.zeros(), jnp.float32(0), jnp.float32(0))
    return jax.lax.fori_loop(0, read.counts_N[segment], add, none)


def _update(
    own: _Matrices,
    read: _Read,
    row: _Row,
    latent: Array,
    before: tuple[Pieces, Pieces],
    gradients: tuple[Pieces, Pieces],
    *,
    config: AdamConfig,
) -> None:
    """`optimiser.update` of one latent, the decoder's gradient projected already."""
    learning_rate, bias_correction = read.scalars[0], read.scalars[1]
    decay = config.beta2 * read.decay_F[latent]

    def adam(w_K: Array, g_K: Array, v_K: Array) -> tuple[Array, Array]:
        v_K = decay * v_K + (1.0 - config.beta2) * jnp.square(g_K)
        root_K = jnp.sqrt(v_K / bias_correction)
        return w_K - learning_rate * g_K / (root_K + config.epsilon), v_K

    def step(weights: Pieces, gradient: Pieces, moments: Pieces) -> tuple[Pieces, Pieces]:
        stepped = [adam(*one) for one in zip(weights, gradient, moments, strict=True)]
        return tuple(new for new, _ in stepped), tuple(moment for _, moment in stepped)

    W_enc, v_enc = step(before[0], gradients[0], row.read(own.v_enc, latent))
    W_dec, v_dec = step(before[1], gradients[1], row.read(own.v_dec, latent))
    norm = jnp.sqrt(_dot(W_dec, W_dec))
    new = _Matrices(W_enc, _each(lambda w: w / norm, W_dec), v_enc, v_dec)
    for ref, pieces in zip(own, new, strict=True):
        row.write(ref, latent, pieces)


def _each(function: Callable[..., Array], *rows: Sequence[Array]) -> Pieces:
    return tuple(function(*pieces) for pieces in zip(*rows, strict=True))


def _dot(a: Pieces, b: Pieces) -> Array:
    """In the order of pieces; within one, of Triton's tree."""
    return sum((a_K * b_K).sum() for a_K, b_K in zip(a, b, strict=True))  # type: ignore[return-value]

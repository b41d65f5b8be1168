"""What the weights say of each latent: the logits it writes, and the latents that resemble it.

All logits of a latent are made of operands rounded to bfloat16, which takes half of float32's time
on a CPU and less elsewhere. Their histogram is of these. The greatest are found among them with a
bound on the error (`sae_train.sparse.search_margin`) and made again in float32: candidates are the
`CANDIDATES` greatest, and if the smallest candidate and the margin are below the last that is kept,
no other token can be one of those kept. A latent of which that isn't true has all its logits made
in float32.

Legend: T latents of a block, D model width, H width of a tap, F latents, V vocabulary, N latents of
any SAE, C candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float, Int, UInt8

from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel
from activation_cache.products import einsum, rounded
from sae_train.inference.sae import HostOrDevice
from sae_train.latents.activity import lists
from sae_train.latents.job import LatentsJob
from sae_train.latents.schema import BINS, DIRECTIONS, RANKED, RANKED_OF_OTHERS
from sae_train.sparse.search_margin import Norms, margin, norms

MAX_ELEMENTS = 2**26  # of logits or cosines at a time: 256 MB in float32
BLOCK = 256  # latents
CANDIDATES = 48  # of a trained SAE of Gemma 3 270M 32 were enough for every latent
_FEW = 8  # latents whose logits are all made in float32 at a time
_GROUP = 256  # tokens of which the greatest logit is looked at first

Columns = dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class Readout:
    """A model's way from the residual stream to logits.

    Attributes:
        embedding: tied, so it is W_Uᵀ too; in the model's dtype.
        rounded: the same in bfloat16.
        longest, lost: the greatest norm of a row, and of what rounding took from one.
        gain: 1 + w of the final norm.
    """

    embedding: Float[Array, "V D"]
    rounded: Float[Array, "V D"]
    longest: Float[Array, ""]
    lost: Float[Array, ""]
    gain: Float[Array, " D"]
    model: LanguageModel

    @classmethod
    def of(cls, model: LanguageModel) -> Readout:
        """The parts of a loaded model that are needed."""
        embedding = jnp.asarray(model.params["embedding"])
        rounded_VD = embedding.astype(jnp.bfloat16)
        longest, lost = _longest(embedding, rounded_VD)
        return cls(embedding, rounded_VD, longest, lost, _gain(model.params["final_norm"]), model)

    def written(
        self, rows_TH: Float[np.ndarray, "T H"], tap: Tap
    ) -> tuple[Float[Array, "T D"], Float[Array, "T D"]] | None:
        """What vectors at a tap add to the residual stream: as it is read, and plain.

        The first includes the gains of the norms on the way, the second none. None for the MLP's
        input, which is read from the residual stream and not written to it.
        """
        if tap.site in ("mlp_in", "mlp_in_normalized"):
            return None
        plain_TD = through_TD = jnp.asarray(rows_TH)
        if tap.site == "attn_out_prelinear":
            layer = self.model.params[f"layers_{tap.layer}"]
            W_O = jnp.asarray(layer["attention"]["W_O"]).astype(jnp.float32)
            plain_TD = _product("th,hd->td", plain_TD, W_O)
            through_TD = plain_TD * _gain(layer["post_attention_norm"])[None]
        return through_TD * self.gain[None], plain_TD


def _gain(norm: Mapping[str, Any]) -> Float[Array, " D"]:
    return 1.0 + jnp.asarray(norm["scale"]).astype(jnp.float32)


_product = functools.partial(einsum, precision="float32")


@dataclass(frozen=True)
class Directed:
    """Rows of `directions.parquet`, and sums over them.

    Attributes:
        abs_cosine, abs_encoder_cosine: |cosine| with all other latents of the SAE, summed.
    """

    rows: pa.Table
    abs_cosine: float
    abs_encoder_cosine: float


def directed(
    one: LatentsJob, others: Sequence[LatentsJob], readout: Readout, latents: range
) -> Directed:
    """The rows of neighbouring latents.

    Args:
        others: further SAEs whose decoder's rows are of the same space.
    """
    job = one.job
    decoders = [one, *others]
    columns: Columns = {}
    rows_TD = np.asarray(job.sae.W_dec, np.float32)[latents.start : latents.stop]
    written = readout.written(rows_TD, job.target)
    for name, side in (("", 0), ("plain_", 1)):
        found = _logits(None if written is None else written[side], readout, len(latents))
        columns |= {f"{name}{key}": column for key, column in found.items()}
    nearest, total = _neighbours([each.job.sae.W_dec for each in decoders], latents)
    columns |= {f"neighbour_{key}": column for key, column in nearest.items()}
    encoders: list[HostOrDevice] = []
    numbers: list[int] = []
    if job.target != job.tap:
        alike = [number for number, each in enumerate(decoders) if each.job.tap == job.tap]
        numbers = [number for number in alike if decoders[number].job.target != job.tap]
        encoders = [np.asarray(decoders[number].job.sae.W_enc).T for number in numbers]
    read = None
    if encoders and encoders[0].shape[1] == readout.embedding.shape[1]:
        read = jnp.asarray(encoders[0][latents.start : latents.stop])
    found = _logits(read, readout, len(latents))
    columns |= {f"encoder_{key}": found[key] for key in found if not key.startswith("logit")}
    nearest, encoder_total = _neighbours(encoders, latents, numbers)
    columns |= {f"encoder_neighbour_{key}": column for key, column in nearest.items()}
    columns["latent"] = [np.array(latents, np.int32)]
    return Directed(_table(columns), total, encoder_total)


def _table(columns: Columns) -> pa.Table:
    arrays = []
    for field in DIRECTIONS.schema:
        rows = columns[field.name]
        if pa.types.is_list(field.type):
            arrays.append(lists(rows))
        else:
            values = np.concatenate(rows)
            arrays.append(pa.array(values, mask=np.isnan(values)))
    return pa.table(arrays, schema=DIRECTIONS.schema)


def _logits(rows: Float[Array, "T D"] | None, readout: Readout, count: int) -> Columns:
    """Greatest and smallest logits of each row and their histogram; empty without rows."""
    keys = ("top_ids", "top_values", "bottom_ids", "bottom_values", "logit_counts")
    columns: Columns = {key: [] for key in (*keys, "logit_low", "logit_high")}
    if rows is None:
        none = np.zeros(0, np.float32)
        missing = [np.full(count, np.nan, np.float32)]
        return {key: [none] * count for key in keys} | {"logit_low": missing, "logit_high": missing}
    for block, valid in _blocks(rows, width=len(readout.embedding)):
        logits_TV, top, bottom = _searched(block, readout)
        for name, (values, ids) in (("top", top), ("bottom", bottom)):
            columns[f"{name}_ids"] += [*ids[:valid]]
            columns[f"{name}_values"] += [*values[:valid]]
        high, low = top[0][:, 0], bottom[0][:, 0]
        columns["logit_low"].append(low[:valid])
        columns["logit_high"].append(high[:valid])
        bins = np.asarray(_binned(logits_TV, low, high))[:valid]
        columns["logit_counts"] += [np.bincount(row, minlength=BINS) for row in bins]
    return columns


Ranked = tuple[np.ndarray, np.ndarray]  # values [T, ranked] and their ids


def _searched(rows_TD: Float[Array, "T D"], readout: Readout) -> tuple[Array, Ranked, Ranked]:
    """Rounded logits of each row, and of float32's the greatest and the smallest, lowest first."""
    logits_TV = _rounded_product(rows_TD, readout.rounded)
    margin_T = _margins(rows_TD, readout.longest, readout.lost)
    found: list[Ranked] = []
    for sign in (1.0, -1.0):
        ranked = _ranked(rows_TD, logits_TV, readout.embedding, margin_T, sign)
        values, ids, is_sure = (np.array(one) for one in ranked)
        unsure = np.flatnonzero(~is_sure)
        for begin in range(0, len(unsure), _FEW):
            chosen = unsure[begin : begin + _FEW]
            padded = rows_TD[np.resize(chosen, _FEW)]
            exact = _ranked_of_all(padded, readout.embedding, sign)
            values[chosen], ids[chosen] = (np.asarray(one)[: len(chosen)] for one in exact)
        found.append((sign * values, ids))
    top, bottom = found
    return logits_TV, top, bottom


@jax.jit
def _longest(
    embedding_VD: Float[Array, "V D"], rounded_VD: Float[Array, "V D"]
) -> tuple[Array, Array]:
    """The greatest norm of a row, and of what rounding took from one."""
    rows = norms(embedding_VD.astype(jnp.float32), read_ND=rounded_VD.astype(jnp.float32))
    return rows.whole_N.max(), rows.lost_N.max()


@jax.jit
def _rounded_product(
    rows_TD: Float[Array, "T D"], rounded_VD: Float[Array, "V D"]
) -> Float[Array, "T V"]:
    return einsum("td,vd->tv", rows_TD, rounded_VD, precision="bfloat16")


@jax.jit
def _margins(rows_TD: Float[Array, "T D"], longest: Array, lost: Array) -> Float[Array, " T"]:
    """At least as much as any rounded logit of a row is from float32's."""
    rows = norms(rows_TD, read_ND=rounded(rows_TD, precision="bfloat16"))
    tokens = Norms(longest[None], longest[None] + lost[None], lost[None])
    return margin(rows, tokens, bias_L=jnp.zeros(1), d_model=rows_TD.shape[1])[:, 0]


def _ranked(
    rows_TD: Float[Array, "T D"],
    logits_TV: Float[Array, "T V"],
    embedding_VD: Float[Array, "V D"],
    margin_T: Float[Array, " T"],
    sign: float,
) -> tuple[Array, Array, Array]:
    """The greatest `sign` · logits in float32, their ids, and whether these are sure to be all.

    Equal logits are in the order of their ids.
    """
    number = min(CANDIDATES, len(embedding_VD))
    # Programs of their own: in one XLA makes the logits' parts again and again on a CPU.
    candidates = _greatest(sign * logits_TV, number)
    return _made_again(rows_TD, *candidates, embedding_VD, margin_T, sign)


@functools.partial(jax.jit, static_argnums=5)
def _made_again(
    rows_TD: Float[Array, "T D"],
    rounded_TC: Float[Array, "T C"],
    ids_TC: Int[Array, "T C"],
    embedding_VD: Float[Array, "V D"],
    margin_T: Float[Array, " T"],
    sign: float,
) -> tuple[Array, Array, Array]:
    vocabulary = len(embedding_VD)
    ids_TC = jnp.sort(ids_TC, axis=1)
    candidates_TCD = embedding_VD[ids_TC].astype(jnp.float32)
    values_TC = sign * _product("td,tcd->tc", rows_TD, candidates_TCD)
    values, places = jax.lax.top_k(values_TC, min(RANKED, vocabulary))
    is_sure_T = (rounded_TC[:, -1] + margin_T < values[:, -1]) | (ids_TC.shape[1] == vocabulary)
    is_sure_T |= margin_T == 0  # all logits of a row of zeros are 0
    return values, jnp.take_along_axis(ids_TC, places, axis=1), is_sure_T


@functools.partial(jax.jit, static_argnums=1)
def _greatest(values_TV: Float[Array, "T V"], number: int) -> tuple[Array, Array]:
    """The greatest values of each row, falling, and their places; of equal ones any.

    They are in the groups whose greatest values are the greatest, so few values are sorted.
    """
    padding = ((0, 0), (0, -values_TV.shape[1] % _GROUP))
    padded_TV = jnp.pad(values_TV, padding, constant_values=-jnp.inf)
    groups = padded_TV.reshape(len(values_TV), -1, _GROUP)
    _, chosen = jax.lax.top_k(groups.max(axis=2), min(number, groups.shape[1]))
    inside = jnp.take_along_axis(groups, chosen[:, :, None], axis=1)
    places = chosen[:, :, None] * _GROUP + jnp.arange(_GROUP)[None, None, :]
    values, at = jax.lax.top_k(inside.reshape(len(values_TV), -1), number)
    return values, jnp.take_along_axis(places.reshape(len(values_TV), -1), at, axis=1)


@functools.partial(jax.jit, static_argnums=2)
def _ranked_of_all(
    rows_TD: Float[Array, "T D"], embedding_VD: Float[Array, "V D"], sign: float
) -> tuple[Array, Array]:
    """The greatest `sign` · logits and their ids, of all logits in float32."""
    logits_TV = sign * _product("td,vd->tv", rows_TD, embedding_VD.astype(jnp.float32))
    values, ids = jax.lax.top_k(logits_TV, min(RANKED, len(embedding_VD)))
    return values, ids


@jax.jit
def _binned(
    logits_TV: Float[Array, "T V"], low_T: Float[Array, " T"], high_T: Float[Array, " T"]
) -> UInt8[Array, "T V"]:
    """The bin of each logit between the smallest and the greatest."""
    width_T = jnp.maximum(high_T - low_T, jnp.finfo(jnp.float32).tiny)
    bins_TV = (logits_TV - low_T[:, None]) * (BINS / width_T)[:, None]
    return jnp.clip(bins_TV, 0, BINS - 1).astype(jnp.uint8)


def _blocks(rows: HostOrDevice, *, width: int) -> Iterator[tuple[Array, int]]:
    """Blocks of rows of one shape, the last filled up with zeros, and how many rows are real."""
    size = max(1, min(BLOCK, len(rows), MAX_ELEMENTS // width))
    for begin in range(0, len(rows), size):
        block = jnp.asarray(rows[begin : begin + size])
        yield jnp.pad(block, ((0, size - len(block)), (0, 0))), len(block)


def _neighbours(
    matrices: Sequence[HostOrDevice], latents: range, numbers: Sequence[int] | None = None
) -> tuple[Columns, float]:
    """The nearest rows in each matrix of each of the first one's `latents`, by cosine.

    Args:
        numbers: which SAE each matrix is of, in the record's `saes`; None: 0, 1, ...

    Returns:
        The columns, and the sum of |cosine| with all other rows of the first matrix.
    """
    keys = ("saes", "latents", "cosines")
    columns: Columns = {key: [] for key in keys}
    if not matrices:
        return {key: [np.zeros(0, np.float32)] * len(latents) for key in keys}, 0.0
    own = _unit(jnp.asarray(matrices[0][latents.start : latents.stop]))
    parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in latents]
    total = 0.0
    for number, matrix in enumerate(matrices):
        others = _unit(jnp.asarray(matrix))
        most = RANKED_OF_OTHERS if number else RANKED
        most = min(most, len(matrix) - (number == 0))
        sae = number if numbers is None else numbers[number]
        done = 0
        for block, valid in _blocks(own, width=len(matrix)):
            first = latents.start + done if number == 0 else -BLOCK
            cosines, ids, sums = _nearest(block, others, jnp.int32(first), most)
            if number == 0:
                total += float(np.asarray(sums, np.float64)[:valid].sum())
            saes = np.full(most, sae, np.int32)
            pairs = zip(np.asarray(ids)[:valid], np.asarray(cosines)[:valid], strict=True)
            for row, (places, values) in enumerate(pairs, start=done):
                parts[row].append((saes, places, values))
            done += valid
    for part in parts:
        for key, pieces in zip(keys, zip(*part, strict=True), strict=True):
            columns[key].append(np.concatenate(pieces))
    return columns, total


@jax.jit
def _unit(rows: Float[Array, "N D"]) -> Float[Array, "N D"]:
    rows = rows.astype(jnp.float32)
    norms = jnp.sqrt(jnp.square(rows).sum(axis=1, keepdims=True))
    return rows / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


@functools.partial(jax.jit, static_argnums=3)
def _nearest(
    block_TD: Float[Array, "T D"],
    others_ND: Float[Array, "N D"],
    first: Int[Array, ""],
    number: int,
) -> tuple[Array, Array, Array]:
    """Greatest cosines, their places, and the sum of all |cosines| but that with itself.

    Row t of the block is row `first` + t of the others; below 0 it is none of them.
    """
    cosines_TN = _product("td,nd->tn", block_TD, others_ND)
    own_T = first + jnp.arange(len(block_TD))
    itself_TN = own_T[:, None] == jnp.arange(len(others_ND))[None, :]
    sums_T = jnp.where(itself_TN, 0.0, jnp.abs(cosines_TN)).sum(axis=1)
    values, ids = jax.lax.top_k(jnp.where(itself_TN, -jnp.inf, cosines_TN), number)
    return values, ids, sums_T

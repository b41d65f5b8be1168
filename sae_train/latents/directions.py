"""What the weights say of each latent: the logits it writes, and the latents that resemble it.

Legend: T latents of a block, D model width, H width of a tap, F latents, V vocabulary, N latents of
any SAE.
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
from jaxtyping import Array, Float, Int

from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel
from activation_cache.products import einsum
from sae_train.inference.sae import HostOrDevice
from sae_train.latents.activity import lists
from sae_train.latents.job import LatentsJob
from sae_train.latents.schema import BINS, DIRECTIONS, RANKED, RANKED_OF_OTHERS

MAX_ELEMENTS = 2**26  # of logits or cosines at a time: 256 MB in float32
BLOCK = 256  # latents

Columns = dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class Readout:
    """A model's way from the residual stream to logits.

    Attributes:
        embedding: tied, so it is W_Uᵀ too; float32.
        gain: 1 + w of the final norm.
    """

    embedding: Float[Array, "V D"]
    gain: Float[Array, " D"]
    model: LanguageModel

    @classmethod
    def of(cls, model: LanguageModel) -> Readout:
        """The parts of a loaded model that are needed, the embedding in float32."""
        embedding = jnp.asarray(model.params["embedding"]).astype(jnp.float32)
        return cls(embedding, _gain(model.params["final_norm"]), model)

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
    vocabulary = len(readout.embedding)
    for block, valid in _blocks(rows, width=vocabulary):
        top, bottom, low, high, bins = _read_out(block, readout.embedding)
        for name, (values, ids) in (("top", top), ("bottom", bottom)):
            columns[f"{name}_ids"] += [*np.asarray(ids)[:valid]]
            columns[f"{name}_values"] += [*np.asarray(values)[:valid]]
        columns["logit_low"].append(np.asarray(low)[:valid])
        columns["logit_high"].append(np.asarray(high)[:valid])
        counts = [np.bincount(row, minlength=BINS) for row in np.asarray(bins)[:valid]]
        columns["logit_counts"] += counts
    return columns


@jax.jit
def _read_out(rows_TD: Float[Array, "T D"], embedding_VD: Float[Array, "V D"]) -> tuple:
    """(values, ids) of the greatest and of the smallest logits, their range, and their bins."""
    logits_TV = _product("td,vd->tv", rows_TD, embedding_VD)
    number = min(RANKED, len(embedding_VD))
    top = jax.lax.top_k(logits_TV, number)
    values, ids = jax.lax.top_k(-logits_TV, number)
    low_T, high_T = logits_TV.min(axis=1), logits_TV.max(axis=1)
    width_T = jnp.maximum(high_T - low_T, jnp.finfo(jnp.float32).tiny)
    bins_TV = (logits_TV - low_T[:, None]) * (BINS / width_T)[:, None]
    bins_TV = jnp.clip(bins_TV, 0, BINS - 1).astype(jnp.uint8)
    return top, (-values, ids), low_T, high_T, bins_TV


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

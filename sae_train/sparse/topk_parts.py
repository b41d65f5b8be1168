"""The parts of a TopK or BatchTopK step by pairs on a mesh.

Each runs under `shard_map`, each device on its rows and latents, with the sums over devices written
out; all gradients are explicit.

Legend: B rows of a batch, D model width, F latents, P places for pairs on one device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from sae_train.config.run import Config
from sae_train.sparse.dead_latents import (
    Cuts,
    Encoder,
    Listed,
    dead_first,
    decode_dead,
    decode_selected,
    least_by_products,
    least_of_dead,
    listed_pass,
)
from sae_train.sparse.latent_updates import Pulls, Sums, Write
from sae_train.sparse.segment_sums import decode_sorted, per_latent, sort_by_row
from sae_train.sparse.sharded_parts import (
    PAIR_DIMS,
    ROW_DIMS,
    SUM_DIMS,
    ShardedParts,
    argument_dims,
    over_model,
    pull_dims,
)
from sae_train.sparse.topk_selection import Goal, select_largest, smallest_selected
from sae_train.step.adam import Rows

_MATRIX = ("F", "D")
_LISTED_DIMS = Listed(ids_F=("F",), num_dead=("F",))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chosen:
    """A batch's selected latents: in sum, and the pairs they are at.

    Attributes:
        decoded_BD: f W_dec.
        l0_B, active_F: selected latents of a row, and rows of a latent.
        least_B: the smallest value that is selected.
        per_row: places a row that the selection took, of the device with the most, times the
            devices along `model`.
        fits: were there places enough? Else the sums are made by products, and the pairs void.
        pairs: each device's, stacked [data, model, ...], `pre_P` 0 at those not selected.

    Its leaves are arrays; in its twins, their dims.
    """

    decoded_BD: Any
    l0_B: Any
    active_F: Any
    least_B: Any
    per_row: Any
    fits: Any
    pairs: Any


_CHOSEN_DIMS = Chosen(
    decoded_BD=("B", "D"),
    l0_B=("B",),
    active_F=("F",),
    least_B=("B",),
    per_row=(),
    fits=(),
    pairs=PAIR_DIMS,
)


class TopKParts(ShardedParts):
    """Those parts, for one shape of SAE."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        super().__init__(config, mesh)
        assert config.sae.k is not None
        self._goal = Goal(
            k=config.sae.k,
            over_batch=config.sae.architecture == "batch_topk",
            num_rows=config.train.batch_size,
        )

    def listed(self, dead_F: Array) -> Listed:
        """All latents, the dead ones first; `num_dead` of each device along `model`."""

        def part(dead_F):
            listed = dead_first(dead_F)
            return Listed(ids_F=listed.ids_F, num_dead=listed.num_dead[None])

        return self._map(part, (("F",),), _LISTED_DIMS)(dead_F)

    def choose(
        self, W_enc_FD: Array, W_dec_FD: Array, bias_F: Array, x_BD: Array, listed: Listed
    ) -> Chosen:
        """Encode, select and decode: by pairs if they fit, else by products.

        Both are in the program one behind the other, and one of them is of no length.
        """

        def part(W_enc_FD, W_dec_FD, bias_F, x_BD, listed):
            encoder, listed = Encoder(W_enc_FD, bias_F, x_BD), _own(listed)
            pairs, most = select_largest(*encoder, goal=self._goal, capacity=self.capacity)
            order_P, counts_B = sort_by_row(pairs, num_rows=x_BD.shape[0])
            least_B, is_right = smallest_selected(pairs.pre_P[order_P], counts_B, goal=self._goal)
            fits = (most <= self.capacity) & is_right
            otherwise_B = least_by_products(encoder, listed, goal=self._goal, wanted=~fits)
            least_B = jnp.where(fits, least_B, otherwise_B)
            selected_P = fits & (pairs.pre_P >= least_B[pairs.row_P])
            pairs = dataclasses.replace(pairs, pre_P=jnp.where(selected_P, pairs.pre_P, 0.0))
            decoded_BD, l0_B = decode_sorted(
                pairs.latent_P[order_P],
                pairs.pre_P[order_P],
                jnp.where(fits, counts_B, 0),
                W_dec_FD,
            )
            active_F = per_latent(pairs.pre_P > 0, pairs.counts_F)
            others = decode_selected(encoder, W_dec_FD, listed, least_B, wanted=~fits)
            return Chosen(
                decoded_BD=jax.lax.psum(decoded_BD + others[0], "model"),
                l0_B=jax.lax.psum(l0_B + others[1], "model"),
                active_F=jax.lax.psum(active_F + others[2], "data"),
                least_B=jax.lax.pmax(least_B, "model"),
                per_row=most * (self._model / self._rows),
                fits=fits,
                pairs=jax.tree.map(lambda array: array[None, None], pairs),
            )

        in_dims = (_MATRIX, _MATRIX, ("F",), ("B", "D"), _LISTED_DIMS)
        return self._map(part, in_dims, _CHOSEN_DIMS)(W_enc_FD, W_dec_FD, bias_F, x_BD, listed)

    def wake(
        self, W_enc_FD: Array, W_dec_FD: Array, bias_F: Array, x_BD: Array, listed: Listed
    ) -> tuple[Array, Array]:
        """What the D/2 largest dead latents of each row predict, and what they are above."""

        def part(W_enc_FD, W_dec_FD, bias_F, x_BD, listed):
            encoder, listed = Encoder(W_enc_FD, bias_F, x_BD), _own(listed)
            least_B = least_of_dead(encoder, listed, k=W_dec_FD.shape[1] // 2)
            predicted_BD = decode_dead(encoder, W_dec_FD, listed, least_B)
            return jax.lax.psum(predicted_BD, "model"), jax.lax.pmax(least_B, "model")

        in_dims = (_MATRIX, _MATRIX, ("F",), ("B", "D"), _LISTED_DIMS)
        return self._map(part, in_dims, (("B", "D"), ("B",)))(
            W_enc_FD, W_dec_FD, bias_F, x_BD, listed
        )

    def update_chosen(
        self,
        rows: Rows,
        *,
        chosen: Chosen,
        listed: Listed,
        dead_F: Array,
        pulls: Pulls,
        g_missed_BD: Array,
        dead_least_B: Array,
        write: Write | None,
        arguments: Any,
    ) -> tuple[Rows, Sums, Array]:
        """New rows, sums and which latents were touched.

        Latents that aren't dead go by pairs, dead ones by products; if the pairs don't fit, all
        go by products.
        """
        alive_F = chosen.fits & ~dead_F
        rows, touched, touched_F = self.update_touched(
            rows, chosen.pairs, alive_F, pulls, write=write, arguments=arguments
        )

        def part(rows, listed, pairs, fits, pulls, g_missed_BD, cuts, arguments):
            rows, sums = listed_pass(
                rows,
                _own(listed),
                jax.tree.map(lambda array: array[0, 0], pairs),
                fits,
                pulls=pulls,
                g_missed_BD=g_missed_BD,
                cuts=cuts,
                write=None if write is None else partial(write, arguments),
            )
            return rows, over_model(sums)

        of_batch = pull_dims("B"), ("B", "D"), Cuts(("B",), ("B",))
        in_dims = (ROW_DIMS, _LISTED_DIMS, PAIR_DIMS, (), *of_batch, argument_dims(arguments))
        rows, by_products = self._map(part, in_dims, (ROW_DIMS, SUM_DIMS))(
            rows,
            listed,
            chosen.pairs,
            chosen.fits,
            pulls,
            g_missed_BD,
            Cuts(chosen.least_B, dead_least_B),
            arguments,
        )
        sums = jax.tree.map(jnp.add, touched, by_products)
        return rows, sums, touched_F | ~alive_F


def _own(listed: Listed) -> Listed:
    return Listed(ids_F=listed.ids_F, num_dead=listed.num_dead[0])

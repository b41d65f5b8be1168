"""The TopK or BatchTopK step that pays for what is selected, not for the width; exact.

    encoder's product, tile by tile      -> pairs (row, latent) that are selected    (`selection`)
    decode at the pairs                  -> reconstruction, error
    dead latents, by products            -> what they predict of the error     (`listed_passes`)
    touched latents by their pairs, dead ones by products
                                         -> gradients, Adam, new rows, in place

Every step goes this way, for how many pairs there will be is known beforehand. If they don't fit
after all (ties in great numbers, a capacity near k) the same step is made by products of all
latents, a tile at a time and 31 times over for the smallest value selected: slow, and seldom; no
array is of size [B, F] either way. The formulas are those of `topk`, the gradients by hand:

    g_b  = -2/B (y - ŷ),  ĝ_b = -2 α s/B (e - ê)     s the dead latents' share of D/2, at most 1
    dd_i = Σ f g_b + Σ z ĝ_b                         over pairs that are selected as ordinary ones
    g_i  = 1[f > 0] d_i · g_b + 1[z > 0] d_i · ĝ_b    and over dead ones that predict the error e
    de_i = Σ g_i x_b,  db_i = Σ g_i

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from sae_train.config.run import Config
from sae_train.model.forward import decoded_with
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
from sae_train.sparse.latent_updates import Sums, Write
from sae_train.sparse.lazy_update import step_inputs, updated
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
from sae_train.step.gradients import Pulls
from sae_train.step.result import Stepped
from sae_train.step.schedule import Scheduled
from sae_train.step.sparsity_penalty import Counts, priced
from sae_train.step.state import TrainState


class TopKStep:
    """The step of TopK and BatchTopK configs that go by pairs."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._sae, self._train = config.sae, config.train
        self._parts = TopKParts(config, mesh)

    def __call__(
        self,
        state: TrainState,
        x_BD: Float[Array, "B D"],
        *,
        target_BD: Float[Array, "B D"],
        scalars: Scheduled,
        dead_F: Bool[Array, " F"],
    ) -> tuple[Stepped, Bool[Array, ""]]:
        """What the step makes of scaled rows, and whether the pairs fitted."""
        inputs = step_inputs(state, x_BD, target_BD=target_BD, scalars=scalars, sae=self._sae)
        params = state.params
        listed = self._parts.listed(dead_F)
        weights = params["W_enc"], params["W_dec"], params["b_enc"], inputs.shifted_BD
        chosen = self._parts.choose(*weights, listed)
        reconstruction_BD = decoded_with(params, chosen.decoded_BD, x_BD=x_BD)
        error_BD = target_BD - reconstruction_BD
        predicted_BD, dead_least_B = self._parts.wake(*weights, listed)
        missed_BD, share = error_BD - predicted_BD, self._aux_share(dead_F, d_model=x_BD.shape[1])
        num_rows = x_BD.shape[0]
        per_latent_F = jnp.zeros(self._sae.width)
        pulls = Pulls(
            x_BD=inputs.shifted_BD,
            g_BD=-2.0 / num_rows * error_BD,
            g_l0_B=jnp.zeros(num_rows),
            g_count_F=per_latent_F,
            theta_F=per_latent_F,
            bias_F=params["b_enc"],
        )
        update = partial(
            self._parts.update_chosen,
            chosen=chosen,
            listed=listed,
            dead_F=dead_F,
            pulls=pulls,
            g_missed_BD=-2.0 / num_rows * share * missed_BD,
            dead_least_B=dead_least_B,
        )
        new = updated(inputs, pulls, update, sae=self._sae, train=self._train)
        counts = Counts(l0_B=chosen.l0_B, frequency_F=chosen.active_F / num_rows)
        penalty = priced(counts, scalars, log_gain=state.log_gain, train=self._train)
        missed = jnp.square(missed_BD).sum(axis=1).mean() * share
        stepped = Stepped(
            params=new.params,
            second_moment=new.second_moment,
            last_touched=new.last_touched,
            loss=jnp.square(error_BD).sum(axis=1).mean() + penalty.loss + missed,
            coefficient=penalty.coefficient,
            log_gain=penalty.log_gain,
            norm=new.norm,
            reconstruction_BD=reconstruction_BD,
            l0_B=chosen.l0_B,
            fired_F=chosen.active_F > 0,
            candidates=chosen.per_row,
            smallest=chosen.least_B[0] if self._sae.architecture == "batch_topk" else None,
        )
        return stepped, chosen.fits

    def _aux_share(self, dead_F: Array, *, d_model: int) -> Array:
        """α s: what the loss of the dead latents counts."""
        return self._sae.aux_k_coefficient * jnp.minimum(dead_F.sum() / (d_model // 2), 1.0)


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

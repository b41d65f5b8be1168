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

from functools import partial

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from sae_train.config.run import Config
from sae_train.model.forward import decoded_with
from sae_train.sparse.latent_updates import Pulls
from sae_train.sparse.lazy_update import Stepped, step_inputs, updated
from sae_train.sparse.topk_parts import TopKParts
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

"""What every training step is: its arguments and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float

from sae_train.model.forward import Params
from sae_train.step.schedule import Scheduled
from sae_train.step.sparsity_penalty import Penalty
from sae_train.step.state import TrainState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepResult:
    """What one step makes of a state and a batch.

    Attributes:
        params, first_moment, second_moment, last_touched: as in the new state.
        loss: of the batch, penalty and auxiliary loss included.
        gradient_norm: of all parameters' gradients, before the decoder's is projected and before
            clipping.
        l0_B, fired_F: active latents of each row, and which latents were active at all.
        pairs_per_row: of the sparse path, see `Encoded`; 0 where it isn't taken into account.
        is_sparse: was the sparse path taken?
        overflowed: was it tried in vain, for there were more pairs than it has space for?
        smallest: the smallest latent that was selected; BatchTopK only.
        told: what an `Error` of the caller's tells of the batch; None without one.
    """

    params: Params
    first_moment: Params
    second_moment: Params
    last_touched: Array
    loss: Float[Array, ""]
    penalty: Penalty
    gradient_norm: Float[Array, ""]
    reconstruction_BD: Float[Array, "B D"]
    l0_B: Float[Array, " B"]
    fired_F: Bool[Array, " F"]
    pairs_per_row: Float[Array, ""]
    is_sparse: Bool[Array, ""]
    overflowed: Bool[Array, ""]
    smallest: Float[Array, ""] | None = None
    told: Any = None


class Updated(NamedTuple):
    """What an update leaves: new parameters and moments, who was touched, the gradients' norm."""

    params: Params
    first_moment: Params
    second_moment: Params
    touched_F: Bool[Array, " F"]
    norm: Float[Array, ""]


@runtime_checkable
class Step(Protocol):
    """A step of one SAE: `DenseStep`, `SparseStep` or `AutodiffStep`."""

    def __call__(
        self,
        state: TrainState,
        x_BD: Float[Array, "B D"],
        *,
        target_BD: Float[Array, "B D"],
        scalars: Scheduled,
    ) -> StepResult:
        """One step on scaled rows; of an SAE the target is x."""

"""The architectures by name: what each trains, and how it goes forward (docs/architectures.md).

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from activation_cache.precision import Precision
from sae_train.config.sae import SaeConfig
from sae_train.model import gated, jumprelu, relu, topk
from sae_train.model.forward import Forward, Params


def forward(
    params: Params,
    x_BD: Float[Array, "B D"],
    *,
    target_BD: Float[Array, "B D"],
    config: SaeConfig,
    dead_F: Bool[Array, " F"],
    precision: Precision,
) -> Forward:
    """One pass over scaled rows.

    Args:
        target_BD: what is predicted: of an SAE, x itself. Auxiliary losses read it.
        dead_F: latents that haven't fired for long; only TopK and BatchTopK read them.
    """
    match config.architecture:
        case "jumprelu":
            return jumprelu.forward(params, x_BD, config=config, precision=precision)
        case "relu":
            return relu.forward(params, x_BD, config=config, precision=precision)
        case "gated":
            return gated.forward(
                params, x_BD, target_BD=target_BD, config=config, precision=precision
            )
        case "topk" | "batch_topk":
            return topk.forward(
                params,
                x_BD,
                target_BD=target_BD,
                config=config,
                dead_F=dead_F,
                precision=precision,
            )

"""What rounded products do to thresholds: which decisions change, and how far gradients move.

    python -m benchmarks.precision.windows runs/precision      # after ...quality

A threshold learns from the rows within half a bandwidth of it, |pre - θ| < ε/2. Gemma Scope's ε
is 0.001 for rows of unit mean square, and rounding a product moves `pre` too. Measured on rows of a
store, at the initial weights and at those of a trained SAE, always with ε = 0.001:

- of the pairs (row, latent) in the window, and of the active ones, the share that isn't the same
  with rounded operands: those that leave plus those that come, over those there are;
- the gradient of θ summed over a batch of 4,096: its distance from float32's, as a norm over all
  latents, beside the distance of a batch's gradient from the mean of all batches. With only the
  encoder's product rounded, and with all;
- the same distance of the mean over all batches: what doesn't average out.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from activation_cache.precision import Precision
from activation_cache.products import PRODUCTS
from activation_cache.store.store import open_store
from benchmarks.precision.emulation import EMULATED
from benchmarks.precision.quality import STORES, Cell, base_config
from benchmarks.support.measure import markdown, prepare
from sae_train.checkpoint.trained import Trained, load_trained
from sae_train.model.sharding import local_mesh
from sae_train.runs.metrics_file import read_metrics
from sae_train.step.state import init_state

logger = logging.getLogger("windows")

BANDWIDTH = FIRST_THRESHOLD = 0.001
BATCH, BATCHES = 4096, 8
TARGET = 50

Params = Mapping[str, Float[Array, "..."]]


@partial(jax.jit, static_argnames=("encoder", "others"))
def look(
    params: Params,
    x_BD: Float[Array, "B D"],
    penalty: float,
    *,
    encoder: Precision,
    others: Precision,
) -> tuple[Array, Array, Array]:
    """(active pairs, pairs in the window, the gradient of θ summed over the batch's rows).

    dL/dθ = -(1/ε) Σ K (θ g_f + λ/B), g_f = W_dec · g, g = -2/B (x - x̂): the JumpReLU paper's.

    Args:
        encoder, others: of the encoder's product, and of the other two.
    """
    of = {**PRODUCTS, **EMULATED}
    theta_1F = params["threshold"][None, :]
    inside_BD = x_BD - params["b_dec"][None, :]
    pre_BF = of[encoder]("bd,fd->bf", inside_BD, params["W_enc"]) + params["b_enc"][None, :]
    active_BF = pre_BF > theta_1F
    window_BF = jnp.abs(pre_BF - theta_1F) < BANDWIDTH / 2
    f_BF = jnp.where(active_BF, pre_BF, 0.0)
    error_BD = inside_BD - of[others]("bf,fd->bd", f_BF, params["W_dec"])
    g_BF = of[others]("bd,fd->bf", -2.0 / len(x_BD) * error_BD, params["W_dec"])
    slope_BF = jnp.where(window_BF, theta_1F * g_BF + penalty / len(x_BD), 0.0)
    return active_BF, window_BF, -slope_BF.sum(axis=0) / BANDWIDTH


def compared(params: Params, batches: Sequence[Array], *, penalty: float) -> list[dict[str, Any]]:
    """Each precision against float32, over all batches."""
    plain = [look(params, x, penalty, encoder="float32", others="float32") for x in batches]
    expected = np.stack([np.asarray(one[2], np.float64) for one in plain])
    size = _norm(expected.mean(axis=0)[None])
    spread = _norm(expected - expected.mean(axis=0)) * np.sqrt(len(batches) / (len(batches) - 1))
    rows = []
    for precision in EMULATED:
        row: dict[str, Any] = {"precision": precision, "size": size, "spread": spread}
        for name, others in (("encoder", "float32"), ("all", precision)):
            found = [look(params, x, penalty, encoder=precision, others=others) for x in batches]
            moved = np.stack([np.asarray(one[2], np.float64) for one in found]) - expected
            row[f"moved_{name}"] = _norm(moved)
            row[f"mean_moved_{name}"] = _norm(moved.mean(axis=0)[None])
        for index, name in enumerate(("active", "window")):
            there = sum(int(one[index].sum()) for one in plain)
            other = sum(int((a[index] ^ b[index]).sum()) for a, b in zip(plain, found, strict=True))
            row[name], row[f"{name}_changed"] = there / len(batches) / BATCH, other / there
        rows.append(row)
    return rows


def _norm(rows: np.ndarray) -> float:
    """The root of the mean, over batches, of the squared norm over latents."""
    return float(np.sqrt(np.square(rows).sum(axis=1).mean()))


def at_the_start(trained: Trained, x_ND: Float[np.ndarray, "N D"]) -> Params:
    """Gemma Scope's initial weights, with b_dec at the mean."""
    sae = trained.config.sae
    state = init_state(sae, d_model=x_ND.shape[1], seed=0, mesh=local_mesh())
    first_F = jnp.full(sae.width, FIRST_THRESHOLD)
    return {**state.params, "b_dec": jnp.asarray(x_ND.mean(axis=0)), "threshold": first_F}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown of docs/numerics.md."""
    head = ["store", "weights", "precision", "active a row", "of them changed", "in the window"]
    head += ["of them changed", "gradient moves, encoder rounded", "all rounded"]
    head += ["batch to batch", "the mean moves, all rounded"]
    lines = []
    for row in rows:
        cells = [row["store"], row["weights"], row["precision"]]
        cells += [f"{row['active']:.1f}", f"{row['active_changed']:.3%}"]
        cells += [f"{row['window']:.2f}", f"{row['window_changed']:.2%}"]
        moves = ("moved_encoder", "moved_all", "spread", "mean_moved_all")
        cells += [f"{row[name] / row['size']:.3f}" for name in moves]
        lines.append(cells)
    return markdown(head, lines)


def main() -> int:
    """Look at both stores, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="that of benchmarks.precision.quality")
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    arguments = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    rows = []
    for store in arguments.stores:
        folder = Cell(store, "float32", 0, TARGET).folder(arguments.folder)
        trained, base = load_trained(folder), base_config(store, arguments.folder)
        read = open_store(base.cache.path).read(base.sae.tap, start=0, stop=BATCH * BATCHES)
        x_ND = read.astype(np.float32) / np.float32(trained.input_scale)
        penalty = read_metrics(folder)[-1]["sparsity_coefficient"]
        for name, params in (("first", at_the_start(trained, x_ND)), ("trained", trained.params)):
            batches = [jnp.asarray(x_BD) for x_BD in np.split(x_ND, BATCHES)]
            for row in compared(params, batches, penalty=penalty):
                rows.append({"store": store, "weights": name, **row})
                logger.info("%s", rows[-1])
    sys.stdout.write(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

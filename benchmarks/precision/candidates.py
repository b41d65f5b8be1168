"""Would a cheap encoder product find all pairs of the sparse step, and among how many candidates?

    python -m benchmarks.precision.candidates runs/precision      # after ...quality

The sparse step spends most of its time on the encoder's product, which finds the pairs (row,
latent) that have a gradient: pre > θ - ε/2. A product in one or three bfloat16 passes is cheaper.
If it is within a margin of the float32 product, then all pairs are among the candidates
cheap + margin > θ - ε/2, and float32 pre-activations of the candidates alone give the float32
step.

**The margin** of one pass is `sae_train.sparse.search_margin`'s, from norms. Beside it are counted
what u = 2⁻⁸ and the norms of x and w alone give, and six standard deviations of the error, which
prove nothing. Three passes multiply x̂ = h + l by ŵ = h' + l' but for l·l', where e and d are what
two bfloat16 numbers leave, at most 2⁻¹⁶ of x and w: |l||l'| is added to the margin.

**What candidates may cost.** A candidate's pre-activation reads a row of W_enc, 4 D bytes. Per row
of the batch the product is 2 D F operations at the precision's peak, so D drops out: the tables'
shares are candidates per latent of the width. More of them than the first, and the float32 product
is faster; the second is where the candidates cost as much as the cheap product itself.

Legend: B rows, D model width, F latents, L latents of a tile.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from activation_cache.products import PRODUCTS
from activation_cache.store.store import open_store
from benchmarks.precision.emulation import EMULATED, rounded_to
from benchmarks.precision.quality import STORES, Cell, base_config
from benchmarks.support.measure import markdown, prepare
from sae_train.checkpoint.trained import Trained, load_trained
from sae_train.config.file import with_values
from sae_train.config.run import Config
from sae_train.plan.accelerators import ACCELERATORS, Accelerator
from sae_train.sparse.search_margin import Norms, margin, norms
from sae_train.train.loop import train_cohort

logger = logging.getLogger("candidates")

U = 2.0**-8  # of bfloat16
WIDTHS = (8192, 16384, 65536)  # beside the 2048 of benchmarks.precision.quality
ROWS = 1024
TILE = 1024
# Steps that a wide SAE is trained for, and where its L0 should begin and end.
STEPS, FIRST_L0, TARGET = 120, 100, 50
GEMMA_SCOPE_BANDWIDTH = 0.001


@dataclass(frozen=True)
class Operand:
    """Rows or latents as a cheap product reads them.

    Attributes:
        norms: of them, of what is read, and of what is not.
        low_N: |l|, of the second of the two numbers; 0 with one pass.
    """

    norms: Norms
    low_N: Float[Array, " N"]


def operand(x_ND: Float[Array, "N D"], *, passes: int) -> Operand:
    """The norms of rows for a product in one or three passes."""
    high_ND = rounded_to(x_ND, bits=7)
    low_ND = rounded_to(x_ND - high_ND, bits=7) if passes == 3 else jnp.zeros_like(x_ND)
    found = norms(x_ND, read_ND=high_ND + low_ND)
    return Operand(found, norms(low_ND, read_ND=low_ND).whole_N)


def proven_margin(
    x: Operand, w: Operand, *, bias_L: Float[Array, " L"], d_model: int
) -> Float[Array, "B L"]:
    """How far a cheap pre-activation may be from the float32 one."""
    of_rounding = margin(x.norms, w.norms, bias_L=bias_L, d_model=d_model)
    return of_rounding + jnp.outer(x.low_N, w.low_N)


def coarse_margin(
    x: Operand, w: Operand, *, bias_L: Float[Array, " L"], d_model: int
) -> Float[Array, "B L"]:
    """The same of one pass, from |x| and |w| alone."""
    exact = (replace(own.norms, lost_N=jnp.zeros_like(own.low_N)) for own in (x, w))
    rounding = (2 * U + U**2) * jnp.outer(x.norms.whole_N, w.norms.whole_N)
    return rounding + margin(*exact, bias_L=bias_L, d_model=d_model) * (1 + U) ** 2


def likely_error(x: Operand, w: Operand, *, d_model: int) -> Float[Array, "B F"]:
    """The standard deviation of a cheap product's error if roundings were independent."""
    of_rows = jnp.outer(x.norms.lost_N, w.norms.whole_N)
    of_latents = jnp.outer(x.norms.read_N, w.norms.lost_N)
    return jnp.sqrt((of_rows**2 + of_latents**2) / d_model)


@jax.jit
def counts(
    W_LD: Float[Array, "L D"],
    bias_L: Float[Array, " L"],
    theta_L: Float[Array, " L"],
    x_BD: Float[Array, "B D"],
    bandwidth: float,
) -> dict[str, Array]:
    """Of some latents, summed over rows: active ones, pairs, candidates, and what is lost."""
    d_model, edge_1L = x_BD.shape[1], (theta_L - bandwidth / 2)[None, :]
    pre_BL = PRODUCTS["float32"]("bd,ld->bl", x_BD, W_LD) + bias_L[None, :]
    pairs_BL = pre_BL > edge_1L
    found = {"active": (pre_BL > theta_L[None, :]).sum(), "pairs": pairs_BL.sum()}
    for passes, precision in ((1, "bfloat16"), (3, "bfloat16_3x")):
        x, w = operand(x_BD, passes=passes), operand(W_LD, passes=passes)
        cheap_BL = EMULATED[precision]("bd,ld->bl", x_BD, W_LD) + bias_L[None, :]
        margins = {"proven": proven_margin(x, w, bias_L=bias_L, d_model=d_model)}
        found[f"worst_{passes}"] = (jnp.abs(cheap_BL - pre_BL) / margins["proven"]).max()
        if passes == 1:
            margins["coarse"] = coarse_margin(x, w, bias_L=bias_L, d_model=d_model)
            margins["likely"] = 6 * likely_error(x, w, d_model=d_model)
        for name, margin_BL in margins.items():
            candidates_BL = cheap_BL + margin_BL > edge_1L
            found[f"{name}_{passes}"] = candidates_BL.sum()
            found[f"{name}_{passes}_lost"] = (pairs_BL & ~candidates_BL).sum()
    return found


def count(trained: Trained, rows_ND: Float[np.ndarray, "N D"], *, bandwidth: float) -> Any:
    """The same of all latents, per row."""
    x_ND = jnp.asarray(rows_ND / trained.input_scale - trained.params["b_dec"][None, :])
    total: dict[str, float] = {}
    for start in range(0, trained.config.sae.width, TILE):
        tile = slice(start, start + TILE)
        own = (jnp.asarray(trained.params[name][tile]) for name in ("W_enc", "b_enc", "threshold"))
        for name, value in counts(*own, x_ND, bandwidth).items():
            if name.startswith("worst"):
                total[name] = max(total.get(name, 0.0), float(value))
            else:
                total[name] = total.get(name, 0.0) + float(value) / len(rows_ND)
    return total


def wide(store: str, width: int, root: Path) -> Config:
    """A short run whose thresholds begin where `FIRST_L0` latents are active: sparse at once."""
    base = base_config(store, root)
    opened, tap = open_store(base.cache.path), base.sae.tap
    rows_ND = opened.read(tap, start=0, stop=512).astype(np.float32)
    x_ND = rows_ND - rows_ND.mean(axis=0)
    x_ND /= np.sqrt(opened.tap_info(tap).mean_squared_norm)
    W_FD = np.random.default_rng(0).standard_normal((2048, x_ND.shape[1])).astype(np.float32)
    W_FD /= np.linalg.norm(W_FD, axis=1, keepdims=True)
    theta = float(np.quantile(x_ND @ W_FD.T, 1 - FIRST_L0 / width))
    own = {
        "sae.width": width,
        "sae.threshold.init": theta,
        "train.step": "sparse",
        "train.tokens": STEPS * base.train.batch_size,
        "train.learning_rate.decay_steps": STEPS // 5,
        "train.sparsity": {
            "penalty": "match_l0",
            "target": TARGET,
            "coefficient": 1e-4,
            "warmup_steps": STEPS // 5,
        },
        "output": str(root / store / "wide" / str(width)),
    }
    return with_values(base, own, source="benchmark")


def folders(store: str, root: Path, widths: Sequence[int]) -> list[Path]:
    """Run folders of SAEs of all widths, trained if they aren't."""
    configs = [wide(store, width, root) for width in widths]
    for config in configs:
        train_cohort([config])
    narrow = Cell(store, "float32", 0, TARGET).folder(root)
    return [narrow, *(Path(config.output) for config in configs)]


def table(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown of docs/performance.md."""
    head = [
        "store",
        "width",
        "ε",
        "L0",
        "pairs",
        "one pass, \\|x\\|\\|w\\| alone",
        "one pass, as built",
    ]
    head += ["three passes, norms", "one pass, 6σ (lost)", "error / margin, one pass", "three"]
    lines = []
    for one in results:
        numbers = [f"{one[k]:.0f}" for k in ("active", "pairs", "coarse_1", "proven_1", "proven_3")]
        likely = f"{one['likely_1']:.0f} ({one['likely_1_lost']:.3f})"
        worst = [f"{one[f'worst_{passes}']:.3f}" for passes in (1, 3)]
        lines.append([one["store"], str(one["width"]), f"{one['bandwidth']:g}", *numbers])
        lines[-1] += [likely, *worst]
    return markdown(head, lines)


def affordable(accelerator: Accelerator, *, passes: int) -> tuple[float, float]:
    """Candidates per latent: as fast as the float32 product, as slow as the cheap one again."""
    exact = 1 / accelerator.flops["float32"]
    cheap = passes / accelerator.flops["bfloat16"]
    rows = accelerator.hbm_bandwidth / 2  # of W_enc read in the time of one operation a latent
    return (exact - cheap) * rows, cheap * rows


def affordable_table() -> str:
    """The same of every accelerator that `sae plan` knows."""
    head = ["accelerator", "one pass: as float32", "twice the pass"]
    head += ["three passes: as float32", "twice the passes"]
    lines = []
    for accelerator in ACCELERATORS.values():
        shares = (*affordable(accelerator, passes=1), *affordable(accelerator, passes=3))
        lines.append([accelerator.title, *(f"{share:.2%}" for share in shares)])
    return markdown(head, lines)


def main() -> int:
    """Train the wide SAEs, count, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="that of benchmarks.precision.quality")
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    arguments = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    results = []
    for store in arguments.stores:
        base = base_config(store, arguments.folder)
        rows_ND = open_store(base.cache.path).read(base.sae.tap, start=0, stop=ROWS)
        for folder in folders(store, arguments.folder, arguments.widths):
            trained = load_trained(folder)
            for bandwidth in (GEMMA_SCOPE_BANDWIDTH, trained.config.sae.bandwidth):
                found = count(trained, rows_ND.astype(np.float32), bandwidth=bandwidth)
                about = {"store": store, "width": trained.config.sae.width}
                results.append(about | {"bandwidth": bandwidth} | found)
                logger.info("%s", results[-1])
    sys.stdout.write(f"{table(results)}\n\n{affordable_table()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The names of a suite's folders, as in the releases of Gemma Scope and Gemma Scope 2."""

from __future__ import annotations

from typing import Literal

from sae_train.config.run import Config

Tree = Literal["gemma_scope", "gemma_scope_2"]

GEMMA_SCOPE_SITES: dict[str, str] = {
    "resid_post": "res",
    "mlp_out": "mlp",
    "attn_out_prelinear": "att",
}


def released_folder(folder: str, *, tree: Tree, average_l0: float) -> str:
    """A run's folder in a released tree; Gemma Scope's ends in the measured L0, rounded."""
    if tree == "gemma_scope_2":
        return folder
    return f"{folder.rpartition('/')[0]}/average_l0_{average_l0:.0f}"


def width_name(width: int) -> str:
    """A width as the released folders write it: `16k`, `65k`, `131k`, `1m`."""
    if width % 2**20 == 0:
        return f"{width // 2**20}m"
    return f"{width // 1000}k" if width >= 1000 else str(width)


def sparsity_name(config: Config) -> str:
    """The setting that decides how sparse a run is, and its seed: `coefficient_0.001_seed_1`."""
    values = config.train.sparsity.model_dump()
    if config.sae.k is not None:
        setting = f"k_{config.sae.k}"
    else:
        key = "target" if "target" in values else "coefficient"
        setting = f"{key}_{values[key]:g}"
    return setting + (f"_seed_{config.train.seed}" if config.train.seed else "")

"""Sharded training, evaluation and release of JumpReLU sparse autoencoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_train.inference.read_formats import load_sae
    from sae_train.inference.sae import Sae

__all__ = ["Sae", "load_sae"]


def __getattr__(name: str) -> Any:
    # Lazily: the config classes are in this package too, and `sae --help` shouldn't load JAX.
    if name == "load_sae":
        from sae_train.inference.read_formats import load_sae

        return load_sae
    if name == "Sae":
        from sae_train.inference.sae import Sae

        return Sae
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

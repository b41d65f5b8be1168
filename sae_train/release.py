"""A released SAE, and how a trained one becomes it.

Training sees scaled inputs and subtracts a pre-encoder bias; a release has both folded in, so that
no tool needs to know of either (Gemma Scope, arXiv 2408.05147, appendix A).

Legend: D model width, F latents.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from activation_cache.errors import UserError
from sae_train.hooks import metadata_of
from sae_train.sae import PRECISION

if TYPE_CHECKING:
    from sae_train.checkpoint import Trained

HostOrDevice = np.ndarray | Array

TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


@dataclass(frozen=True)
class Sae:
    """A JumpReLU SAE on raw activations: f = relu(z) · 1[z > θ], z = x W_enc + b_enc.

    A JAX pytree of its five tensors: pass it to a jitted function as an argument. The metadata
    stay behind then, so that SAEs of one shape share one compilation.

    Attributes:
        W_enc, W_dec, b_enc, b_dec, threshold: float32, nothing left to scale or to subtract.
        metadata: what is known of the origin, under SAELens' names (`model_name`, `hook_name`,
            `hf_hook_name`, `context_size`, ...); empty where a format says nothing.
    """

    W_enc: Float[HostOrDevice, "D F"]
    W_dec: Float[HostOrDevice, "F D"]
    b_enc: Float[HostOrDevice, " F"]
    b_dec: Float[HostOrDevice, " D"]
    threshold: Float[HostOrDevice, " F"]
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)

    def encode(self, x: Float[HostOrDevice, "... D"]) -> Float[Array, "... F"]:
        """Latents of raw activations, in float32 (Gemma Scope 2, released form)."""
        pre = jnp.matmul(_float32(x), jnp.asarray(self.W_enc), precision=PRECISION)
        pre = pre + _last(self.b_enc, pre.ndim)
        return jnp.where(pre > _last(self.threshold, pre.ndim), jax.nn.relu(pre), 0.0)

    def decode(self, latents: Float[HostOrDevice, "... F"]) -> Float[Array, "... D"]:
        """The reconstruction f W_dec + b_dec, in float32."""
        decoded = jnp.matmul(_float32(latents), jnp.asarray(self.W_dec), precision=PRECISION)
        return decoded + _last(self.b_dec, decoded.ndim)

    def __call__(self, x: Float[HostOrDevice, "... D"]) -> Float[Array, "... D"]:
        """Reconstruct raw activations."""
        return self.decode(self.encode(x))

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The five tensors on the host, under their released names."""
        return {name: np.asarray(getattr(self, name)) for name in TENSORS}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and bytes of the five tensors."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(np.ascontiguousarray(tensor).data)
        return digest.hexdigest()


def _float32(x: HostOrDevice) -> Array:
    return jnp.asarray(x).astype(jnp.float32)


def _last(vector: HostOrDevice, ndim: int) -> Array:
    """A vector along the last of `ndim` dims: the tests forbid implicit rank promotion."""
    return jnp.asarray(vector).reshape((1,) * (ndim - 1) + (-1,))


def _flatten(sae: Sae) -> tuple[tuple[Any, ...], None]:
    return tuple(getattr(sae, name) for name in TENSORS), None


def _flatten_with_keys(sae: Sae) -> tuple[tuple[Any, ...], None]:
    return tuple((jax.tree_util.GetAttrKey(name), getattr(sae, name)) for name in TENSORS), None


def _unflatten(_: None, children: Any) -> Sae:
    # Past __init__: JAX also unflattens with placeholders, which no shape check would let through.
    sae = object.__new__(Sae)
    for entry, value in zip(fields(Sae), (*children, {}), strict=True):
        object.__setattr__(sae, entry.name, value)
    return sae


jax.tree_util.register_pytree_with_keys(Sae, _flatten_with_keys, _unflatten, _flatten)


def fold(trained: Trained) -> Sae:
    """The released form of trained weights (Gemma Scope, appendix A).

    With x = x_raw / C: W_enc' = W_enc, W_dec' = W_dec, b_enc' = C (b_enc - W_enc b_dec),
    b_dec' = C b_dec, θ' = C θ; the latents come out multiplied by C. Without a pre-encoder bias
    the term W_enc b_dec is absent. Computed in float64, returned in float32.

    Raises:
        UserError: a weight isn't finite.
    """
    params = {name: np.asarray(value, np.float64) for name, value in trained.params.items()}
    scale = float(trained.input_scale)
    check_finite(params, where=f"the checkpoint at step {trained.step}")
    # The trainer clamps direct thresholds at 0: no format can say more, all apply a ReLU first.
    assert (params["threshold"] >= 0).all(), "a trained threshold is negative"
    bias_F = params["b_enc"]
    if trained.config.sae.pre_encoder_bias:
        bias_F = bias_F - params["W_enc"] @ params["b_dec"]
    return Sae(
        W_enc=np.ascontiguousarray(params["W_enc"].T, np.float32),
        W_dec=np.ascontiguousarray(params["W_dec"], np.float32),
        b_enc=(scale * bias_F).astype(np.float32),
        b_dec=(scale * params["b_dec"]).astype(np.float32),
        threshold=(scale * params["threshold"]).astype(np.float32),
        metadata=metadata_of(trained),
    )


def check_finite(tensors: dict[str, np.ndarray], *, where: str) -> None:
    """Raise a `UserError` naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        bad = int(tensor.size - np.isfinite(tensor).sum())
        if bad:
            raise UserError(
                f"{name} of {where} must be finite; {bad} of {tensor.size} values are NaN or "
                "infinite: take an earlier checkpoint or another copy of the file"
            )

"""A released SAE or transcoder: encodes raw activations to latents and decodes them.

Nothing is left to scale or to subtract (`sae_train.inference.fold`).

Legend: D model width, F latents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from activation_cache.config import Dtype
from activation_cache.precision import Precision
from activation_cache.products import einsum
from activation_cache.runtime.errors import UserError
from sae_train.config.sae import Architecture, SaeConfig

HostOrDevice = np.ndarray | Array
# What a user has: an array of NumPy or JAX, a list, or a torch tensor of any dtype and device.
ArrayLike = Any

TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
SKIP = "W_skip"  # a sixth tensor, of transcoders with an affine skip


@dataclass(frozen=True)
class Sae:
    """An SAE on raw activations: f = relu(z) · 1[z > θ], z = x W_enc + b_enc.

    Or a transcoder: f W_dec + b_dec, plus x W_skip if it has one, predicts the activations of
    another site, `hook_name_out` of the metadata.

    Every architecture we train has this form: a ReLU SAE has θ = 0, a Gated SAE is a JumpReLU one
    (`gated_as_jumprelu`), BatchTopK becomes one after training, and TopK has θ = 0 and keeps only
    the k largest latents of a row.

    A JAX pytree of its tensors: pass it to a jitted function as an argument. The metadata isn't
    part of the pytree, so SAEs of one shape share one compilation.

    Attributes:
        W_enc, W_dec, b_enc, b_dec, threshold: float32 unless `cast`.
        k: the most active latents a row may have; None for all architectures but TopK.
        architecture: the form to write it in where a file format has several (SAELens).
        metadata: what is known of the origin, under SAELens' names (`model_name`, `hook_name`,
            `hf_hook_name`, `context_size`, ...); empty where a file says nothing.
        W_skip: [in, out], of transcoders with an affine skip; else None.
        precision: of the products, which isn't the file's.
    """

    W_enc: Float[HostOrDevice, "D F"]
    W_dec: Float[HostOrDevice, "F D"]
    b_enc: Float[HostOrDevice, " F"]
    b_dec: Float[HostOrDevice, " D"]
    threshold: Float[HostOrDevice, " F"]
    k: int | None = None
    architecture: Architecture = "jumprelu"
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    W_skip: Float[HostOrDevice, "D D"] | None = None
    precision: Precision = field(default="float32", compare=False)

    def encode(self, x: ArrayLike) -> Float[Array, "... F"]:
        """Latents of raw activations, in the weights' dtype; 0 where a latent isn't active.

        Args:
            x: [..., D], of NumPy, JAX or torch (the gradient isn't kept), of any real dtype.

        Returns:
            An array of JAX. A row that holds NaN gives NaN.

        Raises:
            UserError: the last dim isn't D, or the values are no real numbers.
        """
        pre = self._product(_as_array(x, self.W_enc, "activations"), self.W_enc)
        pre = pre + _last(self.b_enc, pre.ndim)
        # Not `pre > threshold`, which is false for NaN.
        latents = jnp.where(pre <= _last(self.threshold, pre.ndim), 0.0, jax.nn.relu(pre))
        if self.k is None:
            return latents
        # NaN is the largest, as in torch; a NaN with a minus sign would be the smallest.
        ranked = jnp.where(jnp.isnan(latents), jnp.nan, latents)
        largest, places = jax.lax.top_k(ranked, self.k)
        zeros = jnp.zeros_like(latents)
        return jnp.put_along_axis(zeros, places, largest, axis=-1, inplace=False)

    def decode(self, latents: ArrayLike) -> Float[Array, "... D"]:
        """f W_dec + b_dec, in the weights' dtype: the reconstruction without an affine skip.

        Takes latents [..., F] as `encode` takes activations.
        """
        decoded = self._product(_as_array(latents, self.W_dec, "latents"), self.W_dec)
        return decoded + _last(self.b_dec, decoded.ndim)

    def predict(self, x: ArrayLike, *, latents: ArrayLike) -> Float[Array, "... D"]:
        """The reconstruction from latents that `encode` gave for x, an affine skip included."""
        decoded = self.decode(latents)
        if self.W_skip is None:
            return decoded
        return decoded + self._product(_as_array(x, self.W_skip, "activations"), self.W_skip)

    def _product(self, x: HostOrDevice, weight: HostOrDevice) -> Array:
        """x @ weight, accumulated in float32, returned in the weight's dtype."""
        weight = jnp.asarray(weight)
        x = jnp.asarray(x).astype(weight.dtype)
        wide = einsum("...d,de->...e", x, weight, precision=self.precision)
        return wide.astype(weight.dtype)

    def __call__(self, x: ArrayLike) -> Float[Array, "... D"]:
        """Reconstruct raw activations; of a transcoder, predict its target's."""
        return self.predict(x, latents=self.encode(x))

    @property
    def is_transcoder(self) -> bool:
        """Does its file say that it predicts another site? A lone `params.npz` says nothing."""
        return self.W_skip is not None or "hook_name_out" in self.metadata

    def cast(self, dtype: Dtype) -> Sae:
        """The same SAE with weights in another dtype, in which it then computes."""
        tensors: dict[str, Any] = {
            name: tensor.astype(jnp.dtype(dtype)) for name, tensor in self.tensors.items()
        }
        return dataclasses.replace(self, **tensors)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """How many latents each prefix of a Matryoshka SAE has, all of them last; else empty."""
        widths = self.metadata.get("matryoshka_widths")
        return tuple(widths) if isinstance(widths, list | tuple) else ()

    def reconstructing_with(self, first: int) -> Sae:
        """The SAE that encodes as this one and reconstructs from its first latents alone."""
        W_dec = jnp.asarray(self.W_dec)
        counts_F = jnp.arange(W_dec.shape[0]) < first
        return dataclasses.replace(self, W_dec=jnp.where(counts_F[:, None], W_dec, 0))

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors on the host, by attribute name."""
        names = TENSORS if self.W_skip is None else (*TENSORS, SKIP)
        return {name: np.asarray(getattr(self, name)) for name in names}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and bytes of the tensors, and k if there is one."""
        digest = hashlib.sha256()
        if self.k is not None:
            digest.update(f"k {self.k}\n".encode())
        for name, tensor in self.tensors.items():
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(np.ascontiguousarray(tensor).data)
        return digest.hexdigest()


def _as_array(x: ArrayLike, weight: HostOrDevice, what: str) -> HostOrDevice:
    """`x` as an array whose last dim is the first of `weight`; `what` names it in messages."""
    if hasattr(x, "detach"):  # torch's: NumPy has no bfloat16 and takes no gradient or GPU's memory
        x = x.detach()
        x = (x.to_dense() if x.is_sparse else x).cpu()
        x = (x if x.is_complex() else x.float()).numpy()
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool) or jnp.iscomplexobj(x):
        raise UserError(f"{what} must be real numbers; they are {x.dtype}")
    width, shape = weight.shape[0], list(x.shape)
    if x.ndim == 0 or x.shape[-1] != width:
        hint = ""
        if math.prod(shape[-2:]) == width:
            hint = f". If the last two are heads, join them: x.reshape(*x.shape[:-2], {width})"
        raise UserError(f"{what} must end in a dim of {width}, and their shape is {shape}{hint}")
    return x


def _last(vector: HostOrDevice, ndim: int) -> Array:
    """A vector along the last of `ndim` dims, for code under strict rank promotion."""
    return jnp.asarray(vector).reshape((1,) * (ndim - 1) + (-1,))


_Static = tuple[int | None, Architecture, Precision]


def _flatten(sae: Sae) -> tuple[tuple[Any, ...], _Static]:
    names = (*TENSORS, SKIP)
    children = tuple((jax.tree_util.GetAttrKey(name), getattr(sae, name)) for name in names)
    return children, (sae.k, sae.architecture, sae.precision)


def _unflatten(static: _Static, children: Any) -> Sae:
    # Without __init__, whose shape checks would reject the placeholders JAX also unflattens with.
    sae = object.__new__(Sae)
    names = (*TENSORS, SKIP, "k", "architecture", "precision", "metadata")
    for name, value in zip(names, (*children, *static, {}), strict=True):
        object.__setattr__(sae, name, value)
    return sae


jax.tree_util.register_pytree_with_keys(Sae, _flatten, _unflatten)


def check_kind(sae: Sae, config: SaeConfig, *, name: str) -> None:
    """Raise `UserError` for a transcoder where the config describes an SAE, or the reverse."""
    if sae.is_transcoder and not config.is_transcoder:
        raise UserError(
            f"{name} is a transcoder, from {sae.metadata.get('hook_name')} to "
            f"{sae.metadata.get('hook_name_out')}, and the config describes an SAE of "
            f"{config.site}: set sae.target to the site it predicts, or choose an SAE"
        )
    if config.is_transcoder and not sae.is_transcoder and "hook_name" in sae.metadata:
        raise UserError(
            f"{name} is an SAE of {sae.metadata['hook_name']}, and the config describes a "
            f"transcoder to {config.target}: take out sae.target, or choose a transcoder"
        )


def gated_as_jumprelu(params: dict[str, np.ndarray], *, latent_axis: int) -> dict[str, np.ndarray]:
    """W_enc, b_enc and threshold of the JumpReLU SAE that computes what a Gated one does.

    A Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014, section 3) gates with
    π = x W_enc + b_gate > 0 and has the magnitude relu(exp(r_mag) (x W_enc) + b_mag). π > 0 where
    exp(r_mag) π > 0, that is where the magnitude's pre-activation exp(r_mag) (π - b_gate) + b_mag
    is above b_mag - exp(r_mag) b_gate. A negative threshold is the same as 0: the magnitude passes
    a ReLU.

    Args:
        latent_axis: which dim of W_enc has the latents: 0 in training, 1 in released files.
    """
    gain_F = np.exp(params["r_mag"])
    return {
        "W_enc": params["W_enc"] * np.expand_dims(gain_F, 1 - latent_axis),
        "b_enc": params["b_mag"],
        "threshold": np.maximum(params["b_mag"] - gain_F * params["b_gate"], 0.0),
    }


def check_finite(tensors: dict[str, np.ndarray], *, where: str) -> None:
    """Raise a `UserError` naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        bad = int(tensor.size - np.isfinite(tensor).sum())
        if bad:
            raise UserError(
                f"{name} of {where} must be finite; {bad} of {tensor.size} values are NaN or "
                "infinite: take an earlier checkpoint or another copy of the file"
            )

"""What is put in the place of a tap's activations: an SAE's reconstruction, or zero.

Legend: B sequences of a batch, S position, D model width, N rows = B·S.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from activation_cache.gemma.taps import Splice
from sae_train.evaluate.job import Job
from sae_train.evaluate.sums import reconstruct
from sae_train.inference.sae import Sae


def splice_of(job: Job, arguments: tuple[Sae, Bool[Array, "B S"]]) -> Splice:
    """The splice that puts a job's SAE into the model."""
    if job.target == job.tap:
        return Splice(job.tap, splice_sae, arguments)
    return Splice(job.target, splice_transcoder, arguments, reads=job.tap)


def splice_sae(
    acts_BSD: Float[Array, "B S D"], arguments: tuple[Sae, Bool[Array, "B S"]]
) -> Float[Array, "B S D"]:
    """The SAE's reconstruction where the mask says so, the model's own elsewhere."""
    return splice_transcoder(acts_BSD, arguments, read=acts_BSD)


def splice_transcoder(
    acts_BSD: Float[Array, "B S D"],
    arguments: tuple[Sae, Bool[Array, "B S"]],
    *,
    read: Float[Array, "B S D"],
) -> Float[Array, "B S D"]:
    """What the transcoder predicts from `read` where the mask says so, else the model's own."""
    sae, where_BS = arguments
    x_ND = read.astype(jnp.float32).reshape(-1, read.shape[-1])
    decoded_ND, _, _ = reconstruct(sae, x_ND, where_BS.reshape(-1))
    decoded_BSD = decoded_ND.reshape(acts_BSD.shape).astype(acts_BSD.dtype)
    return jnp.where(where_BS[:, :, None], decoded_BSD, acts_BSD)


def splice_zero(
    acts_BSD: Float[Array, "B S D"], where_BS: Bool[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Zero where the mask says so, the model's own elsewhere."""
    return jnp.where(where_BS[:, :, None], jnp.zeros_like(acts_BSD), acts_BSD)

"""What replaces a tap's activations inside the model: an SAE's reconstruction, or zero.

Legend: B sequences of a batch, S position, D model width, N rows = B·S.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from activation_cache.gemma.taps import Splice
from sae_train.evaluate.job import Job
from sae_train.evaluate.sums import reconstruct
from sae_train.inference.sae import Sae


def splice_of(job: Job, arguments: tuple[Sae, Bool[Array, "B S"]] | None) -> Splice:
    """The splice of a job's SAE; `arguments` are the SAE and where it replaces activations.

    Without arguments it can't be run, and says where it would replace what.
    """
    if job.target == job.tap:
        return Splice(job.tap, splice_sae, arguments)
    return Splice(job.target, splice_transcoder, arguments, reads=job.tap)


def splice_sae(
    acts_BSD: Float[Array, "B S D"], arguments: tuple[Sae, Bool[Array, "B S"]]
) -> Float[Array, "B S D"]:
    """The SAE's reconstruction where the mask is True, else the model's own activations."""
    return splice_transcoder(acts_BSD, arguments, read=acts_BSD)


def splice_transcoder(
    acts_BSD: Float[Array, "B S D"],
    arguments: tuple[Sae, Bool[Array, "B S"]],
    *,
    read: Float[Array, "B S D"],
) -> Float[Array, "B S D"]:
    """The transcoder's prediction from `read` where the mask is True, else the model's own."""
    sae, where_BS = arguments
    x_ND = read.astype(jnp.float32).reshape(-1, read.shape[-1])
    decoded_ND, _, _ = reconstruct(sae, x_ND, where_BS.reshape(-1))
    decoded_BSD = decoded_ND.reshape(acts_BSD.shape).astype(acts_BSD.dtype)
    return jnp.where(where_BS[:, :, None], decoded_BSD, acts_BSD)


def splice_zero(
    acts_BSD: Float[Array, "B S D"], where_BS: Bool[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Zero where the mask is True, else the model's own activations."""
    return jnp.where(where_BS[:, :, None], jnp.zeros_like(acts_BSD), acts_BSD)

"""What the model has at the last token of every prompt, at all taps in one pass.

A prompt is BOS and its last tokens, as many as fit; padding comes after. Causal attention lets no
token see it.

Legend: N prompts, B prompts of a batch, S position, D width of a tap, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel
from activation_cache.language_model.tokenizer import Tokenizer
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.progress import ProgressMeter
from sae_train.inference.sae import Sae
from sae_train.latents.walk import active_pairs

_BATCH_TOKENS = 8192
_SHORTEST = 16  # batches have the lengths 16, 32, 64, ...: a program for each


def prompt_tokens(
    prompts: Sequence[str], tokenizer: Tokenizer, *, max_tokens: int
) -> list[list[int]]:
    """BOS and the last tokens of each prompt, at most `max_tokens` in all."""
    encoded = tokenizer.encode_batch(prompts)
    return [[tokenizer.bos_id, *ids[len(ids) - min(len(ids), max_tokens - 1) :]] for ids in encoded]


def last_activations(
    model: LanguageModel,
    tokens: Sequence[Sequence[int]],
    taps: Sequence[Tap],
    *,
    name: str,
    stop: Callable[[], bool],
) -> dict[Tap, Float[np.ndarray, "N D"]]:
    """Activations of the last token of each prompt, float32, at every tap.

    Args:
        name: of the data set, for messages.

    Raises:
        UserError: they aren't finite.
        Interrupted: `stop` returned True.
    """
    rows: dict[Tap, list[np.ndarray]] = {tap: [] for tap in taps}
    places: list[np.ndarray] = []
    with ProgressMeter(name, total=len(tokens), unit="prompts") as meter:
        for which, tokens_BS, last_B in _batches(tokens, pad=model.tokenizer.pad_id):
            if stop():
                raise Interrupted(f"stopped in data set {name}; those before it are saved")
            acts = model.activations(tokens_BS, taps)
            for tap in taps:
                last_BD = acts[tap][jnp.arange(len(last_B)), jnp.asarray(last_B)]
                rows[tap].append(np.asarray(last_BD.astype(jnp.float32))[: len(which)])
            places.append(which)
            meter.update(meter.done + len(which))
    order = np.argsort(np.concatenate(places))
    found = {tap: np.concatenate(parts)[order] for tap, parts in rows.items()}
    for tap, x_ND in found.items():
        if not np.isfinite(x_ND).all():
            raise UserError(
                f"{tap.name} of {model.source} holds NaN or infinity on the data set {name}: "
                "activations must be finite. Check the weights, or set its dtype to float32."
            )
    return found


def _batches(
    tokens: Sequence[Sequence[int]], *, pad: int
) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, "B S"], Int[np.ndarray, " B"]]]:
    """Prompts of about one length together: which, their tokens, and where each ends.

    A last batch that isn't full is filled up, so that each length has one shape.
    """
    lengths = np.array([len(ids) for ids in tokens])
    buckets = np.maximum(_SHORTEST, 2 ** np.ceil(np.log2(lengths)).astype(int))
    for length in np.unique(buckets):
        of_length = np.flatnonzero(buckets == length)
        size = max(1, _BATCH_TOKENS // int(length))
        for start in range(0, len(of_length), size):
            which = of_length[start : start + size]
            tokens_BS = np.full((size, int(length)), pad, np.int32)
            last_B = np.zeros(size, np.int32)
            for row, number in enumerate(which):
                tokens_BS[row, : lengths[number]] = tokens[number]
                last_B[row] = lengths[number] - 1
            yield which, tokens_BS, last_B


def latents_of(sae: Sae, x_ND: Float[np.ndarray, "N D"]) -> scipy.sparse.csr_matrix:
    """The latents [N, F] of some activations, float32; the latents of few rows at a time."""
    rows, width = len(x_ND), sae.W_enc.shape[1]
    pairs = active_pairs(sae, jnp.asarray(x_ND)[None], np.ones((1, rows), bool))
    return scipy.sparse.csr_matrix(
        (pairs.values.astype(np.float32), (pairs.rows, pairs.latents)), shape=(rows, width)
    )

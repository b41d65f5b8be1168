"""Which tokens become contexts: a rule that doesn't depend on who looks at them, or when.

Legend: T places in the text.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, UInt64


def sampling_order(
    latents_T: Int[np.ndarray, " T"],
    sequences_T: Int[np.ndarray, " T"],
    positions_T: Int[np.ndarray, " T"],
) -> UInt64[np.ndarray, " T"]:
    """A pseudo-random number of each (latent, sequence, position): samples are the smallest.

    Three rounds of SplitMix64 (Steele, Lea, Flood 2014), so no generator has a state that could
    depend on the number of processes.
    """
    mixed_T = np.zeros(len(latents_T), np.uint64)
    for one_T in (latents_T, sequences_T, positions_T):
        mixed_T = _mixed(mixed_T ^ one_T.astype(np.uint64))
    return mixed_T


def _mixed(x: UInt64[np.ndarray, " T"]) -> UInt64[np.ndarray, " T"]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

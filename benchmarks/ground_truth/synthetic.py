"""Activations whose features are known: hierarchical, correlated, of Zipf's frequencies.

The model is SynthSAEBench's (arXiv 2602.14687; `sae_lens.synthetic`), written anew:

    x = Σ_i a_i d_i + bias,  |d_i| = 1
    feature i is drawn on where Φ(g_i) < p_i;  g = L u + sqrt(1 - |L|²) ε, so that draws correlate
    a child fires only where its parent does, and of siblings drawn together one fires
    a_i = ReLU(m_i + s_i ε) where it fires

p falls from 0.4 to 0.0005 as the rank's power of -1/2, means m from 5 to 4, as there. Unlike there,
p isn't raised to make up for what hierarchy and exclusion take away.

Legend: N rows, D width, G true features, F latents of an SAE.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.special import ndtri

_BRANCHES, _DEPTH = 4, 3
_RANK, _CORRELATION = 25, 0.1
_MATCHED = 0.8  # |cosine| from which a true feature counts as found


@dataclass(frozen=True)
class Truth:
    """The features.

    Attributes:
        parent_G: the feature that must fire too; -1 for none. Parents come before their children.
    """

    seed: int
    direction_GD: Float[np.ndarray, "G D"]
    bias_D: Float[np.ndarray, " D"]
    probability_G: Float[np.ndarray, " G"]
    parent_G: Int[np.ndarray, " G"]
    mean_G: Float[np.ndarray, " G"]
    spread_G: Float[np.ndarray, " G"]
    loading_GR: Float[np.ndarray, "G R"]


def make_truth(*, features: int, width: int, seed: int) -> Truth:
    """Draw the features; two thirds of them stand in trees, the more frequent above."""
    random = np.random.default_rng([seed, 0])
    direction = random.standard_normal((features, width))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    zipf = np.arange(1, features + 1) ** -0.5
    probability = 0.0005 + (0.4 - 0.0005) * (zipf - zipf[-1]) / (1 - zipf[-1])
    loading = random.standard_normal((features, _RANK)) * _CORRELATION
    loading /= np.maximum(1.0, np.linalg.norm(loading, axis=1, keepdims=True) / 0.9)
    bias = random.standard_normal(width)
    return Truth(
        seed=seed,
        direction_GD=direction,
        bias_D=10 * bias / np.linalg.norm(bias),
        probability_G=probability,
        parent_G=_parents(features),
        mean_G=np.linspace(5, 4, features),
        spread_G=0.5 * np.abs(random.standard_normal(features)),
        loading_GR=loading,
    )


def _parents(features: int) -> Int[np.ndarray, " G"]:
    """Trees of `_BRANCHES` and `_DEPTH`, level by level, over the first two thirds."""
    tree_size = sum(_BRANCHES**level for level in range(_DEPTH + 1))
    trees = max(1, 2 * features // 3 // tree_size)
    parent, first, count = np.full(features, -1), 0, trees
    for _ in range(_DEPTH):
        start = first + count
        children = np.arange(start, min(start + count * _BRANCHES, features))
        parent[children] = first + (children - start) // _BRANCHES
        first, count = start, count * _BRANCHES
    return parent


def draw(truth: Truth, *, start: int, stop: int) -> Float[np.ndarray, "N G"]:
    """How strongly each feature fires in rows [start, stop): a function of truth and `start`."""
    random = np.random.default_rng([truth.seed, 1, start])
    rows, features = stop - start, len(truth.parent_G)
    shared = random.standard_normal((rows, truth.loading_GR.shape[1])) @ truth.loading_GR.T
    own = np.sqrt(1 - np.square(truth.loading_GR).sum(axis=1))
    g = shared + own * random.standard_normal((rows, features))
    fires = g < ndtri(truth.probability_G)
    for parent in np.unique(truth.parent_G[truth.parent_G >= 0]):
        children = np.flatnonzero(truth.parent_G == parent)
        excess = np.where(
            fires[:, children], g[:, children] - ndtri(truth.probability_G[children]), 1
        )
        chosen = excess == excess.min(axis=1, keepdims=True)
        fires[:, children] &= chosen & fires[:, [parent]]
    strength = truth.mean_G + truth.spread_G * random.standard_normal((rows, features))
    return np.where(fires, np.maximum(strength, 0.0), 0.0)


def rows_of(truth: Truth, strength_NG: Float[np.ndarray, "N G"]) -> Float[np.ndarray, "N D"]:
    """The activations x, float32."""
    return (strength_NG @ truth.direction_GD + truth.bias_D).astype(np.float32)


@dataclass(frozen=True)
class Found:
    """How much of the truth an SAE found, by SynthSAEBench's definitions but the first.

    Attributes:
        found: the share of true features with a decoder row at a |cosine| above 0.8.
        mcc: the mean |cosine| of the best one-to-one match of latents and features.
        uniqueness: different features among the best of each latent, over the latents.
        precision, recall, f1: of each latent as a sign of its best feature, averaged.
        l0, true_l0: active latents and firing features of a row.
    """

    found: float
    mcc: float
    uniqueness: float
    precision: float
    recall: float
    f1: float
    l0: float
    true_l0: float


def score(
    decoder_FD: Float[np.ndarray, "F D"],
    active_NF: Bool[np.ndarray, "N F"],
    truth_GD: Float[np.ndarray, "G D"],
    fires_NG: Bool[np.ndarray, "N G"],
) -> Found:
    """Hold an SAE's decoder and firings to the truth on the same rows."""
    unit = [
        m / np.maximum(np.linalg.norm(m, axis=1, keepdims=True), 1e-12)
        for m in (decoder_FD, truth_GD)
    ]
    cosine_FG = np.abs(unit[0] @ unit[1].T)
    best_F = cosine_FG.argmax(axis=1)
    matched = cosine_FG[linear_sum_assignment(-cosine_FG)]
    wanted_NF = fires_NG[:, best_F]
    hits = (active_NF & wanted_NF).sum(axis=0)
    precision = hits / np.maximum(active_NF.sum(axis=0), 1)
    recall = hits / np.maximum(wanted_NF.sum(axis=0), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return Found(
        found=float((cosine_FG.max(axis=0) > _MATCHED).mean()),
        mcc=float(matched.mean()),
        uniqueness=len(np.unique(best_F)) / len(best_F),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=float(f1.mean()),
        l0=float(active_NF.sum(axis=1).mean()),
        true_l0=float(fires_NG.sum(axis=1).mean()),
    )

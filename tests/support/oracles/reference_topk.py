"""A slow float64 NumPy oracle of TopK's and BatchTopK's steps; imports nothing of ours.

Written from Gao et al. 2024 (arXiv 2406.04093, with AuxK) and Bussmann et al. 2024 (arXiv
2412.06410), selection by sorting. Weights are latent-major, [F, D] both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.support.oracles.reference import adam


def largest(values, k, *, over_batch=False):
    """Values at or above the k-th largest of their row (of the batch: k a row), if positive."""
    if over_batch:
        least = np.sort(values.ravel())[-k * values.shape[0]]
    else:
        least = np.sort(values, axis=1)[:, -k][:, None]
    return np.where((values >= least) & (values > 0), values, 0.0), least


def loss_and_gradients(params, x, *, target, k, over_batch, dead, aux, skip_shift, prefixes=None):
    """Loss, L0, the smallest value selected (of BatchTopK), and the gradient of every parameter.

    `prefixes` are as in `reference.loss_and_gradients`.
    """
    rows, d_model = target.shape
    shifted = x if skip_shift else x - params["b_dec"]
    pre = np.maximum(shifted @ params["W_enc"].T + params["b_enc"], 0.0)
    f, least = largest(pre, k, over_batch=over_batch)
    shared = params["b_dec"] + (x @ params["W_skip"] if "W_skip" in params else 0.0)
    loss, g, g_f, g_dec = 0.0, 0.0, np.zeros_like(f), np.zeros_like(params["W_dec"])
    for first, weight in prefixes or [(f.shape[1], 1.0)]:
        error = target - (f[:, :first] @ params["W_dec"][:first] + shared)
        loss += weight * (error**2).sum(1).mean()
        g_own = -2 * weight / rows * error
        g = g + g_own
        g_f[:, :first] += g_own @ params["W_dec"][:first].T
        g_dec[:first] += f[:, :first].T @ g_own
    dead_pre = np.where(dead[None, :], pre, 0.0)
    k_aux = d_model // 2
    z = largest(dead_pre, k_aux)[0] if dead.sum() > k_aux else dead_pre
    missed = error - z @ params["W_dec"]
    share = aux * min(dead.sum() / k_aux, 1.0)
    g_missed = -2 / rows * share * missed
    g_pre = (f > 0) * g_f + (z > 0) * (g_missed @ params["W_dec"].T)
    gradients = {
        "W_enc": g_pre.T @ shifted,
        "W_dec": g_dec + z.T @ g_missed,
        "b_enc": g_pre.sum(0),
        "b_dec": g.sum(0) - (0 if skip_shift else params["W_enc"].T @ g_pre.sum(0)),
    }
    if "W_skip" in params:
        gradients["W_skip"] = x.T @ g
    loss += share * (missed**2).sum(1).mean()
    return loss, f, least, gradients


@dataclass
class Trainer:
    """The whole step in float64; latents are dead that haven't fired in `dead_after` steps."""

    params: dict
    k: int
    over_batch: bool
    dead_after: int
    aux: float
    epsilon: float
    skip_shift: bool = False
    prefixes: list | None = None
    steps: int = 0

    def __post_init__(self):
        self.params = {name: np.asarray(v, np.float64) for name, v in self.params.items()}
        self.moments = {name: np.zeros_like(v) for name, v in self.params.items()}
        self.last_fired = np.zeros(self.params["b_enc"].shape[0], int)

    def step(self, x, *, rate, target=None):
        x = np.asarray(x, np.float64)
        loss, f, least, gradients = loss_and_gradients(
            self.params,
            x,
            target=x if target is None else np.asarray(target, np.float64),
            k=self.k,
            over_batch=self.over_batch,
            dead=self.steps - self.last_fired >= self.dead_after,
            aux=self.aux,
            skip_shift=self.skip_shift,
            prefixes=self.prefixes,
        )
        self.steps += 1
        self.last_fired[(f > 0).any(0)] = self.steps
        decoder = self.params["W_dec"]
        along = (gradients["W_dec"] * decoder).sum(1, keepdims=True)
        gradients["W_dec"] = gradients["W_dec"] - along * decoder
        for name, gradient in gradients.items():
            self.params[name], self.moments[name] = adam(
                self.params[name],
                gradient,
                self.moments[name],
                rate=rate,
                step=self.steps,
                epsilon=self.epsilon,
            )
        self.params["W_dec"] /= np.linalg.norm(self.params["W_dec"], axis=1, keepdims=True)
        return {"loss": loss, "l0": (f > 0).sum(1).mean(), "smallest": float(np.min(least))}

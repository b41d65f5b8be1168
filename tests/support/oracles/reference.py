"""A slow float64 NumPy oracle of the JumpReLU step; imports nothing of ours.

Written from the papers' formulas (arXiv 2407.14435 and 2408.05147), one row and one rule at a
time. Weights are latent-major, [F, D] both; `threshold` is the plain θ. `product` multiplies two
matrices: another than NumPy's rounds its operands first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class Sparsity:
    """Which penalty: 'l0', 'batch_mean', 'per_token' or 'match'.

    `frequency` adds (its first) Σ ω² / (its second). `log_gain` and `settle` are of 'match': what
    steering has added to log λ, and the steps in which a distance of 1 adds 1.
    """

    kind: str
    coefficient: float
    target: float = 1.0
    frequency: tuple[float, float] | None = None
    log_gain: float = 0.0
    settle: float = 1.0


def encode(params, x, *, centred=True, product=np.matmul):
    if centred:
        x = x - params["b_dec"]
    pre = product(x, params["W_enc"].T) + params["b_enc"]
    active = pre > params["threshold"]
    return pre, active, np.where(active, pre, 0.0)


def penalty_and_slope(l0, sparsity):
    """Mean penalty of the batch, and for each row B times its derivative in that row's L0."""
    lam, target = sparsity.coefficient, sparsity.target
    if sparsity.kind == "match":
        distance = min(max(np.log(l0.mean() / target), -1.0), 1.0)
        lam = lam * np.exp(sparsity.log_gain + distance)
        sparsity.log_gain += distance / sparsity.settle
        return lam * l0.mean(), np.full_like(l0, lam)
    if sparsity.kind == "l0":
        return lam * l0.mean(), np.full_like(l0, lam)
    if sparsity.kind == "per_token":
        value = lam * (2 / target) * ((l0 - target) ** 2).mean()
        return value, lam * (4 / target) * (l0 - target)
    value = lam * (l0.mean() / target - 1) ** 2
    return value, np.full_like(l0, (2 * lam / target) * (l0.mean() / target - 1))


def loss_and_gradients(
    params, x, *, bandwidth, sparsity, target=None, product=np.matmul, prefixes=None
):
    """Loss, metrics and the gradient of every parameter, the threshold's in θ itself.

    With a `target` a transcoder's: it is predicted from x, which b_dec isn't subtracted from; with
    a W_skip [in, out] x W_skip is part of the prediction. `prefixes` are (latents, weight) of each
    reconstruction of a Matryoshka SAE, all latents last.
    """
    rows, is_sae = x.shape[0], target is None
    pre, active, latents = encode(params, x, centred=is_sae, product=product)
    target = x if is_sae else target
    shared = params["b_dec"] + (product(x, params["W_skip"]) if "W_skip" in params else 0.0)
    error, g_shared = 0.0, np.zeros_like(target)
    g_latents, g_dec = np.zeros_like(latents), np.zeros_like(params["W_dec"])
    for first, weight in prefixes or [(latents.shape[1], 1.0)]:
        residual = target - (product(latents[:, :first], params["W_dec"][:first]) + shared)
        error += weight * (residual**2).sum(axis=1).mean()
        g_out = -2 * weight * residual / rows
        g_shared += g_out
        g_latents[:, :first] += product(g_out, params["W_dec"][:first].T)
        g_dec[:first] += product(latents[:, :first].T, g_out)
    l0 = active.sum(axis=1).astype(float)
    penalty, slope = penalty_and_slope(l0, sparsity)
    frequency, crowding = active.mean(axis=0), np.zeros(active.shape[1])
    if sparsity.frequency is not None:
        price, scale = sparsity.frequency
        penalty += price * (frequency**2).sum() / scale
        crowding = 2 * price * frequency / scale
    mse = (residual**2).sum(axis=1).mean()

    g_pre = np.where(active, g_latents, 0.0)
    window = np.abs((pre - params["threshold"]) / bandwidth) < 0.5
    g_threshold = np.zeros_like(params["threshold"])
    for row in range(rows):
        pull = params["threshold"] * g_latents[row] + (slope[row] + crowding) / rows
        g_threshold -= np.where(window[row], pull, 0.0) / bandwidth
    gradients = {
        "W_enc": product(g_pre.T, x - params["b_dec"] if is_sae else x),
        "b_enc": g_pre.sum(axis=0),
        "W_dec": g_dec,
        "b_dec": g_shared.sum(axis=0) - is_sae * (params["W_enc"].T @ g_pre.sum(axis=0)),
        "threshold": g_threshold,
    }
    if "W_skip" in params:
        gradients["W_skip"] = product(x.T, g_shared)
    variance = ((target - target.mean(axis=0)) ** 2).sum(axis=1).mean()
    metrics = {"loss": error + penalty, "mse": mse, "l0": l0.mean(), "fvu": mse / variance}
    return metrics, gradients


def revival(params, x, gradients, *, dead, coefficient, k):
    """The aux loss of dead latents, whose gradients are added to those that are given.

    AuxK (arXiv 2406.04093, appendix A.2) of ReLU(pre): k a row, selected by sorting. Returns the
    loss, which latents it taught, which are active, and where their thresholds have to come down.
    """
    rows = x.shape[0]
    pre, active, latents = encode(params, x)
    missed = x - (latents @ params["W_dec"] + params["b_dec"])
    dead = dead & ~active.any(axis=0)
    z = np.where(dead, np.maximum(pre, 0.0), 0.0)
    z = np.where(z >= np.sort(z, axis=1)[:, -k][:, None], z, 0.0)
    missed = missed - z @ params["W_dec"]
    share = coefficient * min(dead.sum() / k, 1.0)
    g = -2 / rows * share * missed
    g_pre = (z > 0) * (g @ params["W_dec"].T)
    gradients["W_enc"] += g_pre.T @ (x - params["b_dec"])
    gradients["b_enc"] += g_pre.sum(axis=0)
    gradients["W_dec"] += z.T @ g
    loss = share * (missed**2).sum(axis=1).mean()
    return loss, dead, active.any(axis=0), np.where(dead & (z.max(0) > 0), z.max(0), np.inf)


def fvus(x, error, counted, *, first):
    """FVU of the counted tokens, without outlying ones, and of the median token.

    x is [T, S, D]; the median norm is that of the `first` sequences' counted tokens.
    """
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=-1)
    usual = counted & (norm <= 5 * np.median(norm[:first][counted[:first]]))

    def variance(where):
        return ((x[where] - x[where].mean(axis=0)) ** 2).sum(-1).mean()

    return {
        "fvu": error[counted].mean() / variance(counted),
        "fvu_without_outlying": error[usual].mean() / variance(usual),
        "fvu_median_token": np.median(error[counted]) / variance(usual),
    }


def adam(param, gradient, moment, *, rate, step, beta2=0.999, epsilon=1e-8):
    """One update with β₁ = 0; `step` counts from 1."""
    moment = beta2 * moment + (1 - beta2) * gradient**2
    return param - rate * gradient / (np.sqrt(moment / (1 - beta2**step)) + epsilon), moment


def adam_with_momentum(param, gradient, moments, *, rate, step, beta1, beta2=0.999, epsilon=1e-8):
    """One update by Kingma and Ba's algorithm 1; `step` counts from 1."""
    first, second = moments
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    size = np.sqrt(second / (1 - beta2**step)) + epsilon
    return param - rate * first / (1 - beta1**step) / size, (first, second)


@dataclass
class Trainer:
    """The whole step in float64: gradients, projection, Adam, unit-norm rows."""

    params: dict
    bandwidth: float
    log_threshold: bool
    threshold_multiplier: float = 1.0
    steps: int = 0
    product: Callable = np.matmul
    revive: float = 0.0  # the aux loss's coefficient
    revive_k: int = 1
    dead_after: int = 1  # steps
    prefixes: list | None = None
    beta1: float = 0.0
    bias_multiplier: float = 1.0

    def __post_init__(self):
        self.params = {name: np.asarray(v, np.float64) for name, v in self.params.items()}
        self.first_moments = {name: np.zeros_like(v) for name, v in self.params.items()}
        self.moments = {name: np.zeros_like(v) for name, v in self.params.items()}
        self.last_fired = np.zeros(self.params["b_enc"].shape[0], int)

    def step(self, x, *, rate, sparsity, target=None):
        x = np.asarray(x, np.float64)
        metrics, gradients = loss_and_gradients(
            self.params,
            x,
            bandwidth=self.bandwidth,
            sparsity=sparsity,
            target=target,
            product=self.product,
            prefixes=self.prefixes,
        )
        if self.revive:
            dead = self.steps - self.last_fired >= self.dead_after
            auxiliary, dead, fired, edges = revival(
                self.params, x, gradients, dead=dead, coefficient=self.revive, k=self.revive_k
            )
            metrics |= {"loss": metrics["loss"] + auxiliary, "revived": dead.sum()}
            self.last_fired[fired] = self.steps + 1
        self.steps += 1
        decoder = self.params["W_dec"]
        for latent in range(decoder.shape[0]):
            row = decoder[latent]
            gradients["W_dec"][latent] -= (row @ gradients["W_dec"][latent]) * row
        for name, gradient in gradients.items():
            value, own_rate = self.params[name], rate
            if name == "threshold":
                own_rate = rate * self.threshold_multiplier
                if self.log_threshold:
                    gradient, value = gradient * value, np.log(value)
            if name.startswith("b_"):
                own_rate = rate * self.bias_multiplier
            value, both = adam_with_momentum(
                value,
                gradient,
                (self.first_moments[name], self.moments[name]),
                rate=own_rate,
                step=self.steps,
                beta1=self.beta1,
            )
            self.first_moments[name], self.moments[name] = both
            if name == "threshold":
                value = np.exp(value) if self.log_threshold else np.maximum(value, 0.0)
            self.params[name] = value
        if self.revive:
            self.params["threshold"] = np.minimum(self.params["threshold"], edges)
        self.params["W_dec"] /= np.linalg.norm(self.params["W_dec"], axis=1, keepdims=True)
        return metrics

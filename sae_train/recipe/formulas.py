"""Settings as formulas of the budget: what `train.recipe` chooses, and why.

`gemma_scope` is the paper's letter (arXiv 2408.05147, section 3), made for a million steps. Its
rate carries no parameter far in a few hundred. `short` is for those: `benchmarks.recipe` found it
(docs/recipes.md has the tables). `auto` goes from `short` to `gemma_scope` with the share s, which
falls from 1 at a thousand steps to 0 at a million, straight in their logarithm. The study's longest
runs were short themselves: between them and the paper's, formulas join the two, and were not tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Name = Literal["gemma_scope", "short", "auto"]
NAMES: tuple[Name, ...] = ("gemma_scope", "short", "auto")

# What a config means that doesn't say (Gemma Scope 3.2).
BATCH_SIZE, ARCHITECTURE = 4096, "jumprelu"

# Where whitening was found to help: the residual stream, and what an MLP adds to it.
_IN_STREAM = ("resid_post", "mlp_out")
# Where half the rate was found to do better.
_SLOW_SITE = "attn_out_prelinear"

SHORT_STEPS, LONG_STEPS = 1_000, 1_000_000
# From so many steps on `auto` trains log θ: at its rates a logarithm then rises by up to 22, and
# from the first threshold to those of sparse SAEs it is 5 at the most. And it has no momentum any
# more, without which steps may be sparse.
_LONG_RUN = 100_000


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the formulas read of a config.

    Attributes:
        penalty: of `train.sparsity`.
        can_whiten: `sae.whitening` may be set: an SAE of a layer, trained without the model.
        site: what the SAE reads.
        beta1: as the config has it; None where the recipe chooses.
        is_sparse: the config asks for sparse steps, which have no momentum.
        starts_trained: it goes on from a release, which high rates would undo.
        dead_after_tokens: as the config has it; None where the recipe chooses.
    """

    steps: int
    batch_size: int
    architecture: str
    penalty: str
    can_whiten: bool
    site: str = "resid_post"
    beta1: float | None = None
    is_sparse: bool = False
    starts_trained: bool = False
    dead_after_tokens: int | None = None


@dataclass(frozen=True)
class Choice:
    """A value and the formula in words."""

    value: Any
    why: str


def share_of_short(name: Name, budget: Budget) -> float:
    """s: 1 where the recipe is `short`, 0 where it is Gemma Scope's."""
    if name == "gemma_scope" or budget.starts_trained:
        return 0.0
    share = math.log(LONG_STEPS / budget.steps) / math.log(LONG_STEPS / SHORT_STEPS)
    return 1.0 if name == "short" else min(1.0, max(0.0, share))


def choices(name: Name, budget: Budget) -> dict[str, Choice]:
    """The recipe's value for each dotted key that it has one for."""
    if name == "gemma_scope":
        chosen = _GEMMA_SCOPE
    else:
        chosen = _from_budget(budget, share=share_of_short(name, budget))
    return {key: choice for key, choice in chosen.items() if _applies(key, budget)}


_GEMMA_SCOPE = {
    "train.adam.beta1": Choice(0.0, "Gemma Scope 3.2"),
    "train.learning_rate.peak": Choice(7e-5, "Gemma Scope 3.2"),
    "train.learning_rate.warmup_steps": Choice(1000, "Gemma Scope 3.2"),
    "train.learning_rate.decay_steps": Choice(0, "Gemma Scope states no decay"),
    "train.learning_rate.bias_multiplier": Choice(1.0, "Gemma Scope has one rate"),
    "train.sparsity.warmup_steps": Choice(10_000, "Gemma Scope 3.2"),
    "train.gradient_clip": Choice(None, "Gemma Scope clips nothing"),
    "train.dead_after_tokens": Choice(10_000_000, "what counts as dead; nothing depends on it"),
    "sae.bandwidth": Choice(0.001, "Gemma Scope 2.2, footnote 5"),
    "sae.threshold.init": Choice(0.001, "Gemma Scope 3.2"),
    "sae.threshold.parametrisation": Choice("log", "JumpReLU paper, appendix J"),
    "sae.b_dec_init": Choice("zeros", "Gemma Scope 3.2"),
    "sae.whitening": Choice(0.0, "Gemma Scope's squared error"),
    "sae.revive_coefficient": Choice(0.0, "Gemma Scope has no loss for dead latents"),
}


def _from_budget(budget: Budget, *, share: float) -> dict[str, Choice]:
    steps, batch_size = budget.steps, budget.batch_size
    dead_after = min(10_000_000, max(1, steps // 12) * batch_size)
    is_short = share > 0
    beta1 = _beta1(budget, share=share)
    has_momentum = (beta1.value if budget.beta1 is None else budget.beta1) > 0
    return {
        "train.adam.beta1": beta1,
        "train.learning_rate.peak": _peak(budget, share=share, has_momentum=has_momentum),
        "train.learning_rate.warmup_steps": Choice(
            min(1000, steps // 12), "a twelfth of the steps, at most Gemma Scope's 1,000"
        ),
        "train.learning_rate.decay_steps": _decay(steps, share=share, has_momentum=has_momentum),
        "train.learning_rate.bias_multiplier": Choice(
            _rounded(0.04**share), "0.04 to the power s: b_dec's noise is in every reconstruction"
        ),
        "train.sparsity.warmup_steps": Choice(
            min(10_000, steps // 6), "a sixth of the steps, at most Gemma Scope's 10,000"
        ),
        "train.gradient_clip": Choice(
            0.1 if is_short else None, "keeps a batch with outlying rows from moving every weight"
        ),
        "train.dead_after_tokens": Choice(
            dead_after, "the rows of a twelfth of the steps, at most 10 million"
        ),
        "sae.bandwidth": Choice(
            _rounded(0.001 * 10**share), "0.001, Gemma Scope's, times 10 to the power s"
        ),
        "sae.threshold.init": Choice(
            _rounded(0.001 * 10**share), "0.001, Gemma Scope's, times 10 to the power s"
        ),
        "sae.threshold.parametrisation": _parametrisation(steps, share=share),
        "sae.b_dec_init": Choice(
            "mean" if is_short else "zeros", "a short run can't carry b_dec to the rows' mean"
        ),
        "sae.whitening": _whitening(budget, share=share),
        "sae.revive_coefficient": _revival(budget, share=share, dead_after=dead_after),
    }


def _beta1(budget: Budget, *, share: float) -> Choice:
    if share == 0 or budget.steps >= _LONG_RUN:
        return Choice(0.0, "Gemma Scope's; so many steps need no high rate")
    if budget.is_sparse:
        return Choice(0.0, "sparse steps have no momentum")
    return Choice(0.9, "below 100,000 steps: high rates need it")


def _decay(steps: int, *, share: float, has_momentum: bool) -> Choice:
    if has_momentum:
        return Choice(round(share * steps * 0.9), "s times nine tenths of the steps")
    return Choice(round(share * steps / 5), "s times a fifth of the steps")


def _peak(budget: Budget, *, share: float, has_momentum: bool) -> Choice:
    if budget.starts_trained:
        return Choice(7e-5, "Gemma Scope's: a higher one would undo what sae.start_from learnt")
    if has_momentum:
        rate = min(7e-3, 7e-5 * max(1.0, LONG_STEPS / budget.steps) ** 0.6)
        why = "7e-5, Gemma Scope's, times (a million / steps) to the power 0.6; from 7e-5 to 7e-3"
        if budget.site == _SLOW_SITE:
            rate *= 0.5**share
            why += f"; at {_SLOW_SITE} times 0.5 to the power s"
        return Choice(_rounded(rate), why)
    rate = 7e-5 * max(1.0, LONG_STEPS / budget.steps) ** 0.45
    return Choice(
        _rounded(min(rate, 2.2e-3)),
        "7e-5, Gemma Scope's, times (a million / steps) to the power 0.45; from 7e-5 to 2.2e-3",
    )


def _parametrisation(steps: int, *, share: float) -> Choice:
    if share == 1 or (share > 0 and steps < _LONG_RUN):
        return Choice("direct", "below 100,000 steps a logarithm moves too slowly")
    return Choice("log", "the JumpReLU paper's; there are steps enough for a logarithm")


def _whitening(budget: Budget, *, share: float) -> Choice:
    if not budget.can_whiten:
        return Choice(0.0, "only SAEs of a layer can be whitened, trained without the model")
    if budget.architecture != "jumprelu":
        return Choice(0.0, "measured for jumprelu alone")
    if budget.site not in _IN_STREAM:
        return Choice(0.0, "measured to help in the residual stream and at the MLP's output alone")
    return Choice(_rounded(share / 4), "a quarter of s: less delta loss for hardly more FVU")


def _revival(budget: Budget, *, share: float, dead_after: int) -> Choice:
    counted = dead_after if budget.dead_after_tokens is None else budget.dead_after_tokens
    if counted >= (budget.steps - 1) * budget.batch_size:
        return Choice(0.0, "no latent can count as dead before the run ends")
    return Choice(_rounded(share), "s: dead latents learn what the others leave")


def _applies(key: str, budget: Budget) -> bool:
    if key in ("sae.bandwidth", "sae.revive_coefficient") or key.startswith("sae.threshold."):
        return budget.architecture == "jumprelu"
    return key != "train.sparsity.warmup_steps" or budget.penalty != "none"


def _rounded(value: float) -> float:
    """Three digits: a config is read by people too."""
    return float(f"{value:.3g}")

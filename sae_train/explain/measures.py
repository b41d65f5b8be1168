"""Scores of explanations from what was true and what was answered. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def balanced_accuracy(truth: Sequence[bool], predicted: Sequence[bool]) -> float | None:
    """The mean of the shares of true and of false ones that are right; chance is 0.5.

    None unless there are both.
    """
    true, said = np.asarray(truth, bool), np.asarray(predicted, bool)
    if true.all() or not true.any():
        return None
    return float((said[true].mean() + (~said[~true]).mean()) / 2)


def area_under_curve(truth: Sequence[bool], probability: Sequence[float]) -> float | None:
    """The area under the ROC curve: the share of pairs of a true and a false one in order.

    Ties count half; chance is 0.5. None unless there are both.
    """
    true, likely = np.asarray(truth, bool), np.asarray(probability, float)
    if true.all() or not true.any():
        return None
    difference = likely[true][:, None] - likely[~true][None, :]
    return float((np.sign(difference) + 1).mean() / 2)


def correlation(truth: Sequence[float], predicted: Sequence[float]) -> float | None:
    """Pearson's correlation; chance is 0. None where either is constant."""
    if len(set(truth)) < 2 or len(set(predicted)) < 2:
        return None
    return float(np.corrcoef(truth, predicted)[0, 1])

"""One probe: the best latents, a logistic regression on them, and how well it does on other rows.

The protocol is sae-probes', to the letter: latents are ranked by the difference of their means over
the rows of the two labels, after dividing each by its mean where it is active; the L1-penalised
regression's C is that with the best AUC on the last rows of training.

Legend: N rows, F latents, k latents of a probe.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from activation_cache.runtime.errors import UserError

_EPSILON = 1e-6
_CS = np.logspace(5, -5, 10)
_FEW_ROWS = 128  # below which C is chosen by six folds instead of one part
_MOST_VALIDATION_ROWS = 100


@dataclass(frozen=True)
class Score:
    """How well a probe does on the test rows: F1 is the mean of both labels', by their numbers."""

    f1: float
    accuracy: float
    auc: float


def best_latents(
    latents_NF: scipy.sparse.csr_matrix, label_N: Int[np.ndarray, " N"], *, most: int
) -> Int[np.ndarray, " k"]:
    """The latents whose means differ most between the labels, falling."""
    count_F = np.asarray((latents_NF != 0).sum(axis=0)).ravel()
    mean_F = np.asarray(abs(latents_NF).sum(axis=0)).ravel() / (count_F + _EPSILON)
    means = [np.asarray(latents_NF[label_N == label].mean(axis=0)).ravel() for label in (1, 0)]
    difference_F = np.abs(means[0] - means[1]) / (mean_F + _EPSILON)
    return np.argsort(-difference_F, kind="stable")[:most]


def score_of(
    train: Float[np.ndarray, "N k"],
    train_label_N: Int[np.ndarray, " N"],
    test: Float[np.ndarray, "M k"],
    test_label_M: Int[np.ndarray, " M"],
    *,
    penalty: Literal["l1", "l2"],
    seed: int,
) -> Score:
    """Fit a logistic regression and score it.

    Raises:
        UserError: scikit-learn isn't installed.
    """
    metrics, _ = _scikit_learn()
    train, test = train.astype(np.float64), test.astype(np.float64)
    c = _best_c(train, train_label_N, penalty=penalty, seed=seed)
    mixed = np.random.RandomState(seed).permutation(len(train))
    model = _regression(c, penalty=penalty, seed=seed).fit(train[mixed], train_label_N[mixed])
    predicted = model.predict(test)
    return Score(
        f1=float(metrics.f1_score(test_label_M, predicted, average="weighted")),
        accuracy=float(metrics.accuracy_score(test_label_M, predicted)),
        auc=float(metrics.roc_auc_score(test_label_M, model.predict_proba(test)[:, 1])),
    )


def _best_c(
    x: Float[np.ndarray, "N k"], label_N: Int[np.ndarray, " N"], *, penalty: str, seed: int
) -> float:
    metrics, selection = _scikit_learn()
    if len(x) < _FEW_ROWS:
        folds = selection.StratifiedKFold(n_splits=6, shuffle=True, random_state=seed)
        parts = list(folds.split(x, label_N))
    else:
        last = len(x) - min(int(0.2 * len(x)), _MOST_VALIDATION_ROWS)
        parts = [(np.arange(last), np.arange(last, len(x)))]

    def auc(c: float, fitted: np.ndarray, held: np.ndarray) -> float:
        model = _regression(c, penalty=penalty, seed=seed).fit(x[fitted], label_N[fitted])
        return float(metrics.roc_auc_score(label_N[held], model.predict_proba(x[held])[:, 1]))

    return float(_CS[np.argmax([np.mean([auc(c, *part) for part in parts]) for c in _CS])])


def _regression(c: float, *, penalty: str, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    own = {"l1_ratio": 1.0, "solver": "saga"} if penalty == "l1" else {}
    return LogisticRegression(C=c, random_state=seed, max_iter=1000, **own)


def _scikit_learn() -> tuple[Any, Any]:
    try:
        from sklearn import metrics, model_selection
    except ImportError as error:
        raise UserError(
            "sae probe needs scikit-learn: pip install 'open-gemma-scope[probe]'"
        ) from error
    return metrics, model_selection


@contextmanager
def many_fits() -> Iterator[None]:
    """Around all threads that fit: each multiplies in one thread, and no fit warns.

    The protocol stops a regression after 1,000 rounds, and scikit-learn warns of each.
    """
    _scikit_learn()
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(limits=1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield

"""One pass with a stub of a model: batches no larger than the text, and what isn't finite."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache.language_model.model import LanguageModel
from activation_cache.runtime.errors import UserError
from activation_cache.text.token_table import TokenTable
from sae_train.config.evaluation import EvaluationConfig
from sae_train.evaluate.job import Job
from sae_train.evaluate.result import measures
from sae_train.evaluate.text_pass import Pass
from tests.support.configs import make_config
from tests.support.saes import make_sae

D, F, S, BOS = 6, 24, 5, 2


def make_pass(
    sequences: int,
    *,
    per_batch: int = 8,
    acts: np.ndarray | None = None,
    losses: float = 1.0,
    vocabulary: int | None = None,
) -> Pass:
    """A pass over `sequences` of ordinary tokens behind BOS, in a model with these activations."""
    tokens = np.full((max(sequences, vocabulary or 0), S), 9, np.int32)
    tokens[:, 0] = BOS
    table = Mock(spec=TokenTable, sequence_length=S, num_harvestable=vocabulary or 99)
    table.summary = SimpleNamespace(special_ids=SimpleNamespace(pad=0), subsets=[])
    table.read = lambda indices: tokens[list(indices)]
    table.usable = lambda found, _: found > BOS
    table.masked = lambda sequences: np.zeros((len(sequences), S), bool)
    table.subset_of = lambda indices: np.zeros(len(indices), np.int32)
    model = Mock(spec=LanguageModel, config=SimpleNamespace(vocab_size=11))
    acts = np.ones((sequences, S, D), np.float32) if acts is None else acts
    model.activations = Mock(side_effect=lambda _, taps: {tap: jnp.asarray(acts) for tap in taps})
    model.losses = Mock(side_effect=lambda batch, _, **__: jnp.full((len(batch), S - 1), losses))
    site = {"site": "embedding"} if vocabulary else {}
    config = make_config(width=F, layer=0 if vocabulary else 1, sae=site)
    settings = EvaluationConfig(sequences_per_batch=per_batch, importance_sequences=0)
    settings = settings.model_copy(update={"sequences": sequences})  # 0: the vocabulary alone
    job = Job(
        folder=Path("run"),
        config=config,
        settings=settings,
        step=1,
        sae=make_sae(D=D, F=F),
        model=config.model,
        table=table,
        sequences=range(sequences),
        record={},
        fingerprints={},
    )
    return Pass([job], model)


@pytest.mark.parametrize(
    ("sequences", "per_batch", "vocabulary", "expected"),
    [
        (4, 20_000, None, [4]),
        (5, 2, None, [2, 2, 2]),
        (8, 8, None, [8]),
        (3, 5, 7, [5, 5, 3]),
        (0, 5, 3, [3]),
    ],
)
def test_a_batch_is_no_larger_than_what_there_is(
    sequences: int, per_batch: int, vocabulary: int | None, expected: list[int]
):
    batches = make_pass(sequences, per_batch=per_batch, vocabulary=vocabulary)._batches()
    assert [len(batch.tokens_BS) for batch in batches] == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_told_at_once(value: float):
    acts = np.ones((4, S, D), np.float32)
    acts[1, 2, 3] = value
    one = make_pass(4, acts=acts)
    with pytest.raises(UserError, match=r"resid_post.1 of tiny holds NaN or infinity .* dtype"):
        one.run()
    one.model.losses.assert_not_called()  # type: ignore[attr-defined]


def test_a_token_that_is_not_counted_may_be_anything():
    acts = np.ones((4, S, D), np.float32)
    acts[:, 0] = np.nan  # at BOS
    one = make_pass(4, acts=acts)
    one.run()
    assert one.base.mean == 1.0


def test_what_is_not_finite_behind_the_tap_or_overflows_is_null():
    acts = 1e30 * np.random.default_rng(0).standard_normal((4, S, D)).astype(np.float32)
    one = make_pass(4, acts=acts, losses=np.nan)
    one.run()
    (site,), (sae,) = one.sites.values(), one.saes
    found = measures(site=site, sae=sae, losses=one.losses_of(0))
    json.dumps(found, allow_nan=False)
    assert found["variance"] is found["loss"] is found["delta_loss"] is None

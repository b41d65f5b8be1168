"""Scores: from a kept residual stream, of counted predictions alone, and their gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache.config import ModelConfig
from activation_cache.gemma import scores
from activation_cache.gemma.scores import centred_logit, cross_entropy
from activation_cache.gemma.taps import Splice, Tap, stream_before
from activation_cache.language_model.model import LanguageModel, load_model
from tests.support.tiny_gemma import write_tiny_gemma

LAYER = 2
SITES = ["resid_post", "mlp_out", "attn_out_prelinear", "mlp_in", "mlp_in_normalized"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma(tmp_path_factory.mktemp("gemma"), family="gemma2")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    tokens = np.random.default_rng(0).integers(5, 400, (3, 12), dtype=np.int32)
    tokens[:, 0] = 2
    return tokens


def loaded(folder: Path, dtype: Any = "float32") -> LanguageModel:
    return load_model(ModelConfig(weights=str(folder), dtype=dtype))


def flip(acts: jax.Array, gain: jax.Array, read: jax.Array | None = None) -> jax.Array:
    """Backwards, since a norm may follow, to which a factor alone is nothing."""
    return gain * jnp.flip(acts if read is None else read, axis=-1)


def kept_by(model: LanguageModel, tokens: np.ndarray, splice: Splice) -> dict[Tap, jax.Array]:
    """Every stream: the one it starts from, and others from which it may not or need not."""
    assert stream_before(splice) is not None
    streams = [Tap("resid_post", layer) for layer in range(model.config.num_layers)]
    return model.activations(tokens, streams)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "dtype"),
    [*((site, "float32") for site in [*SITES, "transcoder"]), ("mlp_out", "bfloat16")],
)
def test_from_the_kept_stream_come_the_same_losses(
    folder: Path, tokens: np.ndarray, site: Any, dtype: str
) -> None:
    model, gain = loaded(folder, dtype), jnp.asarray(0.5, dtype)
    if site == "transcoder":
        splice = Splice(Tap("mlp_out", LAYER), flip, gain, reads=Tap("mlp_in", LAYER))
    else:
        splice = Splice(Tap(site, LAYER), flip, gain)
    kept = kept_by(model, tokens, splice)
    whole = np.asarray(model.losses(tokens, splice))
    found = np.asarray(model.losses(tokens, splice, kept=kept))
    # XLA fuses the two programs apart, and may round a multiply and add once or twice. In bfloat16
    # it may leave a stream unrounded on its way to the next layer; the kept one isn't.
    tolerance = 2e-2 if dtype == "bfloat16" else 0 if site == "resid_post" else 1e-6
    np.testing.assert_allclose(found, whole, rtol=tolerance, atol=0)
    without = np.asarray(model.losses(tokens, kept=kept))
    assert np.abs(whole - without).max() > 0.1, "the splice shows"


@pytest.mark.slow
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_from_the_kept_stream_comes_the_same_gradient(
    folder: Path, tokens: np.ndarray, site: Any
) -> None:
    model, tap, counted = loaded(folder), Tap(site, LAYER), np.ones((3, 11), bool)
    kept = kept_by(model, tokens, Splice(tap, flip))
    whole = np.asarray(model.gradient(tokens, tap, counted))
    found = np.asarray(model.gradient(tokens, tap, counted, kept=kept))
    assert np.abs(whole).max() > 1e-2
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("splice", "stream"),
    [
        (Splice(Tap("resid_post", 0), flip), Tap("resid_post", 0)),
        (Splice(Tap("mlp_out", 3), flip), Tap("resid_post", 2)),
        (Splice(Tap("resid_post", 3), flip, reads=Tap("mlp_in", 3)), Tap("resid_post", 2)),
        (Splice(Tap("mlp_in", 0), flip), None),
        (Splice(Tap("embedding", 0), flip), None),
    ],
)
def test_a_splice_starts_at_the_last_stream_below_it(splice: Splice, stream: Tap | None) -> None:
    assert stream_before(splice) == stream


@pytest.mark.slow
def test_a_stream_of_zeros_predicts_every_token_alike(folder: Path, tokens: np.ndarray) -> None:
    """Which is why an evaluation doesn't run the model with zero at every position."""
    model = loaded(folder)
    for tap in (Tap("resid_post", LAYER), Tap("embedding", 0)):
        losses = np.asarray(model.losses(tokens, Splice(tap, flip, jnp.asarray(0.0))))
        np.testing.assert_allclose(losses, np.log(model.config.vocab_size), rtol=1e-6)


# The scores alone -------------------------------------------------------------------------------

B, P, D, V = 3, 5, 8, 37


def parts() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, three of which are those of the first sequence; targets; an embedding."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((B, P, D), np.float32)
    h[1, :3] = h[0, :3]
    targets = rng.integers(0, V, (B, P), np.int32)
    return (
        jnp.asarray(h),
        jnp.asarray(targets),
        jnp.asarray(rng.standard_normal((V, D), np.float32)),
    )


def plain_logits(h: Any, embedding: Any, softcap: float | None) -> Any:
    logits = h @ embedding.T
    return logits if softcap is None else softcap * np.tanh(logits / softcap)


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each row that is projected on the vocabulary: chunks hold one row."""
    rows: list[int] = []
    project = scores.project

    def counting(h: jax.Array, embedding: jax.Array, **options: Any) -> jax.Array:
        jax.debug.callback(lambda: rows.append(len(h)))
        return project(h, embedding, **options)

    monkeypatch.setattr(scores, "MAX_LOGIT_ELEMENTS", V)
    monkeypatch.setattr(scores, "project", counting)
    return rows


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rows_that_count_and_differ_are_projected(
    projected: list[int], softcap: float | None
) -> None:
    h, targets, embedding = parts()
    counted = np.ones((B, P), bool)
    counted[0, 1] = counted[2, 4] = False  # the one is needed all the same, for sequence 1
    options: dict[str, Any] = {"softcap": softcap, "precision": "float32"}
    found = np.asarray(cross_entropy(h, targets, jnp.asarray(counted), embedding, **options))
    jax.effects_barrier()
    assert len(projected) == B * P - 3 - 1
    logits = plain_logits(np.asarray(h, np.float64), np.asarray(embedding, np.float64), softcap)
    picked = np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
    expected = np.log(np.exp(logits).sum(axis=-1)) - picked
    np.testing.assert_allclose(found, np.where(counted, expected, 0), rtol=1e-5, atol=1e-6)


def test_all_is_well_where_nothing_counts(projected: list[int]) -> None:
    h, targets, embedding = parts()
    counted = jnp.zeros((B, P), bool)
    options: dict[str, Any] = {"softcap": None, "precision": "float32"}
    assert not np.asarray(cross_entropy(h, targets, counted, embedding, **options)).any()
    jax.effects_barrier()
    assert not projected


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_centred_logit_s_gradient_is_autodiff_s(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None
) -> None:
    monkeypatch.setattr(scores, "MAX_LOGIT_ELEMENTS", 4 * V)  # 15 rows: the last chunk is padded
    h, targets, embedding = parts()
    counted = jnp.asarray(np.random.default_rng(1).uniform(size=(B, P)) < 0.6)

    def plain(h: jax.Array) -> jax.Array:
        logits = jnp.einsum("bpd,vd->bpv", h, embedding)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        picked = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
        return jnp.where(counted, picked - logits.mean(axis=-1), 0.0)

    def ours(h: jax.Array) -> jax.Array:
        return centred_logit(h, targets, counted, embedding, softcap=softcap, precision="float32")

    def gradient(of: Callable[[jax.Array], jax.Array]) -> np.ndarray:
        return np.asarray(jax.grad(lambda h: of(h).sum())(jnp.asarray(h)))

    np.testing.assert_allclose(ours(jnp.asarray(h)), plain(jnp.asarray(h)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient(ours), gradient(plain), rtol=1e-5, atol=1e-6)

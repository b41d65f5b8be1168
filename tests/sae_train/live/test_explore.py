"""`explore` and `steer` on a tiny Gemma, against NumPy and against splices."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from activation_cache.config import ModelConfig
from activation_cache.gemma.taps import Splice, Tap
from activation_cache.language_model.model import LanguageModel, load_model
from activation_cache.runtime.errors import UserError
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.live.explore import explore
from sae_train.live.steer import steer
from tests.support.saes import make_sae, make_trained_as, reference_latents
from tests.support.tiny_gemma import write_tiny_gemma

TEXT = "the cat and <b>a</b> dog"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = write_tiny_gemma(tmp_path_factory.mktemp("gemma"))
    return load_model(ModelConfig(weights=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def sae() -> Sae:
    return make_sae(D=20, F=37)


@pytest.mark.slow
def test_strongest_latents_and_shares(model: LanguageModel, sae: Sae) -> None:
    found = explore(model, sae, TEXT, strongest=5, position=4)
    tokens = np.array([found.ids], np.int32)
    tap = Tap("resid_post", 1)
    assert found.placed.tap == found.placed.target == tap
    values = reference_latents(sae, np.asarray(model.activations(tokens, [tap])[tap])[0])
    values[0] = 0  # BOS
    assert found.tokens[:2] == ("<bos>", "the")
    assert list(found.active) == (values > 0).sum(axis=1).tolist()
    np.testing.assert_allclose(
        found.values([3, 0, 36]), values[:, [3, 0, 36]], rtol=1e-4, atol=1e-5
    )
    for row, firings in zip(values, found.strongest, strict=True):
        best = [index for index in np.argsort(-row)[:5] if row[index] > 0]
        assert [one.latent for one in firings] == best
    best = np.argsort(-values.max(axis=0))[:5]
    assert [one.latent for one in found.overall] == best.tolist()
    assert [one.position for one in found.overall] == values.argmax(axis=0)[best].tolist()

    counted = np.arange(tokens.shape[1] - 1)[None] == 4
    gradient = np.asarray(model.gradient(tokens, tap, counted))[0]
    effects = values * (gradient @ np.asarray(sae.W_dec).T)
    shares = effects / np.abs(effects).sum()
    assert not shares[5:].any()  # what comes after the prediction has no effect on it
    for firing in found.strongest[3]:
        assert firing.share == pytest.approx(shares[3, firing.latent], rel=1e-3, abs=1e-6)
    total = shares.sum(axis=0)
    assert [one.latent for one in found.effective] == np.argsort(-np.abs(total))[:5].tolist()
    assert found.effective[0].share == pytest.approx(total[found.effective[0].latent], rel=1e-3)

    loss = np.asarray(model.losses(tokens))[0, 4]
    assert found.predicted.id == found.ids[5]
    assert found.predicted.probability == pytest.approx(np.exp(-loss), rel=1e-4)
    chances = [one.probability for one in found.likely]
    assert chances == sorted(chances, reverse=True)
    # At the end of the text the model's own choice is explained.
    end = explore(model, sae, TEXT)
    assert end.position == len(end.ids) - 1
    assert end.predicted == end.likely[0]
    assert "&lt;" in end._repr_html_()
    assert "<b>" not in end._repr_html_()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_steering_is_the_change_of_the_stream(model: LanguageModel, kind: str) -> None:
    topk = kind == "topk"
    sae = fold(make_trained_as(kind, D=20, F=37)) if topk else make_sae(D=20, F=37)
    none = steer(model, sae, TEXT, {5: ("add", 0.0)}, new_tokens=8, temperature=1.0, seed=2)
    assert none.plain_sampled == none.steered_sampled
    for mode, strength in (("add", 9.0), ("clamp", 8.0), ("zero", 3.0)):
        found = steer(
            model, sae, TEXT, {5: (mode, strength)}, new_tokens=8, temperature=1.0, seed=2
        )
        assert found.plain_sampled == none.plain_sampled
        assert found.plain == model.tokenizer.decode(found.plain_sampled.tokens)
        prompt = [2, *model.tokenizer.encode_batch([TEXT])[0]]
        tokens = np.array([[*prompt, *found.steered_sampled.tokens]], np.int32)
        change = (sae, mode, 0.0 if mode == "zero" else strength)
        losses = np.asarray(losses_of(model, tokens, change))[0, len(prompt) - 1 :]
        np.testing.assert_allclose(
            found.steered_sampled.log_probabilities, -losses, rtol=1e-4, atol=1e-4
        )
        if mode != "zero":
            assert found.steered != found.plain


def losses_of(model: LanguageModel, tokens: np.ndarray, change: tuple[Sae, str, float]) -> Array:
    """Losses with latent 5 changed, in plain words; BOS, EOS and padding are left alone."""
    sae, mode, strength = change
    where = jnp.asarray(tokens > 2)

    def replace(acts_BSD: Array, sae: Sae) -> Array:
        f_BS = sae.encode(acts_BSD)[..., 5]
        size_BS = jnp.full_like(f_BS, strength) if mode == "add" else strength - f_BS
        size_BS = jnp.where(where, size_BS, 0.0)
        return acts_BSD + size_BS[:, :, None] * jnp.asarray(sae.W_dec)[5][None, None]

    return model.losses(tokens, Splice(Tap("resid_post", 1), replace, sae))


@pytest.mark.slow
def test_a_transcoder_is_steered_where_it_writes(model: LanguageModel) -> None:
    sae = make_sae(D=20, F=24, site="mlp_in", target="mlp_out")
    heard: list[str] = []
    found = steer(
        model,
        sae,
        TEXT,
        {1: ("clamp", 30.0), 2: ("add", -30.0), 3: ("zero", 0.0)},
        new_tokens=8,
        listener=lambda name, so_far: heard.append(name),
    )
    assert heard == ["plain", "steered"]
    assert found.steered != found.plain
    explored = explore(model, sae, TEXT)
    assert (explored.placed.tap.site, explored.placed.target.site) == ("mlp_in", "mlp_out")


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("", {1: ("add", 1.0)}, "the text is empty"),
        ("a" * 400, {1: ("add", 1.0)}, r"the text has \d+ tokens with BOS, and at most 256"),
        ("a" * 240, {1: ("add", 1.0)}, "40 new ones were asked for"),
        ("a", {37: ("add", 1.0)}, "latents 0 to 36: there is no latent 37"),
        ("a", {1: ("push", 1.0)}, "choose add, clamp or zero"),
        ("a", {1: ("add", float("inf"))}, "a finite strength"),
    ],
)
def test_what_cannot_be_steered_is_refused(
    model: LanguageModel, sae: Sae, text: str, changes: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        steer(model, sae, text, changes)


def test_what_cannot_be_explored_is_refused(model: LanguageModel, sae: Sae) -> None:
    with pytest.raises(UserError, match="the text is empty"):
        explore(model, sae, "")
    with pytest.raises(UserError, match="positions 0 to 1: there is no position 2"):
        explore(model, sae, "a", position=2)
    with pytest.raises(UserError, match="the SAE reads vectors of 10, and resid_post"):
        explore(model, make_sae(D=10), "a")
    with pytest.raises(UserError, match="don't say which activations it reads"):
        explore(model, Sae(**sae.tensors), "a")

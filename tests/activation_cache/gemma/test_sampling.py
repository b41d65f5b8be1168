"""Sampling with a key-value cache, against the forward without one and `transformers`' generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jaxtyping import Array

from activation_cache.config import ModelConfig
from activation_cache.gemma.sampling import Continuation, Sampling
from activation_cache.gemma.taps import Splice, Tap
from activation_cache.language_model.model import LanguageModel, load_model
from activation_cache.mesh import make_mesh
from activation_cache.runtime.errors import UserError
from tests.support.tiny_gemma import write_tiny_gemma

# Longer than the window of 5, of different lengths, across a bucket of 16.
PROMPTS = [[2, *range(300, 307)], [2, 350], [2, *range(310, 331)]]


one_family = pytest.mark.parametrize("folder", ["gemma3"], indirect=True)


@pytest.fixture(scope="module", params=["gemma2", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Small caps, so that both bite.
    caps = {"attention_softcap": 2.0, "final_softcap": 1.5} if request.param == "gemma2" else {}
    return write_tiny_gemma(tmp_path_factory.mktemp("gemma"), family=request.param, **caps)


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return load_model(ModelConfig(weights=str(folder), dtype="float32"))


def log_probabilities(
    model: LanguageModel, prompt: list[int], found: Continuation, splice: Splice | None = None
) -> np.ndarray:
    """What the forward without a cache says of the sampled tokens, whatever comes after them."""
    ids = [*prompt, *found.tokens]
    tokens = np.array([ids + [0] * (43 - len(ids))], np.int32)
    return -np.asarray(model.losses(tokens, splice))[0, len(prompt) - 1 : len(ids) - 1]


def add(acts_BSD: Array, added_D: Array) -> Array:
    return acts_BSD + added_D[None, None, :]


@pytest.mark.slow
def test_the_numbers_are_those_of_the_forward_without_a_cache(model: LanguageModel) -> None:
    how = Sampling(new_tokens=21, temperature=1.0, seed=3)
    heard: list[int] = []
    found = model.sample(PROMPTS, how, listener=lambda now: heard.append(len(now[0].tokens)))
    assert heard == [8, 16, 21]
    assert len({one.tokens for one in found}) == 3
    for prompt, one in zip(PROMPTS, found, strict=True):
        assert len(one.tokens) == 21
        assert not one.stopped
        expected = log_probabilities(model, prompt, one)
        np.testing.assert_allclose(one.log_probabilities, expected, rtol=2e-5, atol=2e-5)
    # A row is the same whatever stands beside it, and another under another seed.
    alone = model.sample(PROMPTS[:1], how)
    assert alone[0].tokens == found[0].tokens
    assert model.sample(PROMPTS[:1], Sampling(21, seed=4))[0].tokens != found[0].tokens


@pytest.mark.slow
def test_the_most_likely_tokens_are_those_of_transformers(
    folder: Path, model: LanguageModel
) -> None:
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    found = model.sample(PROMPTS, Sampling(new_tokens=12, temperature=0.0))
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(one.tokens) == expected[0, len(prompt) :].tolist()


@one_family
@pytest.mark.slow
def test_splices_reach_prompts_and_new_tokens(model: LanguageModel) -> None:
    added = jnp.asarray(np.random.default_rng(0).standard_normal(20).astype(np.float32))
    splice = Splice(Tap("resid_post", 1), add, added)
    how = Sampling(new_tokens=9, seed=1)
    plain, spliced, kept = (
        model.sample(PROMPTS[:1], how, splices=splices)[0]
        for splices in ((), (splice,), (Splice(splice.tap, add, jnp.zeros(20)),))
    )
    assert spliced.tokens != plain.tokens
    assert kept == plain
    expected = log_probabilities(model, PROMPTS[0], spliced, splice)
    np.testing.assert_allclose(spliced.log_probabilities, expected, rtol=2e-5, atol=2e-5)
    # Two splices of one tap act one after the other, and none acts on a token that is left out.
    halves = [Splice(splice.tap, add, added / 2)] * 2
    assert model.sample(PROMPTS[:1], how, splices=halves)[0].tokens == spliced.tokens
    everything = Sampling(new_tokens=9, seed=1, unspliced_ids=tuple(range(401)))
    assert model.sample(PROMPTS[:1], everything, splices=(splice,))[0] == plain


@one_family
def test_a_row_ends_with_a_stop_token(model: LanguageModel) -> None:
    whole = model.sample(PROMPTS, Sampling(new_tokens=21, seed=3))
    stop = whole[0].tokens[4]
    found = model.sample(PROMPTS, Sampling(new_tokens=21, seed=3, stop_ids=(stop,)))
    end = whole[0].tokens.index(stop) + 1
    assert found[0].tokens == whole[0].tokens[:end]
    assert found[0].stopped
    for one, other in zip(found, whole, strict=True):
        assert one.tokens == other.tokens[: len(one.tokens)]
        assert one.stopped == (stop in other.tokens)


@one_family
@pytest.mark.slow
def test_a_model_cut_over_two_devices_samples_the_same(folder: Path, model: LanguageModel) -> None:
    mesh = make_mesh(jax.devices()[:2])
    cut = load_model(ModelConfig(weights=str(folder), dtype="float32"), mesh=mesh)
    how = Sampling(new_tokens=8, temperature=0.0)
    assert [one.tokens for one in cut.sample(PROMPTS, how)] == [
        one.tokens for one in model.sample(PROMPTS, how)
    ]


@one_family
@pytest.mark.parametrize(
    ("prompts", "how", "words"),
    [
        ([], Sampling(), "an empty prompt"),
        ([[2], []], Sampling(), "an empty prompt"),
        ([[2, 401]], Sampling(), "token ids are 2 to 401 and the model embeds 0 to 400"),
        ([[2]], Sampling(new_tokens=0), "0 new tokens at temperature 1"),
        ([[2]], Sampling(temperature=-0.5), "32 new tokens at temperature -0.5"),
        ([[2]], Sampling(temperature=float("nan")), "temperature nan"),
        ([[2] * 250], Sampling(new_tokens=7), "shorten the text to at most 249 tokens"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    model: LanguageModel, prompts: list[list[int]], how: Sampling, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        model.sample(prompts, how)


@one_family
def test_a_splice_at_a_missing_layer_is_refused(model: LanguageModel) -> None:
    splice = Splice(Tap("resid_post", 9), add, jnp.zeros(20))
    with pytest.raises(UserError, match="layer 9 of site resid_post does not exist"):
        model.sample([[2]], Sampling(), splices=(splice,))

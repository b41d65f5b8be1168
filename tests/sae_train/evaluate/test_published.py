"""Importance, subsets, precision and extra evaluations: the paper's numbers beyond the headline.

What is compared with an evaluation is computed in batches of its shape, which are compiled already.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache.config import ModelConfig
from activation_cache.gemma.forward import Gemma
from activation_cache.gemma.scores import centred_logit
from activation_cache.gemma.taps import Splice, Tap
from activation_cache.harvest.harvest import harvest
from activation_cache.language_model.model import LanguageModel, load_model
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import open_store
from activation_cache.text.masked import masked_tokens
from activation_cache.text.token_table import open_tokens
from launch.run_state import needs_evaluation
from sae_train.checkpoint.trained import load_trained
from sae_train.config.evaluation import EvaluationConfig, ExtraEvaluationConfig
from sae_train.config.run import Config
from sae_train.evaluate.evaluate import evaluate
from sae_train.evaluate.importance import ImportanceSums, uniformity
from sae_train.evaluate.result import Evaluation, read_evaluation, read_frequencies
from sae_train.evaluate.splice import splice_sae
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from tests.support.saes import (
    make_config,
    make_sae,
    make_trained,
    reference_latents,
    reference_reconstruction,
    save_run,
)
from tests.support.tiny_gemma import write_tiny_gemma

pytestmark = pytest.mark.slow

D, F, S, HELD_OUT = 20, 40, 16, 24
PAD, EOS, BOS = 0, 1, 2
TAP = Tap("resid_post", 2)
SUBSETS = {"prose": "the cat and a dog ", "code": "if x: return 0\n", "law": "whereas the same "}
BATCH = 7
SETTINGS = {"sequences": HELD_OUT, "sequences_per_batch": BATCH, "importance_sequences": 6}


@dataclasses.dataclass
class World:
    config: Config
    run: Path
    sae: Sae
    model: LanguageModel
    tokens: np.ndarray
    subset_of: np.ndarray


def write_text(path: Path) -> Path:
    random = np.random.default_rng(2)
    rows = [
        {"text": words * int(random.integers(1, 9)), "meta": {"set": name}}
        for _ in range(25)
        for name, words in SUBSETS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_tiny_gemma(folder / "gemma")
    values = make_config(width=F, layer=TAP.layer).model_dump()
    values["model"] = {"weights": str(folder / "gemma"), "dtype": "float32"}
    values["text"] |= {
        "source": [str(write_text(folder / "text.jsonl"))],
        "subset_field": "meta.set",
        "sequence_length": S,
        "held_out_sequences": HELD_OUT,
    }
    values["cache"] |= {"path": str(folder / "store"), "tokens": 200}
    values |= {"evaluation": SETTINGS, "output": str(folder / "run")}
    config = Config.model_validate(values)
    harvest(model=config.model, text=config.text, cache=config.cache)
    store = open_store(config.cache.path)
    trained = make_trained(D=D, F=F, scale=2.0)
    trained = dataclasses.replace(trained, config=config, store=store.identity)
    run = save_run(folder / "run", trained)
    held_out = store.tokens.held_out
    return World(
        config,
        run,
        fold(load_trained(run)),
        load_model(config.model),
        store.tokens.read(held_out),
        store.tokens.subset_of(held_out),
    )


def measured(world: World, **settings: Any) -> Evaluation:
    chosen = EvaluationConfig.model_validate(SETTINGS | settings)
    return evaluate([world.run], settings=chosen, model=world.model)[0]


# Importance -------------------------------------------------------------------------------------


def test_the_uniformity_is_the_formula_s():
    """Appendix C.3, row by row in float64."""
    sae = make_sae(D=6)
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 5, 6)).astype(np.float32)
    gradient = random.standard_normal((3, 5, 6)).astype(np.float32)
    found = np.asarray(uniformity(sae, jnp.asarray(x), jnp.asarray(gradient)))
    f = reference_latents(sae, x)
    y = np.abs(f * (gradient.astype(np.float64) @ sae.W_dec.T.astype(np.float64)))
    for token in np.ndindex(3, 5):
        p = y[token][y[token] > 0] / y[token].sum()
        expected = np.exp(-(p * np.log(p)).sum()) / len(p)
        assert found[token] == pytest.approx(expected, rel=1e-4)
        assert 1 / len(p) <= found[token] <= 1 + 1e-6


def test_latents_that_matter_alike_and_one_that_matters_alone():
    eye = np.eye(4, dtype=np.float32)
    zero = np.zeros(4, np.float32)
    sae = Sae(eye, eye, zero, zero, zero)
    x = jnp.asarray([[[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    gradient = jnp.asarray([[[-2.0, 2.0, 2.0, 9.0], [1e-30, 0.0, 5.0, 0.0], [1.0, 1.0, 1.0, 1.0]]])
    r = np.asarray(uniformity(sae, x, gradient))[0]
    assert r[0] == pytest.approx(1.0)
    assert r[1] == pytest.approx(0.5), "of the two with any importance, one has nearly all"
    assert np.isnan(r[2])
    sums = ImportanceSums()
    sums.add(jnp.asarray(np.stack([[*r, r[0]]])), np.ones((1, 3), bool))
    assert (sums.count, sums.mean) == (2, pytest.approx(0.75))


def test_the_importance_of_a_run_by_finite_differences(world: World):
    """y of active latents, by moving the activation along their decoder rows."""
    tokens = world.tokens[:BATCH]
    usable = ~np.isin(tokens, [PAD, EOS, BOS])
    counted = usable[:, :-1] & (tokens[:, 1:] != PAD)
    counted[6:] = False
    acts = np.asarray(world.model.activations(tokens, [TAP])[TAP], np.float64)
    f = reference_latents(world.sae, acts)
    gradient = np.asarray(world.model.gradient(tokens, TAP, counted), np.float64)
    y = f * (gradient @ world.sae.W_dec.T.astype(np.float64))
    rows = y[:, :-1][counted]
    p = np.abs(rows) / np.abs(rows).sum(axis=1, keepdims=True)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1)
    expected = (np.exp(entropy) / (rows != 0).sum(axis=1)).mean()
    found = measured(world)
    assert found.importance_uniformity == pytest.approx(expected, rel=1e-4)
    assert found.importance_tokens == counted.sum()
    assert found.importance_sequences == 6

    @jax.jit
    def scores(step: jax.Array) -> Any:
        """The mean-centred logits, from the model's own forward."""
        splice = Splice(TAP, lambda a, added: a + added, step)
        return Gemma(world.model.config, world.model.mesh).apply(
            {"params": world.model.params}, jnp.asarray(tokens), splice=splice, score=centred_logit,
            counted_BP=jnp.asarray(counted), method=Gemma.scores,
        )  # fmt: skip

    def total(step: np.ndarray) -> float:
        found = np.asarray(scores(jnp.asarray(step, jnp.float32)), np.float64)
        return float(found[counted].sum())

    where = np.argwhere(f[:6] > 0)
    for sequence, position, latent in where[:: len(where) // 5]:
        step = np.zeros_like(acts)
        step[sequence, position] = 1e-2 * world.sae.W_dec[latent]
        slope = (total(step) - total(-step)) / 2e-2
        # The second difference of float32 sums.
        assert y[sequence, position, latent] == pytest.approx(
            f[sequence, position, latent] * slope, rel=2e-2, abs=2e-2
        )


def test_importance_can_be_left_out(world: World):
    found = measured(world, importance_sequences=0)
    assert found.importance_uniformity is None
    assert (found.importance_sequences, found.importance_tokens) == (0, 0)


# Subsets ----------------------------------------------------------------------------------------


def test_each_subset_is_measured_as_if_it_were_alone(world: World):
    found = measured(world)
    assert set(found.by_subset) == set(SUBSETS)
    names = open_store(world.config.cache.path).tokens.summary.subsets
    all_usable = ~np.isin(world.tokens, [PAD, EOS, BOS])
    all_counted = all_usable[:, :-1] & (world.tokens[:, 1:] != PAD)
    acts = np.asarray(world.model.activations(world.tokens, [TAP])[TAP], np.float64)
    splice = Splice(TAP, splice_sae, (world.sae, jnp.asarray(all_usable)))
    losses = [np.asarray(world.model.losses(world.tokens, one)) for one in (None, splice)]
    total = 0
    for number, name in enumerate(names):
        mine = world.subset_of == number
        assert mine.any()
        x, usable, counted = acts[mine], all_usable[mine], all_counted[mine]
        error = ((x - reference_reconstruction(world.sae, x)) ** 2).sum(-1)[usable].sum()
        spread = ((x[usable] - x[usable].mean(axis=0)) ** 2).sum()
        base, spliced = (one[mine].astype(np.float64)[counted].mean() for one in losses)
        row = found.by_subset[name]
        assert (row["tokens"], row["loss_tokens"]) == (usable.sum(), counted.sum())
        l0 = (reference_latents(world.sae, x)[usable] > 0).sum(axis=1).mean()
        assert row["l0"] == pytest.approx(l0, rel=1e-5)
        assert row["fvu"] == pytest.approx(error / spread, rel=1e-4)
        assert row["loss"] == pytest.approx(base, rel=1e-5)
        assert row["delta_loss"] == pytest.approx(spliced - base, abs=2e-5)
        total += row["tokens"]
    assert total == found.tokens


# Precision --------------------------------------------------------------------------------------


def test_precisions_stand_side_by_side(world: World):
    found = measured(world, compare_precision=True)
    kinds = [(row["model"], row["sae"]) for row in found.by_precision]
    both = ("float32", "bfloat16")
    assert kinds == [(model, sae) for model in both for sae in both]
    own = found.by_precision[0]
    for key in ("l0", "fvu", "loss", "loss_spliced", "delta_loss"):
        assert own[key] == getattr(found, key), "the run's own precision is measured once"
        assert len({row[key] for row in found.by_precision}) >= 2, key
    x = np.asarray(world.model.activations(world.tokens, [TAP])[TAP])
    usable = ~np.isin(world.tokens, [PAD, EOS, BOS])
    rounded = world.sae.cast("bfloat16")
    assert rounded.W_enc.dtype == jnp.bfloat16
    latents = np.asarray(rounded.encode(x[usable]).astype(jnp.float32))
    assert found.by_precision[1]["l0"] == pytest.approx((latents > 0).sum(axis=1).mean(), rel=1e-6)
    assert found.by_precision[1]["fvu"] == pytest.approx(found.fvu, rel=0.05)
    assert found.by_precision[1]["loss"] == found.loss, "the same model"
    assert found.by_precision[2]["loss"] != found.loss


def test_without_it_nothing_is_compared(world: World):
    assert measured(world).by_precision == []


# Extra evaluations --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(world: World) -> ModelConfig:
    folder = Path(world.config.model.weights).parent / "gemma-it"
    write_tiny_gemma(folder, seed=1)
    return ModelConfig(weights=str(folder), dtype="float32")


def extra(world: World, *entries: dict[str, Any]) -> Callable[[str], Evaluation]:
    measured(world, also=list(entries))

    def read(label: str) -> Evaluation:
        found = read_evaluation(world.run, label)
        assert found is not None
        return found

    return read


def test_an_sae_in_another_model(world: World, tuned: ModelConfig):
    before = measured(world)
    found = extra(world, {"model": tuned.model_dump()})("gemma-it")
    assert measured(world) == before, "the run's own evaluation stays"
    read_frequencies(world.run, before)
    other = load_model(tuned)
    x = np.asarray(other.activations(world.tokens, [TAP])[TAP], np.float64)
    usable = ~np.isin(world.tokens, [PAD, EOS, BOS])
    error = ((x - reference_reconstruction(world.sae, x)) ** 2).sum(-1)[usable].sum()
    spread = ((x[usable] - x[usable].mean(axis=0)) ** 2).sum()
    assert found.fvu == pytest.approx(error / spread, rel=1e-4)
    assert found.fvu != before.fvu
    assert (found.label, found.model) == ("gemma-it", tuned.weights)
    assert found.fingerprints["model"] == other.fingerprint
    assert found.fingerprints["sae"] == before.fingerprints["sae"]
    fired = (reference_latents(world.sae, x)[usable] > 0).mean(axis=0)
    np.testing.assert_allclose(read_frequencies(world.run, found), fired, atol=1e-12)


def test_another_text_with_prefixes_that_are_masked(
    world: World, tuned: ModelConfig, tmp_path: Path
):
    rollouts = tmp_path / "rollouts.jsonl"
    prefix, rows = "<s>user\n", []
    for number in range(12):
        rows.append({"text": f"well{prefix}why {number}? the answer and then some"})
    rollouts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = {"source": [str(rollouts)], "sequence_length": S}
    entry = {"model": tuned.model_dump(), "text": text, "sequences": BATCH}
    plain = extra(world, entry | {"label": "plain"})("plain")
    masked = extra(world, entry | {"label": "masked", "masked_text": [prefix]})("masked")
    assert (plain.sequences, plain.sequence_length) == (BATCH, S)
    assert plain.fingerprints["tokens"] == masked.fingerprints["tokens"]
    ids = world.model.tokenizer.encode_batch([prefix])[0]
    (table,) = (Path(world.config.cache.path).parent / "evaluation_tokens").iterdir()
    tokens = open_tokens(table).read(range(BATCH))
    usable = ~np.isin(tokens, [PAD, EOS, BOS])
    inside = np.zeros_like(usable)
    for row in range(BATCH):
        for start in range(S - len(ids) + 1):
            if tokens[row, start : start + len(ids)].tolist() == ids:
                inside[row, start : start + len(ids)] = True
    assert inside.any()
    assert plain.tokens == usable.sum()
    assert masked.tokens == (usable & ~inside).sum()
    counted = (usable & ~inside)[:, :-1] & (tokens[:, 1:] != PAD) & ~inside[:, 1:]
    assert masked.loss_tokens == counted.sum()
    splice = Splice(TAP, splice_sae, (world.sae, jnp.asarray(usable & ~inside)))
    losses = np.asarray(load_model(tuned).losses(tokens, splice), np.float64)[counted]
    assert masked.loss_spliced == pytest.approx(losses.mean(), rel=1e-5)


def test_a_current_extra_evaluation_is_kept(world: World, tuned: ModelConfig):
    also = [{"model": tuned.model_dump()}]
    measured(world, also=also)
    paths = [world.run / "evaluation.json", world.run / "evaluation-gemma-it.json"]
    times = [path.stat().st_mtime_ns for path in paths]
    measured(world, also=also)
    measured(world)
    assert [path.stat().st_mtime_ns for path in paths] == times


def test_a_missing_extra_evaluation_is_wanted(world: World, tuned: ModelConfig, tmp_path: Path):
    entry = ExtraEvaluationConfig(model=tuned, label="it")
    settings = world.config.evaluation.model_copy(update={"also": [entry]})
    config = world.config.model_copy(update={"evaluation": settings})
    trained = dataclasses.replace(load_trained(world.run), config=config)
    run = save_run(tmp_path / "run", trained)
    assert needs_evaluation(run)
    evaluate([run], model=world.model)
    assert not needs_evaluation(run)
    (run / "evaluation-it.json").unlink()
    assert needs_evaluation(run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 2, "global_layers": (False, True)}, "layer 2 of site resid_post"),
        ({"d_model": 24}, r"reads vectors of 20, and resid_post.2 of .* has 24"),
        (
            {"context_length": 8},
            r"also, other: .* the model's context has 8 tokens",
        ),
    ],
)
def test_a_model_the_sae_does_not_fit(world: World, tmp_path: Path, changes: Any, words: str):
    write_tiny_gemma(tmp_path / "other", **changes)
    with pytest.raises(UserError, match=words):
        extra(world, {"model": {"weights": str(tmp_path / "other")}})


def test_too_little_text_of_an_extra_evaluation(world: World, tuned: ModelConfig, tmp_path: Path):
    (tmp_path / "few.txt").write_text("only a few words")
    text = {"source": [str(tmp_path / "few.txt")], "sequence_length": 16}
    entry = {"model": tuned.model_dump(), "text": text}
    with pytest.raises(UserError, match=r"also, gemma-it: 24 sequences are asked .* makes 1 of"):
        extra(world, entry)


@pytest.mark.parametrize(
    ("also", "words"),
    [
        ([{}], "give a model, a text or both"),
        ([{"text": {"source": ["a"]}}], "needs a label"),
        ([{"model": {"weights": "a", "precision": "bfloat16"}}], "leave model.precision out"),
        ([{"model": {"weights": "org/m"}}] * 2, "also has m twice"),
    ],
)
def test_entries_without_a_meaning_are_refused(also: list[dict[str, Any]], words: str):
    with pytest.raises(ValueError, match=words):
        EvaluationConfig.model_validate({"also": also})


def test_masked_token_sequences_are_found_wherever_they_occur():
    tokens = np.array([[5, 6, 5, 6, 6], [6, 5, 6, 5, 7], [1, 1, 1, 1, 1]], np.int32)
    found = masked_tokens(tokens, [(5, 6), (7,), (1, 1, 1, 1, 1, 1)])
    expected = [[1, 1, 1, 1, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]
    assert found.astype(int).tolist() == expected

"""Evaluation against an oracle: transformers' Gemma with torch hooks, and NumPy in float64."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache.harvest.harvest import harvest
from activation_cache.language_model.model import LanguageModel, load_model
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import Store, open_store
from launch.cli import main
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import write_config
from sae_train.config.run import Config, EvaluationConfig
from sae_train.evaluate import text_pass
from sae_train.evaluate.evaluate import evaluate
from sae_train.evaluate.result import Evaluation, read_evaluation, read_frequencies
from sae_train.evaluate.sums import sae_batch
from sae_train.inference.fold import fold
from sae_train.inference.write_formats import write_gemma_scope
from tests.support.oracles.reference import fvus
from tests.support.oracles.their_gemma import (
    BOS,
    EOS,
    HEADS,
    PAD,
    TAPS,
    D,
    F,
    S,
    save_their_gemma,
    their_losses,
    world_config,
)
from tests.support.saes import (
    make_sae,
    make_trained,
    of_first,
    reference_latents,
    reference_reconstruction,
    save_run,
)

pytestmark = pytest.mark.slow

PREFIXES = [0.25, 0.5]
FVUS = ("fvu", "fvu_without_outlying", "fvu_median_token")
FEW = {"sequences": 3, "sequences_per_batch": 3, "importance_sequences": 0}


@dataclass
class World:
    """A model twice, its store, and a run's folder for each of `TAPS`."""

    theirs: Any
    ours: LanguageModel
    store: Store
    config: Config
    runs: list[Path]

    @property
    def held_out(self) -> np.ndarray:
        return self.store.tokens.read(self.store.tokens.held_out)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    theirs = save_their_gemma(folder / "gemma")
    config = world_config(folder)
    harvest(model=config.model, text=config.text, cache=config.cache)
    store = open_store(config.cache.path)
    runs = [save_world_run(folder / f"run{i}", config, store, index=i) for i in range(len(TAPS))]
    return World(theirs, load_model(config.model), store, config, runs)


def save_world_run(folder: Path, config: Config, store: Store, *, index: int, **params) -> Path:
    """A checkpoint of random weights that reads the tap `TAPS[index]`."""
    site, layer = TAPS[index]
    width = HEADS if site == "attn_out_prelinear" else D
    trained = make_trained(D=width, F=F, seed=index, scale=2.0 if width == D else 0.5)
    values = config.model_dump()
    values["sae"] |= {"site": site, "layer": layer}
    if index == 0:
        values["sae"] |= {"matryoshka": PREFIXES}
    values |= {"output": str(folder), "name": folder.name}
    trained = dataclasses.replace(
        trained,
        config=Config.model_validate(values),
        store=store.identity,
        params=trained.params | params,
    )
    return save_run(folder, trained)


@pytest.fixture(scope="module")
def evaluations(world) -> list[Evaluation]:
    return evaluate(world.runs, model=world.ours)


def test_a_released_sae_is_measured_as_it_is(world, evaluations, tmp_path: Path):
    sae = fold(load_trained(world.runs[0]))
    write_gemma_scope(sae, tmp_path / "theirs")
    values = world.config.model_dump()
    values["sae"] |= {"site": TAPS[0][0], "layer": TAPS[0][1]}
    values["sae"] |= {"start_from": str(tmp_path / "theirs" / "params.npz")}
    write_config(Config.model_validate(values | {"output": str(tmp_path / "out")}), tmp_path)
    assert main(["evaluate", str(tmp_path / "config.yaml")]) == 0
    found = read_evaluation(tmp_path / "out")
    assert found is not None
    assert found.step == 0
    for name in ("l0", "fvu", "delta_loss", "loss", "alive_fraction"):
        assert getattr(found, name) == pytest.approx(getattr(evaluations[0], name), rel=1e-6)


# The oracle -------------------------------------------------------------------------------------


def expected(world, index, tokens, *, first: int = F) -> dict[str, Any]:
    """Every headline number of a run's `first` latents, by transformers and NumPy in float64."""
    tap, sae = TAPS[index], of_first(first, fold(load_trained(world.runs[index])))
    usable = ~np.isin(tokens, [PAD, EOS, BOS])
    counted = usable[:, :-1] & (tokens[:, 1:] != PAD)
    base, acts = their_losses(world.theirs, tokens, tap=tap)
    x = acts.astype(np.float64)
    latents = reference_latents(sae, x)[usable]
    error = ((x - reference_reconstruction(sae, x)) ** 2).sum(-1)
    spread = ((x - x[usable].mean(axis=0)) ** 2).sum(-1)

    def loss(make, where):
        def replace(a):
            return np.where(where[..., None], make(a), a)

        return their_losses(world.theirs, tokens, tap=tap, replace=replace)[0]

    def spliced(a):
        return reference_reconstruction(sae, a)

    everywhere = np.ones_like(usable)
    losses = {
        "loss": base,
        "loss_spliced": loss(spliced, usable),
        "loss_zero_ablated": loss(np.zeros_like, usable),
        "loss_spliced_all_positions": loss(spliced, everywhere),
        "loss_zero_ablated_all_positions": loss(np.zeros_like, everywhere),
    }
    return {
        "l0": (latents > 0).sum(1).mean(),
        **fvus(x, error, usable, first=world.config.evaluation.sequences_per_batch),
        "alive_fraction": (latents > 0).any(axis=0).mean(),
        **{name: values[counted].mean() for name, values in losses.items()},
        "tokens": usable.sum(),
        "loss_tokens": counted.sum(),
        "fired": (latents > 0).sum(axis=0),
        "curves": {
            "l0": ((reference_latents(sae, x) > 0).sum(-1), usable),
            "loss": (base, counted),
            "delta_loss": (losses["loss_spliced"] - base, counted),
        },
        "fvu_curve": (error, spread, usable),
    }


def test_held_out_text_has_every_kind_of_masked_token(world):
    tokens = world.held_out
    assert (tokens[:, 0] == BOS).all()
    assert (tokens[:, 1:] == EOS).sum() > 3
    assert (tokens[-1] == PAD).sum() > 1
    usable = ~np.isin(tokens, [PAD, EOS, BOS])
    assert (usable[:, :-1] & (tokens[:, 1:] == PAD)).any()  # padding right after text


@pytest.mark.parametrize("index", range(len(TAPS)))
def test_every_number_is_the_oracles(world, evaluations, index):
    want, got = expected(world, index, world.held_out), evaluations[index]
    for key in ("tokens", "loss_tokens"):
        assert getattr(got, key) == want[key], key
    for key in ("l0", *FVUS, "alive_fraction"):
        assert getattr(got, key) == pytest.approx(want[key], rel=1e-5), key
    for suffix in ("", "_all_positions"):
        base, spliced = want["loss"], want[f"loss_spliced{suffix}"]
        zero = want[f"loss_zero_ablated{suffix}"]
        wanted = {
            "loss": base,
            f"loss_spliced{suffix}": spliced,
            f"loss_zero_ablated{suffix}": zero,
            f"delta_loss{suffix}": spliced - base,
        }
        for key, value in wanted.items():
            assert getattr(got, key) == pytest.approx(value, abs=2e-5), key
        recovered = (zero - spliced) / (zero - base)
        # A quotient of small differences of the losses above.
        assert getattr(got, f"loss_recovered{suffix}") == pytest.approx(recovered, abs=1e-3)
    assert np.array_equal(
        np.round(read_frequencies(world.runs[index], got) * got.tokens), want["fired"]
    )
    assert got.mse / got.variance == pytest.approx(got.fvu)


def test_every_prefix_is_measured_as_an_sae_of_its_latents(world, evaluations):
    assert [row["latents"] for row in evaluations[0].by_prefix] == [F // 4, F // 2, F]
    for row in evaluations[0].by_prefix:
        want = expected(world, 0, world.held_out, first=row["latents"])
        for key in ("l0", *FVUS, "alive_fraction"):
            assert row[key] == pytest.approx(want[key], rel=1e-5), key
        assert row["delta_loss"] == pytest.approx(want["loss_spliced"] - want["loss"], abs=2e-5)
    assert evaluations[1].by_prefix == []


def test_the_two_treatments_of_bos_differ(evaluations):
    for e in evaluations:
        assert abs(e.delta_loss - e.delta_loss_all_positions) > 1e-3
        assert abs(e.loss_zero_ablated - e.loss_zero_ablated_all_positions) > 1e-3
        assert e.bos["headline"] == "special_left_alone"


@pytest.mark.parametrize("index", [0, 2])
def test_curves_by_position_are_the_oracles(world, evaluations, index):
    want, curves = expected(world, index, world.held_out), evaluations[index].by_position
    assert curves["position"] == list(range(S))
    assert all(len(curve) == S for curve in curves.values())
    for name, (values, counted) in want["curves"].items():
        for position in range(values.shape[1]):
            where = counted[:, position]
            mean = values[where, position].mean() if where.any() else None
            assert curves[name][position] == pytest.approx(mean, abs=5e-5), (name, position)
    error, spread, usable = want["fvu_curve"]
    for position in range(1, S):
        where = usable[:, position]
        fvu = error[where, position].sum() / spread[where, position].sum()
        assert curves["fvu"][position] == pytest.approx(fvu, rel=1e-5), position
    assert curves["fvu"][0] is curves["l0"][0] is curves["loss"][S - 1] is None


def test_histogram_counts_every_latent_once(world, evaluations):
    for run, e in zip(world.runs, evaluations, strict=True):
        histogram, frequency = e.frequency_histogram, read_frequencies(run, e)
        assert sum(histogram["counts"]) + histogram["never_fired"] == F
        assert histogram["never_fired"] == (frequency == 0).sum()
        assert histogram["max"] == frequency.max()
        assert histogram["fraction_above_0.1"] == (frequency > 0.1).mean()
        assert len(histogram["log10_edges"]) == len(histogram["counts"]) + 1


# Splicing ---------------------------------------------------------------------------------------


def identity_weights() -> dict[str, np.ndarray]:
    """x = relu(x) - relu(-x): an SAE of 2 D latents that loses nothing."""
    eye, zero = np.eye(D, dtype=np.float32), np.zeros(D, np.float32)
    both = np.concatenate([eye, -eye])
    tiny = np.full(2 * D, 1e-30, np.float32)
    return {"W_enc": both, "W_dec": both, "b_enc": 0 * tiny, "b_dec": zero, "threshold": tiny}


def test_splicing_the_identity_costs_nothing(world, tmp_path):
    config = world.config.model_copy(
        update={"sae": world.config.sae.model_copy(update={"width": 2 * D})}
    )
    run = save_world_run(tmp_path, config, world.store, index=0, **identity_weights())
    (e,) = evaluate([run], model=world.ours)
    assert abs(e.delta_loss) < 1e-6
    assert abs(e.delta_loss_all_positions) < 1e-6
    assert e.fvu < 1e-12
    assert e.l0 == pytest.approx(D)
    assert e.loss_recovered == pytest.approx(1, abs=1e-4)


# The command's behaviour ------------------------------------------------------------------------


def test_the_same_command_gives_the_same_bytes(world, evaluations):
    before = [(run / "evaluation.json").read_bytes() for run in world.runs]
    again = evaluate(world.runs, model=world.ours, force=True)
    assert [(run / "evaluation.json").read_bytes() for run in world.runs] == before
    assert again == evaluations


def test_alone_or_together_is_the_same(world, evaluations):
    alone = evaluate([world.runs[2]], model=world.ours, force=True)[0]
    for name in ("l0", "fvu", "loss", "loss_spliced", "delta_loss_all_positions"):
        expected = getattr(evaluations[2], name)
        assert getattr(alone, name) == pytest.approx(expected, rel=1e-5, abs=1e-5), name
    assert alone.tokens == evaluations[2].tokens


def test_a_current_evaluation_is_kept(world, evaluations, monkeypatch, tmp_path):
    def no(_):
        raise AssertionError("measured again")

    monkeypatch.setattr(text_pass.Pass, "run", no)
    assert evaluate(world.runs, model=world.ours) == evaluations
    other = EvaluationConfig(**FEW)
    with pytest.raises(AssertionError, match="measured again"):
        evaluate(world.runs[:1], model=world.ours, settings=other)
    with pytest.raises(AssertionError, match="measured again"):
        evaluate(world.runs[:1], model=world.ours, force=True)
    run = save_world_run(tmp_path, world.config, world.store, index=1)  # other weights
    (tmp_path / "evaluation.json").write_bytes((world.runs[0] / "evaluation.json").read_bytes())
    with pytest.raises(AssertionError, match="measured again"):
        evaluate([run], model=world.ours)


def test_losses_can_be_limited_to_fewer_sequences(world, tmp_path):
    """The limit falls inside a batch; L0 and FVU still use all sequences."""
    run = save_world_run(tmp_path, world.config, world.store, index=0)

    def measured(**settings) -> Evaluation:
        settings = EvaluationConfig(**FEW | settings)
        return evaluate([run], model=world.ours, settings=settings)[0]

    whole, few = measured(sequences=7), measured(sequences=4)
    limited = measured(sequences=7, loss_sequences=4)
    assert (limited.l0, limited.fvu, limited.tokens) == (whole.l0, whole.fvu, whole.tokens)
    assert (limited.loss, limited.loss_spliced) == (few.loss, few.loss_spliced)
    assert limited.loss_tokens == few.loss_tokens < whole.loss_tokens
    assert (limited.sequences, limited.loss_sequences) == (7, 4)


def test_one_compilation_serves_all_saes_of_a_shape(world, evaluations):
    before = sae_batch._cache_size()
    evaluate(world.runs[1:2], model=world.ours, force=True)
    assert sae_batch._cache_size() == before


def test_the_model_is_loaded_from_the_runs_config(world, evaluations, tmp_path):
    run = save_world_run(tmp_path, world.config, world.store, index=0)
    settings = EvaluationConfig(**FEW | {"sequences": 2})
    (e,) = evaluate([run], settings=settings)
    assert e.fingerprints["model"] == world.ours.fingerprint
    assert read_evaluation(run) == e


# Bad input --------------------------------------------------------------------------------------


def test_too_few_held_out_sequences(world):
    settings = EvaluationConfig(sequences=8)
    with pytest.raises(UserError, match=r"asks for 8 sequences and .*tokens holds out 7"):
        evaluate(world.runs[:1], model=world.ours, settings=settings)


def test_an_sae_of_another_width(world, tmp_path):
    trained = make_trained(D=20, F=F)
    values = world.config.model_dump()
    values["sae"] |= {"site": "resid_post", "layer": 2}
    config = Config.model_validate(values)
    run = save_run(tmp_path, dataclasses.replace(trained, config=config))
    with pytest.raises(UserError, match=r"reads vectors of 20, and resid_post.2 of .* has 36"):
        evaluate([run], model=world.ours)


def test_a_released_sae_of_another_width_is_named_itself(world, tmp_path):
    write_gemma_scope(make_sae(D=20, F=F), tmp_path / "theirs")
    released = tmp_path / "theirs" / "params.npz"
    values = world.config.model_dump()
    values["sae"] |= {"site": "resid_post", "layer": 2, "start_from": str(released)}
    write_config(Config.model_validate(values), tmp_path)
    with pytest.raises(UserError, match=rf"sae\.start_from {released} reads vectors of 20, and"):
        evaluate([tmp_path], model=world.ours)


def test_a_layer_the_model_does_not_have(world, tmp_path):
    values = world.config.model_dump()
    values["cache"]["sites"][0]["layers"] = [9]
    values["sae"] |= {"site": "resid_post", "layer": 9}
    trained = dataclasses.replace(make_trained(D=D, F=F), config=Config.model_validate(values))
    with pytest.raises(UserError, match="layer 9 of site resid_post does not exist"):
        evaluate([save_run(tmp_path, trained)], model=world.ours)


def test_a_model_other_than_the_stores(world):
    other = dataclasses.replace(world.ours, fingerprint="0" * 64)
    with pytest.raises(UserError, match=r"model.weights: the store was made from"):
        evaluate(world.runs[:1], model=other)


def test_another_store_is_warned_of_and_a_missing_one_refused(world, tmp_path, caplog):
    trained = load_trained(world.runs[0])
    run = save_run(tmp_path / "run", dataclasses.replace(trained, store="1" * 64))
    settings = EvaluationConfig(**FEW | {"sequences": 1})
    evaluate([run], model=world.ours, settings=settings)
    assert "what is held out there may have been trained on" in caplog.text
    values = trained.config.model_dump()
    values["cache"]["path"] = str(tmp_path / "nowhere")
    moved = dataclasses.replace(trained, config=Config.model_validate(values))
    with pytest.raises(UserError, match=r"manifest.json: there is no activation store"):
        evaluate([save_run(tmp_path / "moved", moved)], model=world.ours)


def test_a_run_without_a_checkpoint(world, tmp_path):
    write_config(world.config, tmp_path)
    with pytest.raises(UserError, match="has no checkpoints"):
        evaluate([tmp_path], model=world.ours)

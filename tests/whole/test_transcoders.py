"""Transcoders: the step against the float64 oracle, pairs of rows, training runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from activation_cache.gemma.taps import Tap
from activation_cache.harvest.harvest import harvest
from activation_cache.language_model.model import load_model
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import open_store
from sae_train import load_sae
from sae_train.checkpoint.trained import load_trained
from sae_train.config.run import Config
from sae_train.inference.fold import fold
from sae_train.inference.sae import check_kind
from sae_train.inference.write_formats import write_gemma_scope, write_sae_lens
from sae_train.model.sharding import make_mesh
from sae_train.release.export import export_run
from sae_train.step.schedule import scheduled
from sae_train.step.state import init_state
from sae_train.train.initial_state import prepare_start
from sae_train.train.loop import train, train_cohort
from sae_train.train.train_step import make_train_step
from sae_train.train.warm_start import starting_params
from tests.support.configs import make_config
from tests.support.oracles import reference
from tests.support.oracles.rows_off_edges import off_edges
from tests.support.pipeline import write_pipeline
from tests.support.saes import make_config as make_sae_config
from tests.support.saes import make_sae
from tests.support.training import assert_same_run, final_state

pytestmark = pytest.mark.slow

D, F = 10, 24
PAIR: dict[str, Any] = {"site": "mlp_in", "target": "mlp_out"}
L1 = {"penalty": "l1", "coefficient": 0.03, "warmup_steps": 0}
SKIPS = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])


def pair_config(*, skip: bool = False, mesh: tuple[int, int] = (1, 1), **options: Any) -> Config:
    """A config of `tests.support.configs` whose SAE is a transcoder."""
    values = make_config(
        width=96, batch_size=64, tokens=64 * 40, threshold_init=0.03, mesh=mesh, **options
    ).model_dump()
    values["sae"] |= PAIR | {"affine_skip": skip, "pre_encoder_bias": False}
    values["cache"]["sites"] = [{"site": site, "layers": [1]} for site in ("mlp_in", "mlp_out")]
    return Config.model_validate(values)


def rows_of(
    step: int, choose: Callable[..., np.ndarray] = lambda draw: draw()
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of norm 3, and targets of norm 2: a function of the inputs plus noise."""
    rng = np.random.default_rng(step)
    mix = np.random.default_rng(99).standard_normal((24, 24)) / np.sqrt(24)
    x = choose(lambda: 3 * (rng.standard_normal((64, 24)) / np.sqrt(24) + 0.1).astype(np.float32))
    y = np.maximum(x / 3, 0) @ mix + 0.3 * rng.standard_normal((64, 24)) / np.sqrt(24) - 0.1
    return x, (2 * y).astype(np.float32)


@SKIPS
def test_forty_steps_follow_the_float64_reference(skip: bool):
    config = pair_config(
        skip=skip,
        sparsity={"coefficient": 0.02, "warmup_steps": 0},
        learning_rate={"peak": 1e-3, "warmup_steps": 0},
    )
    mesh = make_mesh(config.mesh)
    state = init_state(config.sae, d_model=24, seed=3, mesh=mesh)
    assert ("W_skip" in state.params) == skip
    assert np.abs(np.asarray(state.params["W_enc"]) - state.params["W_dec"]).max() > 0.1
    noise = np.random.default_rng(5)
    biased = {
        name: 0.1 * noise.standard_normal(state.params[name].shape).astype(np.float32)
        for name in ("b_dec", "b_enc", "W_skip")
        if name in state.params
    }
    placed = {name: jax.device_put(value) for name, value in biased.items()}
    state = dataclasses.replace(state, params=state.params | placed)
    params = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    params["threshold"] = np.exp(params["threshold"])
    oracle = reference.Trainer(params=params, bandwidth=0.05, log_threshold=True)
    take = make_train_step(config, input_scale=3.0, target_scale=2.0, mesh=mesh)
    for step in range(40):
        edges = {"scale": 3.0, "bandwidth": 0.05, "centred": False}
        x, y = rows_of(step, partial(off_edges, params=oracle.params, **edges))
        state, metrics = take(state, (x, y), scheduled(config.train, step=step))
        penalty = reference.Sparsity("l0", 0.02)
        expected = oracle.step(x / 3.0, target=y / np.float64(2.0), rate=1e-3, sparsity=penalty)
        for name in ("loss", "mse", "fvu", "l0"):
            np.testing.assert_allclose(
                getattr(metrics, name), expected[name], rtol=1e-5, err_msg=f"{name} step {step}"
            )
    found = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    found["threshold"] = np.exp(found["threshold"])
    for name, value in found.items():
        # Adam divides by |g|: a gradient near 0 turns float32 noise into a visible step.
        np.testing.assert_allclose(value, oracle.params[name], rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("way", ["dense", "sparse", "gated"])
def test_a_mean_that_is_subtracted_counts_as_if_the_rows_were_without_it(way: str):
    """On a mesh with the mean, and on one device on rows that it was taken off before."""
    mean_D = np.linspace(-1, 1, 24).astype(np.float32)
    found = []
    for mesh, subtracts in (((1, 1), False), ((2, 4), True)):
        values = pair_config(mesh=mesh, sparse_capacity=96).model_dump()
        values["sae"] |= {"subtract_mean": subtracts}
        if way == "gated":
            values["sae"] |= {"architecture": "gated"}
            values["train"] |= {"sparsity": L1}
        else:
            values["train"] |= {"step": way}
        config = Config.model_validate(values)
        devices = make_mesh(config.mesh)
        state = init_state(config.sae, d_model=24, seed=3, mesh=devices)
        if subtracts:
            same = np.tile(3 * mean_D, (64, 1)), np.ones((64, 24), np.float32)
            scales = {"input_scale": 3.0, "target_scale": 2.0}
            state = prepare_start(config, state=state, batch=lambda step, same=same: same, **scales)
        take = make_train_step(config, input_scale=3.0, target_scale=2.0, mesh=devices)
        for number in range(4):
            x, y = rows_of(number)
            x = x if subtracts else x - 3 * mean_D
            state, _ = take(state, (x, y), scheduled(config.train, step=number))
        found.append({name: np.asarray(value) for name, value in state.params.items()})
    np.testing.assert_array_equal(found[1].pop("input_mean"), mean_D)
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("mesh", [(4, 2), (1, 8)])
def test_losses_agree_on_all_meshes(mesh: tuple[int, int]):
    def losses(config: Config) -> list[float]:
        devices = make_mesh(config.mesh)
        state = init_state(config.sae, d_model=24, seed=3, mesh=devices)
        take = make_train_step(config, input_scale=3.0, mesh=devices)
        found = []
        for step in range(10):
            state, metrics = take(state, rows_of(step), scheduled(config.train, step=step))
            found.append(float(metrics.loss))
        return found

    alone = losses(pair_config(skip=True))
    np.testing.assert_allclose(losses(pair_config(skip=True, mesh=mesh)), alone, rtol=1e-5)


def test_an_sae_and_a_transcoder_do_not_stand_in_for_each_other(tmp_path: Path):
    transcoder, sae = make_sae(**PAIR, affine_skip=True), make_sae()
    of_sae, of_transcoder = make_sae_config(width=F).sae, make_sae_config(width=F, **PAIR).sae
    with pytest.raises(UserError, match=r"is a transcoder, from blocks.1.hook_mlp_in to .*target"):
        check_kind(transcoder, of_sae, name="it")
    with pytest.raises(UserError, match=r"is an SAE of blocks.1.hook_resid_post.* to mlp_out"):
        check_kind(sae, of_transcoder, name="it")
    write_gemma_scope(make_sae(**PAIR), tmp_path)
    check_kind(load_sae(tmp_path), of_transcoder, name="it")  # params.npz can't tell


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ({"affine_skip": True}, "sae.affine_skip is for transcoders"),
        ({"target_scale": "own"}, "sae.target_scale is for transcoders"),
        ({"subtract_mean": True}, "sae.subtract_mean is for transcoders"),
        (PAIR | {"site": "attn_out_prelinear"}, "can't read attn_out_prelinear and predict"),
        (PAIR | {"site": "resid_post"}, "can't read resid_post and predict mlp_out"),
        (PAIR | {"site": "mlp_out"}, "can't read mlp_out and predict mlp_out"),
        (PAIR | {"pre_encoder_bias": True}, "pre_encoder_bias must be false with a sae.target"),
        (PAIR | {"architecture": "topk", "k": 4, "target": "resid_post"}, "topk .* resid_post"),
    ],
)
def test_impossible_transcoders_are_refused(sae: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_sae_config(width=F, **sae)


def test_a_target_that_is_not_harvested_is_refused():
    values = make_sae_config(width=F, **PAIR).model_dump()
    assert values["sae"]["pre_encoder_bias"] is False
    values["cache"]["sites"] = [{"site": "mlp_in", "layers": [1]}]
    with pytest.raises(
        ValueError, match=r"sae reads mlp_out of layer 1, which cache.sites does not"
    ):
        Config.model_validate(values)


def tiny(folder: Path, *, site: str = "mlp_in", name: str = "out", **sae: Any) -> Config:
    """A transcoder of layer 1 on the tiny Gemma's activations; `folder` holds weights and text."""
    from sae_train.config.file import load_config

    path = folder / "config.yaml"
    if not path.exists():
        write_pipeline(folder)
    values = load_config(path).model_dump()
    sites = ["mlp_in", "mlp_in_normalized", "mlp_out", "resid_post"]
    values["cache"] |= {
        "path": str(folder / "store"),
        "sites": [{"site": one, "layers": [1]} for one in sites],
    }
    values["sae"] |= {"site": site, "target": "mlp_out", "pre_encoder_bias": False} | sae
    values |= {"output": str(folder / name), "name": name}
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny(folder)
    harvest(model=config.model, text=config.text, cache=config.cache)
    return folder


def test_rows_of_all_taps_are_of_the_same_tokens(folder: Path):
    """Each row is the model's activation at the sequence and position that its provenance names."""
    config = tiny(folder)
    store, model = open_store(config.cache.path), load_model(config.model)
    where = store.provenance(start=0, stop=store.rows)
    chosen = np.random.default_rng(0).choice(store.rows, 50, replace=False)
    for site in ("mlp_in", "mlp_in_normalized", "mlp_out"):
        tap = Tap(site, 1)  # type: ignore[arg-type]
        rows = store.read(tap, start=0, stop=store.rows)
        for row in chosen:
            tokens = store.tokens.read([int(where.sequence[row])])
            acts = np.asarray(model.activations(tokens, [tap])[tap])
            expected = acts[0, where.position[row]]
            np.testing.assert_allclose(rows[row], expected, rtol=1e-4, atol=1e-5)
    normalized = store.tap_info(Tap("mlp_in_normalized", 1)).mean_squared_norm
    assert normalized == pytest.approx(20, rel=1e-3)  # D: Gemma Scope divides by its root


def test_training_sees_both_rows_of_a_token(folder: Path):
    """The skip learns a target that is linear in the input, which takes rows of the same token."""
    config = tiny(folder, name="linear", affine_skip=True, target_scale="own")
    values = config.model_dump()
    # mlp_in is mlp_in_normalized times a gain, so a matrix predicts it.
    values["sae"] |= {"site": "mlp_in_normalized", "target": "mlp_in", "b_dec_init": "mean"}
    values["train"] |= {"tokens": 64 * 400}
    values["train"]["learning_rate"] |= {"peak": 1e-2, "decay_steps": 200}
    values["train"]["sparsity"]["coefficient"] = 10.0
    linear = Config.model_validate(values)
    result = train(linear)
    assert result.metrics["fvu"] < 0.01
    trained = load_trained(linear.output)
    store = open_store(linear.cache.path)
    scales = [np.sqrt(store.tap_info(tap).mean_squared_norm) for tap in linear.sae.taps]
    assert (trained.input_scale, trained.target_scale) == pytest.approx(scales)
    x, y = (store.read(tap, start=0, stop=64) for tap in linear.sae.taps)
    error = np.square(np.asarray(fold(trained)(x)) - y).sum() / np.square(y - y.mean(0)).sum()
    assert error < 0.02


def test_a_cohort_reads_one_pair_of_sites(folder: Path):
    pair = [tiny(folder, name=f"member-{skip}", affine_skip=skip) for skip in (False, True)]
    train_cohort(pair)
    alone = [tiny(folder, name=f"alone-{skip}", affine_skip=skip) for skip in (False, True)]
    for member, config in zip(pair, alone, strict=True):
        assert train(config).step == 20
        assert_same_run(Path(config.output), Path(member.output), step=20)
        trained = load_trained(member.output)
        assert trained.target_scale == trained.input_scale, "unless target_scale is own"
    other = tiny(folder, name="other", site="mlp_in_normalized")
    with pytest.raises(UserError, match=r"sae.site is mlp_in in the one and mlp_in_normalized"):
        train_cohort([pair[0], other])
    values = tiny(folder, name="sae").model_dump()
    values["sae"] |= {"target": None}
    with pytest.raises(UserError, match=r"sae.target is mlp_out in the one and None in the other"):
        train_cohort([pair[0], Config.model_validate(values)])


@SKIPS
def test_training_starts_from_a_released_transcoder(folder: Path, tmp_path: Path, skip: bool):
    # The one without a skip subtracts its input's mean, in both runs.
    more = {"affine_skip": skip, "subtract_mean": not skip}
    config = tiny(folder, name=f"first-{skip}", target_scale="own", **more)
    if not (Path(config.output) / "checkpoints").exists():
        train(config)
    sae = fold(load_trained(config.output))
    write_sae_lens(sae, tmp_path / "theirs")
    own = {"start_from": str(tmp_path / "theirs")} | more
    again = tiny(folder, name=f"again-{skip}", **own)
    means = {} if skip else {"input_mean": np.linspace(-1, 1, 20).astype(np.float32)}
    params = means | starting_params(
        again.sae,
        d_model=20,
        input_scale=1.3,
        target_scale=0.7,
        input_mean_D=means.get("input_mean"),
    )
    trained = dataclasses.replace(
        load_trained(config.output), params=params, input_scale=1.3, target_scale=0.7
    )
    x = np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32)
    np.testing.assert_allclose(fold(trained)(x), sae(x), rtol=1e-4, atol=1e-5)
    assert train(again).step == 20
    with pytest.raises(UserError, match="is a transcoder, from"):
        train(_as_sae(again))
    if skip:
        without = tiny(folder, name="without", start_from=own["start_from"])
        with pytest.raises(UserError, match=r"has an affine skip, and sae.affine_skip is false"):
            train(without)


def _as_sae(config: Config) -> Config:
    values = config.model_dump()
    values["sae"] |= {"target": None, "affine_skip": False, "subtract_mean": False}
    return Config.model_validate(values | {"output": f"{config.output}-sae"})


@pytest.mark.parametrize(
    ("architecture", "sparsity"),
    [
        ("gated", L1),
        ("relu", L1),
        ("topk", {"penalty": "none"}),
        ("batch_topk", {"penalty": "none"}),
    ],
)
def test_the_other_architectures(folder: Path, architecture: str, sparsity: dict[str, Any]):
    own = {"k": 8} if architecture.endswith("topk") else {}
    values = tiny(folder, name=architecture, affine_skip=True).model_dump()
    values["sae"] |= {"architecture": architecture} | own
    values["train"]["sparsity"] = sparsity
    values["train"]["tokens"] = 64 * 100
    config = Config.model_validate(values)
    assert train(config).metrics["fvu"] < 1.0
    sae = fold(load_trained(config.output))
    assert sae.is_transcoder
    store = open_store(config.cache.path)
    x, y = (store.read(tap, start=0, stop=500) for tap in config.sae.taps)
    error = np.square(np.asarray(sae(x)) - y).sum() / np.square(y - y.mean(0)).sum()
    assert error < 1.0
    released = export_run(Path(config.output)).folder
    np.testing.assert_array_equal(load_sae(released)(x), sae(x))


def test_a_resumed_run_is_the_same(folder: Path):
    from activation_cache.runtime.errors import Interrupted

    parts = tiny(folder, name="parts", affine_skip=True)
    calls = iter(range(7))
    with pytest.raises(Interrupted):
        train(parts, stop=lambda: next(calls, None) is None)
    train(parts)
    whole = tiny(folder, name="whole", affine_skip=True)
    train(whole)
    assert len(final_state(Path(whole.output), step=20)) == 20  # six parameters twice, and eight
    assert_same_run(Path(whole.output), Path(parts.output), step=20)

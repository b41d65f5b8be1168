"""The loop: resume, refusal, divergence, signals, metrics, and what it does with a bad folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage.locks import folder_lock
from sae_train.checkpoint.checkpoints import Checkpoints
from sae_train.checkpoint.trained import load_trained
from sae_train.runs.metrics_file import read_metrics
from sae_train.train import cohort_step
from sae_train.train.loop import train
from tests.support.stores import make_manifest, write_store
from tests.support.training import ROWS, assert_same_run, make_run, stop_after, untimed_metrics

pytestmark = pytest.mark.slow

REQUIRED = {
    "step",
    "tokens",
    "loss",
    "mse",
    "fvu",
    "l0",
    "dead_fraction",
    "threshold_mean",
    "learning_rate",
    "sparsity_coefficient",
    "tokens_per_second",
    "input_wait_fraction",
}


def test_a_run_leaves_metrics_config_and_checkpoints(tmp_path: Path):
    config = make_run(tmp_path)
    result = train(config)
    assert result.step == 40
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert all(set(row) >= REQUIRED for row in rows)
    assert rows[-1] == result.metrics
    assert rows[-1]["tokens"] == 40 * 48
    assert rows[-1]["fvu"] < rows[0]["fvu"]
    assert (tmp_path / "run" / "config.yaml").exists()
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.steps() == [30, 40]


@pytest.mark.parametrize("stop_step", [1, 7, 10, 23, 39])
def test_resuming_at_any_step_is_bit_identical(tmp_path: Path, stop_step: int):
    train(make_run(tmp_path, output="whole"))
    parts = make_run(tmp_path, output="parts")
    with pytest.raises(Interrupted, match=f"at step {stop_step} of 40"):
        train(parts, stop=stop_after(stop_step))
    train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=40)


@pytest.mark.parametrize(("stop_step", "mesh"), [(3, (1, 1)), (25, (2, 4))])
def test_steering_and_reviving_go_on_where_they_were(
    tmp_path: Path, stop_step: int, mesh: tuple[int, int]
):
    options = {
        "mesh": mesh,
        "threshold_init": 0.5,
        "sae": {"revive_coefficient": 0.5},
        "dead_after_tokens": 48 * 3,
        "sparsity": {
            "penalty": "match_l0",
            "target": 5.0,
            "coefficient": 0.01,
            "warmup_steps": 8,
            "settle_steps": 10,
            "frequency": {"scale": 0.1, "coefficient": 0.02},
        },
    }
    train(make_run(tmp_path, output="whole", **options))
    parts = make_run(tmp_path, output="parts", **options)
    with pytest.raises(Interrupted):
        train(parts, stop=stop_after(stop_step))
    train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=40)
    inforce = [row["sparsity_coefficient"] for row in read_metrics(tmp_path / "parts")]
    assert inforce[0] == 0.0, "the warm-up begins at nothing"
    assert len(set(inforce[8:])) > 25, "steering moves it from step to step"
    dead = [row["dead_fraction"] for row in read_metrics(tmp_path / "parts")]
    assert max(dead) > dead[-1] > 0, "some are revived, and some are left"


def test_a_checkpoint_is_the_state_at_its_step_though_the_loop_ran_on(tmp_path: Path):
    # Saving is asynchronous and the step donates its state: a copy taken too late would differ.
    config = make_run(tmp_path, output="long", checkpoint={"every_steps": 1, "keep": 100})
    train(config)
    for step in (1, 2, 17):
        with pytest.raises(Interrupted):
            train(make_run(tmp_path, output=f"until{step}"), stop=stop_after(step))
        long, short = (
            load_trained(tmp_path / name, step=step) for name in ("long", f"until{step}")
        )
        for name, value in long.params.items():
            np.testing.assert_array_equal(value, short.params[name])


def test_a_finished_run_is_not_trained_again(tmp_path: Path):
    config = make_run(tmp_path)
    train(config)
    before = untimed_metrics(tmp_path / "run")
    assert train(config).metrics["step"] == 40
    assert untimed_metrics(tmp_path / "run") == before


def test_another_config_is_refused_by_field_and_fresh_starts_anew(tmp_path: Path):
    train(make_run(tmp_path))
    other = make_run(tmp_path, bandwidth=0.1)
    with pytest.raises(UserError, match=r"sae\.bandwidth was 0\.05 and is now 0\.1"):
        train(other)
    assert train(other, fresh=True).step == 40
    train(make_run(tmp_path, output="reference", bandwidth=0.1))
    assert_same_run(tmp_path / "run", tmp_path / "reference", step=40)


def test_fields_that_do_not_touch_the_numbers_may_change(tmp_path: Path):
    with pytest.raises(Interrupted):
        train(make_run(tmp_path), stop=stop_after(10))
    changed = make_run(
        tmp_path, checkpoint={"every_steps": 7, "keep": 1}, log_every_steps=5, mesh=(2, 2)
    )
    assert train(changed).step == 40


def test_the_order_s_seed_may_be_spelt_out(tmp_path: Path):
    with pytest.raises(Interrupted):
        train(make_run(tmp_path, seed=2), stop=stop_after(10))
    with pytest.raises(UserError, match=r"train\.data_seed was None and is now 1"):
        train(make_run(tmp_path, seed=2, data_seed=1))
    train(make_run(tmp_path, seed=2, data_seed=2))
    train(make_run(tmp_path, output="whole", seed=2))
    assert_same_run(tmp_path / "whole", tmp_path / "run", step=40)


def test_another_store_is_refused(tmp_path: Path):
    config = make_run(tmp_path)
    with pytest.raises(Interrupted):
        train(config, stop=stop_after(10))
    (tmp_path / "store").rename(tmp_path / "old")
    write_store(tmp_path / "store", make_manifest(rows=ROWS, width=16, mean_squared_norm=3.0))
    with pytest.raises(UserError, match="another activation store"):
        train(config)


def test_divergence_stops_the_run_and_keeps_the_last_good_state(tmp_path: Path):
    config = make_run(
        tmp_path,
        parametrisation="direct",
        checkpoint={"every_steps": 1, "keep": 10},
        learning_rate={"peak": 1e37, "warmup_steps": 20, "warmup_from": 0.0},
    )
    with pytest.raises(
        UserError, match=r"training stopped at step (\d+).*last finite metrics"
    ) as e:
        train(config)
    stopped = int(str(e.value).split("at step ")[1].split(":")[0])
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, stopped))
    with Checkpoints(tmp_path / "run") as checkpoints:
        saved = checkpoints.steps()
    assert saved == list(range(1, stopped))[-10:]
    for value in load_trained(tmp_path / "run").params.values():
        assert np.isfinite(value).all()


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path):
    config = make_run(tmp_path)
    with (
        folder_lock(tmp_path / "run"),
        pytest.raises(UserError, match="in use by another process"),
    ):
        train(config)


def test_a_missing_store_and_too_few_devices_are_told(tmp_path: Path):
    config = make_run(tmp_path, mesh=(1, 16))
    with pytest.raises(UserError, match="needs 16 devices and JAX sees 8"):
        train(config)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="sae harvest"):
        train(make_run_without_store(tmp_path))


def make_run_without_store(folder: Path):
    """The config of a run whose store was moved away."""
    (folder / "store").mkdir()
    return make_run(folder)


def test_loading_a_folder_without_checkpoints_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="has no checkpoints"):
        load_trained(tmp_path)
    train(make_run(tmp_path))
    with pytest.raises(UserError, match=r"no checkpoint at step 3; it has \[30, 40\]"):
        load_trained(tmp_path / "run", step=3)


def test_load_trained_gives_the_plain_threshold(tmp_path: Path):
    train(make_run(tmp_path, threshold_init=0.25, learning_rate={"peak": 1e-9}))
    trained = load_trained(tmp_path / "run")
    np.testing.assert_allclose(trained.params["threshold"], 0.25, rtol=1e-4)
    assert trained.input_scale == np.sqrt(2.0)
    assert trained.params["W_enc"].shape == (64, 16)


def test_tensorboard_and_wandb_files_on_request(tmp_path: Path):
    train(make_run(tmp_path, tensorboard=True, wandb={"project": "saes", "mode": "offline"}))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    [sent] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    last = read_metrics(tmp_path / "run")[-1]
    assert str(last["loss"]).encode() in sent.read_bytes(), "the last row too"


def test_a_line_cut_short_is_dropped_and_a_damaged_one_is_told(tmp_path: Path):
    train(make_run(tmp_path, output="whole"))
    config = make_run(tmp_path)
    with pytest.raises(Interrupted):
        train(config, stop=stop_after(20))
    path = tmp_path / "run" / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 21, "lo')
    train(config)
    assert_same_run(tmp_path / "whole", tmp_path / "run", step=40)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{oops", *lines[1:]]) + "\n")
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_metrics(tmp_path / "run")


def test_the_step_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []

    def counting(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    original = cohort_step.make_train_step
    monkeypatch.setattr(cohort_step, "make_train_step", counting)
    train(make_run(tmp_path))
    [step] = made
    assert step._cache_size() == 1

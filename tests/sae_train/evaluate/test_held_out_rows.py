"""A run on imported rows, without a language model: what is measured, shown and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from activation_cache import write_rows
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import open_store
from launch.cli import main
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import load_config, read_run_config
from sae_train.config.run import Config, EvaluationConfig
from sae_train.evaluate.evaluate import evaluate
from sae_train.inference.fold import fold
from tests.support.saes import make_trained, reference_latents, reference_reconstruction, save_run

WIDTH = 10
CONFIG = """
name: mine
cache: {{path: {store}}}
sae: {{site: rows, layer: 0, width: 24}}
train: {{batch_size: 64, tokens: 640, sparsity: {{coefficient: 1e-3}}}}
output: {output}
"""


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    found = np.random.default_rng(3).standard_normal((30, 8, WIDTH)) + 1
    found[-1, 3] *= 40
    return found.astype(np.float32)


@pytest.fixture(scope="module")
def run(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a store of rows, the last four sequences held out."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(rows[:, :7], to=folder / "cut", held_out=28, shuffle_rows=64, block_rows=8)
    write_rows(rows, to=folder / "store", held_out=32, shuffle_rows=64, block_rows=8)
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(store=folder / "store", output=folder / "run"))
    own = replace(make_trained(D=WIDTH), config=load_config(config))
    return save_run(folder / "run", replace(own, store=open_store(folder / "store").identity))


@pytest.mark.parametrize(("store", "held_out"), [("store", np.s_[26:]), ("cut", np.s_[26:, :7])])
def test_l0_and_fvu_of_the_held_out_rows(
    run: Path, rows: np.ndarray, store: str, held_out: tuple[slice, ...]
):
    """As NumPy has them in float64, in batches whose last is short."""
    settings = EvaluationConfig(sequences_per_batch=3)
    places = [f"cache.path={json.dumps(str(run.parent / store))}"]
    (found,) = evaluate([run], settings=settings, places=places, force=True)
    sae, x = fold(load_trained(run)), rows[held_out].reshape(-1, WIDTH).astype(np.float64)
    active = reference_latents(sae, x) > 0
    error = np.square(x - reference_reconstruction(sae, x)).sum(axis=1)
    spread = np.square(x - x.mean(axis=0)).sum(axis=1)
    assert found.l0 == pytest.approx(active.sum(axis=1).mean(), rel=1e-6)
    assert found.fvu == pytest.approx(error.sum() / spread.sum(), rel=1e-5)
    assert found.alive_fraction == active.any(axis=0).mean()
    assert (found.sequences, found.tokens, found.loss_sequences) == (4, len(x), 0)
    assert found.by_position["tokens"] == [4] * (len(x) // 4)
    assert found.delta_loss is None
    assert str(found).startswith("L0")
    assert "delta loss" not in str(found)


@pytest.mark.slow
def test_the_commands_say_what_needs_a_model(run: Path, capsys: pytest.CaptureFixture[str]):
    config = str(run.parent / "config.yaml")
    assert main(["plan", "-q", config]) == 0
    assert "imported rows" in capsys.readouterr().out
    assert main(["harvest", "-q", config]) == 0
    for command in (["latents"], ["probe"], ["evaluate", "evaluation.masked_text=[a]"]):
        assert main([command[0], "-q", str(run), *command[1:]]) == 2
        assert "this needs a language model, and the config has none" in capsys.readouterr().err
    assert main(["export", "-q", str(run)]) == 0
    card = (run / "release" / "README.md").read_text()
    assert "unknown: the rows were imported" in card
    assert "Gemma is provided" not in card


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text={source: [a.txt]}"], "cache.sites is missing: with text it must say"),
        (["cache.tokens=100"], "cache: sites is missing: with tokens it must say"),
        (["train.end_to_end={tokens: 64}"], "train.end_to_end goes through a language model"),
    ],
)
def test_half_a_config_of_a_harvest_is_refused(run: Path, overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        load_config(run.parent / "config.yaml", overrides)


def test_the_resolved_config_is_read_back(run: Path):
    assert read_run_config(run) == load_config(run.parent / "config.yaml")
    assert isinstance(read_run_config(run), Config)


def test_without_held_out_rows_there_is_nothing_to_measure(run: Path, rows: np.ndarray):
    write_rows(rows, to=run.parent / "all", held_out=0, shuffle_rows=64, block_rows=8)
    with pytest.raises(UserError, match=r"no held-out rows: .* Import again with --held-out"):
        evaluate([run], places=[f"cache.path={json.dumps(str(run.parent / 'all'))}"])

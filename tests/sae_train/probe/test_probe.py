"""`probe` on runs, with a model whose activations are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel
from activation_cache.language_model.tokenizer import load_tokenizer
from activation_cache.runtime.errors import Interrupted, UserError
from launch.show.status import status_table
from launch.targets import target_config
from sae_train.config.evaluation import ProbeConfig
from sae_train.probe import activations
from sae_train.probe.activations import last_activations, prompt_tokens
from sae_train.probe.probe import probe
from sae_train.probe.record import read_probe, write_probe
from sae_train.report.described_runs import describe_runs
from sae_train.report.probe_table import probe_section
from sae_train.runs.folder import read_run
from tests.support.saes import make_trained, save_run
from tests.support.tiny_gemma import tiny_config, write_tiny_gemma

D, F = 20, 24
TAP = Tap("resid_post", 1)
ROWS = 240


class World:
    """Two runs of one tap, a model whose activation is that of the token read, and data."""

    def __init__(self, folder: Path) -> None:
        weights = write_tiny_gemma(folder / "gemma", d_model=D)
        trained = make_trained(D=D, F=F)
        self.runs = [save_run(folder / f"run{n}", make_trained(D=D, F=F, seed=n)) for n in range(2)]
        model_config = trained.config.model.model_copy(update={"weights": str(weights)})
        self.tokenizer = load_tokenizer(model_config)
        self.vectors = np.random.default_rng(0).standard_normal((300, D)).astype(np.float32)
        self.model = Mock(
            spec=LanguageModel,
            config=tiny_config(d_model=D),
            fingerprint="tiny",
            precision="float32",
            tokenizer=self.tokenizer,
            source="tiny",
        )
        self.model.activations = Mock(side_effect=self._activations)
        self.data = folder / "data"
        self.data.mkdir()
        for name in "ab":
            self.write(name)

    def _activations(self, tokens: np.ndarray, taps: Any) -> dict[Tap, Any]:
        return {tap: jnp.asarray(self.vectors[tokens % 300]) for tap in taps}

    def write(self, name: str, *, letters: str = "eaoutnsr") -> None:
        """Prompts whose target is that of their last letter."""
        lines = [f"hello {letters[n % 8]},{n % 8 // 4}" for n in range(ROWS)]
        (self.data / f"{name}.csv").write_text("\n".join(["prompt,target", *lines]))

    def probe(self, **options: Any) -> list[Any]:
        settings = ProbeConfig(data=str(self.data), k=[1, 2], splits=2, max_tokens=64)
        return probe(self.runs, settings=settings, model=self.model, **options)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_saes_share_passes_and_a_stop_loses_one_data_set(world: World):
    with pytest.raises(Interrupted, match="finished data sets are saved"):
        world.probe(stop=lambda: read_probe(world.runs[1]) is not None)
    assert [list(read_probe(run).data_sets) for run in world.runs] == [["a"], ["a"]]
    passes = world.model.activations.call_count
    calls = iter([False] * (1 + passes) + [True])
    with pytest.raises(Interrupted, match="stopped in data set b"):
        world.probe(stop=lambda: next(calls, True))  # among its fits
    assert [list(read_probe(run).data_sets) for run in world.runs] == [["a"], ["a"]]
    world.model.activations.call_count = passes
    records = world.probe()
    assert world.model.activations.call_count == 2 * passes, "both SAEs at once, b alone"
    for run, record in zip(world.runs, records, strict=True):
        assert read_probe(run) == record
        assert list(record.data_sets) == ["a", "b"]
        assert record.data_sets["a"].probes == record.data_sets["b"].probes  # the same rows
        assert list(record.means) == ["raw", "1", "2"]
        assert record.means["raw"]["auc"][0] > 0.99
        values = np.array([one.probes["2"].auc for one in record.data_sets.values()]).mean(axis=0)
        assert record.means["2"]["auc"] == pytest.approx((values.mean(), values.std(ddof=1)))
    raw = [record.data_sets["a"].probes["raw"] for record in records]
    assert raw[0] == raw[1]
    assert records[0].data_sets["a"].latents != records[1].data_sets["a"].latents
    _check_what_is_shown(world.runs[0], auc=records[0].means["2"]["auc"][0])
    world.write("b", letters="srntuoae")
    world.probe()
    assert world.model.activations.call_count == 3 * passes, "only what changed"


def _check_what_is_shown(run: Path, *, auc: float) -> None:
    """By the report and by `sae status`."""
    page = probe_section(describe_runs([read_run(run)]))
    assert f"AUC {auc:.3f} ±" in page
    table = status_table(target_config(str(run)))
    assert list(table.columns[-1].cells) == ["2 data sets"]
    record = read_probe(run)
    write_probe(run, record.model_copy(update={"step": 1}))
    assert "(of an earlier step)" in probe_section(describe_runs([read_run(run)]))
    assert list(status_table(target_config(str(run))).columns[-1].cells) == ["outdated"]
    write_probe(run, record)


def test_the_last_tokens_activation_is_read(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activations, "_BATCH_TOKENS", 64)
    prompts = ["hello " + "n" * n for n in range(40)]
    tokens = prompt_tokens(prompts, world.tokenizer, max_tokens=20)
    whole = world.tokenizer.encode_batch(prompts)
    assert tokens[0] == [world.tokenizer.bos_id, *whole[0]]
    assert tokens[-1] == [world.tokenizer.bos_id, *whole[-1][-19:]]
    found = last_activations(world.model, tokens, [TAP], name="a", stop=lambda: False)[TAP]
    expected = world.vectors[[ids[-1] % 300 for ids in tokens]]
    np.testing.assert_array_equal(found, expected)
    world.vectors[tokens[5][-1] % 300] = np.inf
    with pytest.raises(UserError, match="NaN or infinity on the data set a"):
        last_activations(world.model, tokens, [TAP], name="a", stop=lambda: False)


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ({"site": "mlp_in", "target": "mlp_out"}, "is a transcoder, and probes ask"),
        ({"site": "embedding", "layer": 0}, "reads the embedding"),
    ],
)
def test_what_cannot_be_probed_is_refused(world: World, tmp_path: Path, sae: Any, message: str):
    trained = make_trained(D=D, F=F, **sae)
    world.runs = [save_run(tmp_path / "other", trained)]
    with pytest.raises(UserError, match=message):
        world.probe()

"""`sae latents` on runs, a released SAE and other text; against `sae evaluate` and transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from activation_cache.harvest.harvest import harvest
from activation_cache.language_model.model import load_model
from activation_cache.store.store import open_store
from launch.cli import main
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import read_run_config, write_config
from sae_train.config.run import Config, EvaluationConfig
from sae_train.evaluate.evaluate import evaluate
from sae_train.evaluate.result import read_frequencies
from sae_train.inference.fold import fold
from sae_train.inference.write_formats import write_gemma_scope
from sae_train.latents.reader import open_latents
from tests.sae_train.evaluate.test_evaluate import World, save_world_run
from tests.support.oracles.their_gemma import HELD_OUT, TAPS, S, save_their_gemma, world_config

pytestmark = pytest.mark.slow

HEADS_RUN = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A Gemma, its store, and runs of two sites, whose latents are written by the command."""
    folder = tmp_path_factory.mktemp("world")
    theirs = save_their_gemma(folder / "gemma")
    config = world_config(folder)
    harvest(model=config.model, text=config.text, cache=config.cache)
    store = open_store(config.cache.path)
    runs = [save_world_run(folder / f"run{i}", config, store, index=i) for i in range(len(TAPS))]
    for run in runs:
        assert main(["latents", str(run)]) == 0
    return World(theirs, load_model(config.model), store, config, runs)


def test_frequencies_are_evaluates_firing_counts(world: World):
    few = {"sequences": HELD_OUT, "loss_sequences": 1, "importance_sequences": 0}
    settings = EvaluationConfig(**few, sequences_per_batch=3)
    found = evaluate(world.runs, model=world.ours, settings=settings)
    for run, evaluation in zip(world.runs, found, strict=True):
        latents = open_latents(run)
        expected = read_frequencies(run, evaluation)
        np.testing.assert_array_equal(latents.summary["frequency"], expected)
        assert latents.record.tokens == evaluation.tokens
        assert expected.any()


def test_logits_of_heads_pass_through_the_output_projection(world: World):
    """And, with gains, through the post-attention norm: weights are those of transformers."""
    state = {name: one.double().numpy() for name, one in world.theirs.state_dict().items()}
    layer = f"model.layers.{TAPS[HEADS_RUN][1]}"
    W_O = state[f"{layer}.self_attn.o_proj.weight"].T
    gain = 1 + state[f"{layer}.post_attention_layernorm.weight"]
    final = 1 + state["model.norm.weight"]
    embedding = state["model.embed_tokens.weight"]
    W_dec = fold(load_trained(world.runs[HEADS_RUN])).W_dec.astype(np.float64)
    latent = open_latents(world.runs[HEADS_RUN])[3]
    plain = embedding @ (W_dec[3] @ W_O)
    through = embedding @ (W_dec[3] @ W_O * gain * final)
    for found, logits in ((latent.plain_top_logits, plain), (latent.top_logits, through)):
        best = np.argsort(-logits)[: len(found)]
        assert [one.id for one in found] == best.tolist()
        np.testing.assert_allclose([one.value for one in found], logits[best], rtol=1e-5)


def test_a_released_sae_gives_the_same_latents(world: World, tmp_path: Path):
    write_gemma_scope(fold(load_trained(world.runs[0])), tmp_path / "theirs")
    values = read_run_config(world.runs[0]).model_dump()
    values["sae"] |= {"start_from": str(tmp_path / "theirs" / "params.npz")}
    write_config(Config.model_validate(values | {"output": str(tmp_path / "out")}), tmp_path)
    assert main(["latents", str(tmp_path / "config.yaml")]) == 0
    found, expected = (open_latents(one) for one in (tmp_path / "out", world.runs[0]))
    assert found.summary.equals(expected.summary)
    assert found[1].contexts == expected[1].contexts


def test_more_tokens_and_other_text(world: World, tmp_path: Path, capsys):
    run = world.runs[1]
    assert main(["latents", str(run), f"latents.tokens={S * (HELD_OUT + 2)}"]) == 0
    record = open_latents(run).record
    end = world.store.tokens.num_sequences
    assert record.settings["sequences"] == [end - HELD_OUT - 2, end]
    assert main(["latents", str(run), f"latents.tokens={S * 2}"]) == 0
    begin = world.store.tokens.held_out.start
    assert open_latents(run).record.settings["sequences"] == [begin, begin + 2]
    (tmp_path / "other.txt").write_text("the inner and there on the other of it " * 20)
    words = [f"latents.source=[{tmp_path / 'other.txt'}]", f"latents.tokens={S * 4}"]
    assert main(["latents", str(run), *words]) == 0
    other = open_latents(run)
    assert other.record.sequences == 4
    assert other.record.fingerprints["tokens"] != record.fingerprints["tokens"]
    assert main(["latents", str(run), words[0]]) == 2
    assert "latents.source needs latents.tokens" in capsys.readouterr().err


def test_what_the_runs_were_trained_with_cannot_be_overridden(world: World, capsys):
    assert main(["latents", str(world.runs[0]), "sae.width=8"]) == 2
    assert "has no effect here" in capsys.readouterr().err


def test_another_models_tokenizer_is_refused(world: World, tmp_path: Path, capsys):
    from tests.support.tiny_gemma import tiny_pieces

    save_their_gemma(tmp_path / "gemma")
    definition = tmp_path / "gemma" / "tokenizer.json"
    piece = tiny_pieces().pieces[-1]
    definition.write_text(definition.read_text().replace(f'"{piece}"', '"▁tz"'))
    words = ["latents", str(world.runs[0]), f"model.weights={tmp_path / 'gemma'}"]
    assert main([*words, "latents.top=3"]) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert open_latents(world.runs[0]).record.settings["top"] == 20


def test_a_run_without_a_checkpoint_is_told(world: World, tmp_path: Path, capsys):
    config = world.config.model_copy(update={"output": str(tmp_path / "run")})
    write_config(config, tmp_path / "run")
    assert main(["latents", str(tmp_path / "run")]) == 2
    assert "holds no trained run yet" in capsys.readouterr().err

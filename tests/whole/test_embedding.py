"""SAEs of the embedding: rows from the table, several epochs, evaluated on table and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from activation_cache.gemma.taps import EMBEDDING
from activation_cache.harvest.harvest import harvest
from activation_cache.language_model.model import load_model
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import open_store
from sae_train.checkpoint.trained import load_trained
from sae_train.config.run import Config
from sae_train.evaluate.evaluate import evaluate
from sae_train.evaluate.result import Evaluation
from sae_train.inference.fold import fold
from sae_train.release.export import export
from sae_train.train.loop import train
from tests.support.oracles.their_gemma import (
    BOS,
    EOS,
    PAD,
    D,
    S,
    save_their_gemma,
    their_model,
    world_config,
)
from tests.support.saes import reference_latents, reference_reconstruction

pytestmark = pytest.mark.slow

VOCABULARY = 403


def embedding_config(folder: Path, *, text: bool = True, name: str = "out", **cache: Any) -> Config:
    """A run on the embedding of the Gemma 2 in `folder`, several epochs of its table."""
    values = world_config(folder, importance_sequences=64).model_dump()
    values["cache"] |= {
        "path": str(folder / ("store" if text else "no-text")),
        "sites": [{"site": "embedding", "layers": [0]}],
        "tokens": VOCABULARY - 3,
    } | cache
    if not text:
        values["text"] |= {"source": [], "held_out_sequences": 0}
    values["sae"] |= {"site": "embedding", "layer": 0, "b_dec_init": "mean"}
    values["sae"]["threshold"] |= {"init": 0.05, "parametrisation": "direct"}
    values["train"] |= {"batch_size": 64, "tokens": 5 * 400}
    values["train"]["learning_rate"] |= {"peak": 1e-2, "warmup_steps": 5}
    values["train"]["sparsity"] |= {"coefficient": 1e-3}
    values |= {"output": str(folder / name), "name": name}
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embedding")
    save_their_gemma(folder / "gemma")
    config = embedding_config(folder)
    harvest(model=config.model, text=config.text, cache=config.cache)
    assert train(config).step == 31
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Evaluation:
    return evaluate([folder / "out"])[0]


def their_table() -> np.ndarray:
    return their_model().model.embed_tokens.weight.detach().numpy()


@pytest.mark.parametrize("text", [True, False], ids=["text", "no text"])
def test_every_usable_row_of_the_table_once(folder: Path, text: bool):
    config = embedding_config(folder, text=text)
    harvest(model=config.model, text=config.text, cache=config.cache)
    store = open_store(config.cache.path)
    assert [tap.name for tap in store.taps] == ["embedding"]
    rows = store.read(EMBEDDING, start=0, stop=store.rows)
    where = store.provenance(start=0, stop=store.rows)
    ids = store.tokens.read(where.sequence.tolist())[np.arange(store.rows), where.position]
    assert sorted(ids) == [one for one in range(VOCABULARY) if one not in (PAD, EOS, BOS)]
    assert (np.diff(ids) != 1).mean() > 0.9  # shuffled
    np.testing.assert_array_equal(rows, their_table()[ids])
    assert len(store.tokens.held_out) == (7 if text else 0)
    if text:
        held_out = store.tokens.read(store.tokens.held_out)
        assert (held_out == EOS).any()


def test_l0_and_fvu_are_of_the_table_and_losses_of_text(folder: Path, found: Evaluation):
    """Against NumPy on the table, and transformers' losses with other rows as layer 0's input."""
    sae = fold(load_trained(folder / "out"))
    table = their_table().astype(np.float64)
    usable_rows = np.setdiff1d(np.arange(VOCABULARY), [PAD, EOS, BOS])
    x = table[usable_rows]
    error = ((x - reference_reconstruction(sae, x)) ** 2).sum()
    assert found.fvu == pytest.approx(error / ((x - x.mean(axis=0)) ** 2).sum(), rel=1e-5)
    latents = reference_latents(sae, x)
    assert found.l0 == pytest.approx((latents > 0).sum(1).mean(), rel=1e-6)
    assert found.tokens == len(usable_rows)
    assert found.by_position["l0"] == [None] * S

    theirs = their_model()
    store = open_store(folder / "store")
    tokens = store.tokens.read(store.tokens.held_out)
    usable = ~np.isin(tokens, [PAD, EOS, BOS])
    counted = usable[:, :-1] & (tokens[:, 1:] != PAD)
    ids = torch.from_numpy(tokens.astype(np.int64))

    def losses(rows: np.ndarray | None) -> float:
        scaled = None if rows is None else torch.from_numpy(np.float32(rows * np.sqrt(D)))
        handle = theirs.model.layers[0].register_forward_pre_hook(
            lambda _, args: args if scaled is None else (scaled, *args[1:])
        )
        with torch.no_grad():
            log_p = torch.log_softmax(theirs(ids).logits.double()[:, :-1], dim=-1)
        handle.remove()
        return float(-log_p.gather(-1, ids[:, 1:, None])[..., 0].numpy()[counted].mean())

    rows = table[tokens]
    spliced = np.where(usable[..., None], reference_reconstruction(sae, rows), rows)
    assert found.loss == pytest.approx(losses(None), abs=2e-5)
    assert found.loss == pytest.approx(losses(rows), abs=2e-5)
    assert found.loss_spliced == pytest.approx(losses(spliced), abs=2e-5)
    zero = np.where(usable[..., None], 0.0, rows)
    assert found.loss_zero_ablated == pytest.approx(losses(zero), abs=2e-5)
    assert found.importance_uniformity is not None


def test_without_text_all_but_the_losses_is_measured(folder: Path, found: Evaluation):
    config = embedding_config(folder, text=False, name="without")
    harvest(model=config.model, text=config.text, cache=config.cache)
    assert train(config).step == 31
    [without] = evaluate([folder / "without"])
    assert (without.loss, without.delta_loss, without.loss_tokens) == (None, None, 0)
    assert (without.tokens, without.sequences) == (found.tokens, 0)
    assert without.fvu is not None
    assert 0 < without.fvu < 1
    assert export(folder / "without")[0].sae.metadata["hook_name"] == "model.embed_tokens.weight"


def test_what_cannot_be_harvested_is_refused(folder: Path):
    config = embedding_config(folder, path=str(folder / "none"), tokens=401)
    with pytest.raises(UserError, match=r"asks for 401 rows and the embedding has 400"):
        harvest(model=config.model, text=config.text, cache=config.cache)
    sites = [{"site": "embedding", "layers": [0]}, {"site": "mlp_out", "layers": [1]}]
    config = embedding_config(folder, path=str(folder / "none"), sites=sites)
    with pytest.raises(UserError, match=r"has embedding beside mlp_out.1"):
        harvest(model=config.model, text=config.text, cache=config.cache)
    sites = [{"site": "embedding", "layers": [1, 0]}]
    config = embedding_config(folder, path=str(folder / "none"), sites=sites)
    with pytest.raises(UserError, match=r"site embedding has layer 1: the table is there once"):
        harvest(model=config.model, text=config.text, cache=config.cache)
    sites = [{"site": "mlp_out", "layers": [0]}, {"site": "embedding", "layers": [0]}]
    with pytest.raises(ValueError, match=r"only the embedding is harvested without text"):
        embedding_config(folder, text=False, sites=sites)


def test_the_table_alone_is_read_from_the_checkpoint(folder: Path):
    from activation_cache.language_model.model import load_replicas
    from activation_cache.mesh import make_mesh

    config = embedding_config(folder)
    [alone] = load_replicas(
        config.model, meshes=[make_mesh(jax.devices()[:1])], embedding_only=True
    )
    assert list(alone.params) == ["embedding"]
    tokens = np.arange(8, dtype=np.int32).reshape(1, 8)
    acts = alone.activations(tokens, [EMBEDDING])[EMBEDDING]
    whole = load_model(config.model).activations(tokens, [EMBEDDING])[EMBEDDING]
    np.testing.assert_array_equal(acts, whole)

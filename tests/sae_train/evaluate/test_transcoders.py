"""Transcoders inside the model: every number against hooks on transformers' own Gemma 2."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activation_cache.harvest.harvest import harvest
from activation_cache.language_model.model import load_model
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import open_store
from launch.cli import main
from sae_train.config.file import write_config
from sae_train.config.run import Config
from sae_train.evaluate.evaluate import evaluate
from sae_train.evaluate.result import Evaluation, read_evaluation
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.inference.write_formats import write_gemma_scope_2
from tests.support.oracles.their_gemma import (
    BOS,
    EOS,
    PAD,
    D,
    F,
    save_their_gemma,
    world_config,
)
from tests.support.saes import make_trained, reference_latents, reference_reconstruction, save_run

pytestmark = pytest.mark.slow

LAYER = 2
# Two transcoders of one target, with and without a skip, and an SAE of that target, in one pass.
RUNS: dict[str, dict[str, Any]] = {
    "gs2": {"site": "mlp_in", "target": "mlp_out", "affine_skip": True},
    "gs1": {"site": "mlp_in_normalized", "target": "mlp_out"},
    "sae": {"site": "mlp_out"},
}


@dataclasses.dataclass
class World:
    theirs: Any
    tokens: np.ndarray
    config: Config
    saes: dict[str, Sae]
    found: dict[str, Evaluation]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    theirs = save_their_gemma(folder / "gemma")
    values = world_config(folder).model_dump()
    sites = ("mlp_in", "mlp_in_normalized", "mlp_out")
    values["cache"]["sites"] = [{"site": site, "layers": [LAYER]} for site in sites]
    values["sae"] |= {"site": "mlp_out"}
    config = Config.model_validate(values)
    harvest(model=config.model, text=config.text, cache=config.cache)
    store, saes, folders = open_store(config.cache.path), {}, []
    for seed, (name, own) in enumerate(RUNS.items()):
        trained = make_trained(D=D, F=F, seed=seed, scale=2.0, target_scale=1.4, **own)
        values["sae"] = config.sae.model_dump() | own
        values["sae"]["pre_encoder_bias"] = "target" not in own
        values |= {"output": str(folder / name), "name": name}
        trained = dataclasses.replace(
            trained, config=Config.model_validate(values), store=store.identity
        )
        folders.append(save_run(folder / name, trained))
        saes[name] = fold(trained)
    found = evaluate(folders, model=load_model(config.model))
    tokens = store.tokens.read(store.tokens.held_out)
    return World(theirs, tokens, config, saes, dict(zip(RUNS, found, strict=True)))


def their_pass(world: World, *, site: str = "mlp_in", replace: Any = None) -> tuple[Any, Any, Any]:
    """Losses, the activations at `site`, and mlp_out, which `replace(read, out)` may change."""
    seen: dict[str, np.ndarray] = {}
    layer = world.theirs.model.layers[LAYER]

    def before(module: Any, args: Any, out: torch.Tensor) -> None:
        wide = args[0].double()
        normalized = wide / (wide.square().mean(dim=-1, keepdim=True) + module.eps).sqrt()
        seen["mlp_in"], seen["mlp_in_normalized"] = out.numpy(), normalized.numpy()

    def after(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        seen["mlp_out"] = out.numpy()
        if replace is None:
            return out
        return torch.from_numpy(replace(seen[site], seen["mlp_out"]).astype(np.float32))

    handles = [
        layer.pre_feedforward_layernorm.register_forward_hook(before),
        layer.post_feedforward_layernorm.register_forward_hook(after),
    ]
    ids = torch.from_numpy(world.tokens.astype(np.int64))
    with torch.no_grad():
        log_p = torch.log_softmax(world.theirs(ids).logits.double()[:, :-1], dim=-1)
    for handle in handles:
        handle.remove()
    losses = -log_p.gather(-1, ids[:, 1:, None])[..., 0].numpy()
    return losses, seen[site], seen["mlp_out"]


@pytest.mark.parametrize("name", list(RUNS))
def test_every_number_is_the_oracles(world: World, name: str):
    sae, found, site = world.saes[name], world.found[name], RUNS[name]["site"]
    usable = ~np.isin(world.tokens, [PAD, EOS, BOS])
    counted = usable[:, :-1] & (world.tokens[:, 1:] != PAD)
    base, read, target = their_pass(world, site=site)
    x, y = read.astype(np.float64), target.astype(np.float64)
    error = ((y - reference_reconstruction(sae, x)) ** 2).sum(-1)
    spread = ((y - y[usable].mean(axis=0)) ** 2).sum(-1)
    assert found.fvu == pytest.approx(error[usable].sum() / spread[usable].sum(), rel=1e-5)
    l0 = (reference_latents(sae, x)[usable] > 0).sum(1).mean()
    assert found.l0 == pytest.approx(l0, rel=1e-5)
    assert found.loss == pytest.approx(base[counted].mean(), abs=2e-5)
    everywhere = np.ones_like(usable)
    for suffix, where in (("", usable), ("_all_positions", everywhere)):
        for key, make in (
            ("loss_spliced", lambda read: reference_reconstruction(sae, read)),
            ("loss_zero_ablated", np.zeros_like),
        ):

            def replace(read: Any, out: Any, make: Any = make, where: Any = where) -> Any:
                return np.where(where[..., None], make(read), out)

            losses, _, _ = their_pass(world, site=site, replace=replace)
            expected = losses[counted].mean()
            assert getattr(found, key + suffix) == pytest.approx(expected, abs=2e-5), key + suffix
    assert abs(found.delta_loss or 0) > 1e-2
    assert (found.site, found.target) == (site, RUNS[name].get("target"))


def test_a_released_transcoder_is_measured_as_it_is(world: World, tmp_path: Path):
    write_gemma_scope_2(world.saes["gs2"], tmp_path / "theirs")
    values = world.config.model_dump()
    values["sae"] |= RUNS["gs2"] | {"pre_encoder_bias": False}
    values["sae"] |= {"start_from": str(tmp_path / "theirs")}
    write_config(Config.model_validate(values | {"output": str(tmp_path / "out")}), tmp_path)
    assert main(["evaluate", str(tmp_path / "config.yaml")]) == 0
    found = read_evaluation(tmp_path / "out")
    assert found is not None
    for key in ("l0", "fvu", "delta_loss", "loss"):
        assert getattr(found, key) == pytest.approx(getattr(world.found["gs2"], key), rel=1e-6)


def test_a_transcoder_instead_of_an_sae_is_refused(world: World, tmp_path: Path):
    write_gemma_scope_2(world.saes["gs2"], tmp_path / "theirs")
    values = world.config.model_dump()
    values["sae"] |= {"start_from": str(tmp_path / "theirs")}
    write_config(Config.model_validate(values), tmp_path)
    with pytest.raises(UserError, match=r"is a transcoder, from blocks.2.hook_mlp_in to blocks.2"):
        evaluate([tmp_path], model=load_model(world.config.model))

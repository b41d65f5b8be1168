"""Small SAEs and trained weights for the tests of release and evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_train.checkpoint.checkpoints import Checkpoints
from sae_train.checkpoint.same_run import checkpoint_meta
from sae_train.checkpoint.trained import Trained
from sae_train.config.file import write_config
from sae_train.config.run import Config, MeshConfig
from sae_train.inference.fold import fold
from sae_train.inference.sae import Sae
from sae_train.model.sharding import make_mesh
from sae_train.step.state import init_state


def make_config(*, width: int = 24, site: str = "resid_post", layer: int = 1, **sae: Any) -> Config:
    """A valid config; `width` is the SAE's width F, further keywords go to `sae`."""
    tapped = [site, sae["target"]] if "target" in sae else [site]
    sites = [{"site": one, "layers": [layer]} for one in tapped]
    return Config.model_validate(
        {
            "name": "tiny",
            "model": {"weights": "google/gemma-3-270m", "dtype": "float32"},
            "text": {"source": ["data/*.txt"], "sequence_length": 16},
            "cache": {"path": "store", "sites": sites, "tokens": 999},
            "sae": {"site": site, "layer": layer, "width": width, **sae},
            "train": {"tokens": 8192, "batch_size": 64, "sparsity": {"coefficient": 1e-3}},
            "output": "runs/tiny",
        }
    )


def make_trained(
    *,
    D: int = 10,
    F: int = 24,
    scale: float = 3.7,
    target_scale: float | None = None,
    seed: int = 0,
    **config: Any,
) -> Trained:
    """Random weights as training would hold them, every bias and threshold well away from 0."""
    random = np.random.default_rng(seed)
    W_dec_FD = random.standard_normal((F, D))
    W_dec_FD /= np.linalg.norm(W_dec_FD, axis=1, keepdims=True)
    params = {
        "W_enc": random.standard_normal((F, D)),
        "W_dec": W_dec_FD,
        "b_enc": 0.3 * random.standard_normal(F),
        "b_dec": 0.5 * random.standard_normal(D),
        "threshold": random.uniform(0.05, 0.6, F),
    }
    if config.get("affine_skip"):
        params["W_skip"] = 0.3 * random.standard_normal((D, D))
    return Trained(
        params={name: value.astype(np.float32) for name, value in params.items()},
        input_scale=scale,
        target_scale=target_scale or scale,
        step=128,
        config=make_config(width=F, **config),
        store="0" * 64,
    )


def make_sae(**arguments: Any) -> Sae:
    """The released form of `make_trained`."""
    return fold(make_trained(**arguments))


def reference_latents(sae: Sae, x: np.ndarray) -> np.ndarray:
    """Gemma Scope's inference in float64: relu(z) where z > threshold."""
    t = {name: tensor.astype(np.float64) for name, tensor in sae.tensors.items()}
    z = x.astype(np.float64) @ t["W_enc"] + t["b_enc"]
    return np.maximum(z, 0) * (z > t["threshold"])


def reference_reconstruction(sae: Sae, x: np.ndarray) -> np.ndarray:
    """f W_dec + b_dec in float64, and x W_skip if there is one."""
    t = {name: tensor.astype(np.float64) for name, tensor in sae.tensors.items()}
    skip = x.astype(np.float64) @ t["W_skip"] if "W_skip" in t else 0.0
    return reference_latents(sae, x) @ t["W_dec"] + t["b_dec"] + skip


def save_run(folder: Path, trained: Trained) -> Path:
    """A run's folder with one checkpoint, as training would leave it."""
    params = {name: jnp.asarray(value) for name, value in trained.params.items()}
    if trained.config.sae.threshold.parametrisation == "log":
        params["threshold"] = jnp.log(params["threshold"])
    d_model = len(trained.params["b_dec"])
    born = init_state(trained.config.sae, d_model=d_model, seed=0, mesh=make_mesh(MeshConfig()))
    state = dataclasses.replace(born, params=params, step=jnp.int32(trained.step))
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, born))
    meta = checkpoint_meta(
        trained.config,
        input_scale=trained.input_scale,
        target_scale=trained.target_scale,
        d_model=d_model,
        store=trained.store,
    )
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state, step=trained.step, meta=meta)
    write_config(trained.config, folder)
    return folder

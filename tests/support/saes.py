"""Small SAEs and trained weights for the tests of inference, release and evaluation."""

from __future__ import annotations

import dataclasses
import json
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
from sae_train.step.state import abstract_state


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


def make_trained_as(architecture: str, *, k: int = 5, D: int = 10, F: int = 24) -> Trained:
    """`make_trained` of another architecture than JumpReLU."""
    own = {"k": k} if "topk" in architecture else {}
    trained = make_trained(D=D, F=F)
    config = trained.config.sae.model_copy(update={"architecture": architecture, **own})
    params = dict(trained.params)
    if architecture != "batch_topk":
        del params["threshold"]
    if architecture == "gated":
        random = np.random.default_rng(1)
        params["b_gate"] = params.pop("b_enc") - 0.4
        params["b_mag"] = (0.3 * random.standard_normal(F)).astype(np.float32)
        params["r_mag"] = (0.3 * random.standard_normal(F)).astype(np.float32)
    config = trained.config.model_copy(update={"sae": config})
    return dataclasses.replace(trained, params=params, config=config)


def make_sae(**arguments: Any) -> Sae:
    """The released form of `make_trained`."""
    return fold(make_trained(**arguments))


def of_first(first: int, sae: Sae) -> Sae:
    """The SAE that is made of so many first latents."""
    t = sae.tensors
    own = {name: t[name][:first] for name in ("W_dec", "b_enc", "threshold")}
    return dataclasses.replace(sae, W_enc=t["W_enc"][:, :first], **own)


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
    if "threshold" in params and trained.config.sae.threshold.parametrisation == "log":
        params["threshold"] = jnp.log(params["threshold"])
    d_model = len(trained.params["b_dec"])
    abstract = abstract_state(trained.config.sae, d_model=d_model, mesh=make_mesh(MeshConfig()))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    state = dataclasses.replace(zeros, params=params, step=np.int32(trained.step))
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    meta = checkpoint_meta(
        trained.config,
        input_scale=trained.input_scale,
        target_scale=trained.target_scale,
        d_model=d_model,
        store=trained.store,
        precision="float32",
    )
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state, step=trained.step, meta=meta)
    write_config(trained.config.model_copy(update={"output": str(folder)}), folder)
    return folder


def rewrite_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object's file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: one for key, one in content.items() if one is not None}))

"""ReLU, Gated, TopK and BatchTopK: loss and gradients as SAELens' training classes have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from activation_cache.runtime.errors import Interrupted
from sae_train.checkpoint.trained import load_trained
from sae_train.config.run import Config
from sae_train.config.sae import has_unit_decoder
from sae_train.inference.fold import fold
from sae_train.model.architectures import forward
from sae_train.model.sharding import params_table
from sae_train.model.topk import kth_largest, kth_largest_of_all, select
from sae_train.runs.metrics_file import read_metrics
from sae_train.step.autodiff import loss_and_forward
from sae_train.step.schedule import scheduled
from sae_train.train.loop import train
from sae_train.train.train_step import averaged
from tests.support.configs import make_config
from tests.support.training import assert_same_run, make_run

pytestmark = pytest.mark.slow

B, D, F, K = 32, 12, 40, 6
L1 = {"penalty": "l1", "coefficient": 0.03, "warmup_steps": 0}
NONE = {"penalty": "none"}
KINDS: dict[str, dict[str, Any]] = {
    "relu": {"sparsity": L1, "sae": {"architecture": "relu"}},
    "gated": {"sparsity": L1, "sae": {"architecture": "gated"}},
    "topk": {"sparsity": NONE, "sae": {"architecture": "topk", "k": K}},
    "batch_topk": {
        "sparsity": NONE,
        "sae": {"architecture": "batch_topk", "k": K, "threshold_per_latent": True},
    },
}


@pytest.fixture
def x_BD() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((B, D)).astype(np.float32)


def make_params(config: Config) -> dict[str, np.ndarray]:
    """Random parameters, decoder rows of unit norm where the architecture has them so."""
    random = np.random.default_rng(1)
    shapes = {"F": F, "D": D}
    params = {
        name: 0.4 * random.standard_normal([shapes[dim] for dim in tensor.dims])
        for name, tensor in params_table(config.sae.architecture).items()
    }
    if has_unit_decoder(config.sae.architecture):
        params["W_dec"] /= np.linalg.norm(params["W_dec"], axis=1, keepdims=True)
    return {name: value.astype(np.float32) for name, value in params.items()}


def ours(config: Config, params: dict[str, np.ndarray], x: np.ndarray, dead: np.ndarray):
    """(loss, Forward, gradients)."""
    (loss, (out, *_)), gradients = jax.value_and_grad(loss_and_forward, has_aux=True)(
        jax.tree.map(jnp.asarray, params),
        jnp.asarray(x),
        scheduled(config.train, step=0),
        target_BD=jnp.asarray(x),
        log_gain=jnp.zeros(()),
        dead_F=jnp.asarray(dead),
        sae=config.sae,
        train=config.train,
        precision="float32",
    )
    return loss, out, gradients


def theirs(sae_lens, architecture: str, params: dict[str, np.ndarray], **options: Any):
    """SAELens' training SAE with these parameters."""
    made = {
        "relu": (sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig),
        "gated": (sae_lens.GatedTrainingSAE, sae_lens.GatedTrainingSAEConfig),
        "topk": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig),
        "batch_topk": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig),
    }
    module, config = made[architecture]
    sae = module(config(d_in=D, d_sae=F, apply_b_dec_to_input=True, **options))
    with torch.no_grad():
        for name, value in params.items():
            getattr(sae, name).copy_(torch.from_numpy(value.T if name == "W_enc" else value))
    return sae


def their_step(sae_lens, module, x: np.ndarray, dead: np.ndarray | None = None):
    """One training forward pass of theirs."""
    step = sae_lens.saes.sae.TrainStepInput(
        sae_in=torch.from_numpy(x),
        coefficients={"l1": L1["coefficient"]},
        dead_neuron_mask=None if dead is None else torch.from_numpy(dead),
        n_training_steps=0,
        is_logging_step=False,
    )
    return module.training_forward_pass(step)


def gradients_of(loss: torch.Tensor, module, names) -> dict[str, np.ndarray]:
    """Gradients of a loss of theirs, W_enc latent-major."""
    names = list(names)
    tensors = torch.autograd.grad(loss, [getattr(module, name) for name in names])
    found = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    return found | ({"W_enc": found["W_enc"].T} if "W_enc" in found else {})


def assert_close(found: Any, expected: Any, name: str = "") -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("architecture", ["relu", "topk", "batch_topk"])
def test_loss_and_gradients_are_sae_lens(sae_lens, x_BD: np.ndarray, architecture: str):
    config = make_config(width=F, **KINDS[architecture])
    params = make_params(config)
    # Their rescaling by decoder norms would let gradients through norms that we hold at 1.
    options = {} if architecture == "relu" else {"k": K, "rescale_acts_by_decoder_norm": False}
    module = theirs(sae_lens, architecture, params, **options)
    step = their_step(sae_lens, module, x_BD)
    loss, out, gradients = ours(config, params, x_BD, np.zeros(F, bool))
    assert_close(loss, step.loss.item())
    assert_close(out.latents_BF, step.feature_acts.detach().to_dense())
    expected = gradients_of(step.loss, module, params)
    for name in params:
        assert_close(gradients[name], expected[name], name)


def test_gated_loss_and_gradients(sae_lens, x_BD: np.ndarray):
    """As SAELens, but that the auxiliary loss leaves the decoder alone, as in the paper."""
    config = make_config(width=F, **KINDS["gated"])
    params = make_params(config)
    module = theirs(sae_lens, "gated", params)
    step = their_step(sae_lens, module, x_BD)
    loss, out, gradients = ours(config, params, x_BD, np.zeros(F, bool))
    assert_close(loss, step.loss.item())
    assert_close(out.latents_BF, step.feature_acts.detach())
    own = [name for name in params if name not in ("W_dec", "b_dec")]
    for name, value in gradients_of(step.loss, module, own).items():
        assert_close(gradients[name], value, name)
    again = their_step(sae_lens, module, x_BD).losses["mse_loss"]
    assert_close(gradients["W_dec"], gradients_of(again, module, ["W_dec"])["W_dec"], "W_dec")
    assert_close(gradients["b_dec"], numeric_b_dec(config, params, x_BD), "b_dec")


def numeric_b_dec(config: Config, params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The gradient in b_dec from the definitions, with what the auxiliary loss may not move."""
    b = torch.tensor(params["b_dec"], requires_grad=True)
    t = {name: torch.from_numpy(value) for name, value in params.items()}
    rows = torch.from_numpy(x)
    linear = (rows - b) @ t["W_enc"].T
    gate = linear + t["b_gate"]
    magnitude = torch.relu(linear * t["r_mag"].exp() + t["b_mag"])
    output = ((gate > 0) * magnitude) @ t["W_dec"] + b
    via_gate = torch.relu(gate) @ t["W_dec"] + b.detach()
    loss = (rows - output).pow(2).sum(1).mean() + (rows - via_gate).pow(2).sum(1).mean()
    loss = loss + L1["coefficient"] * torch.relu(gate).sum(1).mean()
    return torch.autograd.grad(loss, b)[0].numpy()


@pytest.mark.parametrize("dead_count", [0, 3, 20])
def test_dead_latents_are_woken_as_in_sae_lens(sae_lens, x_BD: np.ndarray, dead_count: int):
    """Theirs takes the dead pre-activations as they are, ours after the ReLU (as Gao et al.)."""
    config = make_config(width=F, **KINDS["topk"])
    params = make_params(config)
    params["b_enc"] += 9.0  # every pre-activation is positive, so both are the same
    dead = np.arange(F) < dead_count
    module = theirs(
        sae_lens,
        "topk",
        params,
        k=K,
        rescale_acts_by_decoder_norm=False,
        aux_loss_coefficient=1 / 32,
    )
    step = their_step(sae_lens, module, x_BD, dead)
    loss, out, gradients = ours(config, params, x_BD, dead)
    assert (float(out.auxiliary) > 0) == (dead_count > 0)
    assert_close(loss, step.loss.item())
    for name, value in gradients_of(step.loss, module, params).items():
        assert_close(gradients[name], value, name)


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4)])
def test_the_kth_largest_is_exact_on_any_mesh(mesh: tuple[int, int]):
    random = np.random.default_rng(2)
    values = np.maximum(random.standard_normal((16, 64)), 0).astype(np.float32)
    values[3] = 0.0
    values[4, 10:] = 0.0
    devices = jax.make_mesh(mesh, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("data", "model"))
    placed = jax.device_put(values, spec)
    for k in (1, 6, 64):
        expected = np.sort(values, axis=1)[:, -k]
        np.testing.assert_array_equal(
            jax.jit(kth_largest, static_argnames="k")(placed, k=k), expected
        )
        kth = jax.jit(kth_largest_of_all, static_argnames="k")(placed, k=16 * k)
        np.testing.assert_array_equal(kth, np.sort(values.ravel())[-16 * k])
        kept = np.asarray(jax.jit(select, static_argnames="k")(placed, k=k))
        assert ((kept > 0).sum(axis=1) == np.minimum((values > 0).sum(axis=1), k)).all()


def run_of(folder: Path, architecture: str, **options: Any) -> Config:
    kind = KINDS[architecture]
    sae = dict(kind["sae"])
    return make_run(folder, sparsity=kind["sparsity"], sae=sae, **options)


@pytest.mark.parametrize("architecture", KINDS)
def test_a_run_learns_resumes_exactly_and_is_released(tmp_path: Path, architecture: str):
    whole = run_of(tmp_path, architecture, output="whole")
    train(whole)
    rows = read_metrics(tmp_path / "whole")
    assert rows[-1]["fvu"] < 0.9 * rows[0]["fvu"]
    parts = run_of(tmp_path, architecture, output="parts")
    calls = iter(range(17))
    with pytest.raises(Interrupted):
        train(parts, stop=lambda: next(calls, None) is None)
    train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", step=40)
    trained = load_trained(tmp_path / "whole")
    sae = fold(trained)
    x = np.random.default_rng(5).standard_normal((64, 16)).astype(np.float32)
    params = {name: jnp.asarray(value) for name, value in trained.params.items()}
    scaled, nobody = jnp.asarray(x), jnp.zeros(whole.sae.width, bool)
    out = forward(
        params,
        scaled,
        target_BD=scaled,
        config=whole.sae,
        dead_F=nobody,
        precision="float32",
    )
    if architecture != "batch_topk":
        released = np.asarray(sae(x * trained.input_scale)) / trained.input_scale
        np.testing.assert_allclose(released, out.reconstruction_BD, rtol=1e-4, atol=1e-5)
    norm_F = np.linalg.norm(trained.params["W_dec"], axis=1)
    assert np.allclose(norm_F, 1, atol=1e-5) == (architecture != "relu")
    if architecture == "topk":
        assert rows[-1]["l0"] == pytest.approx(K, abs=0.01)
    if architecture == "batch_topk":
        theta_F = trained.params["threshold"]
        parts_F = load_trained(tmp_path / "parts").params["threshold"]
        np.testing.assert_array_equal(theta_F, parts_F)
        assert len(np.unique(theta_F)) > 1
        assert rows[-1]["threshold_mean"] == pytest.approx(np.median(theta_F), rel=0.3)
        single_F = load_trained(tmp_path / "whole", step=30).params["threshold"]
        assert rows[30]["threshold_mean"] == pytest.approx(single_F[0])
        assert len(np.unique(single_F)) == 1
        assert rows[-1]["l0"] == pytest.approx(K, abs=0.01)


@pytest.mark.parametrize("architecture", KINDS)
def test_every_mesh_trains_the_same(tmp_path: Path, architecture: str):
    rows = {}
    for name, mesh in {"one": (1, 1), "many": (2, 4)}.items():
        train(run_of(tmp_path, architecture, output=name, mesh=mesh, steps=20))
        rows[name] = read_metrics(tmp_path / name)
    for one, many in zip(rows["one"], rows["many"], strict=True):
        for key in ("loss", "mse", "fvu", "l0", "threshold_mean"):
            np.testing.assert_allclose(one[key], many[key], rtol=1e-5, atol=1e-7, err_msg=key)
    if architecture == "batch_topk":
        found = [load_trained(tmp_path / name).params["threshold"] for name in rows]
        np.testing.assert_allclose(*found, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sae": {"architecture": "topk"}, "sparsity": NONE}, "topk needs sae.k"),
        ({"sae": {"k": 3}}, "jumprelu has no k"),
        ({"sae": {"architecture": "topk", "k": 99}, "width": F, "sparsity": NONE}, "k 99 is above"),
        ({"sae": {"architecture": "relu"}}, "penalty l0 does not go with .* relu: use l1"),
        ({"sae": {"threshold_per_latent": True}}, "is for batch_topk, and .* is jumprelu"),
        ({"sparsity": NONE}, "penalty none does not go with .* jumprelu: use l0 or"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_the_selection_threshold_is_a_fading_mean():
    values = [3.0, 1.0, 2.0, 5.0]
    mean = jnp.zeros(())
    for number, value in enumerate(values, 1):
        mean = averaged(mean, jnp.asarray(value), step=jnp.int32(number))
        weights = 0.99 ** np.arange(number)[::-1]
        assert float(mean) == pytest.approx(weights @ values[:number] / weights.sum(), rel=1e-5)
    assert averaged(mean, None, step=jnp.int32(5)) is mean

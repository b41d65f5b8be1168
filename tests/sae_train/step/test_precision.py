"""Steps at every precision, beside the float64 reference whose operands are rounded alike.

A CPU has products of float32 and bfloat16. What a GPU would make of the two presets is shown on it
by products that cut the operands' bits first. Sums written out, those of the sparse step's pairs,
are rounded for bfloat16 alone.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache import products
from activation_cache.precision import Precision
from activation_cache.runtime.errors import UserError
from sae_train.config.run import Config
from sae_train.model.sharding import make_mesh
from sae_train.sparse.jumprelu_step import SparseStep
from sae_train.sparse.kernels.mode import without_gpu
from sae_train.step.autodiff import AutodiffStep
from sae_train.step.dense_jumprelu import DenseStep
from sae_train.step.result import StepResult
from sae_train.step.schedule import scheduled
from sae_train.step.state import TrainState
from sae_train.train.train_step import make_train_step
from tests.sae_train.step.test_step import PENALTIES, biased_state, run_on_mesh
from tests.support.configs import make_config
from tests.support.oracles import reference
from tests.support.oracles.rounded_products import jax_product, numpy_product
from tests.support.oracles.rows_off_edges import off_edges

B, D, F = 24, 16, 64
SCALE, BANDWIDTH = 3.5, 0.05
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16_3x", "tf32", "bfloat16")


@pytest.fixture(autouse=True)
def presets_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this CPU the two presets cut bits, forwards and backwards."""
    for name in ("bfloat16_3x", "tf32"):
        product = products.with_gradients(jax_product(name))
        monkeypatch.setitem(products.PRODUCTS, name, product)


def config_of(**options: Any) -> Config:
    """A config whose second moments are squares of the step's gradients."""
    penalty, _ = PENALTIES["l0"]
    return make_config(
        width=F,
        bandwidth=BANDWIDTH,
        threshold_init=0.03,
        sparsity=copy.deepcopy(penalty) | {"warmup_steps": 0},
        batch_size=B,
        adam={"beta2": 0.0, "epsilon": 1e-30},
        learning_rate={"peak": 1e-3, "warmup_steps": 0},
        **options,
    )


WAYS: dict[str, dict[str, Any]] = {
    "dense": {"step": "dense"},
    "clipped": {"step": "dense", "gradient_clip": 1e6},
    "sparse": {"step": "sparse", "sparse_capacity": F},
    "too many pairs": {"step": "sparse", "sparse_capacity": 1},
    "kernels": {"step": "sparse", "sparse_capacity": F, "kernels": "pallas"},
    "autodiff": {},
}


def one_step(way: str, state: TrainState, rows: np.ndarray, *, precision: Precision) -> StepResult:
    config = config_of(**WAYS[way])
    mesh = make_mesh(config.mesh)
    with without_gpu("interpret"):
        if way == "autodiff":
            step: Any = AutodiffStep(config, precision=precision)
        elif config.train.step == "sparse":
            step = SparseStep(config, mesh, precision=precision)
        else:
            step = DenseStep(config, mesh, precision=precision)
        x_BD = jnp.asarray(rows) / SCALE
        scalars = scheduled(config.train, step=0)
        return jax.jit(lambda *given: step(*given, target_BD=given[1], scalars=scalars))(
            state, x_BD
        )


@pytest.mark.parametrize(
    ("way", "precision"),
    [(way, one) for way in ("dense", "autodiff", "too many pairs") for one in PRECISIONS]
    + [(way, one) for way in ("clipped", "sparse", "kernels") for one in ("float32", "bfloat16")],
)
def test_a_step_is_that_of_rounded_operands(way: str, precision: Precision):
    state = biased_state(config_of(), d_model=D)
    params = {name: np.asarray(value, np.float64) for name, value in state.params.items()}
    params["threshold"] = np.exp(params["threshold"])
    rng = np.random.default_rng(0)

    def draw() -> np.ndarray:
        return (SCALE * (rng.standard_normal((B, D)) / np.sqrt(D) + 0.1)).astype(np.float32)

    product = numpy_product(precision)
    rows = off_edges(draw, params, scale=SCALE, bandwidth=BANDWIDTH, product=product)
    metrics, gradients = reference.loss_and_gradients(
        params,
        (rows / np.float32(SCALE)).astype(np.float64),
        bandwidth=BANDWIDTH,
        sparsity=copy.deepcopy(PENALTIES["l0"][1]),
        product=product,
    )
    found = one_step(way, state, rows, precision=precision)
    assert bool(found.is_sparse) == (way in ("sparse", "kernels"))
    np.testing.assert_allclose(found.loss, metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(found.l0_B.mean(), metrics["l0"], rtol=1e-6)
    gradients["threshold"] = gradients["threshold"] * params["threshold"]
    W_dec, g_dec = params["W_dec"], gradients["W_dec"]
    gradients["W_dec"] = g_dec - (g_dec * W_dec).sum(axis=1, keepdims=True) * W_dec
    for name, expected in gradients.items():
        size, largest = np.sqrt(np.asarray(found.second_moment[name])), np.abs(expected).max()
        np.testing.assert_allclose(
            size / largest, np.abs(expected) / largest, rtol=0, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize(
    ("step", "mesh"), [("dense", (2, 2)), ("dense", (1, 4)), ("sparse", (2, 2))]
)
def test_bfloat16_is_one_maths_on_many_meshes(step: str, mesh: tuple[int, int]):
    """The same mesh twice to the bit; meshes agree but where a sum's last bit turns a rounding."""
    common = config_of_run(step=step)
    single, losses = run_on_mesh(make_config(**common), 6)
    meshed, meshed_losses = run_on_mesh(make_config(**common, mesh=mesh), 6)
    np.testing.assert_allclose(meshed_losses, losses, rtol=1e-5)
    again, again_losses = run_on_mesh(make_config(**common, mesh=mesh), 6)
    assert again_losses == meshed_losses
    jax.tree.map(np.testing.assert_array_equal, again, meshed)
    exact, _ = run_on_mesh(make_config(**common | {"precision": "float32"}), 6)
    by_mesh, by_precision = (
        np.abs(other.params["W_enc"] - single.params["W_enc"]).mean() for other in (meshed, exact)
    )
    assert by_mesh < by_precision / 10


def config_of_run(**options: Any) -> dict[str, Any]:
    return {
        "width": 128,
        "bandwidth": 0.05,
        "threshold_init": 0.02,
        "batch_size": 64,
        "tokens": 64 * 20,
        "sparsity": {"coefficient": 0.01, "warmup_steps": 5},
        "learning_rate": {"peak": 1e-3, "warmup_steps": 5},
        "precision": "bfloat16",
        **options,
    }


@pytest.mark.parametrize("precision", ["bfloat16_3x", "tf32"])
def test_a_step_is_refused_what_the_devices_lack(precision: Precision):
    config = make_config(precision=precision)
    found = rf"train.precision is {precision}, .* cpu .* float32, bfloat16: set train.precision"
    with pytest.raises(UserError, match=found):
        make_train_step(config, input_scale=1.0, mesh=make_mesh(config.mesh))


def test_auto_is_float32_on_a_cpu():
    state, losses = run_on_mesh(make_config(**config_of_run(precision="auto")), 3)
    again, same = run_on_mesh(make_config(**config_of_run(precision="float32")), 3)
    assert losses == same
    jax.tree.map(np.testing.assert_array_equal, state, again)

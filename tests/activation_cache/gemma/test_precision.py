"""A float32 model whose products round their operands: which they are, and what a config asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache.config import ModelConfig
from activation_cache.gemma.forward import Gemma
from activation_cache.language_model.model import load_model
from activation_cache.runtime.errors import UserError
from tests.support.oracles.rounded_products import dots
from tests.support.tiny_gemma import write_tiny_gemma

TOKENS = np.array([[2, *range(300, 311)], [2, *range(320, 331)]], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma(tmp_path_factory.mktemp("gemma"))


def config_of(folder: Path, **options: Any) -> ModelConfig:
    return ModelConfig.model_validate({"weights": str(folder), "dtype": "float32"} | options)


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("float32", ("float32",) * 3), ("bfloat16", ("bfloat16", "bfloat16", "float32"))],
)
def test_all_products_of_a_forward_and_of_its_gradient(
    folder: Path, precision: Any, kind: tuple[str, ...]
) -> None:
    model = load_model(config_of(folder))
    gemma = Gemma(model.config, model.mesh, recompute=True, precision=precision)

    def total(params: Any) -> jax.Array:
        output: Any = gemma.apply({"params": params}, jnp.asarray(TOKENS))
        return output.logits.sum()

    forwards = dots(jax.make_jaxpr(total)(model.params))
    assert len(forwards) == model.config.num_layers * 9 + 1  # 7 weights, scores, values; logits
    assert {*forwards} == {kind}
    both = dots(jax.make_jaxpr(jax.grad(total))(model.params))
    assert len(both) >= 3 * len(forwards)
    assert {*both} == {kind}


def test_a_config_s_precision_is_the_model_s(folder: Path) -> None:
    plain, rounded = (
        load_model(config_of(folder, precision=precision)) for precision in ("auto", "bfloat16")
    )
    assert (plain.precision, rounded.precision) == ("float32", "bfloat16")
    ours, exact = (np.asarray(model.losses(TOKENS)) for model in (rounded, plain))
    assert ours.dtype == np.float32
    assert 1e-5 < np.abs(ours - exact).max() / np.abs(exact).max() < 0.05


def test_products_that_the_devices_lack_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model.precision is tf32, .* cpu .*: set model.precision"):
        load_model(config_of(folder, precision="tf32"))
    # A model in bfloat16 makes no product of float32.
    model = load_model(config_of(folder, precision="tf32", dtype="bfloat16"))
    assert model.precision == "float32"

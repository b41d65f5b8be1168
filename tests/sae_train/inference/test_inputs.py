"""What an SAE may be given: any dtype of any library, NaN and infinity. The oracle is sae-lens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from activation_cache.runtime.errors import UserError
from sae_train.inference.fold import fold
from sae_train.inference.read_formats import load_sae
from sae_train.inference.sae import Sae
from sae_train.inference.write_formats import write_gemma_scope, write_sae_lens
from tests.support.oracles.rounded_products import numpy_product
from tests.support.saes import make_sae, make_trained_as

D, F, K = 10, 24, 5
ARCHITECTURES = ("jumprelu", "relu", "gated", "topk", "batch_topk")


def released(architecture: str) -> Sae:
    if architecture == "jumprelu":
        return make_sae(D=D, F=F)
    return fold(make_trained_as(architecture, k=K))


def not_finite() -> np.ndarray:
    """Rows with NaN everywhere, NaN in one place, one infinity of each sign, and two of them."""
    x = 3 * np.random.default_rng(0).standard_normal((7, D)).astype(np.float32)
    x[1], x[2, 3], x[3, 0], x[4, 1], x[5, 2:4] = np.nan, np.nan, np.inf, -np.inf, np.inf
    x[6, 0:2] = np.inf, -np.inf
    return x


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nan_and_infinity_are_what_they_are_in_sae_lens(
    sae_lens: Any, tmp_path: Path, architecture: str
):
    sae = released(architecture)
    write_sae_lens(sae, tmp_path)
    theirs, x = sae_lens.SAE.load_from_disk(tmp_path), not_finite()
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(x))
        output = theirs.decode(latents).numpy()
    ours, latents = np.asarray(sae.encode(x)), latents.to_dense().numpy()
    assert np.isnan(latents[1:3]).any(axis=1).all()
    for kind in (np.isnan, np.isinf):
        assert np.array_equal(kind(ours).sum(axis=1), kind(latents).sum(axis=1)), kind
    if architecture == "topk":  # which of equals are kept is nobody's promise
        assert np.array_equal(np.isfinite(sae(x)).all(axis=1), np.isfinite(output).all(axis=1))
    else:
        np.testing.assert_allclose(ours, latents, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(sae(x), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_nan_stays_nan(architecture: str):
    sae = released(architecture)
    x = not_finite()[:2]
    assert np.isnan(np.asarray(sae.encode(x))[1]).any()
    out = np.asarray(sae(x))
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_topk_keeps_k_of_equals_in_every_dtype(dtype: Any):
    eye, zero = np.eye(D, dtype=np.float32), np.zeros(D, np.float32)
    sae = Sae(eye, eye, zero, zero, zero, k=3, architecture="topk").cast(dtype)
    x = np.ones((2, D), np.float32)
    x[1, 4] = 2
    latents = np.asarray(sae.encode(x), np.float32)
    assert np.array_equal((latents > 0).sum(axis=1), [3, 3])
    assert latents[1, 4] == 2


TENSORS = {
    "float32": lambda x: torch.from_numpy(x),
    "with a gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "a parameter": lambda x: torch.nn.Parameter(torch.from_numpy(x)),
    "bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
    "float16": lambda x: torch.from_numpy(x).half(),
    "float64": lambda x: torch.from_numpy(x).double(),
    "int": lambda x: torch.from_numpy(x).int(),
    "sparse": lambda x: torch.from_numpy(x).to_sparse(),
    "not contiguous": lambda x: torch.from_numpy(np.repeat(x, 2, axis=-1))[..., ::2],
    "numpy float64": lambda x: x.astype(np.float64),
    "numpy int": lambda x: x.astype(int),
    "jax bfloat16": lambda x: jnp.asarray(x, jnp.bfloat16),
    "a list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_every_library_and_dtype(kind: str):
    sae = make_sae(D=D, F=F)
    # Whole numbers, so that every dtype holds them exactly.
    x = np.random.default_rng(1).integers(-4, 5, (3, 2, D)).astype(np.float32)
    expected = np.asarray(sae.encode(x))
    given = TENSORS[kind](x)
    np.testing.assert_array_equal(sae.encode(given), expected)
    np.testing.assert_array_equal(sae(given), sae(x))
    latents = np.round(expected)
    np.testing.assert_array_equal(sae.decode(TENSORS[kind](latents)), sae.decode(latents))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.ones((4, 9)), r"activations must end in a dim of 10, and their shape is \[4, 9\]$"),
        (np.float32(1), r"their shape is \[\]"),
        (np.ones((4, 2, 5)), r"\[4, 2, 5\]. If the last two are heads, join them: x.reshape"),
        (np.ones((4, 10), complex), "must be real numbers; they are complex128"),
        (torch.ones(4, 10, dtype=torch.complex64), "must be real numbers; they are complex64"),
        (np.full((4, 10), "x"), "must be real numbers; they are <U1"),
    ],
    ids=["width", "scalar", "heads", "complex", "torch complex", "text"],
)
def test_what_is_no_activation_is_told_in_words(given: Any, words: str):
    with pytest.raises(UserError, match=words):
        make_sae(D=D, F=F).encode(given)
    with pytest.raises(UserError, match="latents must end in a dim of 24"):
        make_sae(D=D, F=F).decode(np.ones((4, 10)))


def test_products_are_at_the_precision_that_is_asked_for(tmp_path: Path):
    """In float32 unless told: latents that a bfloat16 encoder would move are where they were."""
    write_gemma_scope(make_sae(D=40, F=56), tmp_path)
    x = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    plain, rounded = load_sae(tmp_path), load_sae(tmp_path, precision="bfloat16")
    assert plain.precision == load_sae(tmp_path, precision="auto").precision == "float32"
    for sae in (plain, rounded):
        product = numpy_product(sae.precision)
        pre = product(x, sae.W_enc) + sae.b_enc
        latents = np.where(pre > sae.threshold, np.maximum(pre, 0), 0)
        found = jax.jit(lambda sae, x: sae.encode(x))(sae, x)
        np.testing.assert_allclose(found, latents, atol=1e-5 * np.abs(latents).max())
        expected = product(np.asarray(found), sae.W_dec) + sae.b_dec
        np.testing.assert_allclose(sae.decode(found), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(plain.encode(x) - rounded.encode(x)).max() > 1e-3
    assert rounded.fingerprint == plain.fingerprint
    with pytest.raises(UserError, match=r"precision is tf32, .* cpu .* float32, bfloat16"):
        load_sae(tmp_path, precision="tf32")

"""What XLA allocates for a sparse step: nothing that grows as the weights do, nothing [B, F].

Compiled for shapes far too large for this machine; nothing is allocated.
"""

from __future__ import annotations

from typing import Any

import pytest

from sae_train.config.run import MeshConfig
from sae_train.plan.memory import Shape
from tests.support.plan_shapes import compile_step

pytestmark = pytest.mark.slow

B, D = 4096, 640


def found_bytes(width: int, *, data: int = 1, model: int = 1, **options: Any) -> tuple[int, int]:
    """(weights, second moments and batch, temporaries) of one device."""
    shape = Shape(B, D, width, MeshConfig(data=data, model=model))
    found = compile_step(shape, step="sparse", **options).memory_analysis()
    assert found is not None
    state = found.argument_size_in_bytes - B // data * D * 4
    # All that the step leaves but the metrics lies where the old state was.
    assert found.alias_size_in_bytes == pytest.approx(state, abs=64)
    return found.argument_size_in_bytes, found.temp_size_in_bytes


@pytest.mark.parametrize(("data", "model", "clip"), [(1, 1, None), (1, 1, 1.0), (2, 4, None)])
def test_temporaries_hold_no_copy_of_the_weights(data: int, model: int, clip: float | None):
    options: dict[str, Any] = {"data": data, "model": model, "gradient_clip": clip}
    before, after = (found_bytes(width, **options)[1] for width in (65_536, 262_144))
    matrix_bytes = (262_144 - 65_536) // model * D * 4
    assert after - before < 0.05 * matrix_bytes  # vectors of a number per latent grow too


def test_a_million_latents_take_little_more_than_their_state_and_the_batch():
    held, temporary = found_bytes(1_048_576)
    assert held == pytest.approx(4 * 1_048_576 * D * 4, rel=0.01)
    assert held + temporary < 1.05 * held

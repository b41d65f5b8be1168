"""Which steps may take the sparse path when the config leaves it open, and its capacity."""

from __future__ import annotations

import pytest

from sae_train.step.path_choice import capacity_per_row, may_be_sparse
from tests.support.configs import make_config


@pytest.mark.parametrize(
    ("width", "capacity"), [(16, 1), (4096, 128), (16_384, 512), (2**20, 2048)]
)
def test_capacity_is_a_32nd_of_the_width(width: int, capacity: int):
    """Where both paths take as long as each other, by measurement."""
    assert capacity_per_row(make_config(width=width)) == capacity


@pytest.mark.parametrize(
    ("width", "step", "on_cpu", "sparse"),
    [
        (4095, "auto", True, False),
        (4096, "auto", True, True),
        (4096, "auto", False, False),
        (4096, "dense", True, False),
        (16, "sparse", False, True),
    ],
)
def test_wide_steps_on_cpus_may_be_sparse(width: int, step: str, on_cpu: bool, sparse: bool):
    assert may_be_sparse(make_config(width=width, step=step), on_cpu=on_cpu) is sparse

"""Which steps may go by pairs when the config leaves it open, and for how many there are places."""

from __future__ import annotations

import pytest

from sae_train.step.path_choice import capacity_per_row, may_go_by_pairs
from tests.support.configs import make_config


@pytest.mark.parametrize(("width", "places"), [(16, 1), (4096, 128), (16_384, 512), (2**20, 2048)])
def test_a_32nd_of_the_latents_has_places(width: int, places: int):
    """Where a step by pairs takes as long as one by products, by measurement."""
    assert capacity_per_row(make_config(width=width)) == places


@pytest.mark.parametrize(
    ("width", "step", "on_cpu", "by_pairs"),
    [
        (4095, "auto", True, False),
        (4096, "auto", True, True),
        (4096, "auto", False, False),
        (4096, "dense", True, False),
        (16, "sparse", False, True),
    ],
)
def test_wide_steps_on_cpus_may_go_by_pairs(width: int, step: str, on_cpu: bool, by_pairs: bool):
    assert may_go_by_pairs(make_config(width=width, step=step), on_cpu=on_cpu) is by_pairs

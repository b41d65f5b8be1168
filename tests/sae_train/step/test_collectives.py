"""What the compiled step sends between devices, read from its HLO."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest

from sae_train.model.sharding import BATCH_DIMS, make_mesh, sharding
from sae_train.step.schedule import scheduled
from sae_train.step.state import abstract_state
from sae_train.train.train_step import make_train_step
from tests.support.configs import make_config

pytestmark = pytest.mark.slow

BATCH, D_MODEL, WIDTH = 512, 64, 1024
L0 = {"coefficient": 0.01}
COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|collective-permute|"
    r"all-to-all)(-start)?\("
)
SHAPE = re.compile(r"[a-z]+[0-9]*\[([0-9,]*)\]")


def program(mesh: tuple[int, int], sparsity: dict, *, width: int = WIDTH) -> str:
    """The compiled dense step, as HLO."""
    config = make_config(
        width=width, batch_size=BATCH, tokens=BATCH, mesh=mesh, sparsity=sparsity, step="dense"
    )
    devices = make_mesh(config.mesh)
    step = make_train_step(config, input_scale=1.0, mesh=devices)
    state = abstract_state(config.sae, d_model=D_MODEL, mesh=devices)
    rows = jax.ShapeDtypeStruct(
        (BATCH, D_MODEL), jnp.float32, sharding=sharding(devices, BATCH_DIMS)
    )
    return step.lower(state, rows, scheduled(config.train, step=0)).compile().as_text()


def collectives(mesh: tuple[int, int], sparsity: dict) -> list[tuple[str, int]]:
    """(kind, elements) of every tensor a collective of the compiled step carries."""
    return carried(program(mesh, sparsity))


def carried(text: str) -> list[tuple[str, int]]:
    """(kind, elements) of every tensor that a collective carries in lines of HLO."""
    found = []
    for match in COLLECTIVE.finditer(text):
        for dims in SHAPE.findall(match["type"]):
            found.append((match["kind"], math.prod(int(d) for d in dims.split(",") if d)))
    return found


@pytest.mark.parametrize(
    "sparsity",
    [
        {"coefficient": 0.01},
        {"penalty": "target_l0", "target": 5.0, "form": "batch_mean"},
        {"penalty": "target_l0", "target": 5.0, "form": "per_token"},
        {"penalty": "match_l0", "target": 5.0},
    ],
    ids=["l0", "batch_mean", "per_token", "match_l0"],
)
def test_a_model_mesh_sends_one_partial_reconstruction(sparsity: dict):
    found = collectives((1, 8), sparsity)
    assert {kind for kind, _ in found} == {"all-reduce"}
    sizes = sorted((size for _, size in found), reverse=True)
    # The reconstruction [B, D]; then L0 per row [B], b_dec's gradient [D] and scalars.
    assert sizes[0] == BATCH * D_MODEL
    assert sum(sizes[1:]) <= BATCH + D_MODEL + 16


def test_a_data_mesh_sends_the_gradients_once():
    found = collectives((8, 1), {"coefficient": 0.01})
    assert {kind for kind, _ in found} == {"all-reduce"}
    weights = [size for _, size in found if size >= WIDTH * D_MODEL]
    assert weights == [WIDTH * D_MODEL] * 2


def test_tiles_of_latents_send_nothing_more():
    looped = "while/body"
    split = program((1, 8), L0, width=8 * 2048)
    assert looped in split
    assert not carried("\n".join(line for line in split.splitlines() if looped in line))
    assert sorted(carried(split)) == sorted(collectives((1, 8), L0))
    # Each tile's gradients of both matrices, b_enc and θ; all else once.
    tiled = program((8, 1), L0, width=4096)
    each = carried("\n".join(line for line in tiled.splitlines() if looped in line))
    assert sorted(size for _, size in each) == [1024, 1024, 1024 * D_MODEL, 1024 * D_MODEL]


def test_pricing_frequencies_sends_nothing_more():
    plain = collectives((8, 1), L0)
    priced = collectives((8, 1), {"coefficient": 0.01, "frequency": {"scale": 0.1}})
    # Those of b_enc and θ, and which latents fired.
    assert sorted(priced) == sorted(plain)
    assert plain.count(("all-reduce", WIDTH)) == 3
    split = collectives((1, 8), {"coefficient": 0.01, "frequency": {"scale": 0.1}})
    assert max(size for _, size in split) == BATCH * D_MODEL
    assert sum(size for _, size in split) <= BATCH * D_MODEL + BATCH + D_MODEL + 16

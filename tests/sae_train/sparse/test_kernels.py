"""The Pallas kernels: interpreted beside pure JAX, whole steps of them, and lowered for a GPU.

What an interpreter runs is the kernels' arithmetic; that they are in Triton's language too is seen
by lowering them. Nothing here runs on a GPU.

Legend: B rows, D model width, F latents, P places for pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from activation_cache.precision import Precision
from activation_cache.runtime.errors import UserError
from sae_train.model.sharding import make_mesh
from sae_train.sparse import active_pairs, latent_updates, segment_sums
from sae_train.sparse.kernels import decode, select
from sae_train.sparse.kernels import update as update_module
from sae_train.sparse.kernels.mode import without_gpu
from sae_train.step.gradients import LatentSums, OutputGradients, Rows
from sae_train.step.optimiser import unit_rows
from sae_train.step.schedule import Scheduled, scheduled
from sae_train.step.state import init_state
from sae_train.train.train_step import make_train_step
from tests.sae_train.sparse.test_sparse_step import COMMON, B, D, F, assert_same_training, run
from tests.support.configs import make_config

pytestmark = pytest.mark.slow

BANDWIDTH = 0.5


@pytest.fixture
def interpreted() -> Iterator[None]:
    with without_gpu("interpret"):
        yield


class Touched:
    """Arguments of both `touched_pass`es at one width of the model."""

    def __init__(
        self,
        d_model: int,
        *,
        num_rows: int = 31,
        width: int = 48,
        groups: int = 1,
        precision: Precision = "float32",
    ) -> None:
        self.precision: Precision = precision
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        self.config = make_config(width=width, bandwidth=BANDWIDTH)
        self.rows: Rows = (
            {"W_enc": normal(width, d_model), "W_dec": unit_rows(normal(width, d_model))},
            {name: jnp.abs(normal(width, d_model)) for name in ("W_enc", "W_dec")},
        )
        x_BD = normal(num_rows, d_model)
        theta_F = 1.5 * d_model**0.5 * jnp.abs(normal(width)) + 0.3 * d_model**0.5
        theta_F = theta_F.at[: width // 4].set(1e6)
        self.output = OutputGradients(
            x_BD=x_BD,
            g_BD=normal(groups * num_rows, d_model),
            g_l0_B=normal(num_rows),
            g_count_F=normal(width),
            theta_F=theta_F,
            bias_F=normal(width),
        )
        self.first_g_F: jax.Array | None = None
        if groups > 1:
            self.first_g_F = jnp.arange(width, dtype=jnp.int32) % groups * num_rows
        self.pairs = jax.jit(
            partial(
                active_pairs.select_pairs,
                bandwidth=BANDWIDTH,
                capacity=num_rows * width,
                precision=precision,
            )
        )(self.rows[0]["W_enc"], self.output.bias_F, theta_F, x_BD)
        scalars = Scheduled(
            learning_rate=jnp.float32(1e-2),
            sparsity_coefficient=jnp.float32(0.0),
            sparsity_warmup=jnp.float32(0.0),
            bias_correction=jnp.float32(0.3),
            momentum_correction=jnp.float32(1.0),
        )
        self.update = scalars, jnp.linspace(0.5, 1.0, width, dtype=jnp.float32)

    def by_xla(
        self, rows: Rows, found: active_pairs.Pairs, *, writes: bool
    ) -> tuple[Rows, LatentSums]:
        return latent_updates.touched_pass(*self._operands(rows, found), **self._options(writes))

    def by_kernel(
        self, rows: Rows, found: active_pairs.Pairs, *, writes: bool = True
    ) -> tuple[Rows, LatentSums]:
        return update_module.touched_pass(*self._operands(rows, found), **self._options(writes))

    def _options(self, writes: bool) -> dict[str, Any]:
        update = self.update if writes else None
        return {
            "output": self.output,
            "first_g_F": self.first_g_F,
            "update": update,
            "config": self.config,
            "precision": self.precision,
        }

    @staticmethod
    def _operands(rows: Rows, found: active_pairs.Pairs) -> Any:
        return rows, segment_sums.longest_first(found.counts_F), found.row_P, found.pre_P


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("d_model", "programs", "writes", "groups"),
    # Of 300 the last piece ends behind the row.
    [(8, 1024, True, 1), (300, 7, True, 3), (300, 7, False, 1)],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_touched_latents_are_updated_as_by_xla(
    d_model: int,
    programs: int,
    writes: bool,
    groups: int,
    precision: Precision,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(update_module, "PROGRAMS", programs)
    case = Touched(d_model, groups=groups, precision=precision)
    assert 12 <= int((case.pairs.counts_F == 0).sum()) < 40
    found, expected = (
        jax.jit(partial(function, writes=writes))(case.rows, case.pairs)
        for function in (case.by_kernel, case.by_xla)
    )
    for name, part in vars(expected[1]).items():
        if name == "projected" and writes:  # of use for the norm alone
            continue
        assert_near(getattr(found[1], name), part, name)
    jax.tree.map(assert_near, found[0], expected[0])
    moved = np.asarray(found[0][0]["W_dec"]) != np.asarray(case.rows[0]["W_dec"])
    moved = moved.any(axis=1)
    assert moved.sum() == writes * int((case.pairs.counts_F > 0).sum())


def assert_near(ours: jax.Array, theirs: jax.Array, name: str = "") -> None:
    largest = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, atol=2e-6 * largest, rtol=0, err_msg=name)


def test_pairs_from_the_pool_are_the_same_in_whichever_order_they_got_there():
    rng = np.random.default_rng(0)
    wanted_BF = rng.random((300, 40)) < 0.1
    latent, row = np.nonzero(wanted_BF.T)
    blocks = np.arange(300) // select.ROWS
    counts_RF = np.stack([wanted_BF[blocks == block].sum(axis=0) for block in range(3)])
    within = [np.cumsum(wanted_BF[blocks == block], axis=0) - 1 for block in range(3)]
    rank, pre = np.concatenate(within)[row, latent], rng.standard_normal(len(row))
    order = rng.permutation(len(row))
    pool = [np.resize(array[order], 2000).astype(np.int32) for array in (row, latent, rank)]
    found = select._by_latent(
        jnp.asarray(counts_RF, jnp.int32),
        jnp.asarray(pool[0]),
        jnp.asarray(pool[1]),
        jnp.asarray(np.resize(pre[order], 2000), jnp.float32),
        jnp.asarray(pool[2]),
    )
    for name, expected, behind in (("row_P", row, 0), ("latent_P", latent, 40), ("pre_P", pre, 0)):
        expected = np.append(expected, np.full(2000 - len(row), behind)).astype(np.float32)
        np.testing.assert_array_equal(getattr(found, name), expected)


@pytest.mark.usefixtures("interpreted", "optimised_programs")
def test_programs_in_the_opposite_order_leave_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(update_module, "PROGRAMS", 7)
    case = Touched(8, num_rows=150, width=96)  # two by two tiles
    num_places = case.pairs.pre_P.shape[0]

    def parts() -> Any:
        found = select.select_pairs(
            case.rows[0]["W_enc"],
            case.output.bias_F,
            case.output.theta_F,
            case.output.x_BD,
            bandwidth=BANDWIDTH,
            capacity=num_places,
            precision="float32",
        )
        decoded = decode.decode_pairs(
            found, found.pre_P, case.rows[0]["W_dec"], num_rows=150, precision="float32"
        )
        return found, decoded, case.by_kernel(case.rows, found)

    forth, own = jax.jit(parts)(), pl.program_id
    monkeypatch.setattr(pl, "program_id", lambda axis: pl.num_programs(axis) - 1 - own(axis))
    back = jax.jit(lambda: parts())()
    assert float(forth[0].total) > 500
    jax.tree.map(np.testing.assert_array_equal, back, forth)


@pytest.mark.usefixtures("interpreted")
def test_of_too_many_pairs_none_is_decoded():
    """Nor is a row of W_dec read behind the last, which an interpreter takes the last one for."""
    empty = active_pairs.Pairs(
        row_P=jnp.zeros(24, jnp.int32),
        latent_P=jnp.full(24, 16, jnp.int32),
        pre_P=jnp.zeros(24),
        counts_F=jnp.full(16, 2, jnp.int32),
        total=jnp.float32(32),
    )
    W_dec = jnp.full((16, 8), jnp.nan, jnp.float32)
    decoded, nonzero = jax.jit(partial(decode.decode_pairs, num_rows=4, precision="float32"))(
        empty, jnp.zeros(24), W_dec
    )
    np.testing.assert_array_equal(decoded, np.zeros((4, 8)))
    np.testing.assert_array_equal(nonzero, np.zeros(4))


@pytest.mark.parametrize("d_model", [1, 63, 128, 129, 640, 2304, 2305, 3584, 4608])
def test_pieces_cover_a_row_once(d_model: int):
    pieces = update_module.pieces_of(d_model)
    ends = [first + size for first, size in pieces]
    assert [first for first, _ in pieces] == [0, *ends[:-1]]
    assert ends[-2:-1] < [d_model] <= ends[-1:]
    assert all(size & (size - 1) == 0 for _, size in pieces)
    assert ends[-1] < d_model + 64


OPTIONS: dict[str, Any] = COMMON | {"step": "sparse", "gradient_clip": 0.05}


@pytest.mark.parametrize(
    ("num", "capacity", "mesh"), [(8, F, (1, 1)), (4, F, (2, 2)), (3, 40, (1, 1))]
)
def test_steps_of_kernels_are_those_by_products(num: int, capacity: int, mesh: tuple[int, int]):
    """Of places for 40 pairs a row there are too few: steps fall back."""
    dense, dense_metrics = run(make_config(**OPTIONS | {"step": "dense"}), num)
    config = make_config(**OPTIONS, sparse_capacity=capacity, kernels="pallas", mesh=mesh)
    with without_gpu("interpret"):
        found, metrics = run(config, num)
    assert_same_training(found, dense)
    for ours, theirs in zip(metrics, dense_metrics, strict=True):
        for name in ("loss", "mse", "fvu", "l0", "gradient_norm"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5)
    assert int(found.overflows) == (num if capacity == 40 else 0)
    assert int(found.sparse) == (capacity == F)


def test_kernels_are_refused_where_there_is_no_gpu():
    config = make_config(**OPTIONS, kernels="pallas")
    with pytest.raises(UserError, match=r"train.kernels.*devices here are of cpu.*to xla"):
        make_train_step(config, input_scale=1.0, mesh=make_mesh(config.mesh))


@pytest.mark.parametrize(("architecture", "step"), [("jumprelu", "auto"), ("relu", "dense")])
def test_kernels_are_refused_for_what_they_are_not_for(architecture: str, step: str):
    options = OPTIONS | {"step": step}
    if architecture == "relu":
        options |= {"sae": {"architecture": "relu"}, "sparsity": {"penalty": "l1"}}
    make_config(**options)
    found = rf"is for the sparse step, .*{architecture} and train.step {step}: set"
    with pytest.raises(ValueError, match=found):
        make_config(**options, kernels="pallas")


def lowered(function: Any, *arguments: Any) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize("width", [16_384, 1_048_576])
@pytest.mark.parametrize(
    ("d_model", "precision"),
    [
        (640, "float32"),
        (2304, "bfloat16"),
        (2304, "tf32"),
        (3584, "bfloat16_3x"),
        (4608, "float32"),
    ],
)
def test_kernels_lower_for_cuda(d_model: int, precision: Precision, width: int):
    """At the sizes of Gemma's layers; of a million latents no index fits into 32 bits."""
    rows, places = 4096, 4096 * 64
    matrix, per_latent, batch = shape(width, d_model), shape(width), shape(rows, d_model)
    whole = partial(shape, dtype=jnp.int32)
    pairs_ = active_pairs.Pairs(whole(places), whole(places), shape(places), whole(width), shape())
    options: dict[str, Any] = {"bandwidth": 1e-3, "capacity": places, "precision": precision}
    select_ = partial(select.select_pairs, **options)
    decode_ = partial(decode.decode_pairs, num_rows=rows, precision=precision)
    output = OutputGradients(batch, batch, shape(rows), per_latent, per_latent, per_latent)
    update = Scheduled(*(shape(),) * 5), per_latent
    both: Any = ({"W_enc": matrix, "W_dec": matrix},) * 2
    config = make_config(width=width)

    def touched_(rows: Rows, pairs_: active_pairs.Pairs, output: Any, update: Any) -> Any:
        return update_module.touched_pass(
            *Touched._operands(rows, pairs_),
            output=output,
            update=update,
            config=config,
            precision=precision,
        )

    for text in (
        lowered(select_, matrix, per_latent, per_latent, batch),
        lowered(decode_, pairs_, shape(places), matrix),
        lowered(touched_, both, pairs_, output, update),
        lowered(partial(touched_, update=None), both, pairs_, output),
    ):
        assert text.count("__gpu$xla.gpu.triton") == 1


def test_a_whole_step_lowers_for_cuda_with_its_types_checked():
    config = make_config(**OPTIONS, kernels="pallas", mesh=(2, 4))
    mesh = make_mesh(config.mesh)
    with without_gpu("lower"):
        step: Any = make_train_step(config, input_scale=1.0, mesh=mesh)
        state = init_state(config.sae, d_model=D, seed=0, mesh=mesh)
        traced = step.trace(state, np.zeros((B, D), np.float32), scheduled(config.train, step=0))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 4  # two passes over touched latents: one clips

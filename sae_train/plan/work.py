"""How much there is to store, compute, read and send: the arithmetic of `sae plan`.

Pure functions of a config and a model's shape; nothing is opened or allocated. FLOPs count a
multiply-add as two and leave out everything that is not a matrix product.

Legend: B rows of a batch, D width of a tap, F latents, S sequence length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from activation_cache.config import CacheConfig, Dtype, TextConfig
from activation_cache.gemma.config import GemmaConfig
from activation_cache.gemma.params import parameter_table
from activation_cache.gemma.taps import Tap, resolve_taps, tap_width
from activation_cache.precision import Precision
from activation_cache.storage.arrays import ArrayLayout, bucket_rows
from activation_cache.store.manifest import window_buckets
from activation_cache.store.store import PROVENANCE
from activation_cache.store.tap_array import array_layout, host_dtype, stored_row_bytes
from activation_cache.store.writer import BUCKETS_IN_MEMORY
from activation_cache.text.token_table import count_layout, token_layout
from sae_train.plan.accelerators import ChipKind
from sae_train.plan.memory import FLOAT_BYTES, Shape


@dataclass(frozen=True)
class Moved:
    """Bytes that a dense step moves over its large arrays, all of a shape taken together."""

    matrix: float  # for each element of one array [F, D]
    latents: float  # for each element of one array [B, F]


# Read off the compilers' programs by `benchmarks.compilers` (docs/performance.md), at D = 2304: an
# H100's, and a v6e's, which makes several passes of one while parts of an array are on the chip.
_GPU, _TPU = Moved(matrix=84, latents=46), Moved(matrix=64, latents=29)
MOVED: Mapping[tuple[ChipKind, Precision], Moved] = {
    ("gpu", "float32"): _GPU,
    ("gpu", "bfloat16_3x"): _GPU,
    ("gpu", "tf32"): _GPU,
    ("gpu", "bfloat16"): Moved(matrix=90, latents=32),
    ("tpu", "float32"): _TPU,
    ("tpu", "bfloat16_3x"): _TPU,
    ("tpu", "bfloat16"): Moved(matrix=64, latents=16),
}


@dataclass(frozen=True)
class StorePlan:
    """The activation store: bytes on disk per tap and in all, checksums and indexes included.

    `token_bytes` is the least the token table takes; text beyond what is harvested adds to it.
    `host_bytes` is the memory that buckets in flight take while harvesting. Of a rolling store the
    sizes are those of the `rows_on_disk`: a window of `window` buckets and one more.
    """

    rows: int
    rows_on_disk: int
    window: int | None
    row_bytes: dict[str, int]
    tap_bytes: dict[str, int]
    provenance_bytes: int
    token_bytes: int
    buckets: int
    host_bytes: int

    @property
    def total_bytes(self) -> int:
        """All arrays; the few kB of JSON are not counted."""
        return sum(self.tap_bytes.values()) + self.provenance_bytes + self.token_bytes


@dataclass(frozen=True)
class HarvestWork:
    """The forward passes: layers run, positions seen, FLOPs, bytes of the weights that run."""

    layers: int
    positions: int
    flops: float
    weight_bytes: int


def store_plan(cache: CacheConfig, text: TextConfig, gemma: GemmaConfig) -> StorePlan:
    """Sizes of the store that a config asks for.

    Raises:
        UserError: a layer the model doesn't have, a site named twice, or too little room for the
            window of a rolling store.
    """
    bucket = bucket_rows(shuffle_rows=cache.shuffle_rows, block_rows=cache.block_rows)
    taps = resolve_taps(cache.sites, gemma)
    row_bytes = {
        tap.name: stored_row_bytes(
            cache.dtype, width=tap_width(gemma, tap.site), block_rows=cache.block_rows
        )
        for tap in taps
    }
    window, rows = None, cache.tokens
    if cache.rolling is not None:
        on_disk = sum(row_bytes.values()) + len(PROVENANCE) * 4
        window = window_buckets(cache.rolling, bucket_bytes=bucket * on_disk)
        rows = min(rows, (window + 1) * bucket)
    layouts = {tap.name: _tap_layout(cache, tap, gemma, bucket=bucket, rows=rows) for tap in taps}
    provenance = ArrayLayout(
        path=Path(), shape=(rows,), dtype="int32", chunk_rows=cache.block_rows, shard_rows=bucket,
    )  # fmt: skip
    sequences = harvested_sequences(cache, text) + text.held_out_sequences
    tokens = token_layout(Path(), sequences, text.sequence_length)
    item = jnp.dtype(host_dtype(cache.dtype)).itemsize
    in_memory = sum(tap_width(gemma, tap.site) * item for tap in taps) + len(PROVENANCE) * 4
    return StorePlan(
        rows=cache.tokens,
        rows_on_disk=rows,
        window=window,
        row_bytes=row_bytes,
        tap_bytes={name: layout.stored_bytes for name, layout in layouts.items()},
        provenance_bytes=len(PROVENANCE) * provenance.stored_bytes,
        token_bytes=tokens.stored_bytes + count_layout(Path(), sequences).stored_bytes,
        buckets=-(-cache.tokens // bucket),
        host_bytes=BUCKETS_IN_MEMORY * min(bucket, cache.tokens) * in_memory,
    )


def _tap_layout(
    cache: CacheConfig, tap: Tap, gemma: GemmaConfig, *, bucket: int, rows: int
) -> ArrayLayout:
    return array_layout(
        Path(tap.name),
        rows=rows,
        width=tap_width(gemma, tap.site),
        dtype=cache.dtype,
        block_rows=cache.block_rows,
        bucket_rows=bucket,
    )


def harvested_sequences(cache: CacheConfig, text: TextConfig) -> int:
    """The fewest sequences that hold `cache.tokens` usable tokens: all but BOS of each."""
    return -(-cache.tokens // (text.sequence_length - 1))


def harvest_work(
    cache: CacheConfig, text: TextConfig, gemma: GemmaConfig, *, dtype: Dtype
) -> HarvestWork:
    """The forward to the deepest tap over every position that is needed."""
    taps = resolve_taps(cache.sites, gemma)
    if taps == (Tap("embedding", 0),):  # read from the weights
        return HarvestWork(layers=0, positions=0, flops=0.0, weight_bytes=0)
    layers = 1 + max(tap.layer for tap in taps)
    length = text.sequence_length
    sequences = harvested_sequences(cache, text)
    per_sequence = sum(
        length * layer_flops(gemma) + attention_flops(gemma, layer=layer, length=length)
        for layer in range(layers)
    )
    elements = sum(
        math.prod(parameter.shape)
        for parameter in parameter_table(gemma)
        if _runs(parameter.path[0], layers)
    )
    return HarvestWork(
        layers=layers,
        positions=sequences * length,
        flops=float(sequences) * per_sequence,
        weight_bytes=elements * jnp.dtype(dtype).itemsize,
    )


def _runs(part: str, layers: int) -> bool:
    name, _, number = part.rpartition("_")
    return part == "embedding" or (name == "layers" and int(number) < layers)


def layer_flops(gemma: GemmaConfig) -> int:
    """FLOPs of one layer's projections for one position: twice their weights."""
    heads = (2 * gemma.num_heads + 2 * gemma.num_kv_heads) * gemma.head_dim
    return 2 * gemma.d_model * (heads + 3 * gemma.d_ff)


def attention_flops(gemma: GemmaConfig, *, layer: int, length: int) -> int:
    """FLOPs of one layer's scores and weighted sums over one sequence, seen keys only."""
    window = length if gemma.global_layers[layer] else min(gemma.window, length)
    # Query q sees min(q + 1, window) keys.
    pairs = window * (window + 1) // 2 + (length - window) * window
    return 4 * gemma.num_heads * gemma.head_dim * pairs


def step_flops(shape: Shape) -> int:
    """FLOPs of one training step on all devices: 10 B D F.

    Five products of B x D x F: encode, decode, and in the backward pass the gradients of W_dec,
    of the latents and of W_enc; the input needs none, and b_dec's path through the encoder is one
    matrix-vector product (docs/numerics.md, "The step"). A transcoder's skip adds its product and
    its gradient's, 4 B D².
    """
    skip = 4 * shape.batch_size * shape.d_model**2 if shape.has_skip else 0
    return 10 * shape.batch_size * shape.d_model * shape.width + skip


def paper_step_flops(shape: Shape) -> int:
    """The same step by Gemma Scope's convention, 6 per parameter and token: 12 B D F."""
    return 12 * shape.batch_size * shape.d_model * shape.width


def step_traffic(shape: Shape, *, kind: ChipKind, precision: Precision) -> int:
    """Bytes that a step moves between one device's memory and its cores."""
    moved = MOVED[kind, precision]
    return round(moved.matrix * shape.local(("F", "D")) + moved.latents * shape.local(("B", "F")))


def collective_bytes(shape: Shape) -> dict[str, int]:
    """Bytes that each device puts into a step's all-reduces, per mesh axis; scalars left out.

    Over `model` the partial reconstruction [B, D], of a Matryoshka SAE one for each group, L0 of
    each row and b_dec's gradient; over
    `data` the gradients of all parameters, and which latents fired (a byte each).
    """
    found = {}
    if shape.mesh.model > 1:
        decoded = max(1, len(shape.groups)) * shape.local(("B", "D"))
        elements = decoded + shape.local(("B",)) + shape.local(("D",))
        found["model"] = elements * FLOAT_BYTES
    if shape.mesh.data > 1:
        found["data"] = shape.params_bytes() + shape.local(("F",))
    return found


def sent_bytes(collectives: dict[str, int], sizes: Sequence[tuple[str, int]]) -> float:
    """Bytes one device sends a step where all-reduces go round a ring: 2 (n - 1) / n of each."""
    return sum(2 * (n - 1) / n * collectives.get(axis, 0) for axis, n in sizes)

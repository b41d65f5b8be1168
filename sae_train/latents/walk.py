"""The walk: the model reads the text once, and each SAE's firings go to disk, shard by shard.

A shard is a fixed number of batches, so that what is computed together doesn't depend on who
computes it. With n processes each takes every n-th shard. A shard whose file exists is done.

Legend: B sequences of a batch, S position, D model width, F latents, C rows of a chunk, P firings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from activation_cache.language_model.model import LanguageModel
from activation_cache.runtime import exchange, processes
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.files import StoragePath
from activation_cache.text.masked import masked_tokens
from sae_train.evaluate.sums import are_finite, in_chunks
from sae_train.inference.sae import Sae
from sae_train.latents import schema
from sae_train.latents.firings import shard_file, write_shard
from sae_train.latents.job import LatentsJob


@dataclass(frozen=True)
class Text:
    """The sequences that are walked, cut into shards of whole batches.

    Attributes:
        tokens: all of them, 4 bytes a token.
        usable: which count: neither BOS, EOS, padding nor masked.
    """

    sequences: range
    tokens: Int[np.ndarray, "N S"]
    usable: Bool[np.ndarray, "N S"]
    per_batch: int
    pad: int

    @classmethod
    def of(cls, one: LatentsJob) -> Text:
        """Read a job's sequences."""
        table = one.job.table
        tokens = table.read(one.sequences)
        usable = table.usable(tokens, one.sequences)
        if not one.of_embedding:
            usable &= ~masked_tokens(tokens, one.job.masked)
        if not usable.any():
            raise UserError(
                f"the {len(tokens)} sequences of {table.path} that are to be walked hold nothing "
                "but special tokens: raise latents.tokens, or name other text in latents.source"
            )
        per_batch = min(one.job.settings.sequences_per_batch, len(tokens))
        return cls(one.sequences, tokens, usable, per_batch, table.summary.special_ids.pad)

    @property
    def length(self) -> int:
        """S, with BOS."""
        return self.tokens.shape[1]

    @property
    def shard_sequences(self) -> int:
        """Sequences of a shard: whole batches, at least one."""
        return self.per_batch * max(1, schema.SHARD_TOKENS // (self.per_batch * self.length))

    @property
    def num_shards(self) -> int:
        """How many shards there are; the last may be shorter."""
        return -(-len(self.tokens) // self.shard_sequences)

    @property
    def first_rows(self) -> list[int]:
        """The first row of each shard: rows count all tokens, sequence by sequence."""
        return [shard * self.shard_sequences * self.length for shard in range(self.num_shards)]

    def batches(self, shard: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """First row in the shard, tokens and usable ones of each batch, filled up with padding."""
        begin = shard * self.shard_sequences
        end = min(begin + self.shard_sequences, len(self.tokens))
        for start in range(begin, end, self.per_batch):
            stop = min(start + self.per_batch, end)
            filling = ((0, self.per_batch - (stop - start)), (0, 0))
            tokens = np.pad(self.tokens[start:stop], filling, constant_values=self.pad)
            yield (start - begin) * self.length, tokens, np.pad(self.usable[start:stop], filling)


def walk(
    group: Sequence[LatentsJob], text: Text, model: Callable[[], LanguageModel], *, stop: Stop
) -> None:
    """This process's share of the shards.

    Args:
        model: loads the model; not called if all shards are there.

    Raises:
        Interrupted: `stop` returned True; finished shards stay.
        UserError: activations that aren't finite, or the disk refuses.
    """
    mine = range(processes.process_index(), text.num_shards, processes.process_count())
    with ProgressMeter("walk", total=text.tokens.size, unit="tokens") as meter:
        for shard in mine:
            waiting = [one for one in group if not shard_file(one.scratch, shard).is_file()]
            if waiting:
                _walk_shard(waiting, text, model(), shard, stop=stop)
            tokens = text.shard_sequences * text.length * processes.process_count()
            meter.update(min(meter.done + tokens, text.tokens.size))


Stop = Callable[[], bool]


def _walk_shard(
    waiting: Sequence[LatentsJob], text: Text, model: LanguageModel, shard: int, *, stop: Stop
) -> None:
    found: dict[StoragePath, list[Pairs]] = {one.folder: [] for one in waiting}
    num_rows = 0
    for first_row, tokens, usable in text.batches(shard):
        if exchange.stop_asked(stop):
            raise Interrupted("the walk was stopped; its finished shards stay")
        num_rows = first_row + tokens.size
        acts = model.activations(tokens, [one.job.tap for one in waiting])
        for tap, values in acts.items():
            if not are_finite(values, usable):
                raise UserError(
                    f"{tap.name} of {waiting[0].job.model.weights} holds NaN or infinity on the "
                    "text walked: activations must be finite. Check the weights, or set its dtype "
                    "to float32."
                )
        for one in waiting:
            pairs = active_pairs(jax.device_put(one.job.sae), acts[one.job.tap], usable)
            found[one.folder].append(Pairs(pairs.rows + first_row, pairs.latents, pairs.values))
    for one in waiting:
        parts = found.pop(one.folder)
        write_shard(
            shard_file(one.scratch, shard),
            rows=np.concatenate([part.rows for part in parts]),
            latents=np.concatenate([part.latents for part in parts]),
            values=np.concatenate([part.values for part in parts]),
            num_rows=num_rows,
            width=one.width,
        )


@dataclass(frozen=True)
class Pairs:
    """Active latents, by row, then by latent."""

    rows: Int[np.ndarray, " P"]
    latents: Int[np.ndarray, " P"]
    values: Float[np.ndarray, " P"]


def active_pairs(
    sae: Sae, x_BSD: Float[Array, "B S D"], usable_BS: Bool[np.ndarray, "B S"]
) -> Pairs:
    """Which latents are active on the usable tokens, and their values: what `encode` gives.

    The latents of one chunk of rows are in memory at a time (`in_chunks`), the chunks being those
    of `sae evaluate`: so both see the same numbers.
    """
    x_ND = jnp.asarray(x_BSD).astype(jnp.float32).reshape(-1, x_BSD.shape[-1])
    usable_N, width = usable_BS.reshape(-1), sae.W_enc.shape[1]
    (chunks,) = in_chunks(sae, x_ND)
    extract = _on_host if jax.default_backend() == "cpu" else _on_device
    rows, latents, values = [], [], []
    for number, x_CD in enumerate(chunks):
        flat, value = extract(_encode(sae, x_CD))
        row = flat // width + number * len(x_CD)
        inside = row < len(usable_N)
        kept = np.flatnonzero(inside)[usable_N[row[inside]]]
        rows.append(row[kept])
        latents.append((flat % width)[kept].astype(np.int32))
        values.append(value[kept])
    return Pairs(*(np.concatenate(parts) for parts in (rows, latents, values)))


@jax.jit
def _encode(sae: Sae, x_CD: Float[Array, "C D"]) -> Float[Array, "C F"]:
    return sae.encode(x_CD).astype(jnp.float32)


def _on_host(latents_CF: Float[Array, "C F"]) -> tuple[np.ndarray, np.ndarray]:
    """Flat places of what is above 0, rising, and the values there."""
    flat = np.asarray(latents_CF).reshape(-1)
    places = np.flatnonzero(flat > 0)
    return places, flat[places]


def _on_device(latents_CF: Float[Array, "C F"]) -> tuple[np.ndarray, np.ndarray]:
    """The same where latents are far from the host: only active ones are sent."""
    count = int(_count(latents_CF))
    capacity = 1 << max(0, count - 1).bit_length()  # few sizes, so few compilations
    places, values = _compacted(latents_CF, capacity)
    return np.asarray(places)[:count].astype(np.int64), np.asarray(values)[:count]


@jax.jit
def _count(latents_CF: Float[Array, "C F"]) -> Int[Array, ""]:
    return (latents_CF > 0).sum(dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def _compacted(latents_CF: Float[Array, "C F"], capacity: int) -> tuple[Array, Array]:
    flat = latents_CF.reshape(-1)
    (places,) = jnp.nonzero(flat > 0, size=capacity, fill_value=0)
    return places, flat[places]

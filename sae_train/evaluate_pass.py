"""One walk of a model over held-out text, measuring any number of SAEs on the way.

The activations, the base loss and the zero-ablated losses of a batch are computed once for all
SAEs; an SAE's weights are on the device only while its turn lasts.

With several processes each takes every n-th batch, and the sums of all are added up at the end.

Legend: B sequences of a batch, S position, D model width, N rows = B·S.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from activation_cache import distributed
from activation_cache.errors import Interrupted, UserError
from activation_cache.model import LanguageModel
from activation_cache.progress import ProgressMeter
from activation_cache.shared_work import shared
from activation_cache.storage import Place
from activation_cache.taps import Splice, Tap, tap_width
from activation_cache.token_table import TokenTable
from sae_train.config import Config, EvaluationConfig
from sae_train.evaluate_stats import LossSums, SaeSums, SiteSums, reconstruct, sae_batch
from sae_train.evaluation import (
    BOS_TREATMENT,
    FORMAT_VERSION,
    Evaluation,
    Losses,
    measures,
    write_evaluation,
)
from sae_train.release import Sae


@dataclass(frozen=True)
class Job:
    """One SAE to evaluate."""

    folder: Place
    config: Config
    settings: EvaluationConfig
    step: int
    sae: Sae
    table: TokenTable
    fingerprints: dict[str, str]

    @property
    def tap(self) -> Tap:
        return Tap(self.config.sae.site, self.config.sae.layer)

    @property
    def loss_sequences(self) -> int:
        wanted = self.settings.loss_sequences or self.settings.sequences
        return min(wanted, self.settings.sequences)

    def is_current(self, evaluation: Evaluation | None) -> bool:
        """Would the evaluation there is come out the same again?"""
        return (
            evaluation is not None
            and evaluation.format_version == FORMAT_VERSION
            and evaluation.settings == self.settings.model_dump(mode="json")
            and self.fingerprints.items() <= evaluation.fingerprints.items()
        )


def splice_sae(
    acts_BSD: Float[Array, "B S D"], arguments: tuple[Sae, Bool[Array, "B S"]]
) -> Float[Array, "B S D"]:
    """The SAE's reconstruction where the mask says so, the model's own elsewhere."""
    sae, where_BS = arguments
    x_ND = acts_BSD.astype(jnp.float32).reshape(-1, acts_BSD.shape[-1])
    decoded_ND, _, _ = reconstruct(sae, x_ND, where_BS.reshape(-1))
    decoded_BSD = decoded_ND.reshape(acts_BSD.shape).astype(acts_BSD.dtype)
    return jnp.where(where_BS[:, :, None], decoded_BSD, acts_BSD)


def splice_zero(
    acts_BSD: Float[Array, "B S D"], where_BS: Bool[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Zero where the mask says so, the model's own elsewhere."""
    return jnp.where(where_BS[:, :, None], jnp.zeros_like(acts_BSD), acts_BSD)


@dataclass(frozen=True)
class _Batch:
    """Tokens and what is counted of them; a short batch is filled up with padding."""

    tokens_BS: Int[np.ndarray, "B S"]
    usable_BS: Bool[np.ndarray, "B S"]
    counted_BP: Bool[np.ndarray, "B P"]  # the losses that count; P = S - 1


@dataclass
class Pass:
    """One walk over the held-out text for all SAEs of a group."""

    jobs: list[Job]
    model: LanguageModel
    stop: Callable[[], bool] = lambda: False
    sites: dict[Tap, SiteSums] = field(default_factory=dict)
    saes: list[SaeSums] = field(default_factory=list)
    base: LossSums = field(default_factory=LossSums)
    zero: dict[tuple[Tap, bool], LossSums] = field(default_factory=dict)
    spliced: dict[tuple[int, bool], LossSums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.jobs[0]
        self.table, self.settings, self.loss_limit = (
            first.table,
            first.settings,
            first.loss_sequences,
        )
        self.taps = tuple(dict.fromkeys(job.tap for job in self.jobs))
        self.sites = {tap: SiteSums() for tap in self.taps}
        self.saes = [SaeSums() for _ in self.jobs]
        both = (False, True)
        self.zero = {key: LossSums() for key in itertools.product(self.taps, both)}
        self.spliced = {key: LossSums() for key in itertools.product(range(len(self.jobs)), both)}

    def run(self) -> None:
        """Measure and write."""
        length = self.table.sequence_length
        passes = 1 + 2 * len(self.taps) + 2 * len(self.jobs)
        total = length * (self.settings.sequences + passes * self.loss_limit)
        with ProgressMeter("evaluate", total=total, unit="tokens") as self.meter:
            # Nobody is stopped once all have measured: the sums then wait for nobody's share.
            shared("measured", self._measure, finish=lambda: None, stop=self.stop)
        self._add_up()
        if not self.base.count_S.sum():
            raise UserError(
                f"the {self.loss_limit} held-out sequences measured hold nothing but special "
                "tokens: raise evaluation.sequences, or harvest with other text"
            )
        distributed.told_by_main("evaluation", self._write_all)

    def _measure(self) -> None:
        """This process's share of the batches."""
        for number, (batch, with_losses) in enumerate(self._batches()):
            if distributed.stop_asked(self.stop):
                raise Interrupted("the evaluation was stopped and will begin anew")
            mine = number % distributed.process_count() == distributed.process_index()
            self._statistics(batch, mine=mine)
            if with_losses and mine:
                self._losses(batch)

    def _add_up(self) -> None:
        """The sums of all processes in place of this one's."""
        if distributed.process_count() == 1:
            return
        length = self.table.sequence_length
        losses = [self.base, *self.zero.values(), *self.spliced.values()]
        holders: list[tuple[Any, dict[str, tuple[int, ...]]]] = [
            (sums, {"sum_S": (length - 1,), "count_S": (length - 1,)}) for sums in losses
        ]
        for tap, site in self.sites.items():
            width = tap_width(self.model.config, tap.site)
            shapes = {"sum_SD": (length, width), "square_S": (length,), "count_S": (length,)}
            holders.append((site, shapes))
        for job, sums in zip(self.jobs, self.saes, strict=True):
            latents = (job.sae.W_enc.shape[1],)
            shapes = {"squared_error_S": (length,), "active_S": (length,), "fired_F": latents}
            holders.append((sums, shapes))
        # A process that had no batch holds zeros without a shape.
        own = {
            f"{number}.{name}": np.broadcast_to(getattr(holder, name), shape)
            for number, (holder, shapes) in enumerate(holders)
            for name, shape in shapes.items()
        }
        for key, array in distributed.sums_of_all(own).items():
            number, _, name = key.partition(".")
            setattr(holders[int(number)][0], name, array)

    def _write_all(self) -> None:
        for index in range(len(self.jobs)):
            self._write(index)

    def _batches(self) -> Iterator[tuple[_Batch, bool]]:
        """The first held-out sequences in order, in batches of one shape."""
        size, wanted = self.settings.sequences_per_batch, self.settings.sequences
        pad = self.table.summary.special_ids.pad
        for start in range(0, wanted, size):
            indices = self.table.held_out[start : min(start + size, wanted)]
            tokens_BS = np.pad(
                self.table.read(indices), ((0, size - len(indices)), (0, 0)), constant_values=pad
            )
            usable_BS = self.table.usable(tokens_BS)
            in_limit_B = start + np.arange(size) < self.loss_limit
            counted_BP = usable_BS[:, :-1] & (tokens_BS[:, 1:] != pad) & in_limit_B[:, None]
            yield _Batch(tokens_BS, usable_BS, counted_BP), bool(in_limit_B.any())

    def _statistics(self, batch: _Batch, *, mine: bool) -> None:
        """L0, squared error and firing of every SAE, mean and spread of every tap.

        A batch that isn't `mine` is looked at only where the sums have no shift yet: all
        processes take it from the same batch.
        """
        if not mine and all(site.shift_D is not None for site in self.sites.values()):
            return
        acts = self.model.activations(batch.tokens_BS, self.taps)
        for tap in self.taps:
            self.sites[tap].start(acts[tap], batch.usable_BS)
            if mine:
                self.sites[tap].add(acts[tap], batch.usable_BS)
        if not mine:
            return
        for job, sums in zip(self.jobs, self.saes, strict=True):
            sums.add(sae_batch(jax.device_put(job.sae), acts[job.tap], batch.usable_BS))
        self._advance(batch)

    def _losses(self, batch: _Batch) -> None:
        """The model as it is, each tap zeroed, each SAE spliced in; both treatments of BOS."""
        where = {False: batch.usable_BS, True: np.ones_like(batch.usable_BS)}

        def measure(sums: LossSums, splice: Splice | None) -> None:
            sums.add(self.model.losses(batch.tokens_BS, splice), batch.counted_BP)
            self._advance(batch)

        measure(self.base, None)
        for (tap, everywhere), sums in self.zero.items():
            measure(sums, Splice(tap, splice_zero, jnp.asarray(where[everywhere])))
        for index, job in enumerate(self.jobs):
            sae = jax.device_put(job.sae)  # one SAE's weights on the device at a time
            for everywhere in (False, True):
                arguments = (sae, jnp.asarray(where[everywhere]))
                measure(self.spliced[index, everywhere], Splice(job.tap, splice_sae, arguments))

    def _advance(self, batch: _Batch) -> None:
        done = self.meter.done + batch.tokens_BS.size * distributed.process_count()
        self.meter.update(min(done, self.meter.total or done))

    def _write(self, index: int) -> None:
        job = self.jobs[index]
        losses = Losses(
            base=self.base,
            spliced=self.spliced[index, False],
            zero=self.zero[job.tap, False],
            spliced_everywhere=self.spliced[index, True],
            zero_everywhere=self.zero[job.tap, True],
        )
        evaluation = Evaluation(
            format_version=FORMAT_VERSION,
            name=job.config.name,
            step=job.step,
            **measures(site=self.sites[job.tap], sae=self.saes[index], losses=losses),
            bos=dict(BOS_TREATMENT),
            sequences=job.settings.sequences,
            sequence_length=job.table.sequence_length,
            loss_sequences=job.loss_sequences,
            site=job.tap.site,
            layer=job.tap.layer,
            width=job.sae.W_enc.shape[1],
            settings=job.settings.model_dump(mode="json"),
            fingerprints=job.fingerprints,
        )
        write_evaluation(evaluation, job.folder, fired_F=self.saes[index].fired_F)

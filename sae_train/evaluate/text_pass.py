"""One pass of a model over held-out text, measuring any number of SAEs on the way.

The activations, the base loss, the zero-ablated losses and the gradients of a batch are computed
once for all SAEs. An SAE's weights are on the device only while it is measured.

With n processes each takes every n-th batch, and at the end their sums are added up.

Legend: B sequences of a batch, S position, P = S - 1 predictions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from activation_cache.gemma.taps import EMBEDDING, Splice, Tap, stream_before
from activation_cache.language_model.model import Kept, LanguageModel
from activation_cache.runtime import exchange, processes
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.exchange import shared
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.text.masked import masked_tokens
from sae_train.evaluate.importance import ImportanceSums, uniformity
from sae_train.evaluate.job import Job
from sae_train.evaluate.result import Losses
from sae_train.evaluate.splice import splice_of, splice_zero
from sae_train.evaluate.sums import LossSums, SaeSums, SiteSums, Subsets, are_finite, sae_batch
from sae_train.inference.sae import Sae

Shapes = dict[str, tuple[int, ...]]

# At most: a layer's forward, the same recomputed, and its backward. The vocabulary's products are
# two, or none without a cap.
_GRADIENT_PASSES = 3


@dataclass(frozen=True)
class _Batch:
    """Tokens and which of them are counted; a short last batch is filled up with padding.

    `first` is the number of its first sequence.
    """

    first: int
    tokens_BS: Int[np.ndarray, "B S"]
    usable_BS: Bool[np.ndarray, "B S"]
    counted_BP: Bool[np.ndarray, "B P"]  # the losses that count
    important_BP: Bool[np.ndarray, "B P"]  # the predictions whose gradients count
    with_statistics: bool
    with_losses: bool
    with_importance: bool
    subsets: Subsets


@dataclass
class Pass:
    """One pass over the held-out text for all SAEs of a group.

    For SAEs of the embedding, L0, FVU and firing are measured on the vocabulary, each token once;
    only the losses are measured on text, if there is any.

    Attributes:
        jobs: of one model, one text and the same settings; those that are `compared` are measured
            for their L0, FVU and delta loss alone.
        sites, saes, importance: the sums of each tap and of each job.
        base, zero, spliced: the losses of the model as it is; with a tap at zero, by (tap,
            everywhere); with a job's SAE, by (index, everywhere). Everywhere includes BOS, EOS
            and padding.
        prefixes: of a Matryoshka SAE, by (index, number of latents), the sums and the losses of
            what its first latents reconstruct.
    """

    jobs: list[Job]
    model: LanguageModel | None  # None where rows are measured, and no losses
    stop: Callable[[], bool] = lambda: False
    sites: dict[Tap, SiteSums] = field(default_factory=dict)
    saes: list[SaeSums] = field(default_factory=list)
    importance: list[ImportanceSums] = field(default_factory=list)
    base: LossSums = field(default_factory=LossSums)
    zero: dict[tuple[Tap, bool], LossSums] = field(default_factory=dict)
    spliced: dict[tuple[int, bool], LossSums] = field(default_factory=dict)
    prefixes: dict[tuple[int, int], tuple[SaeSums, LossSums]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.jobs[0]
        self.table, self.settings, self.rows = first.table, first.settings, first.rows
        self.loss_limit, self.importance_limit = first.loss_sequences, first.importance_sequences
        self.whole = [index for index, job in enumerate(self.jobs) if not job.compared]
        if not self.whole:
            self.importance_limit = 0
        self.of_embedding = first.tap == EMBEDDING
        self.taps = tuple(dict.fromkeys(job.target for job in self.jobs))
        self.measured = {*self.taps, *(job.tap for job in self.jobs)}
        below = (stream_before(splice_of(job, None)) for job in self.jobs)
        self.read = tuple(self.measured | {tap for tap in below if tap is not None})
        self.sites = {tap: SiteSums() for tap in self.taps}
        self.saes = [SaeSums(error_TS=self._no_errors()) for _ in self.jobs]
        self.importance = [ImportanceSums() for _ in self.jobs]
        whole_taps = dict.fromkeys(self.jobs[index].target for index in self.whole)
        self.zero = {key: LossSums() for key in itertools.product(whole_taps, (False, True))}
        self.spliced = {
            (index, everywhere): LossSums()
            for index, job in enumerate(self.jobs)
            for everywhere in ((False,) if job.compared else (False, True))
        }
        self.prefixes = {
            (index, first): (SaeSums(error_TS=self._no_errors()), LossSums())
            for index in self.whole
            for first in self.jobs[index].sae.prefixes[:-1]
        }

    def _no_errors(self) -> np.ndarray:
        return np.zeros(self._walked, np.float32)

    @property
    def _walked(self) -> tuple[int, int]:
        """How many sequences L0 and FVU are measured on, and their length."""
        number = self.table.num_harvestable if self.of_embedding else self.settings.sequences
        return number, self.table.sequence_length

    @property
    def num_subsets(self) -> int:
        """How many subsets the table divides its sequences into."""
        return len(self.table.summary.subsets)

    @property
    def _language_model(self) -> LanguageModel:
        assert self.model is not None, "held-out rows have no losses"
        return self.model

    def run(self) -> None:
        """Measure. Afterwards every process has the sums of all.

        Raises:
            UserError: no counted prediction in the text.
            Interrupted: `stop` returned True.
        """
        with ProgressMeter("evaluate", total=self._work(), unit="tokens") as self.meter:
            # Once all processes have measured, `stop` is ignored: adding up takes all of them.
            shared("measured", self._measure, finish=lambda: None, stop=self.stop)
        self._add_up()
        if not self.base.count_S.sum() and self.loss_limit:
            raise UserError(
                f"the {self.loss_limit} held-out sequences measured hold nothing but special "
                "tokens: raise evaluation.sequences, or harvest with other text"
            )

    def _work(self) -> int:
        passes = 1 + len(self.zero) + len(self.spliced) + len(self.prefixes)
        gradients = _GRADIENT_PASSES * len(self.zero) // 2
        sequences = self._walked[0] + passes * self.loss_limit
        return self.table.sequence_length * (sequences + gradients * self.importance_limit)

    def _measure(self) -> None:
        """This process's share of the batches."""
        for number, batch in enumerate(self._batches()):
            if exchange.stop_asked(self.stop):
                raise Interrupted("the evaluation was stopped and will begin anew")
            mine = number % processes.process_count() == processes.process_index()
            acts = self._statistics(batch, mine=mine) if batch.with_statistics else {}
            if batch.with_importance and mine:
                if not batch.with_statistics:
                    acts = self._language_model.activations(batch.tokens_BS, self.taps)
                self._importance(batch, acts)
            if batch.with_losses and mine:
                self._losses(batch, acts)

    def _add_up(self) -> None:
        """Replace this process's sums by those of all processes."""
        if processes.process_count() == 1 and self.loss_limit:
            return
        holders = list(self._holders())
        # A process that had no batch still holds scalar zeros.
        own = {
            f"{number}.{name}": np.broadcast_to(getattr(holder, name), shape)
            for number, (holder, shapes) in enumerate(holders)
            for name, shape in shapes.items()
        }
        for key, array in exchange.sums_of_all(own).items():
            number, _, name = key.partition(".")
            setattr(holders[int(number)][0], name, array)

    def _holders(self) -> Iterator[tuple[Any, Shapes]]:
        """All objects that hold sums, each with the names and shapes of its arrays."""
        S, G = self.table.sequence_length, self.num_subsets
        by_loss: Shapes = {"sum_S": (S - 1,), "count_S": (S - 1,), "sum_G": (G,), "count_G": (G,)}
        of_prefixes = [losses for _, losses in self.prefixes.values()]
        for losses in (self.base, *self.zero.values(), *self.spliced.values(), *of_prefixes):
            yield losses, by_loss
        for tap, site in self.sites.items():
            D = next(job.sae.W_dec.shape[1] for job in self.jobs if job.target == tap)
            by_position: Shapes = {"sum_SD": (S, D), "square_S": (S,), "count_S": (S,)}
            by_subset: Shapes = {"sum_GD": (G, D), "square_G": (G,), "count_G": (G,)}
            usual: Shapes = {"usual_HD": (G + 1, D), "usual_square_H": (G + 1,)}
            yield site, by_position | by_subset | usual | {"usual_count_H": (G + 1,)}
        with_sums = [*enumerate(self.saes)]
        with_sums += [(index, sums) for (index, _), (sums, _) in self.prefixes.items()]
        for index, sums in with_sums:
            F = self.jobs[index].sae.W_enc.shape[1]
            by_position = {"squared_error_S": (S,), "active_S": (S,), "fired_F": (F,)}
            by_subset = {"squared_error_G": (G,), "active_G": (G,), "usual_error_H": (G + 1,)}
            yield sums, by_position | by_subset | {"error_TS": self._walked}
        for importance in self.importance:
            yield importance, {"sum_": (), "count": ()}

    def _batches(self) -> Iterator[_Batch]:
        """The first held-out sequences in order, in batches of one shape."""
        if self.of_embedding:
            yield from self._batches_of(range(self.table.num_harvestable), of_text=False)
        yield from self._batches_of(self.jobs[0].sequences[: self.settings.sequences])

    def _batches_of(self, sequences: range, *, of_text: bool = True) -> Iterator[_Batch]:
        size = min(self.settings.sequences_per_batch, len(sequences))
        for start in range(0, len(sequences), size or 1):
            chosen = sequences[start : start + size]
            yield self._batch(start, chosen, size=size, of_text=of_text)

    def _batch(self, start: int, indices: range, *, size: int, of_text: bool) -> _Batch:
        pad = self.table.summary.special_ids.pad
        filling = size - len(indices)
        tokens_BS = self.table.read(indices)
        masked_BS = masked_tokens(tokens_BS, self.jobs[0].masked if of_text else ())
        masked_BS |= self.table.masked(indices)
        usable_BS = self.table.usable(tokens_BS, indices) & ~masked_BS
        rows = ((0, filling), (0, 0))
        tokens_BS = np.pad(tokens_BS, rows, constant_values=pad)
        masked_BS, usable_BS = np.pad(masked_BS, rows), np.pad(usable_BS, rows)
        predicts_BP = usable_BS[:, :-1] & (tokens_BS[:, 1:] != pad) & ~masked_BS[:, 1:]
        number_B1 = start + np.arange(size)[:, None]
        subsets = Subsets(self.num_subsets, np.pad(self.table.subset_of(indices), (0, filling)))
        return _Batch(
            start,
            tokens_BS,
            usable_BS,
            counted_BP=predicts_BP & (number_B1 < self.loss_limit),
            important_BP=predicts_BP & (number_B1 < self.importance_limit),
            with_statistics=not (of_text and self.of_embedding),
            with_losses=of_text and start < self.loss_limit,
            with_importance=of_text and start < self.importance_limit,
            subsets=subsets,
        )

    def _statistics(self, batch: _Batch, *, mine: bool) -> Kept:
        """Add L0, squared error and firing of every SAE, mean and spread of every tap.

        A batch that isn't `mine` is read only while a site has no shift yet: all processes take
        the shift from the same batch.

        Returns:
            The activations read, for `_importance` and `_losses`.
        """
        if not mine and all(site.shift_D is not None for site in self.sites.values()):
            return {}
        if self.rows is not None:
            acts = self.rows.activations(batch.tokens_BS, self.read)
        else:
            acts = self._language_model.activations(batch.tokens_BS, self.read)
        for tap in sorted(self.measured):
            if not are_finite(acts[tap], batch.usable_BS):
                raise UserError(
                    f"{tap.name} of {self.jobs[0].model.weights} holds NaN or infinity on the text "
                    "measured: activations must be finite. Check the weights, or set its dtype to "
                    "float32."
                )
        usual = {}
        for tap in self.taps:
            self.sites[tap].start(acts[tap], batch.usable_BS)
            if mine:
                usual[tap] = self.sites[tap].add(acts[tap], batch.usable_BS, batch.subsets)
        if mine:
            for index, job in enumerate(self.jobs):
                sae = jax.device_put(job.sae)
                target = None if job.target == job.tap else acts[job.target]
                for one, sums in [(sae, self.saes[index]), *self._prefixes_of(index, sae, of=0)]:
                    found = sae_batch(one, acts[job.tap], batch.usable_BS, target)
                    where_BS = usual[job.target]
                    sums.add(found, batch.subsets, usual_BS=where_BS, first=batch.first)
            self._advance(batch)
        return acts

    def _importance(self, batch: _Batch, acts: Kept) -> None:
        """Add the uniformity of importance of every SAE; one gradient serves all of a tap."""
        model = self._language_model
        for tap in dict.fromkeys(tap for tap, _ in self.zero):
            gradient = model.gradient(batch.tokens_BS, tap, batch.important_BP, kept=acts)
            for index in self.whole:
                if (job := self.jobs[index]).target == tap:
                    r_BS = uniformity(jax.device_put(job.sae), acts[job.tap], gradient)
                    self.importance[index].add(r_BS, batch.important_BP)
            self._advance(batch, passes=_GRADIENT_PASSES)

    def _losses(self, batch: _Batch, acts: Kept) -> None:
        """Add the losses of the model as it is, with each tap at zero, and with each SAE."""
        counted_BP, model = batch.counted_BP, self._language_model
        where = {False: batch.usable_BS, True: np.ones_like(batch.usable_BS)}

        def measure(sums: LossSums, splice: Splice | None) -> None:
            losses = model.losses(batch.tokens_BS, splice, kept=acts, counted=counted_BP)
            sums.add(losses, counted_BP, batch.subsets)
            self._advance(batch)

        measure(self.base, None)
        for (tap, everywhere), sums in self.zero.items():
            if everywhere and tap.site in ("resid_post", "embedding"):
                # No layer adds to a residual stream of zeros, so all logits are 0.
                uniform = np.log(model.config.vocab_size)
                sums.add(np.full(counted_BP.shape, uniform), counted_BP, batch.subsets)
                self._advance(batch)
            else:
                measure(sums, Splice(tap, splice_zero, jnp.asarray(where[everywhere])))
        for index, job in enumerate(self.jobs):
            sae = jax.device_put(job.sae)  # one SAE's weights on the device at a time
            for everywhere in (False, True):
                if (index, everywhere) in self.spliced:
                    arguments = (sae, jnp.asarray(where[everywhere]))
                    measure(self.spliced[index, everywhere], splice_of(job, arguments))
            for prefix, sums in self._prefixes_of(index, sae, of=1):
                measure(sums, splice_of(job, (prefix, jnp.asarray(where[False]))))

    def _prefixes_of(self, index: int, sae: Sae, *, of: int) -> Iterator[tuple[Sae, Any]]:
        """Each prefix of a job's SAE, as an SAE of the same shape, with its sums or losses."""
        for (number, first), both in self.prefixes.items():
            if number == index:
                yield sae.reconstructing_with(first), both[of]

    def _advance(self, batch: _Batch, *, passes: int = 1) -> None:
        tokens = passes * batch.tokens_BS.size * processes.process_count()
        self.meter.update(min(self.meter.done + tokens, self.meter.total or tokens))

    def losses_of(self, index: int) -> Losses:
        """The five losses that the numbers of a job that isn't `compared` come from."""
        target = self.jobs[index].target
        return Losses(
            base=self.base,
            spliced=self.spliced[index, False],
            zero=self.zero[target, False],
            spliced_everywhere=self.spliced[index, True],
            zero_everywhere=self.zero[target, True],
        )

"""One step of every member of a cohort on one batch: a program for each, or one for several.

Members whose steps differ in numbers alone (`cohort.step_key`) share a compiled program. With
`train.stacked` those of them that stand at the same step are given to the devices together, as one
program over all: fewer program launches, which small SAEs on a fast device wait for. Steps through
the language model take their turns: in them it is the model that takes time.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import Mesh

from sae_train.end_to_end.frozen_model import FrozenModel, SequenceBatch
from sae_train.train.cohort import step_key
from sae_train.train.cohort_member import Member
from sae_train.train.train_step import (
    Batch,
    EndToEndStep,
    StackedStep,
    TrainStep,
    make_end_to_end_step,
    make_stacked_step,
    make_train_step,
)


class CohortStep:
    """Compiled steps, made when they are first needed."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._alone: dict[str, TrainStep] = {}
        self._end_to_end: dict[str, EndToEndStep] = {}
        self._stacked: dict[tuple[str, int], StackedStep] = {}
        self._keys: dict[Member, str] = {}

    def __call__(self, members: Sequence[Member], batch: Batch) -> None:
        """Give the devices the next step of members at the same step; returns at once."""
        for key, group in self._grouped(members).items():
            if len(group) > 1 and group[0].config.train.stacked:
                self._step_stacked(key, group, batch)
                continue
            for member in group:
                if key not in self._alone:
                    self._alone[key] = make_train_step(
                        member.config, **member.scales, mesh=self._mesh
                    )
                state, scalars = member.give()
                member.take(*self._alone[key](state, batch, scalars))

    def through(self, model: FrozenModel, members: Sequence[Member], batch: SequenceBatch) -> None:
        """The same through the language model, on its sequences."""
        for key, group in self._grouped(members).items():
            for member in group:
                if key not in self._end_to_end:
                    self._end_to_end[key] = make_end_to_end_step(
                        member.config, **member.scales, mesh=self._mesh, model=model
                    )
                state, scalars = member.give()
                member.take(*self._end_to_end[key](state, batch, scalars))

    def _grouped(self, members: Sequence[Member]) -> dict[str, list[Member]]:
        groups: dict[str, list[Member]] = {}
        for member in members:
            if member not in self._keys:
                self._keys[member] = step_key(member.config)
            groups.setdefault(self._keys[member], []).append(member)
        return groups

    def _step_stacked(self, key: str, group: Sequence[Member], batch: Batch) -> None:
        program = key, len(group)
        if program not in self._stacked:
            self._stacked[program] = make_stacked_step(
                group[0].config,
                members=len(group),
                **group[0].scales,
                mesh=self._mesh,
            )
        states, scalars = zip(*(member.give() for member in group), strict=True)
        stepped = self._stacked[program](states, batch, scalars)
        for member, state, metrics in zip(group, *stepped, strict=True):
            member.take(state, metrics)

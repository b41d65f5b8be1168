"""A maker of steps that compiles one program once, whatever number of runs has it.

A training run makes its own step, and most of a small run's time is that step's compilation: of
tests that train the same config again and again, stopped here and gone on with there, it was nearly
half. Where processes are started, each compiles for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from sae_train.config.run import Config
from sae_train.train.cohort import step_key
from sae_train.train.train_step import make_train_step
from tests.support.session.compiled_programs import overrides


class StepsMadeOnce:
    """Stands in for `make_train_step`, or another maker, where a cohort makes its steps."""

    def __init__(self, make: Callable[..., Any] = make_train_step) -> None:
        self._make = make
        self._made: dict[Any, Any] = {}

    def __call__(self, config: Config, *, mesh: Mesh, **options: Any) -> Any:
        made_with = *sorted(options.items()), *overrides
        program = step_key(config), mesh, made_with
        if program not in self._made:
            self._made[program] = self._make(config, mesh=mesh, **options)
        return self._made[program]

"""The store that a cohort trains on: a whole one, or a rolling one and who harvests it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from activation_cache.harvest.matching_store import open_matching_store
from activation_cache.harvest.rolling import RollingHarvest, wait_for_store, waiting_supply
from activation_cache.runtime import processes
from activation_cache.runtime.errors import UserError
from activation_cache.store.rolling import RollingWindow, Supply
from activation_cache.store.store import Store
from sae_train.config.file import resolved_yaml
from sae_train.config.run import Config


@dataclass(frozen=True)
class OpenedStore:
    """An open store; `window` is None where the rows of every step are on the disk."""

    store: Store
    window: RollingWindow | None
    stop: Callable[[], bool]

    def prepare(self, step: int, *, wrap: bool = False) -> int:
        """Return the step when its rows are on the disk.

        Args:
            wrap: of a rolling store, past the last batch of the text take its first ones again.

        Raises:
            UserError: the harvest of them failed.
            Interrupted: `stop` turned true.
        """
        if self.window is not None:
            step = step % self.window.num_batches if wrap else step
            self.window.prepare(step, stop=self.stop)
        return step

    def may_read(self, step: int) -> bool:
        """Are the rows of a step on the disk?"""
        return self.window is None or self.window.may_read(step)

    def finish(self) -> None:
        """No run will read further rows."""
        if self.window is not None:
            self.window.finish(stop=self.stop)


@contextmanager
def opened_store(configs: Sequence[Config], *, stop: Callable[[], bool]) -> Iterator[OpenedStore]:
    """Open the store of a cohort; a rolling one is harvested until the block ends.

    Raises:
        UserError: there is no such store, or what `RollingHarvest` raises.
        Interrupted: `stop` turned true while the first window was harvested.
    """
    config = configs[0]
    rolling = config.cache.rolling
    sections: dict[str, Any] = {
        "model": config.model,
        "text": config.text,
        "cache": config.cache,
    }
    if rolling is None:
        yield OpenedStore(open_matching_store(**sections), None, stop)
        return
    if rolling.beside:
        store = wait_for_store(**sections, stop=stop)
        supply = waiting_supply(store.path)
        yield OpenedStore(store, _window(configs, store, supply), stop)
        return
    if processes.process_count() > 1:
        raise UserError(
            "cache.rolling.beside is false, so that the trainer harvests itself, and it is "
            f"{processes.process_count()} processes: set cache.rolling.beside to true, or train in "
            "one process"
        )
    _, mesh = config.harvest_mesh
    yaml = resolved_yaml(config)
    with RollingHarvest(**sections, mesh=mesh, resolved_config_yaml=yaml, stop=stop) as harvest:
        store = harvest.make_store()
        yield OpenedStore(store, _window(configs, store, harvest.supply), stop)


def _window(configs: Sequence[Config], store: Store, supply: Supply) -> RollingWindow:
    train = configs[0].train
    return RollingWindow(
        store,
        seed=train.order_seed,
        batch_size=train.batch_size,
        steps=max(config.steps_on_rows for config in configs),
        supply=supply,
    )

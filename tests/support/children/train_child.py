"""Train the given config files one after the other, as one process of a group.

Those that differ in nothing that is compiled in share their step: many restores compile it once.
"""

from __future__ import annotations

import logging
import sys

from activation_cache.runtime import processes
from sae_train.config.file import load_config
from sae_train.train import cohort_step
from sae_train.train.loop import train
from tests.support.session.steps_made_once import StepsMadeOnce


def main() -> None:
    cohort_step.make_train_step = StepsMadeOnce()
    logging.basicConfig(level=logging.WARNING)
    processes.join()
    for path in sys.argv[1:]:
        config = load_config(path)
        result = train(config)
        assert result.step == config.train.steps
    processes.leave()


if __name__ == "__main__":
    main()

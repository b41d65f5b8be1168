"""Which latents to explain."""

from __future__ import annotations

import logging
import random

from activation_cache.runtime.errors import UserError
from sae_train.latents.reader import Latents

logger = logging.getLogger(__name__)


def choose(latents: Latents, *, listed: str | None, sample: int, seed: int) -> list[int]:
    """The latents to explain, rising: those listed, or a sample of those that fire.

    Args:
        listed: such as `0-99,200`.

    Raises:
        UserError: not such a list, or a latent that isn't there; none of them fires.
    """
    count = latents.summary["count"].to_numpy()
    if listed is None:
        alive = count.nonzero()[0].tolist()
        chosen = sorted(random.Random(seed).sample(alive, min(sample, len(alive))))
    else:
        wanted = _indices(listed, width=len(latents))
        chosen = [index for index in wanted if count[index]]
        if len(chosen) < len(wanted):
            logger.warning(
                "%d of the %d latents never fire on the text of `sae latents`: left out",
                len(wanted) - len(chosen),
                len(wanted),
            )
    if not chosen:
        raise UserError(
            f"{latents.name} has no latent to explain: of the chosen ones none fires on the text "
            "of `sae latents`. Choose others, or give `sae latents` more text"
        )
    return chosen


def _indices(listed: str, *, width: int) -> list[int]:
    found: set[int] = set()
    for part in listed.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--latents {listed} is no list of latents: write it as 0-99,200")
        begin, end = int(first), int(last or first)
        if end >= width or begin > end:
            raise UserError(
                f"--latents {part.strip()}: the SAE has the latents 0 to {width - 1}, and a range "
                "rises: choose among them"
            )
        found |= set(range(begin, end + 1))
    return sorted(found)

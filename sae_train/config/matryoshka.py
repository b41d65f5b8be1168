"""The key `sae.matryoshka` of the YAML: which prefixes of the latents reconstruct on their own.

A Matryoshka SAE (Bussmann et al. 2025, arXiv 2503.17547) is trained so that its first m latents are
an SAE too, for several m (docs/architectures.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from activation_cache.config import LARGEST_INT32, MeshConfig, NonNegative32, Section


class MatryoshkaConfig(Section):
    """The prefixes below the whole SAE, which is always one more; a list is short for `prefixes`.

    `prefixes` are numbers of latents or, below 1, shares of `sae.width`. `weights` are of the
    squared errors, one for each prefix and the last for the whole SAE: 1 each, as in SAELens. Gemma
    Scope 2 was trained with this loss; its prefixes and weights are unpublished.
    """

    prefixes: list[Annotated[float, Field(gt=0, le=LARGEST_INT32)]]
    weights: list[NonNegative32] | None = None  # None: 1 each

    @model_validator(mode="before")
    @classmethod
    def _list_alone(cls, values: Any) -> Any:
        return {"prefixes": values} if isinstance(values, list) else values

    @field_validator("prefixes")
    @classmethod
    def _numbers_or_shares(cls, prefixes: list[float]) -> list[float]:
        for prefix in prefixes:
            if prefix > 1 and not prefix.is_integer():
                raise ValueError(
                    f"a prefix of {prefix:g} is neither a number of latents nor a share of "
                    "sae.width: give a whole number, or a share below 1"
                )
        return [int(prefix) if prefix >= 1 else prefix for prefix in prefixes]

    def __hash__(self) -> int:
        return hash((*self.prefixes, *self.loss_weights))

    def widths(self, width: int) -> tuple[int, ...]:
        """Latents of each prefix, the whole SAE's `width` last.

        Raises:
            ValueError: a share isn't a whole number of latents; prefixes don't grow or aren't
                below the width; there are more or fewer weights than prefixes.
        """
        found = [self._latents(prefix, width) for prefix in self.prefixes]
        for before, after in zip([0, *found], found, strict=False):
            if after <= before:
                raise ValueError(
                    f"sae.matryoshka has a prefix of {after} latents after one of {before}: each "
                    "must be wider than the one before"
                )
        if found and found[-1] >= width:
            raise ValueError(
                f"sae.matryoshka has a prefix of {found[-1]} latents, and sae.width is {width}: "
                "give prefixes below the width, which is itself the last one and needn't be given"
            )
        self._check_weights()
        return *found, width

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """The weight of each prefix's squared error, the whole SAE's last."""
        return (1.0,) * (len(self.prefixes) + 1) if self.weights is None else tuple(self.weights)

    @staticmethod
    def _latents(prefix: float, width: int) -> int:
        latents = prefix * width if prefix < 1 else prefix
        if not float(latents).is_integer():
            raise ValueError(
                f"sae.matryoshka has {prefix:g} of sae.width {width}, which are {latents:g} "
                f"latents: give a whole number, as {max(1, round(latents))}, or another share"
            )
        return int(latents)

    def _check_weights(self) -> None:
        if self.weights is None:
            return
        expected = len(self.prefixes) + 1
        if len(self.weights) != expected:
            raise ValueError(
                f"sae.matryoshka.weights has {len(self.weights)} numbers for {len(self.prefixes)} "
                f"prefixes and the whole SAE: give {expected}, the last for the whole SAE"
            )
        if self.weights[-1] == 0:
            raise ValueError(
                "the last of sae.matryoshka.weights is 0, so that nothing would train the latents "
                "behind the last prefix: give the whole SAE a weight above 0"
            )


def check_shares(ends: tuple[int, ...], mesh: MeshConfig) -> Iterator[str]:
    """A line where a device of the `model` axis wouldn't hold its share of every prefix.

    Args:
        ends: where the groups of latents end, as `SaeConfig.groups` has them.
    """
    common = math.gcd(*ends)
    if len(ends) > 1 and common % mesh.model:
        near = [size for size in range(1, 65) if common % size == 0]
        yield (
            f"sae.matryoshka has prefixes of {', '.join(map(str, ends[:-1]))} latents, and mesh "
            f"axis 'model' has size {mesh.model}, which must divide each, so that every device "
            f"holds a part of every prefix: choose multiples of {mesh.model}, or a size of "
            f"{', '.join(map(str, near))}"
        )

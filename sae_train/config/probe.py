"""The section `probe` of the YAML: the data sets of `sae probe`, and how it probes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from activation_cache.config import FilePath, PositiveSmallCount, Section


class ProbeConfig(Section):
    """What `sae probe` reads and fits; the defaults are sae-probes' protocol, with three splits.

    `datasets` null means ten of sae-probes' data sets with short prompts, and of a folder `data`
    all that are in it.
    """

    data: FilePath | None = None  # a folder of .csv files; None: those of the package sae-probes
    datasets: Literal["all"] | Annotated[list[str], Field(min_length=1)] | None = None
    k: Annotated[list[PositiveSmallCount], Field(min_length=1)] = [1, 2, 5, 16]  # noqa: RUF012
    splits: Annotated[PositiveSmallCount, Field(le=100)] = 3  # into training and test rows
    rows: Annotated[PositiveSmallCount, Field(ge=200)] = 5000  # the first of a data set
    max_tokens: Annotated[PositiveSmallCount, Field(ge=2)] = 1024  # the last of a prompt, with BOS

    @field_validator("k")
    @classmethod
    def _rising(cls, k: list[int]) -> list[int]:
        if sorted(set(k)) != k:
            raise ValueError(f"probe.k {k} must rise: give {sorted(set(k))}")
        return k

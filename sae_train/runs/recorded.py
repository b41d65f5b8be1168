"""What the JSON files in a run's folder hold: checked on reading, so that readers may rely on it.

Of an evaluation most keys may be missing, as in files of earlier versions, and any may be added.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, read_json

_Number = Annotated[float, Strict()]
_Measured = _Number | None  # None where a number isn't finite
_Whole = Annotated[int, Strict(), Field(ge=0)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Histogram(_Open):
    log10_edges: list[_Number]
    counts: list[_Number]
    frequent: _Number | None = Field(None, alias="fraction_above_0.1")

    @model_validator(mode="after")
    def _one_edge_more(self) -> _Histogram:
        if len(self.log10_edges) != len(self.counts) + 1:
            raise ValueError(f"{len(self.log10_edges)} edges for {len(self.counts)} counts")
        return self


class _Precision(_Open):
    model: str
    sae: str
    l0: _Measured = None
    fvu: _Measured = None
    fvu_median_token: _Measured = None
    fvu_without_outlying: _Measured = None
    delta_loss: _Measured = None


class _Prefix(_Open):
    latents: _Whole
    l0: _Number
    fvu: _Measured = None
    fvu_median_token: _Measured = None
    fvu_without_outlying: _Measured = None
    delta_loss: _Measured = None
    alive_fraction: _Number


class _Evaluation(_Open):
    step: _Whole = 0
    l0: _Number = 0.0
    fvu: _Measured = None
    fvu_median_token: _Measured = None
    fvu_without_outlying: _Measured = None
    loss: _Measured = None
    loss_spliced: _Measured = None
    loss_zero_ablated: _Measured = None
    loss_recovered: _Measured = None
    delta_loss: _Measured = None
    delta_loss_all_positions: _Measured = None
    alive_fraction: _Number = 0.0
    importance_uniformity: _Measured = None
    sequences: _Whole = 0
    sequence_length: _Whole = 0
    loss_sequences: _Whole = 0
    tokens: _Whole = 0
    settings: dict[str, Any] = {}
    fingerprints: dict[str, str] = {}
    frequency_histogram: _Histogram | None = None
    by_position: dict[str, list[_Measured]] | None = None
    by_subset: dict[str, dict[str, _Measured]] | None = None
    by_precision: list[_Precision] | None = None
    by_prefix: list[_Prefix] | None = None


class _Failure(BaseModel):
    stage: str
    reason: str


_ROW = TypeAdapter(dict[str, _Measured])


def read_evaluation_record(path: StoragePath) -> dict[str, Any]:
    """An evaluation.json as it is; raises `UserError` if a number or a list isn't one."""
    found = read_json(path)
    try:
        _Evaluation.model_validate(found)
    except ValidationError as error:
        raise UserError(
            f"{path} is not an evaluation: {_first(error)}. Delete it and run `sae evaluate`"
        ) from error
    return found


def read_failure(path: StoragePath) -> tuple[str, str]:
    """Stage and reason of a failure.json; raises `UserError` if it is something else."""
    try:
        found = _Failure.model_validate(read_json(path))
    except ValidationError as error:
        raise UserError(
            f"{path} doesn't say why a run failed: {_first(error)}. Delete it; the next start does"
        ) from error
    return found.stage, found.reason


def metrics_row(line: bytes, *, where: str) -> dict[str, Any]:
    """A line of metrics.jsonl: numbers by name, `step` and `tokens` among them.

    A null is read as NaN: that number wasn't finite.

    Raises:
        UserError: it isn't; `where` says which line.
    """
    try:
        row = json.loads(line)
        _ROW.validate_python(row)
        steps = [row[name] for name in ("step", "tokens")]
        if not all(isinstance(one, int) and one >= 0 for one in steps):
            raise KeyError("whole numbers of step and tokens")
        return {name: math.nan if value is None else value for name, value in row.items()}
    except ValidationError as error:
        reason = f"is not a row of metrics: {_first(error)}"
    except KeyError as error:
        reason = f"has no {error.args[0]}"
    except (ValueError, RecursionError) as error:
        reason = f"is not JSON ({error})"
    raise UserError(f"{where} {reason}: mend or delete the line")


def _first(error: ValidationError) -> str:
    """The first mistake in words: `by_position.l0.3: input should be a valid number`."""
    mistake = error.errors(include_url=False)[0]
    place = ".".join(map(str, mistake["loc"]))
    message = mistake["msg"][0].lower() + mistake["msg"][1:]
    return f"{place}: {message}" if place else message

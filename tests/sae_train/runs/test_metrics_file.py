"""metrics.jsonl: always JSON, whatever the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from activation_cache.storage.files import json_text
from sae_train.runs.metrics_file import MetricsLog, read_metrics


def strict_json(text: str) -> Any:
    """Python's own reader takes NaN; other people's don't."""
    return json.loads(text, parse_constant=pytest.fail)


def test_numbers_that_are_not_finite_are_null_and_read_as_nan(tmp_path: Path):
    written = {"step": 1, "tokens": 64, "fvu": None, "mse": None, "l0": 3.5}
    with MetricsLog(tmp_path, from_step=0, tensorboard=False) as log:
        log.write({"step": 1, "tokens": 64, "fvu": math.inf, "mse": math.nan, "l0": 3.5})
    for _ in range(2):  # as written, and as a resumed run writes it again
        [row] = read_metrics(tmp_path)
        assert math.isnan(row["fvu"])
        assert math.isnan(row["mse"])
        assert (row["step"], row["l0"]) == (1, 3.5)
        [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert strict_json(line) == written
        with MetricsLog(tmp_path, from_step=1, tensorboard=False):
            pass


def test_json_has_null_for_what_is_not_finite_at_any_depth():
    value = {"a": [1.5, -math.inf, (math.nan, 2)], "b": {"c": math.inf}, "d": "nan", "e": True}
    expected = {"a": [1.5, None, [None, 2]], "b": {"c": None}, "d": "nan", "e": True}
    assert strict_json(json_text(value)) == expected

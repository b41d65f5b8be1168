"""JSON of a run's folder that somebody else wrote, or that is damaged: named, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from activation_cache.runtime.errors import UserError
from sae_train.runs.folder import newest_checkpoint
from sae_train.runs.metrics_file import FILE, read_metrics
from sae_train.runs.recorded import read_evaluation_record, read_failure
from tests.support.run_folders import evaluation


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("l0", "12", "l0: input should be a valid number"),
        ("l0", None, "l0: input should be a valid number"),
        ("fvu", 10**400, "fvu: input should be a valid number"),
        ("delta_loss", [1.0], "delta_loss: input"),
        ("step", -1, "step: input should be greater than or equal to 0"),
        ("settings", 3, "settings: input should be a valid dictionary"),
        ("by_position", {"l0": [1.0, "x"]}, "by_position.l0.1: input should be a valid number"),
        ("by_subset", {"a": 1.0}, "by_subset.a: input should be a valid dictionary"),
        ("by_precision", [{"model": "float32"}], "by_precision.0.sae: field required"),
        (
            "frequency_histogram",
            {"log10_edges": [0.0], "counts": [1]},
            "frequency_histogram: value error, 1 edges for 1 counts",
        ),
    ],
)
def test_an_evaluation_with_a_wrong_value_is_named(
    key: str, value: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation(l0=20.0, step=4) | {key: value}))
    with pytest.raises(UserError) as error:
        read_evaluation_record(path)
    assert str(error.value).startswith(f"{path} is not an evaluation: {words}")
    assert "run `sae evaluate`" in str(error.value)


def test_an_evaluation_of_other_versions_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    found = {"l0": 3, "fvu": None, "added later": [1, {"x": None}]}
    path.write_text(json.dumps(found))
    assert read_evaluation_record(path) == found


@pytest.mark.parametrize("text", ["[]", "{}", '{"stage": "train"}', '{"stage": 1, "reason": "x"}'])
def test_a_failure_without_a_reason_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "failure.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"failure.json doesn't say why a run failed: .*Delete it"):
        read_failure(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "should be a valid dictionary"),
        ('{"tokens": 1}', "has no step"),
        ('{"step": 1, "tokens": 1, "loss": "x"}', "loss: input should be a valid number"),
        ('{"step": 0.5, "tokens": 1}', "has no whole numbers of step and tokens"),
        ("{", "is not JSON"),
        ("[" * 5000 + "]" * 5000, "is not JSON"),
        ('{"step": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_a_line_that_is_no_row_is_named(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"step": 1, "tokens": 64, "loss": NaN}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2") as error:
        read_metrics(tmp_path)
    assert words in str(error.value)
    assert "mend or delete the line" in str(error.value)


def test_checkpoints_that_are_deleted_meanwhile_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another process begins the run anew (`--fresh`) after it was seen that there are some."""
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    assert newest_checkpoint(tmp_path) is None

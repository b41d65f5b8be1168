"""Evaluations at another precision than float32 say so; what can't be measured is refused."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from activation_cache.runtime.errors import UserError
from sae_train.config.run import EvaluationConfig
from sae_train.evaluate import evaluate as evaluate_module
from sae_train.evaluate.evaluate import evaluate
from tests.sae_train.evaluate.test_evaluate import FEW, World, world  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow


@pytest.fixture(name="few")
def settings() -> EvaluationConfig:
    return EvaluationConfig(**FEW)


def measured(world: World, few: EvaluationConfig, precision: str):  # noqa: F811 - the fixture
    config = few.model_copy(update={"precision": precision})
    return evaluate(world.runs[:1], settings=config, model=world.ours)[0]


def test_an_evaluation_says_at_which_precision_it_was_made(
    world: World,  # noqa: F811 - the fixture
    few: EvaluationConfig,
    monkeypatch: pytest.MonkeyPatch,
):
    exact = measured(world, few, "auto")
    assert (exact.precision, exact.settings["precision"]) == ("float32", "auto")
    found = measured(world, few, "bfloat16")
    assert found.precision == found.settings["precision"] == "bfloat16"
    for name in ("fvu", "loss", "loss_zero_ablated", "delta_loss"):
        ours, theirs = getattr(found, name), getattr(exact, name)
        assert ours != theirs
        assert ours == pytest.approx(theirs, rel=0.03)
    assert found.fingerprints["sae"] == exact.fingerprints["sae"]
    monkeypatch.setattr(evaluate_module, "_evaluate", None)
    assert measured(world, few, "bfloat16") == found  # it is current
    # One that the `auto` of another machine made is not.
    file = world.runs[0] / "evaluation.json"
    changed = json.loads(file.read_text()) | {"settings": exact.settings}
    file.write_text(json.dumps(changed))
    with pytest.raises(TypeError, match="not callable"):
        measured(world, few, "auto")


def test_settings_of_float32_are_those_of_before():
    assert "precision" not in EvaluationConfig().recorded()
    assert EvaluationConfig(precision="auto").recorded()["precision"] == "auto"


def test_what_can_not_be_measured_is_refused(
    world: World,  # noqa: F811 - the fixture
    few: EvaluationConfig,
):
    with pytest.raises(UserError, match=r"evaluation.precision is tf32, .* cpu .* have float32"):
        measured(world, few, "tf32")
    with pytest.raises(ValidationError, match="and precision is bfloat16: set precision to float"):
        EvaluationConfig(precision="bfloat16", compare_precision=True)

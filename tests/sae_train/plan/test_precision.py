"""A plan counts with the peak of the products that its accelerator would make, and says which."""

from __future__ import annotations

import json
from typing import Any

import pytest

from activation_cache.runtime.errors import UserError
from docs import suite_costs
from launch.cli import main
from launch.show.plan_tables import tables
from sae_train.config.run import Config, MeshConfig
from sae_train.plan.accelerators import ACCELERATORS
from sae_train.plan.memory import Shape
from sae_train.plan.verdict import READER_RATE, Assumptions
from sae_train.plan.work import MOVED, step_traffic
from tests.sae_train.plan.test_plan import rendered
from tests.support.paths import ROOT
from tests.support.plan_configs import plan_of, scope_config

EXAMPLE = str(ROOT / "configs" / "gemma2_2b.yaml")


def with_precision(chosen: str, **changes: Any) -> Config:
    train = {"precision": chosen, "tokens": 8e9, "sparsity": {"coefficient": 6e-4}}
    return scope_config(train=train, **changes)


# The data sheets' dense figures, in TFLOP/s. A TPU makes three and six bfloat16 passes.
@pytest.mark.parametrize(
    ("name", "chosen", "used", "peak"),
    [
        ("h100", "auto", "bfloat16", 989),
        ("h200", "tf32", "tf32", 494.5),
        ("h200", "float32", "float32", 67),
        ("h100", "bfloat16_3x", "bfloat16_3x", 989 / 3),
        ("a100", "auto", "bfloat16", 312),
        ("a100", "tf32", "tf32", 156),
        ("a100", "float32", "float32", 19.5),
        ("v5e", "auto", "bfloat16", 197),
        ("v5p", "float32", "float32", 459 / 6),
        ("v6e", "bfloat16_3x", "bfloat16_3x", 918 / 3),
    ],
)
def test_a_step_is_counted_at_the_peak_of_its_precision(
    name: str, chosen: str, used: str, peak: float
) -> None:
    plan = plan_of(with_precision(chosen), name, mfu=0.5)
    (on,) = plan.accelerators
    (verdict,) = on.verdicts
    assert verdict.precision == used
    assert verdict.bound == "compute"
    seconds = 10 * 4096 * 3584 * 131_072 / (8 * peak * 1e12 * 0.5)
    assert verdict.step_seconds == pytest.approx(seconds)
    text = " ".join(" ".join(rendered(tables(plan)[-1:])).split())
    assert f" {used} " in text
    assert f"{used} {peak:.3g}" in text


@pytest.mark.parametrize(
    ("model", "used", "peak"),
    [
        ({"dtype": "bfloat16"}, "bfloat16", 989e12),
        ({"dtype": "bfloat16", "precision": "float32"}, "bfloat16", 989e12),
        ({"dtype": "float32"}, "bfloat16", 989e12),
        ({"dtype": "float32", "precision": "float32"}, "float32", 67e12),
    ],
)
def test_harvesting_is_counted_at_the_model_s(
    model: dict[str, str], used: str, peak: float
) -> None:
    plan = plan_of(with_precision("float32", model=model), mfu=0.5)
    (on,) = plan.accelerators
    assert on.harvest_precision == used
    assert on.harvest_hours == pytest.approx(plan.harvest.flops / (8 * peak * 0.5) / 3600)


@pytest.mark.parametrize("key", ["train.precision", "model.precision"])
def test_no_peak_at_a_precision(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [f"{key}=tf32", "model.dtype=float32", "sweep=null"]
    assert main(["plan", EXAMPLE, *asked, "--accelerator", "v5p"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    for words in (
        f"{key} is tf32, and TPU v5p has no peak at it",
        f"set {key} to float32, bfloat16_3x, bfloat16 or auto",
        "a100, h100, h200",
    ):
        assert words in told.err
    # Without an accelerator those are compared that can.
    assert main(["plan", EXAMPLE, *asked, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [on["accelerator"]["name"] for on in record["accelerators"]] == ["a100", "h100", "h200"]
    assert main(["plan", EXAMPLE, *asked]) == 0
    assert "left out: v5e, v5p, v6e" in capsys.readouterr().out


def test_a_suite_without_a_peak() -> None:
    with pytest.raises(UserError, match=r"train\.precision is tf32, and TPU v5p has no peak"):
        ACCELERATORS["v5p"].training("tf32")
    suite = str(ROOT / "configs" / "gemma_scope" / "9b-it.yaml")
    assert main(["plan", suite, "--accelerator", "v5p", "train.precision=tf32"]) == 2


def test_traffic_is_counted_by_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(4096, 2304, 16_384, MeshConfig(data=2, model=4))
    for (kind, precision), moved in MOVED.items():
        expected = 16_384 / 4 * (moved.matrix * 2304 + moved.latents * 4096 / 2)
        assert step_traffic(shape, kind=kind, precision=precision) == round(expected)
    for chip in ACCELERATORS.values():
        assert {one for kind, one in MOVED if kind == chip.kind} == chip.flops.keys()


def test_rows_that_come_too_slowly_are_said() -> None:
    def last_table(chosen: str) -> tuple[bool, float, str]:
        plan = plan_of(with_precision(chosen, mesh={"model": 2}))
        (verdict,) = plan.accelerators[0].verdicts
        rate = verdict.read_bytes_per_second
        assert rate is not None
        return verdict.above_reader, rate, "\n".join(rendered(tables(plan)[-1:]))

    above, rate, text = last_table("bfloat16")
    assert above
    assert rate > READER_RATE
    assert "GB/s†" in text
    assert "1.41 GB/s that one process read" in text
    above, rate, text = last_table("float32")
    assert not above
    assert rate < READER_RATE
    assert "†" not in text


def test_the_page_and_the_readme_have_what_is_printed() -> None:
    page = (ROOT / "docs" / "suites.md").read_text()
    assert next(suite_costs.table(chip="h200", assumptions=Assumptions())) in page
    assert all(f"| `{suite}` |" in page for suite in suite_costs.SUITES)
    assumptions = Assumptions(price=2.5)
    for suite in ("gemma_scope/9b-it", "gemma_scope/27b-pt"):
        assert suite_costs.row(suite, chip="h200", assumptions=assumptions) in page
    line = next(
        line for line in page.splitlines() if "`gemma_scope/2b-pt`" in line and "PB" in line
    )
    hours, hours_float32 = line.split(" | ")[7], line.split(" | ")[9].removesuffix(" |")
    readme = (ROOT / "README.md").read_text()
    assert f"{hours} H200 hours" in readme
    assert hours_float32 in readme

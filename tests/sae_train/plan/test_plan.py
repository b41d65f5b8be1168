"""`sae plan`: what fits, how long it takes, what it costs, and the command."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from activation_cache.runtime.amounts import bytes_text
from activation_cache.runtime.errors import UserError
from launch.cli import main
from launch.config.job import Job
from launch.show.plan_tables import tables
from launch.show.units import flops_text
from launch.sweep.expand import expand
from sae_train.config.run import MeshConfig
from sae_train.plan.accelerators import ACCELERATORS, accelerator
from sae_train.plan.memory import Shape, cohort_memory, nearest_mesh, step_memory
from sae_train.plan.plan import Plan, make_plan
from sae_train.plan.verdict import USABLE_MEMORY, Assumptions
from tests.support.configs import as_job
from tests.support.plan_configs import plan_of, scope_config


def test_hours_reads_and_cost() -> None:
    plan = plan_of(scope_config(), "h200", mfu=0.5, price=3.0)
    (on,) = plan.accelerators
    (verdict,) = on.verdicts
    seconds = 10 * 4096 * 3584 * 131_072 / (8 * 989e12 * 0.5)
    assert verdict.fits
    assert verdict.bound == "compute"
    assert verdict.step_seconds == pytest.approx(seconds)
    assert verdict.hours == pytest.approx(1_953_125 * seconds / 3600)
    assert verdict.cost == pytest.approx(verdict.hours * 8 * 3.0)
    assert verdict.read_bytes_per_second == pytest.approx(4096 * 3584 * 4 / seconds)
    harvest = plan.harvest.flops / (8 * 989e12 * 0.5) / 3600  # the model in bfloat16
    assert on.harvest_hours == pytest.approx(harvest)
    assert on.total_hours == pytest.approx(harvest + verdict.hours)
    assert on.total_cost == pytest.approx((harvest + verdict.hours) * 8 * 3.0)


@pytest.mark.parametrize(
    ("sae", "step", "ways"),
    [
        ({}, "auto", (False, True)),
        ({}, "sparse", (True, True)),
        ({}, "dense", (False, False)),
        ({"architecture": "relu"}, "auto", (False, False)),
        ({"architecture": "topk", "k": 64}, "auto", (False, False)),
        ({"architecture": "batch_topk", "k": 64}, "dense", (False, False)),
    ],
)
def test_the_step_a_run_takes_is_said_and_its_memory_counted(
    sae: dict[str, Any], step: str, ways: tuple[bool, bool]
) -> None:
    penalty = {"relu": "l1", "topk": "none", "batch_topk": "none"}.get(
        sae.get("architecture"), "l0"
    )
    sparsity = {"penalty": penalty} | ({} if penalty == "none" else {"coefficient": 1})
    train = {"step": step, "tokens": 8e9, "sparsity": sparsity}
    plan = plan_of(scope_config(sae=sae, train=train))
    (run,) = plan.runs
    assert (run.sparse_path, run.sparse_path_cpu) == ways
    text = "\n".join(rendered(tables(plan)))
    assert ("sparse" in text, "dense" in text) == (any(ways), not all(ways))
    matrix = run.shape.local(("F", "D")) * 4
    for sparse, memory in zip(ways, (run.memory, run.memory_cpu), strict=True):
        temporary = memory.items["gradients"] + memory.items["activations"]
        assert (temporary < 2 * matrix) == sparse


def test_small_batches_are_bound_by_memory() -> None:
    config = scope_config(train={"batch_size": 64, "tokens": 8e9, "sparsity": {"coefficient": 1}})
    (on,) = plan_of(config, "v6e").accelerators
    assert on.verdicts[0].bound == "memory"


def test_what_does_not_fit_names_the_nearest_mesh_that_does() -> None:
    wide = scope_config(sae={"width": 1_048_576}, mesh={"model": 2})
    (on,) = plan_of(wide, "v5p").accelerators
    assert on.verdicts[0].fits
    (on,) = plan_of(wide, "v5e").accelerators
    (verdict,) = on.verdicts
    assert not verdict.fits
    assert (verdict.hours, on.total_hours, verdict.read_bytes_per_second) == (None, None, None)
    assert verdict.mesh == MeshConfig(data=1, model=16), "not 2 x 8: more shards of latents"
    usable = int(ACCELERATORS["v5e"].hbm_bytes * USABLE_MEMORY)

    def total(data: int, model: int) -> int:
        return step_memory(Shape(4096, 3584, 2**20, MeshConfig(data=data, model=model))).total

    assert total(verdict.mesh.data, verdict.mesh.model) <= usable
    # Everything as near or nearer (fewer doublings) is too small.
    doublings = math.log2(verdict.mesh.data) + math.log2(verdict.mesh.model / 2)
    for data, model in [(1, 2), (1, 4), (2, 2), (1, 8), (2, 4), (4, 2), (8, 2)]:
        if math.log2(data) + math.log2(model / 2) < doublings:
            assert total(data, model) > usable


def test_the_number_of_devices_is_a_bound() -> None:
    wide = scope_config(sae={"width": 1_048_576}, mesh={"model": 2})
    (on,) = plan_of(wide, "v5e", devices=4).accelerators
    assert on.verdicts[0].mesh is None
    (on,) = plan_of(scope_config(), "h200", devices=4).accelerators
    assert not on.verdicts[0].fits, "the mesh has eight devices"
    assert on.verdicts[0].mesh == MeshConfig(data=1, model=4)


def test_a_mesh_always_divides() -> None:
    shape = Shape(25, 2304, 3**10, MeshConfig(data=1, model=1))
    usable = step_memory(shape).total * 2 // 3
    mesh = nearest_mesh(shape, "float32", usable=usable, most=100)
    assert mesh == MeshConfig(data=1, model=3), "two would do but for the remainder"
    assert nearest_mesh(shape, "float32", usable=1000, most=100) is None


def test_more_than_jax_takes_of_a_gpu_is_said() -> None:
    config = scope_config(sae={"width": 1_048_576}, mesh={"model": 1})
    plan = plan_of(config, "h200")
    (on,) = plan.accelerators
    assert 0.75 * 141e9 < plan.runs[0].memory.total < 0.92 * 141e9
    assert on.verdicts[0].fits
    assert on.verdicts[0].above_default


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mfu": 0.0}, "--mfu is 0"),
        ({"mfu": 40.0}, "--mfu is 40"),
        ({"mfu": math.nan}, "--mfu is nan"),
        ({"devices": 0}, "--devices is 0"),
        ({"price": -1.0}, "--price is -1"),
        ({"price": math.inf}, "--price is inf"),
    ],
)
def test_assumptions_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Assumptions(**given)


def test_accelerators_have_sources() -> None:
    assert list(ACCELERATORS) == ["v5e", "v5p", "v6e", "a100", "h100", "h200"]
    for chip in ACCELERATORS.values():
        assert chip.source
        assert 0 < chip.flops["float32"] < chip.flops["bfloat16_3x"] < chip.flops["bfloat16"]
        assert 16 * 2**30 <= chip.hbm_bytes < 200 * 2**30
    assert accelerator("H200").hbm_bytes == 141_000_000_000
    with pytest.raises(UserError, match="b200 is not in the table: use one of v5e, v5p"):
        accelerator("b200")


CONFIG = """\
name: wide
model: {weights: google/gemma-2-2b}
text: {source: ["*.txt"]}
cache: {path: STORE, sites: [{site: resid_post, layers: [12]}], tokens: 1e8}
sae: {site: resid_post, layer: 12}
train: {tokens: 1e8, sparsity: {coefficient: 1e-3}}
output: OUTPUT
sweep: {grid: {sae.width: [16384, 65536], train.seed: [0, 1]}}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    text = CONFIG.replace("STORE", str(tmp_path / "store"))
    path.write_text(text.replace("OUTPUT", str(tmp_path / "output")))
    return path


def test_the_command_prints_tables_and_leaves_nothing(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--accelerator", "h200", "--price", "2.5", "--mfu", "0.4"]
    assert main(["plan", str(config_file), *given]) == 0
    text = capsys.readouterr().out
    for words in ("resid_post.12", "and 1 like it, each", "4096×2304×65536", "activations"):
        assert words in text
    assert "NVIDIA H200" in text
    assert main(["plan", str(config_file), "mesh.model=4", "sweep=null"]) == 0
    text = capsys.readouterr().out
    assert all(chip.title in text for chip in ACCELERATORS.values())
    assert "1 x 4" in text
    assert [path.name for path in config_file.parent.iterdir()] == ["config.yaml"]


def test_json_holds_every_run_and_the_total(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(config_file), "--json", "--accelerator", "v5p", "--price", "1"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [run["shape"]["width"] for run in record["runs"]] == [16_384, 16_384, 65_536, 65_536]
    (on,) = record["accelerators"]
    hours = [verdict["hours"] for verdict in on["verdicts"]]
    assert on["train_hours"] == pytest.approx(sum(hours))
    assert hours[2] == pytest.approx(4 * hours[0])
    assert on["total_hours"] == pytest.approx(on["harvest_hours"] + sum(hours))
    assert on["total_cost"] == pytest.approx(on["total_hours"])
    assert record["store"]["total_bytes"] > 1e8 * 2304 * 4
    memory = record["runs"][0]["memory"]
    assert memory["total"] == sum(memory["items"].values()) + memory["next_batch"]
    assert memory["biggest"] == "activations"


def test_a_phase_through_the_model_is_planned(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["plan", str(config_file), "sweep=null", "--json", "--accelerator", "h100"]
    records = []
    for own in ([], ["train.end_to_end.tokens=1_000_000"]):
        assert main([*given, *own]) == 0
        records.append(json.loads(capsys.readouterr().out))
    plain, through = records
    phase = through["runs"][0]["end_to_end"]
    assert plain["runs"][0]["end_to_end"] is None
    assert (phase["steps"], phase["sequences"]) == (1_000_000 // 4096, 4)
    # Gemma 2 2B: 26 layers of 77.9 M weights and attention, 13 of them three times more; 256,000
    # tokens of 2,304, times three.
    layers = 4 * 1024 * 2 * 77.9e6 * (26 + 3 * 13)
    assert phase["model_flops"] == pytest.approx(layers + 3 * 4 * 1023 * 2 * 590e6, rel=0.1)
    assert phase["memory"]["items"]["language model"] == pytest.approx(2 * 2.614e9, rel=0.01)
    hours = [one["accelerators"][0]["verdicts"][0]["hours"] for one in records]
    added = phase["steps"] * phase["model_flops"] / (0.4 * 989e12) / 3600
    assert hours[1] - hours[0] == pytest.approx(added, rel=0.02)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--accelerator tpuv9", "tpuv9 is not in the table"),
        ("--mfu 40", "--mfu is 40"),
        ("--mfu many", "invalid float value: 'many'"),
        ("--devices 0", "--devices is 0"),
        ("sae.layer=99 cache.sites.0.layers=[99]", "layer 99"),
        ("model.weights=meta/llama.gguf", "To plan without weights"),
        ("mesh.model=3", "not divisible by mesh axis 'model'"),
    ],
)
def test_mistakes_are_told(
    config_file: Path, line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(config_file), *line.split()]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_numbers_in_words() -> None:
    assert bytes_text(999) == "999 B"
    assert bytes_text(999_600) == "1 MB"
    assert bytes_text(36_900_000_000_000) == "36.9 TB"
    assert bytes_text(6.18e15) == "6.18 PB"
    assert bytes_text(2.5e18) == "2,500 PB"
    assert flops_text(1.5e12) == "1.5 TFLOP"


def plan_of_sweep(config: Job, *chips: str) -> Plan:
    assert config.sweep is not None
    return make_plan(
        config,
        runs=[(run.name, run.config) for run in expand(config)],
        max_members=config.sweep.cohort.max_members,
        accelerators=[accelerator(name) for name in chips],
        assumptions=Assumptions(),
    )


def test_a_cohort_s_memory_is_its_states_and_one_step() -> None:
    sweep = {"grid": {"sae.width": [16_384, 262_144], "train.sparsity.coefficient": [1e-4, 1e-3]}}
    config = as_job(scope_config(mesh={"data": 1, "model": 2}), sweep=sweep)
    plan = plan_of_sweep(config, "v5e", "h200")
    (cohort,) = plan.cohorts
    assert cohort.runs == (0, 1, 2, 3)
    narrow, wide = plan.runs[0].memory, plan.runs[2].memory
    state = 2 * sum(one.items["weights"] + one.items["second moment"] for one in (narrow, wide))
    temporaries = wide.items["gradients"] + wide.items["activations"]
    # The batch is there once, and once more the one put there meanwhile.
    assert cohort.memory.total == state + temporaries + wide.items["batch"] + wide.next_batch
    assert cohort_memory([wide]) == wide
    small, large = (chip.cohorts[0] for chip in plan.accelerators)
    assert (small.fits, small.at_once, large.fits, large.at_once) == (False, 0, True, 4)
    assert small.read_bytes_per_second is None
    rates = [one.read_bytes_per_second for one in plan.accelerators[1].verdicts]
    # Of steps one after the other, each with its batch, a quarter of the batches is left.
    assert large.read_bytes_per_second == pytest.approx(1 / sum(1 / rate for rate in rates if rate))
    assert [chip.train_hours for chip in plan.accelerators][1] == pytest.approx(
        sum(one.hours for one in plan.accelerators[1].verdicts if one.hours)
    )


def test_how_many_of_a_cohort_fit() -> None:
    grid = {"train.sparsity.coefficient": [0.1 * n for n in range(1, 7)]}
    config = as_job(scope_config(sae={"width": 1_048_576}, mesh={"model": 4}), sweep={"grid": grid})
    plan = plan_of_sweep(config, "a100")
    (verdict,) = plan.accelerators[0].cohorts
    usable = plan.accelerators[0].usable_bytes
    one = plan.runs[0].memory
    assert not verdict.fits
    for count in range(1, 7):
        fits = cohort_memory([one] * count).total <= usable
        assert fits == (count <= verdict.at_once)
    assert 1 < verdict.at_once < 6
    text = "\n".join(rendered(tables(plan)))
    assert f"no, {verdict.at_once} do" in text
    assert "sweep.cohort.max_members" in text


def test_the_names_of_runs_have_room_beside_their_numbers() -> None:
    grid = {"train.sparsity.coefficient": [1e-3, 2e-3]}
    plan = plan_of_sweep(as_job(scope_config(), sweep={"grid": grid}), "h200")
    _, work, memory, *_ = tables(plan)
    for table in (work, memory):
        assert any("coefficient_0.001" in line for line in rendered([table], width=140))


def rendered(found: list[Any], *, width: int = 250) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    for table in found:
        console.print(table)
    return console.export_text().splitlines()

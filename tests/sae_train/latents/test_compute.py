"""Every number of every latent against brute force, and the same bytes however it was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from activation_cache.runtime import exchange, processes
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage.locks import folder_lock
from sae_train.inference.sae import Sae
from sae_train.latents import parts, schema, walk
from sae_train.latents.compute import _Work, compute_jobs
from sae_train.latents.contexts import context_rows
from sae_train.latents.job import LatentsJob
from sae_train.latents.parts import opened_parts
from sae_train.latents.reader import open_latents
from sae_train.latents.schema import ACTIVITY, CONTEXTS, DIRECTIONS, SUMMARY, Table
from tests.sae_train.latents.support import SETTINGS, S, World, make_job, make_world
from tests.support.oracles import latents as brute_force
from tests.support.training import stop_after

# Of float32: values near 1 from products in another order of additions.
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 2e-5}
KINDS = {
    "jumprelu": {"architecture": "jumprelu"},
    "topk": {"architecture": "topk"},
    "transcoder": {"target": "mlp_out"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards, several parts of firings and of weights, co-firing on all tokens."""
    make_small(monkeypatch)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "SHARD_TOKENS", 2 * 3 * S)
    monkeypatch.setattr(schema, "PART_FIRINGS", 700)
    monkeypatch.setattr(schema, "PART_ROWS", 17)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, world: World, tmp_path_factory) -> list[LatentsJob]:
    """An SAE of each kind and another of its sweep, computed together."""
    folder, kind = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        monkeypatch.setattr(schema, "WINDOWS_KEPT", 30)
        jobs = [
            make_job(world, folder / "a", F=60, **kind),
            make_job(world, folder / "b", F=31, **kind),
        ]
        compute_jobs(jobs, world.models)
    return jobs


def rows(job: LatentsJob, table: Table) -> list[dict[str, Any]]:
    return pq.read_table(job.folder / table.name).to_pylist()


def assert_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Whole numbers are equal, real ones close; lists entry by entry."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            where = f"{key} of latent {one['latent']}"
            if value is None or isinstance(value, str) or other[key] is None:
                assert value == other[key], where
            elif key.endswith(
                ("values", "cosines", "cosine", "logit", "low", "high", "mean", "maximum")
            ):
                np.testing.assert_allclose(value, other[key], err_msg=where, **CLOSE)
            elif key.endswith("logit_counts"):
                # A logit on an edge may be on either side: its product has another order.
                assert np.abs(np.cumsum(value) - np.cumsum(other[key])).max() <= 2, where
            else:
                np.testing.assert_allclose(value, other[key], rtol=1e-12, err_msg=where)


def test_statistics_of_text_are_those_of_brute_force(pair: list[LatentsJob], world: World):
    for job in pair:
        walked = world.walked(job.job.sae)
        expected = [brute_force.activity(walked, latent)[1] for latent in range(job.width)]
        assert_rows(rows(job, ACTIVITY), expected)


def test_contexts_are_those_of_a_sort_of_all_firings(pair: list[LatentsJob], world: World):
    for job in pair:
        walked = world.walked(job.job.sae)
        expected = [
            row
            for latent in range(job.width)
            for row in brute_force.contexts(walked, latent, top=6, per_interval=2, size=10)
        ]
        found = rows(job, CONTEXTS)
        assert_rows(found, expected)
        assert {row["interval"] for row in found} >= set(range(5))


def test_windows_name_all_latents_that_fire_in_them(pair: list[LatentsJob], world: World):
    for job in pair:
        walked = world.walked(job.job.sae)
        found = pq.read_table(job.folder / schema.WINDOWS).to_pylist()
        assert found == brute_force.windows(walked, size=10, most=30)
        assert len(found) == 30
        latents = open_latents(job.job.folder)
        for latent in (0, job.width - 1):
            silent = {
                (row["sequence"], row["start"]) for row in found if latent not in row["latents"]
            }
            assert {(o.sequence, o.position) for o in latents.silent_windows(latent)} == silent


def test_directions_and_summary_are_those_of_float64(pair: list[LatentsJob], world: World):
    for number, job in enumerate(pair):
        saes = [job.job.sae, pair[1 - number].job.sae]
        transcoder = job.job.target != job.job.tap
        directed = [
            brute_force.direction(
                latent,
                [np.asarray(sae.W_dec) for sae in saes],
                encoders=[np.asarray(sae.W_enc).T for sae in saes] if transcoder else [],
                embedding=world.embedding,
                gain=world.gain,
            )
            for latent in range(job.width)
        ]
        assert_rows(rows(job, DIRECTIONS), directed)
        walked = world.walked(job.job.sae)
        summary = [
            brute_force.summary_of(brute_force.activity(walked, latent)[0], directed[latent])
            for latent in range(job.width)
        ]
        assert_rows(rows(job, SUMMARY), summary)
        unit = np.asarray(saes[0].W_dec, np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        cosines = np.abs(unit @ unit.T)[~np.eye(job.width, dtype=bool)]
        record = open_latents(job.job.folder).record
        assert record.mean_abs_cosine == pytest.approx(cosines.mean(), rel=1e-5)
        assert (record.mean_abs_encoder_cosine is not None) == transcoder
        assert record.tokens == walked.usable.sum() == record.cofiring_tokens
        assert record.alive == (walked.acts > 0).any(axis=(0, 1)).sum()


def test_frequencies_are_what_the_sae_fires(pair: list[LatentsJob], world: World):
    for job in pair:
        walked = world.walked(job.job.sae)
        summary = open_latents(job.job.folder).summary
        fired = (walked.acts > 0).sum(axis=(0, 1))
        np.testing.assert_array_equal(summary["count"], fired)
        np.testing.assert_array_equal(summary["frequency"], fired / walked.usable.sum())


def test_values_of_a_context_are_the_saes_own(pair: list[LatentsJob], world: World):
    walked = world.walked(pair[0].job.sae)
    index = int((walked.acts > 0).sum(axis=(0, 1)).argmax())
    context = open_latents(pair[0].job.folder)[index].contexts[0]
    row, start = context.sequence - 7, context.position - context.peak
    own = walked.acts[row, start : start + len(context.values), index]
    np.testing.assert_array_equal(np.float32(context.values), own)


def folder_bytes(job: LatentsJob) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in job.folder.iterdir() if path.is_file()}


def alone(world: World, folder: Path) -> list[LatentsJob]:
    """Two jobs whose paths, and so whose records, don't tell the folders apart."""
    return [make_job(world, folder / name, F=width) for name, width in (("a", 60), ("b", 31))]


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory) -> list[dict[str, bytes]]:
    jobs = alone(world, tmp_path_factory.mktemp("undisturbed"))
    compute_jobs(jobs, world.models)
    return [folder_bytes(job) for job in jobs]


def test_parts_and_shards_of_other_sizes_give_the_same_bytes(
    world: World, tmp_path: Path, undisturbed: list[dict[str, bytes]]
):
    jobs = alone(world, tmp_path)
    compute_jobs(jobs, world.models)
    for job, expected in zip(jobs, undisturbed, strict=True):
        assert folder_bytes(job) == expected


def test_a_part_s_contexts_are_bounded_where_latents_fire_little(
    world: World,
    tmp_path: Path,
    undisturbed: list[dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
):
    """Each firing may be a context, of many tokens: firings alone are no bound."""
    monkeypatch.setattr(schema, "PART_FIRINGS", 2**22)
    monkeypatch.setattr(schema, "PART_CONTEXT_TOKENS", 3000)
    sizes = []

    def watched(*arguments: Any, **options: Any) -> pa.Table:
        rows = context_rows(*arguments, **options)
        sizes.append(len(rows["tokens"].combine_chunks().flatten()))
        return rows

    monkeypatch.setattr(parts, "context_rows", watched)
    jobs = alone(world, tmp_path)
    compute_jobs(jobs, world.models)
    assert [folder_bytes(job) for job in jobs] == undisturbed
    assert 2 < len(sizes) < 12
    assert max(sizes) <= 3000


@pytest.mark.parametrize("calls", [0, 3, 8, 10, 14])
def test_stopped_and_continued_the_bytes_are_the_same(
    world: World, tmp_path: Path, undisturbed: list[dict[str, bytes]], calls: int
):
    jobs = alone(world, tmp_path)
    with pytest.raises(Interrupted):
        compute_jobs(jobs, world.models, stop=stop_after(calls))
    assert not (jobs[0].folder / "latents.json").exists()
    done = {path: path.stat().st_mtime_ns for path in jobs[0].scratch.rglob("*.arrow")}
    kept: dict[Path, int] = {}

    def look() -> bool:
        kept.update({path: path.stat().st_mtime_ns for path in done if path.exists()})
        return False

    compute_jobs(jobs, world.models, stop=look)
    assert kept == done  # nothing that was finished is made again
    for job, expected in zip(jobs, undisturbed, strict=True):
        assert folder_bytes(job) == expected
        assert not job.scratch.exists()


def test_two_processes_give_the_same_bytes_as_one(
    world: World,
    tmp_path: Path,
    undisturbed: list[dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
):
    """Each process's share is what a call with its number does, whoever is first."""
    jobs = alone(world, tmp_path)
    text = walk.Text.of(jobs[0])
    work = _Work(jobs, jobs, world.models, lambda: False)
    for job in jobs:
        job.scratch.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(processes, "process_count", lambda: 2)
        patched.setattr(exchange, "stop_asked", lambda stop: False)
        for index in (1, 0):
            patched.setattr(processes, "process_index", lambda index=index: index)
            walk.walk(jobs, text, lambda: world.models.given, stop=work.stop)
        written = [path.name for path in jobs[0].scratch.iterdir()]
        for index in (1, 0):
            patched.setattr(processes, "process_index", lambda index=index: index)
            with opened_parts(jobs, text, lambda: work._readout) as one:
                work._compute([one])
                missing = [
                    unit for unit in one.units if not one.file(unit.kind, unit.latents).exists()
                ]
                assert len(missing) == (len(one.units) + 1) // 2 * index
    assert len(written) == text.num_shards > 4
    world.models.given.activations.reset_mock()
    compute_jobs(jobs, world.models)
    world.models.given.activations.assert_not_called()
    for job, expected in zip(jobs, undisturbed, strict=True):
        assert folder_bytes(job) == expected


def test_what_is_current_is_kept(world: World, tmp_path: Path):
    jobs = alone(world, tmp_path)
    compute_jobs(jobs, world.models)
    before = [folder_bytes(job) for job in jobs]
    world.models.given.activations.reset_mock()
    compute_jobs(jobs[:1], world.models)  # fewer neighbours asked for
    compute_jobs(jobs, world.models)
    world.models.given.activations.assert_not_called()
    assert [folder_bytes(job) for job in jobs] == before
    (jobs[0].folder / CONTEXTS.name).unlink()
    compute_jobs(jobs, world.models)
    assert [folder_bytes(job) for job in jobs] == before
    other = SETTINGS.model_copy(update={"top": 2})
    changed = make_job(world, tmp_path / "a", F=60, settings=other)
    compute_jobs([changed], world.models)
    assert folder_bytes(changed) != before[0]


def test_two_walks_in_one_folder_are_refused(world: World, tmp_path: Path):
    (job,) = alone(world, tmp_path)[:1]
    with folder_lock(job.folder), pytest.raises(UserError, match=r"in use by another process"):
        compute_jobs([job], world.models)


def test_a_disk_that_fills_up_is_told_and_nothing_is_lost(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    jobs = alone(world, tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr(pa.ipc, "new_file", full)
        with pytest.raises(UserError, match=r"firings-000000.arrow: the disk is full"):
            compute_jobs(jobs, world.models)
    with monkeypatch.context() as failing:
        failing.setattr(pq, "ParquetWriter", full)
        with pytest.raises(UserError, match=r"contexts.parquet: the disk is full"):
            compute_jobs(jobs, world.models)
    world.models.given.activations.reset_mock()
    compute_jobs(jobs, world.models)
    world.models.given.activations.assert_not_called()
    assert len(open_latents(jobs[0].folder)) == 60


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_told(tmp_path: Path, value: float):
    world = make_world(tmp_path, bad=value)
    with pytest.raises(UserError, match=r"resid_post.1 of tiny holds NaN or infinity"):
        compute_jobs([make_job(world, tmp_path / "a")], world.models)


def test_a_text_of_special_tokens_alone_is_told(tmp_path: Path):
    world = make_world(tmp_path)
    world.tokens[:] = 1
    with pytest.raises(UserError, match=r"hold nothing but special tokens"):
        compute_jobs([make_job(world, tmp_path / "a")], world.models)


def test_pairs_found_on_a_device_are_those_found_on_the_host(world: World):
    sae: Sae = make_job(world, Path("x")).job.sae
    latents = walk._encode(sae, world.acts[:2].reshape(-1, world.acts.shape[-1]))
    for here, there in zip(walk._on_host(latents), walk._on_device(latents), strict=True):
        np.testing.assert_array_equal(here, there)
    nothing = jnp.zeros((4, 5))
    assert [len(part) for part in walk._on_device(nothing)] == [0, 0]

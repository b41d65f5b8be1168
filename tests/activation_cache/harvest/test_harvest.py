"""Harvesting a small random Gemma: what the rows are, what stops it, what it refuses."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from activation_cache.config import ModelConfig, SiteConfig
from activation_cache.gemma.taps import Tap
from activation_cache.harvest import fill_bucket, worker
from activation_cache.harvest import harvest as harvest_module
from activation_cache.harvest.harvest import harvest
from activation_cache.harvest.matching_store import open_matching_store
from activation_cache.harvest.sizes import check_memory
from activation_cache.language_model import locate, tokenizer
from activation_cache.language_model.model import load_model
from activation_cache.language_model.tokenizer_vocabulary import Pieces
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.storage import safetensors_file
from activation_cache.storage.locks import folder_lock
from activation_cache.storage.row_range import Segment
from activation_cache.store import writer
from activation_cache.store.order import bucket_order, sequence_order
from activation_cache.store.store import Store, open_store
from activation_cache.store.tap_array import Packing
from tests.support.harvests import BUCKETS, ROWS, StopAfter, interrupted, sections
from tests.support.stores import TAP, file_hashes, make_manifest
from tests.support.tiny_gemma import write_tiny_gemma
from tests.support.tiny_gguf import write_gguf

pytestmark = pytest.mark.slow


def test_rows_are_the_model_s_activations_at_their_provenance(finished: Store, gemma: Path):
    found = finished.provenance(start=0, stop=ROWS)
    model = load_model(ModelConfig(weights=str(gemma), dtype="float32"))
    tokens = finished.tokens.read(range(finished.tokens.num_sequences))
    taps = (Tap("resid_post", 0), Tap("resid_post", 2), Tap("attn_out_prelinear", 1))
    assert set(finished.taps) == set(taps)
    expected = model.activations(tokens, taps)
    for tap in taps:
        rows = finished.read(tap, start=0, stop=ROWS)
        wanted = np.asarray(expected[tap])[found.sequence, found.position]
        np.testing.assert_allclose(rows, wanted, rtol=1e-5, atol=1e-5)
        norms = np.square(rows.astype(np.float64)).sum(axis=1)
        info = finished.tap_info(tap)
        assert info.mean_squared_norm == pytest.approx(norms.mean(), rel=1e-12)
        assert info.width == rows.shape[1]


@pytest.mark.parametrize(
    ("length", "change", "message"),
    [
        (16, (b"[401, 20]", b"[401, 19]"), "not a whole safetensors file"),
        (16, (b'"F32"', b'"F8_E4M3"'), "is stored as F8_E4M3"),
        (257, (b"", b""), r"sequence_length is 257 and the model's context has 256 tokens"),
    ],
)
def test_what_no_harvest_can_use_is_told_before_the_text_is_read(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    change: tuple[bytes, bytes],
    message: str,
):
    made = sections(write_tiny_gemma(tmp_path / "gemma"), corpus, tmp_path / "store")
    made["text"] = made["text"].model_copy(update={"sequence_length": length})
    weights = tmp_path / "gemma" / "model.safetensors"
    data = weights.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    changed = header.replace(*change, 1)
    weights.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + len(header) :])
    monkeypatch.setattr(harvest_module, "prepare_tokens", None)
    with pytest.raises(UserError, match=message):
        harvest(**made)


def test_the_tokenizer_is_built_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Although it is asked for to tokenise, to convert the weights and to load the model."""
    build, built = tokenizer.tokenizer_from_pieces, []

    def noted(pieces: Pieces, *, source: str) -> Any:
        built.append(source)
        return build(pieces, source=source)

    monkeypatch.setattr(tokenizer, "tokenizer_from_pieces", noted)
    weights = write_gguf(tmp_path / "tiny.gguf")
    harvest(**sections(weights, corpus, tmp_path / "store"))
    assert open_store(tmp_path / "store").rows == ROWS
    assert built == [str(weights)]


def check_order(store: Store) -> None:
    """Every row is where docs/store.md says it is."""
    rows_in_all, size = store.rows, store.manifest.shuffling.bucket_rows
    found, table = store.provenance(start=0, stop=rows_in_all), store.tokens
    assert found.sequence.max() < table.num_harvestable
    tokens = table.read(range(table.num_sequences))
    assert table.usable(tokens, range(len(tokens)))[found.sequence, found.position].all()
    order = sequence_order(sequences=table.num_harvestable, seed=0)
    expected = [
        (sequence, int(position))
        for sequence in order.forward(np.arange(table.num_harvestable)).tolist()
        for position in np.flatnonzero(table.usable(tokens[[sequence]], [sequence])[0])
    ]
    rows = list(zip(found.sequence.tolist(), found.position.tolist(), strict=True))
    for bucket in range(store.manifest.num_buckets):
        start, stop = bucket * size, min((bucket + 1) * size, rows_in_all)
        places = bucket_order(rows=stop - start, seed=0, bucket=bucket)
        image = places.forward(np.arange(stop - start)).tolist()
        assert [rows[start + place] for place in image] == expected[start:stop]


def test_rows_are_usable_never_held_out_and_in_the_documented_order(finished: Store):
    check_order(finished)


def test_a_sequence_may_be_longer_than_a_bucket(gemma, corpus, tmp_path: Path):
    made = sections(
        gemma, corpus, tmp_path, text__sequence_length=64, cache__shuffle_rows=16, cache__tokens=100
    )
    harvest(**made)
    check_order(open_store(tmp_path))


def test_the_same_config_gives_the_same_bytes(finished: Store, gemma, corpus, tmp_path: Path):
    harvest(**sections(gemma, corpus, tmp_path / "s"), resolved_config_yaml="name: test\n")
    assert file_hashes(tmp_path / "s") == file_hashes(finished.path)
    assert not (tmp_path / "s" / "plan.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rows_in_fewer_bytes_are_those_of_float32(finished, gemma, corpus, tmp_path, dtype: str):
    harvest(**sections(gemma, corpus, tmp_path, cache__dtype=dtype))
    store = open_store(tmp_path)
    for tap in store.taps:
        rows = store.read(tap, start=0, stop=ROWS)
        exact = finished.read(tap, start=0, stop=ROWS)
        if dtype == "bfloat16":
            np.testing.assert_array_equal(rows, exact.astype(ml_dtypes.bfloat16))
        else:
            np.testing.assert_array_equal(rows, by_buckets(store.packing(tap), exact, store))
        norms = np.square(rows.astype(np.float64)).sum(axis=1)
        assert store.tap_info(tap).mean_squared_norm == pytest.approx(norms.mean(), rel=1e-12)


def by_buckets(packing: Packing | None, exact: np.ndarray, store: Store) -> np.ndarray:
    """What rows are read as once each bucket's blocks were packed."""
    assert packing is not None
    found = np.empty_like(exact)
    spans = [store.manifest.bucket_span(number) for number in range(store.manifest.num_buckets)]
    for span in spans:
        packed = packing.pack(exact[span.start : span.stop])
        segments = [Segment(0, len(span))]
        found[span.start : span.stop] = packing.read(segments, lambda _, packed=packed: packed)
    return found


def test_a_bfloat16_model_fills_a_float32_store(gemma, corpus, tmp_path: Path):
    harvest(**sections(gemma, corpus, tmp_path, model__dtype="bfloat16"))
    rows = open_store(tmp_path).read(Tap("resid_post", 2), start=0, stop=ROWS)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, rows.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_stopped_and_started_again_it_ends_the_same(finished: Store, gemma, corpus, tmp_path):
    path = tmp_path / "s"
    made = interrupted(gemma, corpus, path)
    committed = {p: p.stat().st_mtime_ns for p in (path / "commits").iterdir()}
    with pytest.raises(UserError, match="has not finished"):
        open_store(path)
    for stray in ("resid_post.0/c/0/0.__lock", "commits/.bucket-000000.json.5eed.tmp"):
        (path / stray).write_bytes(b"what a killed process leaves")
    harvest(**made)
    assert {p: p.stat().st_mtime_ns for p in committed} == committed  # not made again
    assert file_hashes(path) == file_hashes(finished.path)


def test_a_finished_store_is_left_alone(
    finished: Store, gemma, corpus, caplog: pytest.LogCaptureFixture
):
    before = {p: p.stat().st_mtime_ns for p in finished.path.rglob("*")}
    with caplog.at_level(logging.INFO):
        manifest = harvest(**sections(gemma, corpus, finished.path))
    assert manifest == finished.manifest
    assert "finished already: 700 rows" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in finished.path.rglob("*")} == before


def test_a_finished_store_needs_neither_text_nor_weights(
    finished: Store, gemma, corpus, monkeypatch: pytest.MonkeyPatch, caplog
):
    def gone(*_: object) -> str:
        raise UserError("the weights are not on this machine")

    monkeypatch.setattr(harvest_module, "weight_fingerprint", gone)
    harvest(**sections(gemma, corpus, finished.path))
    assert "cannot be compared: the weights are not on this machine" in caplog.text


def test_moved_weights_are_sampled_once_in_a_process(
    finished: Store, gemma: Path, corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And not at all under the name in the manifest: a machine that trains need not have them."""
    moved = tmp_path / "moved"
    shutil.copytree(gemma, moved)
    opened: list[str] = []

    def noting(file: Any, *rest: Any, **options: Any) -> Any:
        if str(file).startswith((str(gemma), str(moved))):
            opened.append(Path(file).name)
        return open(file, *rest, **options)

    for module in (safetensors_file, locate):
        monkeypatch.setattr(module, "open", noting, raising=False)
    made = sections(gemma, corpus, finished.path)
    open_matching_store(**made)
    assert not opened
    made["model"] = made["model"].model_copy(update={"weights": str(moved)})
    for _ in range(3):
        open_matching_store(**made)
    # The header at each of three visits, the sixteen samples at the first alone.
    assert opened.count("model.safetensors") == 3 + 1
    (moved / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither model"):
        open_matching_store(**made)


OTHER_CONFIGS = {
    "model__dtype": "bfloat16",
    "model__precision": "bfloat16",
    "text__sequence_length": 24,
    "text__held_out_sequences": 5,
    "cache__sites": [SiteConfig(site="resid_post", layers=[0])],
    "cache__tokens": 600,
    "cache__dtype": "bfloat16",
    "cache__shuffle_rows": 64,
    "cache__seed": 1,
    "cache__sequences_per_batch": 2,
}


@pytest.mark.parametrize("state", ["begun", "finished"])
def test_another_config_is_refused_by_field_and_touches_nothing(
    finished: Store, gemma, corpus, tmp_path: Path, state: str
):
    path = finished.path
    if state == "begun":
        path = tmp_path / "s"
        interrupted(gemma, corpus, path)
    before = file_hashes(path)
    for name, value in OTHER_CONFIGS.items():
        field = name.replace("__", r"\.")
        with pytest.raises(UserError, match=rf"another config\. {field}: .* .nothing was changed"):
            harvest(**sections(gemma, corpus, path, **{name: value}))
    other = write_tiny_gemma(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"another config.*fingerprint"):
        harvest(**sections(other, corpus, path))
    assert file_hashes(path) == before


@pytest.mark.parametrize("state", ["begun", "finished"])
def test_changed_text_is_refused_by_file(gemma, corpus, tmp_path: Path, state: str):
    text = tmp_path / "text"
    text.mkdir()
    for file in corpus.iterdir():
        (text / file.name).write_bytes(file.read_bytes())
    if state == "begun":
        made = interrupted(gemma, text, tmp_path / "s")
    else:
        made = sections(gemma, text, tmp_path / "s")
        harvest(**made)
    before = file_hashes(tmp_path / "s")
    (text / "07.txt").write_text((text / "07.txt").read_text().replace("state", "shape"))
    with pytest.raises(UserError, match=r"other text.*07\.txt was .* .nothing was changed"):
        harvest(**made)
    assert file_hashes(tmp_path / "s") == before


def test_before_the_first_commit_the_config_may_change(finished: Store, gemma, corpus, tmp_path):
    path = tmp_path / "s"
    other = [SiteConfig(site="resid_post", layers=[0, 1])]
    begun = sections(gemma, corpus, path, cache__sites=other, cache__dtype="bfloat16")
    with pytest.raises(Interrupted):
        harvest(**begun, stop=StopAfter(1))
    assert (path / "resid_post.1").exists()
    harvest(**sections(gemma, corpus, path), resolved_config_yaml="name: test\n")
    assert file_hashes(path) == file_hashes(finished.path)


def test_too_few_tokens_is_said_before_the_model_is_loaded(
    gemma, corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker, "load_replicas", None)
    with pytest.raises(UserError, match=r"asks for 100000 rows and the text has \d+ usable"):
        harvest(**sections(gemma, corpus, tmp_path, cache__tokens=100_000))


def test_a_layer_the_model_has_not_is_said_before_tokenising(gemma, corpus, tmp_path: Path):
    sites = [SiteConfig(site="mlp_out", layers=[3, 4])]
    with pytest.raises(UserError, match="layer 4 of site mlp_out does not exist"):
        harvest(**sections(gemma, corpus, tmp_path, cache__sites=sites))
    assert not (tmp_path / "tokens").exists()


def test_buckets_too_large_for_the_memory_are_refused():
    plan = make_manifest(rows=10**12, width=4096, shuffle_rows=10**10, block_rows=256)
    with pytest.raises(UserError, match=r"B of memory .* lower cache\.shuffle_rows to about"):
        check_memory(plan, [("here", 2**40)])
    with pytest.raises(UserError, match="2 at once in each of 3 processes"):
        check_memory(plan, [*[("here", 2**49)] * 3, ("there", 2**49)])


def test_activations_that_are_not_finite_are_refused(gemma, corpus, tmp_path: Path):
    from activation_cache.storage.safetensors_file import write_safetensors
    from tests.support.tiny_gemma import tiny_config, tiny_tensors

    broken = write_tiny_gemma(tmp_path / "gemma")
    tensors = tiny_tensors(tiny_config())
    next(value for name, value in tensors.items() if "layers.2" in name)[:] = np.nan
    with open(broken / "model.safetensors", "wb") as file:
        write_safetensors(file, {k: v.shape for k, v in tensors.items()}, tensors.items())
    with pytest.raises(UserError, match=r"resid_post\.2 holds NaN or infinity"):
        harvest(**sections(broken, corpus, tmp_path / "s"))


def test_writing_overlaps_computing(gemma, corpus, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The first bucket's write is held up until the model works on the second."""
    second_begun = threading.Event()
    write, bucket_passes = writer.write_shards, []

    class Filler(fill_bucket.BucketFiller):
        def fill(self, number, *, on_batch):
            bucket_passes.append(number)
            if number == 1:
                second_begun.set()
            return super().fill(number, on_batch=on_batch)

    def held_up(*arguments, **options):
        assert second_begun.wait(timeout=60)
        write(*arguments, **options)

    monkeypatch.setattr(worker, "BucketFiller", Filler)
    monkeypatch.setattr(writer, "write_shards", held_up)
    harvest(**sections(gemma, corpus, tmp_path))
    assert bucket_passes == list(range(BUCKETS))


def test_at_most_one_bucket_is_written_while_one_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Memory is bounded: handing over the next bucket waits for the one before."""
    manifest, disk_works = make_manifest(rows=128, mean_squared_norm=None), threading.Event()
    write = writer.write_shards

    def held_up(*arguments, **options):
        assert disk_works.wait(timeout=60)
        write(*arguments, **options)

    monkeypatch.setattr(writer, "write_shards", held_up)
    numbers = np.arange(64, dtype=np.int32)
    buckets = [
        writer.Bucket(n, {TAP: np.ones((64, 8), np.float32)}, numbers, numbers) for n in (0, 1)
    ]
    with writer.BucketWriter(tmp_path, manifest) as bucket_writer:
        bucket_writer.submit(buckets[0])
        second = threading.Thread(target=bucket_writer.submit, args=(buckets[1],))
        second.start()
        second.join(timeout=0.3)
        assert second.is_alive()
        disk_works.set()
        second.join(timeout=60)
        assert writer.commit_file(tmp_path, 0).exists()
    assert sorted(writer.read_commits(tmp_path, manifest)) == [0, 1]


def test_one_process_at_a_time(gemma, corpus, tmp_path: Path):
    with folder_lock(tmp_path), pytest.raises(UserError, match="in use by another process"):
        harvest(**sections(gemma, corpus, tmp_path))


def test_a_damaged_commit_record_is_named(gemma, corpus, tmp_path: Path):
    made = interrupted(gemma, corpus, tmp_path / "s")
    record = tmp_path / "s" / "commits" / "bucket-000000.json"
    record.write_text(record.read_text().replace('"rows": 128', '"rows": 127'))
    with pytest.raises(UserError, match=rf"{record} is damaged"):
        harvest(**made)

"""The rows of a harvest without outlying ones, imported: the same store, byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from activation_cache import write_rows
from activation_cache.config import ModelConfig
from activation_cache.gemma.taps import Tap
from activation_cache.harvest.harvest import harvest
from activation_cache.language_model.model import load_model
from activation_cache.rows.unpack import TOKEN_IDS
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import Store, open_store
from launch.show.inspect import inspect_store
from sae_train.config.file import read_run_config
from sae_train.config.run import Config, EvaluationConfig
from sae_train.evaluate.jobs import Models, Run
from tests.support.configs import make_config
from tests.support.harvests import sections
from tests.support.saes import make_trained, save_run
from tests.support.stores import file_hashes

pytestmark = pytest.mark.slow

LIMIT = 1.3  # of the median: a tiny random model's rows are nearly of one length


@pytest.fixture(scope="module")
def whole(gemma: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A harvest of every usable token that isn't held out."""
    path = tmp_path_factory.mktemp("whole") / "store"
    limit = {"cache__max_norm_over_median": LIMIT, "cache__shuffle_rows": 512}
    made = sections(gemma, corpus, path, **limit)
    with pytest.raises(UserError) as error:  # says how many there are
        harvest(**sections(gemma, corpus, path, cache__tokens=10**6))
    usable = int(str(error.value).split("the text has ")[1].split()[0])
    made["cache"] = made["cache"].model_copy(update={"tokens": usable})
    harvest(**made)
    return open_store(path)


def imported(whole: Store, gemma: Path, to: Path) -> Store:
    """The activations of the whole text, given sequence by sequence with their tokens."""
    table = whole.tokens
    ids = table.read(range(table.num_sequences))
    model = load_model(ModelConfig(weights=str(gemma), dtype="float32"))
    found = model.activations(ids, whole.taps)
    shuffling, outlying = whole.manifest.shuffling, whole.manifest.outlying
    values = {tap.name: np.array(found[tap]) for tap in whole.taps}
    rows = whole.provenance(start=0, stop=whole.rows)
    for tap in whole.taps:
        read = whole.read(tap, start=0, stop=whole.rows)
        own = values[tap.name][rows.sequence, rows.position]
        np.testing.assert_allclose(own, read, rtol=1e-5, atol=1e-5)
        # In batches of other sequences a row may differ in the last bit.
        values[tap.name][rows.sequence, rows.position] = read
    write_rows(
        [{**values, TOKEN_IDS: ids}],
        to=to,
        tokenizer=str(gemma),
        shuffle_rows=shuffling.shuffle_rows,
        block_rows=shuffling.block_rows,
        held_out=float(len(table.held_out) * table.sequence_length),
        max_norm_over_median=outlying and outlying.max_norm_over_median,
    )
    return open_store(to)


def test_an_import_is_the_harvest_of_its_rows(
    whole: Store, gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    store = imported(whole, gemma, tmp_path / "store")
    ours, theirs = (file_hashes(Path(str(one.path))) for one in (store, whole))
    same = [name for name in theirs if not name.endswith(("manifest.json", "tokens.json", ".lock"))]
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    for field in ("sites", "rows", "outlying", "token_hash", "tokenizer_hash", "shuffling"):
        assert getattr(store.manifest, field) == getattr(whole.manifest, field)
    check_dropped(whole)
    inspect_store(tmp_path / "store", verify=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert whole.manifest.outlying is not None
    assert f"{whole.manifest.outlying.dropped} rows" in shown


def test_text_and_model_are_used_where_both_are_known(whole: Store, gemma: Path, tmp_path: Path):
    """A config that names the model measures the held-out text, if the tokens are that model's."""
    ids, tap = whole.tokens.read(range(6)), Tap("resid_post", 0)
    width = whole.tap_info(tap).width
    rows = np.ones((*ids.shape, width), np.float32)
    values = make_config().model_dump() | {
        "model": {"weights": str(gemma), "dtype": "float32"},
        "text": {"source": []},
        "sae": {"site": tap.site, "layer": tap.layer, "width": 24},
    }
    runs = []
    for name, how in (("a", {"tokenizer": str(gemma)}), ("b", {"special_ids": [0, 1, 2]})):
        write_rows([{tap.name: rows, TOKEN_IDS: ids}], to=tmp_path / name, held_out=20, **how)
        values["cache"] = {"path": str(tmp_path / name)}
        trained = replace(make_trained(D=width), config=Config.model_validate(values))
        folder = save_run(tmp_path / f"run_{name}", trained)
        runs.append(Run(folder, read_run_config(folder), Models(given=None)))
    job = runs[0].own(EvaluationConfig(sequences=2))
    assert job.rows is None
    assert list(job.sequences) == [4, 5]
    assert job.fingerprints["tokens"] == open_store(tmp_path / "a").manifest.token_hash
    assert "model" in job.fingerprints
    with pytest.raises(UserError, match=r"another than that of the tokens at .*: import them with"):
        runs[1].own(EvaluationConfig(sequences=2))


def check_dropped(store: Store) -> None:
    """No row of a bucket is too long, and what was there before is told by other rows."""
    outlying = store.manifest.outlying
    assert outlying is not None
    assert outlying.dropped
    commits = [json.loads(f.read_bytes()) for f in (store.path / "commits").iterdir()]
    assert sum(commit.get("dropped", 0) for commit in commits) == outlying.dropped
    found = store.provenance(start=0, stop=store.rows)
    places = set(zip(found.sequence.tolist(), found.position.tolist(), strict=True))
    assert store.rows - len(places) == outlying.dropped  # of usable tokens each place was one
    for bucket in range(store.manifest.num_buckets):
        span = store.manifest.bucket_span(bucket)
        for tap in store.taps:
            rows = store.read(tap, start=span.start, stop=span.stop).astype(np.float64)
            norms = np.linalg.norm(rows, axis=1)
            # The median of what was kept is a little below that of all.
            assert norms.max() <= LIMIT * np.median(norms) * 1.2

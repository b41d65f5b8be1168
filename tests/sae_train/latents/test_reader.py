"""Reading a folder of latents: every number is the one written, and what isn't there is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from activation_cache.runtime.errors import UserError
from sae_train.latents.reader import Explanations, Latents, open_latents
from sae_train.latents.records import text_of
from sae_train.latents.schema import CONTEXTS, EXPLANATIONS_SCHEMA, GROUP
from tests.support.oracles import latents as brute_force

F = 300


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Latents:
    run = tmp_path_factory.mktemp("sweep") / "run"
    brute_force.write_latents_folder(run, F=F, others=["wider"])
    return open_latents(run)


@pytest.mark.parametrize("index", [0, GROUP - 1, GROUP, F - 2])
def test_a_latent_is_what_was_written(latents: Latents, index: int):
    walked = brute_force.made_up(F=F)
    summary, active = brute_force.activity(walked, index)
    contexts = brute_force.contexts(walked, index, top=20, per_interval=5, size=16)
    latent = latents[index]
    assert (latent.index, latent.count) == (index, summary["count"])
    assert latent.maximum == walked.acts[:, :, index].max()
    assert latent.histogram is not None
    assert list(latent.histogram.counts) == active["histogram_counts"]
    assert latent.histogram.edges[-1] == latent.maximum
    assert [one.id for one in latent.top_inputs] == active["input_ids"]
    assert [one.index for one in latent.coactive] == active["coactive_latents"]
    assert [one.position for one in latent.contexts] == [row["position"] for row in contexts]
    best = latent.contexts[0]
    assert best.value == latent.maximum
    assert len(best.tokens) == len(best.values) == len(best.token_ids)
    assert latents.vocabulary[best.token_ids[best.peak]] == best.tokens[best.peak]
    assert {one.subset for one in latent.contexts} <= {"news", "law"}
    assert {one.sae for one in latent.neighbours} == {"run", "wider"}
    json.dumps(latent.to_dict(), allow_nan=False)


def test_a_latent_that_never_fired(latents: Latents):
    latent = latents[F - 1]
    assert (latent.count, latent.histogram, latent.contexts) == (0, None, ())
    assert latent.top_logits
    assert "never fired" in latent._repr_html_()


def test_explanations_are_read_by_latent_whatever_their_order():
    columns = {
        "latent": pa.array([9, 4, 9, 2], pa.int32()),
        "text": ["first", "four", "last", "two"],
        "method": ["examples"] * 4,
        "model": ["a model"] * 4,
        "scores": ['{"detection": null}', None, "{}", ""],
    }
    found = Explanations(pa.table(columns, schema=EXPLANATIONS_SCHEMA))
    assert (list(found), len(found)) == ([2, 4, 9], 3)
    assert [one.text for one in found[9]] == ["first", "last"]
    assert found[9][0].scores == {"detection": None}
    assert found[4][0].scores == {}
    assert found.last["text"].to_pylist() == ["two", "four", "last"]
    assert found.get(3) is None
    assert found.get(10) is None
    assert not Explanations(EXPLANATIONS_SCHEMA.empty_table())


def test_the_summary_has_a_row_for_each(latents: Latents):
    assert latents.summary["latent"].to_pylist() == list(range(F))
    assert len(latents) == F == len(latents.summary)
    assert latents[np.int64(3)].maximum == latents.summary["maximum"][3].as_py()


def test_one_latent_is_one_row_group(latents: Latents):
    file = pq.ParquetFile(latents.folder / CONTEXTS.name)
    assert file.num_row_groups == -(-F // GROUP)
    for group in range(file.num_row_groups):
        found = set(file.read_row_group(group)["latent"].to_pylist())
        assert found <= set(range(group * GROUP, (group + 1) * GROUP))


@pytest.mark.parametrize("index", [-1, F, 10**9])
def test_an_index_out_of_range_is_told(latents: Latents, index: int):
    with pytest.raises(UserError, match=rf"latents 0 to {F - 1}: there is no latent {index}"):
        latents[index]


def test_a_folder_without_latents_names_the_command(tmp_path: Path):
    with pytest.raises(UserError, match=rf"write them with `sae latents {tmp_path}`"):
        open_latents(tmp_path)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path):
    folder = brute_force.write_latents_folder(tmp_path / "run", F=4)
    (folder / CONTEXTS.name).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"contexts.parquet is missing or damaged: delete"):
        open_latents(folder)[0]
    (folder / CONTEXTS.name).unlink()
    with pytest.raises(UserError, match=r"contexts.parquet is missing"):
        open_latents(folder)[0]


def test_text_in_a_notebook_is_shown_and_never_run(tmp_path: Path):
    folder = brute_force.write_latents_folder(tmp_path / "run", F=4, name="<script>x</script>")
    shown = open_latents(folder)[0]._repr_html_()
    assert "<script" not in shown
    assert "\n" not in shown
    assert "&lt;script&gt;" in shown


@pytest.mark.parametrize(
    ("piece", "text"),
    [("▁the", " the"), ("<0x0A>", "\n"), ("<0x41>", "A"), ("<0xE2>", "<0xE2>"), ("<b>", "<b>")],
)
def test_the_text_of_a_piece(piece: str, text: str):
    assert text_of(piece) == text


@pytest.mark.slow
def test_reading_loads_no_jax(latents: Latents):
    code = (
        "import sys; from sae_train.latents.reader import open_latents; "
        f"open_latents({str(latents.folder)!r})[0]; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Neuronpedia's files against SAEDashboard's own exporter; the upload to a scripted site."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from activation_cache.runtime import json_post
from activation_cache.runtime.errors import Interrupted, UserError
from launch.cli import main
from sae_train.explain.explain import EXPLANATIONS_SCHEMA
from sae_train.latents.reader import Latents, open_latents
from sae_train.release import neuronpedia_upload as site
from sae_train.release.neuronpedia import Chosen, Source
from sae_train.release.neuronpedia_files import About, write_source
from tests.support.oracles import latents as brute_force
from tests.support.paths import DATA
from tests.support.saes import make_trained, save_run
from tests.support.servers.fake_endpoint import FakeEndpoint, Response, fake_endpoint

F, D = 7, 20
KEY = "np-very-secret"
SOURCE = Source("gemma-tiny", "tiny-res-7", 1, "blocks.1.hook_resid_post", "data/*.txt")
ABOUT = About("tiny", "tiny SAEs", "A Person", "c-person", "", "me/saes", "res/layer_1")
# Not SAEDashboard's: the time of the latents; in tables repeatable ids and indices as text; what it
# leaves empty.
OURS = {"createdAt", "updatedAt", "topkCosSimIndices", "topkCosSimValues", "sourceSetName"}
HOSTILE = "<script>alert(1)</script> **bold** \0 \x1b[31m"


def write_latents(run: Path) -> Latents:
    """A run's latents, one of them with a hostile explanation."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = brute_force.write_latents_folder(run, F=F)
    rows = [
        {"latent": 2, "text": text, "method": method, "model": "m", "scores": "{}"}
        for text, method in ((HOSTILE, "examples"), ("days", "max-act-logits"))
    ]
    pq.write_table(pa.Table.from_pylist(rows, EXPLANATIONS_SCHEMA), folder / "explanations.parquet")
    return open_latents(run)


def decoder() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((F, D)).astype(np.float32)


def write(run: Path, **options: Any) -> Path:
    """The files of these latents; returns where."""
    target = run / "neuronpedia"
    latents = write_latents(run)
    given = {"source": SOURCE, "about": ABOUT, "chosen": Chosen(), "decoder_FD": decoder()}
    write_source(latents, target, batches=True, **given | options)
    return target


def lines(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("np") / "run")


def batch_file(target: Path) -> Path:
    (folder,) = (target / "batches").iterdir()
    assert folder.name == "gemma-tiny_tiny-res-7_blocks.1.hook_resid_post_7"
    return folder / "batch-0.json"


def test_the_layout_is_what_saedashboard_s_exporter_makes_of_the_batch(target: Path):
    """Its own output, stored with the hash of the batch file it is of (their_neuronpedia.py)."""
    theirs = json.loads(gzip.decompress((DATA / "neuronpedia.json.gz").read_bytes()))
    found = hashlib.sha256(batch_file(target).read_bytes()).hexdigest()
    assert found == theirs["batch_sha256"], "another batch file: let SAEDashboard read it"
    folder = target / "gemma-tiny" / "1-tiny-res-7"
    for name, expected in theirs["files"].items():
        rows = lines(folder / name)
        assert len(rows) == len(expected) > 0
        for row, their in zip(rows, expected, strict=True):
            assert list(row) == list(their), name
            own = OURS | ({"id", "index"} if name.endswith(".gz") else set())
            row, their = ({k: v for k, v in one.items() if k not in own} for one in (row, their))
            assert row == their, name


def test_all_lines_of_a_table_have_the_same_keys_and_ids_are_unique(target: Path):
    folder = target / "gemma-tiny" / "1-tiny-res-7"
    ids = []
    for name in ("features", "activations", "explanations"):
        rows = lines(folder / name / "batch-0.jsonl.gz")
        assert len({tuple(row) for row in rows}) == 1
        assert all(isinstance(row["index"], str) for row in rows)
        ids += [row["id"] for row in rows if "id" in row]
    assert len(set(ids)) == len(ids)
    assert {len(one) for one in ids} == {25}
    said = lines(folder / "explanations" / "batch-0.jsonl.gz")
    assert [row["description"] for row in said] == [HOSTILE, "days"]
    assert [row["typeName"] for row in said] == ["eleuther_acts_top20", "np_max-act-logits"]


def test_the_same_latents_give_the_same_bytes(target: Path, tmp_path: Path):
    again = tmp_path / "run" / "neuronpedia"
    latents = open_latents(target.parent)
    write_source(latents, again, source=SOURCE, about=ABOUT, chosen=Chosen(), decoder_FD=decoder())
    folder = "gemma-tiny/1-tiny-res-7"
    for path in sorted((target / folder).rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(target)).read_bytes()


def test_the_groups_of_activations(target: Path):
    latents = open_latents(target.parent)
    features = json.loads(batch_file(target).read_text())["features"]
    dead = features[-1]
    assert (dead["frac_nonzero"], dead["activations"], dead["freq_hist_data_bar_values"]) == (
        0,
        [],
        [],
    )
    for index, one in enumerate(features[:-1]):
        assert one["frac_nonzero"] == pytest.approx(latents[index].frequency, abs=1e-8)
        top = [act for act in one["activations"] if act["bin_min"] == -1]
        assert [act["bin_contains"] for act in top] == [-1] * len(top)
        values = [act["values"][act["qualifying_token_index"]] for act in top]
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(latents[index].maximum, abs=1e-5)
        shares = {}
        for act in one["activations"][len(top) :]:
            value = act["values"][act["qualifying_token_index"]]
            assert act["bin_min"] - 1e-3 <= value <= act["bin_max"] + 1e-3
            shares[act["bin_max"]] = act["bin_contains"]
        assert sum(shares.values()) <= 1 + 1e-6
        row = decoder()[index]
        assert one["neuron_alignment_indices"] == np.argsort(-row)[:3].tolist()


def test_contexts_are_the_user_s_to_choose(target: Path):
    latents = open_latents(target.parent)
    all_of = Chosen.read("all", latents=latents)
    assert len(all_of.of(latents[0])) == len(latents[0].contexts)
    assert Chosen.read("none", latents=latents).of(latents[0]) == []
    some = latents.record.subsets[:1]
    for name in some:
        found = Chosen.read(name, latents=latents).of(latents[0])
        assert {one.subset for one in found} <= {name}
    with pytest.raises(UserError, match=r"has no subset 'secret'; it has .* Or write all or none"):
        Chosen.read("secret", latents=latents)


@pytest.mark.parametrize("name", ["-a", "a--b", "A", "a_b", ""])
def test_names_that_neuronpedia_refuses(name: str):
    with pytest.raises(UserError, match="no name of a source set"):
        Source("gemma-tiny", name, 1, "", "")
    with pytest.raises(UserError, match="no name of a model"):
        Source(name + "_", "set", 1, "", "")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    """A site that takes everything."""
    with fake_endpoint(paths=("/api/model/new", "/api/source-set/new", BATCH)) as state:
        state.script = lambda body: Response({"ok": True})
        monkeypatch.setattr(json_post, "ATTEMPTS", 2)
        monkeypatch.setattr(json_post.random, "uniform", lambda low, high: 0.001)
        yield state


BATCH = "/api/feature/upload-batch"


def send(fake: FakeEndpoint, run: Path, **options: Any) -> int:
    given = {"chosen": Chosen(), "stop": lambda: False} | options
    return site.upload(
        open_latents(run),
        source=SOURCE,
        server=site.server(fake.url.removesuffix("/v1"), KEY),
        journal=run / "uploaded.jsonl",
        num_layers=4,
        description="d" * 200,
        **given,
    )


@pytest.fixture
def run(target: Path, tmp_path: Path) -> Path:
    return shutil.copytree(target.parent, tmp_path / "run")


def sent(fake: FakeEndpoint) -> list[dict[str, Any]]:
    return [body for body in fake.requests if "features" in body]


def test_what_is_sent_keeps_the_site_s_limits(fake: FakeEndpoint, run: Path, monkeypatch):
    monkeypatch.setattr(site, "MOST_LATENTS", 4)
    assert send(fake, run) == F - 1  # the last never fires
    model, source_set, *rest = fake.requests
    assert model == {"id": "gemma-tiny", "layers": 4, "displayName": "gemma-tiny"}
    assert source_set == {"name": "tiny-res-7", "modelId": "gemma-tiny", "description": "d" * 128}
    assert [[one["index"] for one in body["features"]] for body in rest] == [[0, 1, 2, 3], [4, 5]]
    for one in (one for body in rest for one in body["features"]):
        assert 0 <= one["density"] <= 1
        assert len(one["topLogits"]) <= 20
        assert all(0 < len(words["text"]) <= 512 for words in one["explanations"])
        for act in one["activations"]:
            assert len(act["tokens"]) == len(act["values"]) > 0
            assert all(act["tokens"])
            assert 0 <= act.get("quantileFraction", 0) <= 1
    assert "\0" not in json.dumps(rest)
    assert "<script>alert(1)</script>" in json.dumps(rest)
    monkeypatch.setattr(site, "MOST_BYTES", 1)
    assert len(list(site.batches(open_latents(run), Chosen()))) == F - 1


def test_an_upload_continues_and_sends_nothing_twice(fake: FakeEndpoint, run: Path, monkeypatch):
    monkeypatch.setattr(site, "MOST_LATENTS", 1)
    with pytest.raises(Interrupted, match="what was sent is kept"):
        send(fake, run, stop=lambda: len(sent(fake)) >= 3)
    with open(run / "uploaded.jsonl", "ab") as file:
        file.write(b'{"hash": "cut sho')
    fake.requests.clear()
    assert send(fake, run) == F - 1 - 3
    assert [body["features"][0]["index"] for body in sent(fake)] == [3, 4, 5]
    fake.requests.clear()
    assert send(fake, run) == 0
    assert not sent(fake)


def test_what_the_site_has_already_is_fine_and_what_it_refuses_is_told(
    fake: FakeEndpoint, run: Path
):
    def script(body: dict[str, Any]) -> Response:
        if "features" in body:
            return Response({"error": "User is not the creator\x1b of this source set."}, 400)
        return Response({"error": "Model already exists"}, 400)

    fake.script = script
    with pytest.raises(
        UserError, match=r"refuses /feature/upload-batch with status 400: .*creator"
    ):
        send(fake, run)
    fake.script = lambda body: Response({"error": f"Unauthorized {KEY}"}, 401)
    with pytest.raises(UserError, match=r"status 401 to the key in NEURONPEDIA_API_KEY") as error:
        send(fake, run)
    assert KEY not in str(error.value)
    fake.script = lambda body: Response("slow down", 429)
    with pytest.raises(UserError, match=r"status 429: slow down.* the same command continues"):
        send(fake, run)
    assert not (run / "uploaded.jsonl").exists()


def test_no_more_requests_an_hour_than_the_site_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(site, "REQUESTS_AN_HOUR", 2)
    now = [10_000.0]
    clock = SimpleNamespace(
        time=lambda: now[0],
        monotonic=lambda: now[0],
        sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
    )
    monkeypatch.setattr(site, "time", clock)
    site._wait_for_window([6000.0, 9000.0], lambda: False)
    assert now[0] == 10_000
    site._wait_for_window([7000.0, 9000.0], lambda: False)
    assert 10_600 <= now[0] < 10_602


@pytest.mark.slow
def test_the_command(fake: FakeEndpoint, run: Path, capsys, monkeypatch):
    from tests.support.tiny_gemma import write_tiny_gemma

    write_tiny_gemma(run / "gemma")
    trained = make_trained(D=D, F=F)
    model = trained.config.model.model_copy(update={"weights": str(run / "gemma")})
    config = trained.config.model_copy(update={"model": model})
    save_run(run, dataclasses.replace(trained, config=config))
    monkeypatch.setenv(site.URL, fake.url.removesuffix("/v1"))
    monkeypatch.setenv(site.KEY, KEY)
    assert main(["export", str(run), "--neuronpedia", "--upload", "neuronpedia", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "gemma/1-tiny-res-7-coefficient-0-001: 7 latents" in said
    assert "Whoever has the address can read them; --contexts chooses which go" in said
    assert not fake.requests
    assert main(["export", str(run), "--upload", "neuronpedia"]) == 0
    assert len(sent(fake)) == 1
    assert sent(fake)[0]["source"] == "1-tiny-res-7-coefficient-0-001"
    assert main(["export", str(run), "--batches"]) == 2
    assert "--batches adds to what --neuronpedia writes: give both" in capsys.readouterr().err
    monkeypatch.delenv(site.KEY)
    assert main(["export", str(run), "--upload", "neuronpedia"]) == 2
    assert "put yours into the variable NEURONPEDIA_API_KEY" in capsys.readouterr().err
    shutil.rmtree(run / "latents")
    assert main(["export", str(run), "--neuronpedia"]) == 2
    assert "holds no latents yet: write them with `sae latents" in capsys.readouterr().err


if __name__ == "__main__":  # what tests/support/oracles/their_neuronpedia.py reads
    shutil.copy(batch_file(write(Path(sys.argv[1], "run"))), sys.argv[1])

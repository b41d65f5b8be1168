"""Submitting to Kubernetes: what is asked of kubectl, in which order, and what happens after."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from activation_cache.runtime.errors import Interrupted, UserError
from launch.cli import main
from launch.clusters import common, kubectl
from launch.clusters import submit as submit_module
from launch.config.job import Job
from sae_train.config.file import resolved_yaml
from tests.launch.clusters.test_jobset import cluster_config
from tests.support.paths import ROOT
from tests.support.servers.kubernetes_checks import check

pytestmark = pytest.mark.slow

FAKE = ROOT / "tests" / "support" / "servers" / "fake_kubectl.py"
SWEEP = {"sweep.grid": {"train.seed": [0, 1, 2]}}


class Cluster:
    """The fake's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read = 0  # lines of the log
        self.set_plan()

    def set_plan(self, *, failing: str = "", refused: str = "") -> None:
        """Which JobSets will fail, and a word that the server takes in no manifest."""
        plan = {"failing": failing, "refused": refused}
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def log(self) -> list[list[str]]:
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        news, self.read = lines[self.read :], len(lines)
        found = [json.loads(line) for line in news]
        return [words for words in found if "--dry-run=server" not in words]

    def applied(self) -> list[str]:
        """The files applied since the last question, and `delete` for each deletion."""
        return [
            Path(words[-1]).name if "apply" in words else "delete"
            for words in self.log()
            if "apply" in words or "delete" in words
        ]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A fake kubectl on the PATH, in front of an empty cluster; no waiting between looks."""
    tools, folder = tmp_path / "tools", tmp_path / "cluster"
    tools.mkdir()
    folder.mkdir()
    script = tools / "kubectl"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -E {FAKE} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_CLUSTER", str(folder))
    monkeypatch.setattr(kubectl, "_POLL_SECONDS", 0.0)
    return Cluster(folder)


def config_in(folder: Path, launch: dict[str, Any] | None = None, **values: Any) -> Job:
    section = {"manifests": str(folder / "manifests"), **(launch or {})}
    return cluster_config(section, name="tiny", **values)


def submit(config: Job, *, command: common.Command = "sweep", asked: bool = False) -> int:
    return submit_module.submit(config, command=command, dry_run=False, stop=lambda: asked)


def test_a_sweep_is_submitted_in_order(cluster: Cluster, tmp_path: Path) -> None:
    assert submit(config_in(tmp_path, **SWEEP)) == 0
    log = cluster.log()
    applied = [Path(words[-1]).name for words in log if "apply" in words]
    trained = ["1-train-1.yaml", "1-train-2.yaml", "1-train-3.yaml"]
    assert applied == ["0-harvest.yaml", *trained, "2-evaluate.yaml", "3-report.yaml"]
    ends = {name: json.loads(file.read_text()) for name, file in names(cluster)}
    assert {one["status"]["conditions"][1]["type"] for one in ends.values()} == {"Completed"}
    harvest_seen = [n for n, words in enumerate(log) if "get" in words and "harvest" in words[2]]
    first_training = next(n for n, words in enumerate(log) if "1-train-1.yaml" in words[-1])
    assert len([n for n in harvest_seen if n < first_training]) == 5, (
        "absent twice, at work twice, done"
    )


def names(cluster: Cluster) -> list[tuple[str, Path]]:
    files = [file for file in cluster.folder.glob("*.json") if file.name != "plan.json"]
    return [(file.stem, file) for file in files if json.loads(file.read_text())["kind"] == "JobSet"]


def test_so_many_at_once(cluster: Cluster, tmp_path: Path) -> None:
    assert submit(config_in(tmp_path, {"at_once": 1}, **SWEEP)) == 0
    order = [
        Path(words[-1]).name if "apply" in words else words[2]
        for words in cluster.log()
        if "apply" in words or "get" in words
    ]
    first, second = order.index("1-train-1.yaml"), order.index("1-train-2.yaml")
    looked_at = order[first - 1]
    assert order[first + 1 : second].count(looked_at) == 3, "the first ended before the second"


def test_a_second_time_nothing_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    config = config_in(tmp_path, **SWEEP)
    assert submit(config) == 0
    cluster.log()
    assert submit(config) == 0
    assert cluster.applied() == []


def test_a_failed_run_does_not_stop_the_rest(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_in(tmp_path, {"context": "prod", "namespace": "interp"}, **SWEEP)
    cluster.set_plan(failing="seed_1")
    assert submit(config) == 1
    assert cluster.applied()[-2:] == ["2-evaluate.yaml", "3-report.yaml"], "of the others"
    assert "train tiny-seed_1 failed" in caplog.text
    assert "kubectl --context prod --namespace interp describe jobset tiny-seed-1-" in caplog.text
    cluster.set_plan()
    assert submit(config) == 0
    again = ["1-train-2.yaml", "2-evaluate.yaml", "3-report.yaml"]
    found = cluster.applied()
    assert found[1::2] == again, "what is missing, and what was made without it"
    assert found[::2] == ["delete"] * 3
    assert submit(config) == 0
    assert cluster.applied() == []


def test_nothing_is_trained_without_a_store(cluster: Cluster, tmp_path: Path) -> None:
    cluster.set_plan(failing="harvest")
    assert submit(config_in(tmp_path, **SWEEP)) == 1
    assert cluster.applied() == ["0-harvest.yaml"]


def test_context_and_namespace_are_passed_on(cluster: Cluster, tmp_path: Path) -> None:
    config = config_in(tmp_path, {"context": "prod", "namespace": "interp"})
    assert submit(config, command="train") == 0
    log = cluster.log()
    assert {tuple(words[:4]) for words in log} == {("--context", "prod", "--namespace", "interp")}
    documents = [json.loads(file.read_text()) for file in cluster.folder.glob("tiny-*.json")]
    assert {one["metadata"]["namespace"] for one in documents} == {"interp"}


def test_one_stage_is_handed_over(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert submit(config_in(tmp_path), command="harvest") == 0
    assert [words[0] for words in cluster.log()] == ["get", "get", "apply"]
    assert "kubectl logs -l jobset.sigs.k8s.io/jobset-name=harvest-tiny-" in caplog.text


def test_another_config_does_not_join_what_runs(cluster: Cluster, tmp_path: Path) -> None:
    assert submit(config_in(tmp_path), command="train") == 0
    changed = config_in(tmp_path, **{"train.seed": 5})
    with pytest.raises(UserError, match="is at work with another config"):
        submit(changed, command="train")
    assert submit(config_in(tmp_path), command="train") == 0, "the same one is left alone"
    cluster.log()
    assert submit(changed, command="train") == 0, "once it is done the new one takes its place"
    assert cluster.applied() == ["delete", "train.yaml"]


def test_a_cluster_away_for_a_while(cluster: Cluster, tmp_path: Path) -> None:
    config = config_in(tmp_path, **SWEEP)
    follower = kubectl.Follower(kubectl.Kubectl(kubectl.kubernetes_launch(config)), stop=bool)
    (manifest, *_) = kubectl.render(config, command="sweep")
    (cluster.folder / "down").write_text("3")
    assert follower._state(manifest) == "absent"
    (cluster.folder / "down").write_text("100")
    with pytest.raises(UserError, match="TLS handshake timeout"):
        follower._state(manifest)


def test_a_refusal_is_told_in_kubectl_s_words(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.folder / "down").write_text("1")
    with pytest.raises(UserError, match=r"kubectl get jobset .* failed: Unable to connect"):
        submit(config_in(tmp_path), command="train")


def test_nothing_is_submitted_where_the_server_refuses_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.set_plan(refused="5 cores")
    config = config_in(tmp_path, {"cpu": "5 cores"}, **SWEEP)
    with pytest.raises(UserError, match=r"apply --dry-run=server .* denied the request"):
        submit(config)
    assert cluster.applied() == []


def test_a_signal_ends_the_following_only(cluster: Cluster, tmp_path: Path) -> None:
    config = config_in(tmp_path, **SWEEP)
    with pytest.raises(Interrupted, match="continues there"):
        submit(config, asked=True)
    assert cluster.applied() == ["0-harvest.yaml"]
    assert submit(config) == 0
    assert cluster.applied()[0] == "1-train-1.yaml", "the harvest was found at work"


def test_a_deleted_jobset_counts_as_failed(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_in(tmp_path)
    submit(config, command="train")
    (manifest,) = kubectl.render(config, command="train")
    (cluster.folder / f"{manifest.name}.json").unlink()
    follower = kubectl.Follower(kubectl.Kubectl(kubectl.kubernetes_launch(config)), stop=bool)
    follower._tell_failure(manifest, follower._state(manifest))
    assert "train tiny was deleted" in caplog.text


def write_config(folder: Path, config: Job) -> str:
    path = folder / "config.yaml"
    path.write_text(resolved_yaml(config))
    return str(path)


def test_a_dry_run_prints_and_writes_and_submits_nothing(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path, {"manifests": None}, **SWEEP, **{"output": "/data/x"})
    path = write_config(tmp_path, config)
    there = str(tmp_path / "manifests")
    assert main(["sweep", path, "--dry-run", f"launch.manifests={there}"]) == 0
    printed = capsys.readouterr().out
    documents = list(yaml.safe_load_all(printed))
    assert [one["kind"] for one in documents] == ["ConfigMap", "JobSet"] * 6
    for document in documents:
        check(document)
    written = sorted((tmp_path / "manifests").iterdir())
    assert printed == "".join(file.read_text() for file in written)
    assert cluster.log() == []


def test_manifests_lie_beside_the_runs(cluster: Cluster, tmp_path: Path) -> None:
    beside = config_in(tmp_path, {"manifests": None}, output="runs/x")
    assert kubectl.manifest_folder(beside) == Path("runs/x/kubernetes")
    assert kubectl.manifest_folder(config_in(tmp_path)) == tmp_path / "manifests"


def test_without_kubectl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_config(tmp_path, config_in(tmp_path))
    assert main(["train", path]) == 2
    assert "kubectl was not found on the PATH, so nothing was submitted" in capsys.readouterr().err
    assert (tmp_path / "manifests" / "train.yaml").exists(), "the manifests are there to be taken"


def test_flags_that_mean_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, config_in(tmp_path))
    assert main(["train", path, "--fresh"]) == 2
    assert "--fresh deletes" in capsys.readouterr().err
    assert main(["train", path, "launch={on: local}", "--dry-run"]) == 2
    assert "launch.on is local" in capsys.readouterr().err

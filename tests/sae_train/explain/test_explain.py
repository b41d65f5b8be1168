"""`sae explain` from the command line to explanations.parquet, against a scripted endpoint."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from activation_cache.runtime import json_post
from activation_cache.runtime.errors import Interrupted
from launch.cli import main
from sae_train.explain.asking import Tally, ask_all
from sae_train.explain.endpoint import Endpoint, EndpointSettings
from sae_train.explain.measures import area_under_curve, balanced_accuracy, correlation
from sae_train.explain.question import Answer, Answers, Question
from sae_train.explain.scoring import asked
from sae_train.explain.texts import Drawn, draw, join
from sae_train.latents.reader import Latents, open_latents
from sae_train.latents.schema import WINDOW_TOKENS
from tests.support.oracles import latents as brute_force
from tests.support.servers.fake_endpoint import (
    Body,
    FakeEndpoint,
    Response,
    completion,
    fake_endpoint,
    is_explanation,
)

F = 12
KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("explained") / "run"
    brute_force.write_latents_folder(run, F=F)
    return run


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "run")


@pytest.fixture
def latents(template: Path) -> Latents:
    return open_latents(template)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    with fake_endpoint() as state:
        monkeypatch.setenv("OPENAI_BASE_URL", state.url)
        monkeypatch.setenv("OPENAI_MODEL", "a-model")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setattr(json_post, "ATTEMPTS", 2)
        state.script = knowing
        yield state


def asked_about(body: Body) -> str:
    return body["messages"][-1]["content"]


def knowing(body: Body) -> Response:
    """Explains each latent by its first text, and finds that text's latent again."""
    if is_explanation(body):
        return completion("Explanation: " + asked_about(body).splitlines()[0][:40])
    lines = asked_about(body).splitlines()[1:-1]
    return completion(json.dumps([len(line) % 2 for line in lines]))


def explain(run: Path, *options: str) -> int:
    return main(["explain", str(run), *options])


def test_explanations_stand_beside_the_latents(run: Path, fake: FakeEndpoint, capsys):
    assert explain(run, "--latents", "0-4,7", "--price", "1,2") == 0
    said = capsys.readouterr().out
    assert re.search(
        r"6 latents, (\d+) calls to a-model at http.* tokens in .*: about 0\.\d+", said
    )
    assert int(re.search(r"latents, (\d+) calls", said)[1]) == len(fake.requests)
    assert set(fake.keys) == {f"Bearer {KEY}"}
    latents = open_latents(run)
    assert sorted(latents.explanations) == [0, 1, 2, 3, 4, 7]
    found = latents[7].explanation
    assert found.text.startswith("FIRES ON: [")
    assert (found.method, found.model) == ("max-act-logits", "a-model")
    for kind in ("detection", "fuzzing"):
        score = found.scores[kind]
        assert 0 <= score["balanced_accuracy"] <= 1
        assert (score["chance"], score["auc"], score["unanswered"]) == (0.5, None, 0)
        assert 0 <= score["shuffled"] <= 1
        assert score["shuffled_latents"] == 6
        assert score["texts"] >= 4
    kept = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in data for data in kept)


def test_nothing_is_asked_twice(run: Path, fake: FakeEndpoint, capsys):
    assert explain(run, "--latents", "0-3") == 0
    before = len(fake.requests)
    bytes_before = (run / "latents/explanations.parquet").read_bytes()
    assert explain(run, "--latents", "0-3") == 0
    assert len(fake.requests) == before
    assert "4 latents, 0 calls" in capsys.readouterr().out
    assert (run / "latents/explanations.parquet").read_bytes() == bytes_before
    assert explain(run, "--latents", "0-3", "--method", "examples", "--scores", "none") == 0
    assert len(fake.requests) == before + 4
    assert [one.method for one in open_latents(run)[0].explanations] == [
        "max-act-logits",
        "examples",
    ]
    assert explain(run, "--latents", "5", "--scores", "simulation") == 0
    assert sorted(open_latents(run).explanations) == [0, 1, 2, 3, 5]


def test_an_interrupted_command_continues(run: Path, fake: FakeEndpoint, capsys):
    limit = 5
    fake.script = lambda body: (
        knowing(body) if len(fake.requests) <= limit else Response("down", 503)
    )
    options = ("--latents", "0-3", "--parallel", "1")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(json_post.random, "uniform", lambda low, high: 0.001)
    assert explain(run, *options) == 2
    monkey.undo()
    assert "status 503: down. Asked 2 times; the answers so far are kept" in capsys.readouterr().err
    assert len((run / "latents/explain/answers.jsonl").read_text().splitlines()) == limit
    fake.script = knowing
    fake.requests.clear()
    assert explain(run, *options) == 0
    resumed = (run / "latents/explanations.parquet").read_bytes()
    asked_again = len(fake.requests)
    shutil.rmtree(run / "latents/explain")
    (run / "latents/explanations.parquet").unlink()
    fake.requests.clear()
    assert explain(run, *options) == 0
    assert asked_again == len(fake.requests) - limit
    assert (run / "latents/explanations.parquet").read_bytes() == resumed


def test_a_line_that_a_kill_cut_short_is_asked_again(tmp_path: Path, fake: FakeEndpoint):
    path = tmp_path / "answers.jsonl"
    question = Question("explanation", 0, (("user", "\udc80 half a character"),), 9)
    with Answers(path) as answers:
        answers.add("a", question, Answer("first", ones=(0.5,)))
        answers.add("b", question, Answer("second"))
    assert len(question.key("m")) == 64
    path.write_bytes(path.read_bytes()[:-9])
    with Answers(path) as answers:
        assert answers.get("a") == Answer("first", ones=(0.5,))
        assert answers.get("b") is None
        answers.add("b", question, Answer("again"))
    with Answers(path) as answers:
        assert answers.get("b").text == "again"
    path.write_text("3\n" + path.read_text())
    with Answers(path) as answers:
        assert answers.get("b").text == "again"


def test_refusals_and_malformed_answers_are_recorded(run: Path, fake: FakeEndpoint, caplog):
    strange = itertools.cycle(
        [
            completion("I'm sorry, I can't help with that."),
            completion(None, message={"content": None, "refusal": "no"}),
            completion("Explanation: good"),
            completion("Explanation: half of", finish_reason="length"),
        ]
    )
    fake.script = lambda body: next(strange) if is_explanation(body) else completion("who knows")
    assert explain(run, "--latents", "0-7", "--parallel", "1") == 0
    latents = open_latents(run)
    assert len(latents.explanations) == 2
    assert "the answer has no line 'Explanation:'" in caplog.text
    assert "the answer refused" in caplog.text
    assert "the answer cut off" in caplog.text
    (found,) = next(iter(latents.explanations.values()))
    score = found.scores["detection"]
    assert score["balanced_accuracy"] is None
    assert score["texts"] == 0
    assert score["unanswered"] >= 4


def test_no_explanation_at_all_is_an_error(run: Path, fake: FakeEndpoint, capsys):
    fake.script = lambda body: completion("I'd rather not")
    assert explain(run, "--latents", "0-2") == 2
    assert "none of 3 answers of a-model holds an explanation" in capsys.readouterr().err


def test_hostile_text_is_carried_as_it_is(run: Path, fake: FakeEndpoint):
    words = "<img src=x onerror=alert(1)> [link](javascript:1) \x1b[31m \u202e"
    fake.script = lambda body: completion(f"Explanation: {words}z")
    assert explain(run, "--latents", "0", "--scores", "none") == 0
    latent = open_latents(run)[0]
    assert latent.explanation.text == words + "z"
    assert "<img" not in latent._repr_html_()


@pytest.mark.parametrize("together", [5, 1])
def test_an_explanation_that_knows_scores_1_and_another_s_scores_less(
    run: Path, fake: FakeEndpoint, together: int
):
    """The endpoint's explanation is the latent's number, and it has the table of the texts."""
    latents, drawn = open_latents(run), {}
    for index in range(6):
        drawn[index] = draw(latents, latents[index], count=10, seed=0)
    shown = {f"\n1. {drawn[index].explaining[0].peaked()}\n": index for index in drawn}

    def script(body: Body) -> Response:
        text = asked_about(body)
        if is_explanation(body):
            return completion(f"Explanation: {next(i for key, i in shown.items() if key in text)}")
        first, *lines, last = text.splitlines()
        assert last == (
            "Answer yes or no." if together == 1 else f"Answer with {len(lines)} numbers."
        )
        texts = drawn[int(first.removeprefix("Explanation: "))].active
        right = {one.text for one in texts} | {one.marked() for one in texts}
        said = [int(re.sub(r"^(\d+\.|Text:) ", "", line) in right) for line in lines]
        return completion(json.dumps(said) if together > 1 else ("No.", "Yes, it does")[said[0]])

    fake.script = script
    assert explain(run, "--latents", "0-5", "--together", str(together)) == 0
    for index in drawn:
        for score in open_latents(run)[index].explanation.scores.values():
            assert score["balanced_accuracy"] == 1.0
            assert score["shuffled"] < 0.75


def test_a_run_is_limited_in_parallel_and_stops(tmp_path: Path, fake: FakeEndpoint):
    endpoint = Endpoint(EndpointSettings(fake.url, "m"), pause=0.01)
    fake.script = lambda body: Response(completion("x").content, delay=0.1)
    questions = [Question("detection", n, (("user", str(n)),), 5) for n in range(30)]
    with Answers(tmp_path / "answers.jsonl") as answers, pytest.raises(Interrupted):
        ask_all(
            questions,
            endpoint=endpoint,
            answers=answers,
            parallel=3,
            stop=lambda: len(fake.requests) > 12,
            tally=(tally := Tally()),
            what="score",
        )
    assert fake.most_at_once == 3
    assert 10 < len((tmp_path / "answers.jsonl").read_text().splitlines()) == tally.calls < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--latents", "0-12"], "the SAE has the latents 0 to 11"),
        (["--latents", "3-1"], "a range rises"),
        (["--latents", "a"], "--latents a is no list of latents: write it as 0-99,200"),
        (["--latents", "11"], "of the chosen ones none fires"),
        (["--url", "nowhere"], "nowhere is no address: it should begin"),
        (["--model", ""], "say the model to ask: with --model or in the variable OPENAI_MODEL"),
        (["--scores", "guess"], "'guess' is no score: write some of detection,fuzzing"),
        (["--price", "3"], "'3' is not two prices"),
        (["--parallel", "0"], "'0' is not a whole number from 1 on"),
        (["--timeout", "nan"], "'nan' is not a number of seconds above 0"),
    ],
)
def test_wrong_options(options: list[str], message: str, run: Path, fake, capsys, monkeypatch):
    if options[0] == "--model":
        monkeypatch.delenv("OPENAI_MODEL")
    assert explain(run, *options) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not fake.requests


def test_what_it_costs_is_asked_first(run: Path, fake: FakeEndpoint, capsys):
    assert explain(run, "--price", "1e4,1") == 2
    err = capsys.readouterr().err
    assert "more than 1,000 calls or a cost of 1: add --yes" in " ".join(err.split())
    assert explain(run, "--price", "1e4,1", "--dry-run") == 0
    assert not fake.requests
    assert explain(run, "--price", "1e4,1", "--yes", "--sample", "2") == 0
    assert len(open_latents(run).explanations) == 2


def test_a_folder_without_latents_names_the_command(tmp_path: Path, fake, capsys):
    (tmp_path / "run").mkdir()
    assert explain(tmp_path / "run") == 2
    assert "sae latents" in capsys.readouterr().err


def test_the_drawn_texts(latents: Latents):
    acts = brute_force.made_up(F=F).acts
    for index in range(F - 1):
        drawn = draw(latents, latents[index], count=10, seed=0)
        assert drawn == draw(latents, latents[index], count=10, seed=0)
        assert len(drawn.active) == len(drawn.silent) >= 2
        for one in drawn.silent:
            sequence, position = one.origin
            assert not acts[sequence - 100, position:, index][: len(one.tokens)].any()
        origins = [one.origin for one in (*drawn.explaining, *drawn.active)]
        assert len(set(origins)) == len(origins)
        for one in (*drawn.explaining, *drawn.active):
            assert len(one.tokens) <= WINDOW_TOKENS
            assert one.values[one.peak] > 0
            assert one.tenths(one.peak) >= 1
            plain = one.marked().replace("<<", "").replace(">>", "")
            assert plain == one.text or "\ufffd" in plain  # a mark inside a character of bytes
            assert one.marked().count("<<") >= 1
        fuzzed = [item for part in questions(drawn, index, "fuzzing") for item in part.items]
        assert sum(item.truth[0] for item in fuzzed) == len(drawn.active) == len(fuzzed) / 2
        for item in fuzzed:
            assert "<<" in item.shown[0]


def questions(drawn: Drawn, latent: int, kind: Any):
    return asked(kind, latent, "words", drawn, seed=0, together=5, max_tokens=9)


def test_measures():
    truth = [True, True, False, False, False]
    assert balanced_accuracy(truth, [True, False, False, False, True]) == pytest.approx(7 / 12)
    assert area_under_curve(truth, [0.9, 0.5, 0.5, 0.1, 0.6]) == pytest.approx((3 + 1.5) / 6)
    assert balanced_accuracy([True], [True]) is area_under_curve([True], [1]) is None
    assert correlation([0, 1, 2], [1, 3, 5]) == pytest.approx(1)
    assert correlation([0, 1], [1, 1]) is None


def test_bytes_of_one_character_are_joined():
    assert join(["▁a", "<0xC3>", "<0xA9>", "<0x0A>", "<0xFF>", "<0xZZ>"]) == " aé\n\ufffd<0xZZ>"

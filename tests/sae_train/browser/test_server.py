"""The browser's server: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from activation_cache.runtime.errors import UserError
from launch.cli import main
from sae_train.browser.catalogue import catalogue
from sae_train.browser.listing import Listing, Query
from sae_train.browser.requests import Live
from sae_train.browser.server import Site, bound_socket
from sae_train.browser.static import write_static
from sae_train.latents.reader import Latents, open_latents
from tests.sae_train.browser.support import SAES, F, serving

FIRST = SAES[0]


def ask(url: str, **how: Any) -> tuple[int, bytes, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **how), timeout=300) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def test_it_answers_its_own_name_alone(address: str) -> None:
    status, page, headers = ask(address)
    assert status == 200
    assert b"<main" in page
    assert "default-src 'none'; script-src 'self'" in headers["Content-Security-Policy"]
    assert ask(address, headers={"Host": "evil.example"})[0] == 400
    assert ask(f"{address}../../../etc/passwd")[0] == 404
    assert ask(f"{address}data/index.json", method="PUT", data=b"x")[0] == 405
    live = f"{address}live/{FIRST}/explore"
    assert ask(live, data=b"{}", headers={"Content-Type": "text/plain"})[0] == 415


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("data/none/list.json", "no SAE 'none' is shown here"),
        (f"data/{FIRST}/latents/{F}.json", f"latents 0 to {F - 1}: there is no latent {F}"),
        (f"data/{FIRST}/latents/x.json", "'x' is not a whole number"),
        (f"data/{FIRST}/list.json?sort=beauty", "'beauty' is none of latent, frequency"),
        (f"data/{FIRST}/list.json?count=5000", "count 5000: from 0, and 1 to 1,000"),
    ],
)
def test_what_is_not_there_is_told(address: str, path: str, words: str) -> None:
    status, answer, _ = ask(address + path)
    assert status == 404
    assert words in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("what", "body", "words"),
    [
        ("explore", b"nonsense", "the request is not JSON"),
        ("explore", b"[]", "not a JSON object"),
        ("explore", b'{"text": 5}', "'text' of the request is 5"),
        ("steer", b'{"text": "a", "changes": [5]}', "each change is an object"),
        ("steer", b'{"text": "a", "changes": [{"latent": "x", "mode": "add"}]}', "'x' isn't"),
        ("steer", b'{"text": "a", "changes": [], "new_tokens": 9999}', "ask for 1 to 256"),
    ],
)
def test_a_request_of_another_form_is_refused(
    address: str, what: str, body: bytes, words: str
) -> None:
    headers = {"Content-Type": "application/json"}
    _, answer, _ = ask(f"{address}live/{FIRST}/{what}", data=body, headers=headers)
    assert words in json.loads(answer.splitlines()[-1])["error"]


def test_a_fault_is_told_and_the_next_request_is_served(caplog: pytest.LogCaptureFixture) -> None:
    live = Live()

    def broken(live: Live, say: Any) -> Any:
        raise RuntimeError("it broke")

    assert list(live.answers(broken))[-1] == {
        "error": "a fault in the program: RuntimeError: it broke"
    }
    assert list(live.answers(lambda live, say: 5))[-1] == {"result": 5}


def test_the_server_closes_no_handler_of_others(sweep: Path) -> None:
    """Such as absl's, which closes the stream that it writes to."""
    closed: list[Any] = []

    class Handler(logging.NullHandler):
        def close(self) -> None:
            closed.append(self)
            super().close()

    handler = Handler()
    with serving(sweep) as address:
        assert ask(address)[0] == 200
        assert closed == []
    handler.close()
    assert closed == [handler]


def test_the_list_is_sorted_and_its_pages_join(sweep: Path) -> None:
    latents = open_latents(sweep / FIRST)
    listing = Listing(latents)
    frequency = latents.summary["frequency"].to_numpy()
    for falling in (True, False):
        pages = [
            listing.page(Query(falling=falling, offset=at, count=77)) for at in range(0, F, 77)
        ]
        found = [row["latent"] for page in pages for row in page["rows"]]
        expected = np.argsort(-frequency if falling else frequency, kind="stable")
        assert found == expected.tolist()
    scored = listing.page(Query(sort="score"))["rows"]
    assert (scored[0]["latent"], scored[0]["score"]) == (17, 0.75)
    assert scored[1]["score"] is None


def test_a_search_of_contexts_goes_on_where_it_ended(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = open_latents(sweep / FIRST)
    monkeypatch.setattr("sae_train.browser.listing._PATIENCE", 300.0)
    whole = Listing(latents).page(Query(text="e", where="context", count=1000))
    assert whole["searched"] == F
    monkeypatch.setattr("sae_train.browser.listing._PATIENCE", -1.0)
    found, after = set(), -1
    for expected in (128, F):
        page = Listing(latents).page(Query(text="e", where="context", count=1000, after=after))
        assert page["searched"] == expected
        found |= {row["latent"] for row in page["rows"]}
        after = page["searched"] - 1
    assert found == {row["latent"] for row in whole["rows"]}


def test_the_first_sae_is_read_before_it_is_asked_for(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(catalogue([sweep]))
    site.read_ahead()
    copy = Path(shutil.copytree(sweep / FIRST / "latents", tmp_path / "latents"))
    (copy / "contexts.parquet").write_bytes(b"damaged")
    Site(catalogue([copy])).read_ahead()  # its pages will tell
    monkeypatch.setattr(Latents, "open_file", Mock(side_effect=AssertionError("a file is read")))
    assert site.page(FIRST, {})["total"] == F
    assert site.latent(FIRST, "1")["index"] == 1


def test_nobody_waits_for_a_search_of_contexts(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(catalogue([sweep]))
    free: list[bool] = []
    contexts = Listing._contexts

    def watched(listing: Listing, text: str, after: int) -> Any:
        free.append(not site.lock.locked())
        if free[-1]:
            assert site.latent(FIRST, "17")["index"] == 17
        return contexts(listing, text, after)

    monkeypatch.setattr(Listing, "_contexts", watched)
    assert site.page(FIRST, {"text": "e", "where": "context"})["total"] > 0
    assert free == [True]


def test_a_static_copy_needs_a_fresh_folder(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists and isn't empty: name a fresh folder"):
        write_static(tmp_path / "old", catalogue([sweep]))


def test_the_command_tells_its_mistakes(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        assert main(["browse", *words]) == 2
        return " ".join(capsys.readouterr().err.split())

    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert f"holds no latents yet: write them with `sae latents {empty}`" in told(empty)
    assert "takes folders and no overrides: leave out a=1" in told(str(sweep), "a=1")
    assert "is not a port" in told(str(sweep), "--port", "99999")
    with bound_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        words = told(str(sweep), "--port", str(port))
    assert f"port {port} of 127.0.0.1 is in use by another program" in words
    with pytest.raises(UserError, match="can't listen on 192"):
        bound_socket("192.0.2.1", 0)
    assert main(["browse", str(sweep), "--static", str(tmp_path / "copy"), "-q"]) == 0
    assert (tmp_path / "copy" / "index.html").exists()


def test_another_model_or_sae_than_that_of_the_latents_is_refused(sweep: Path) -> None:
    from sae_train.live.load import Loader

    latents = open_latents(sweep / FIRST)
    loader = Loader()
    other = latents.record.model_copy(update={"fingerprints": {"model": "another"}})
    latents.record = other
    with pytest.raises(UserError, match="holds another model now"):
        loader.load(latents, sweep / FIRST)
    latents = open_latents(sweep / FIRST)
    with pytest.raises(UserError, match="holds another SAE now"):
        loader.load(latents, sweep / SAES[1])

"""The browser's pages in Chromium: list, search, latent, text, steering, addresses, static copy."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from sae_train.browser.catalogue import catalogue
from sae_train.browser.static import write_static
from sae_train.latents.reader import open_latents
from sae_train.latents.records import text_of
from tests.sae_train.browser.support import NASTY, SAES, F
from tests.support.browser import Browser, open_browser

pytestmark = pytest.mark.slow

FIRST = SAES[0]


@pytest.fixture(scope="module")
def static(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The copy, below a folder of a plain web server."""
    root = tmp_path_factory.mktemp("web")
    write_static(root / "copy", catalogue([sweep]))
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=root)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/copy/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


def show(browser: Browser, address: str, page: str, *, width: int = 1280) -> None:
    """Open a page and wait for its content; it fits the window and no script complained."""
    browser.show("about:blank", width=width)
    browser.show(f"{address}#/{page}", width=width, until=ready(page))
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert not browser.complaints


def ready(page: str) -> str:
    return f"document.getElementById('main')?.dataset.ready === {'#/' + page!r}"


def text(browser: Browser, selector: str = "main") -> str:
    found: str = browser.evaluate(f"document.querySelector({selector!r}).textContent")
    return found


def table(browser: Browser) -> list[list[str]]:
    found: list[list[str]] = browser.evaluate(
        "[...document.querySelectorAll('tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return found


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("copy", [False, True])
def test_from_the_saes_to_a_latent(
    browser: Browser, address: str, static: str, sweep: Path, width: int, copy: bool
) -> None:
    base = static if copy else address
    browser.requests.clear()
    show(browser, base, "", width=width)
    assert [row[3:8] for row in table(browser)] == [
        ["80", "0.0671", "0.101", "0.0894", "0.137"],
        ["20", "0.134", "0.201", "0.179", "0.315"],
    ]
    assert browser.evaluate("document.querySelectorAll('svg a circle').length") == 4
    browser.evaluate("document.querySelector('tbody a').click()")
    browser.wait(ready(FIRST))

    latents = open_latents(sweep / FIRST)
    summary = latents.summary
    falling = sorted(range(F), key=lambda one: (-summary["maximum"][one].as_py(), one))
    show(browser, base, f"{FIRST}?sort=maximum", width=width)
    assert [int(row[0]) for row in table(browser)] == falling[:100]
    browser.evaluate("document.querySelector('a[rel=next]').click()")
    browser.wait(
        "location.hash.includes('page=1') && "
        "document.querySelector('caption').textContent.includes('page 2')"
    )
    assert [int(row[0]) for row in table(browser)] == falling[100:200]
    show(browser, base, f"{FIRST}?where=explanation&text=WORDS", width=width)
    assert [row[:2] for row in table(browser)] == [["17", NASTY]]
    show(browser, base, f"{FIRST}?sort=score", width=width)
    assert table(browser)[0][0] == "17"

    show(browser, base, f"{FIRST}/17", width=width)
    latent = latents[17]
    shown = text(browser)
    assert NASTY in shown
    assert browser.evaluate("document.querySelectorAll('main img').length") == 0
    assert browser.evaluate("document.title") == f"Latent 17 of {FIRST}"
    assert "detection 0.75 (with another's explanation 0.5, chance 0.5)" in shown
    earlier = browser.evaluate("document.querySelector('details').textContent")
    assert "by small, examples" in earlier
    assert "fuzzing: 20 of 20 texts without an answer" in earlier
    contexts = browser.evaluate("document.querySelectorAll('.context').length")
    assert contexts == len(latent.contexts)
    first = latent.contexts[0]
    peak = browser.evaluate("(e => [e.title, e.style.background])(document.querySelector('.peak'))")
    assert peak[0].startswith('"')
    assert peak[0].endswith(f": {first.value:.3g}")
    assert "0.8" in peak[1]
    selector = f'a[href="#/{SAES[1]}/{latent.neighbours[-1].index}"]'
    assert browser.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length") == 1
    browser.evaluate(
        "document.body.dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
    )
    browser.wait(ready(f"{FIRST}/18"))
    show(browser, base, f"{FIRST}/{F}", width=width)
    assert f"has the latents 0 to {F - 1}: there is no latent {F}" in text(browser)
    own = base.split("/copy/")[0]
    assert all(one.startswith((own, "data:", "about:")) for one in browser.requests)


def test_tokens_and_contexts_are_searched(browser: Browser, address: str, sweep: Path) -> None:
    latents = open_latents(sweep / FIRST)
    context = latents[17].contexts[0]
    words = "".join(text_of(piece) for piece in context.tokens[:4])
    query = {"where": "context", "text": words}
    show(browser, address, f"{FIRST}?{urlencode(query)}")
    assert "17" in [row[0] for row in table(browser)]
    show(browser, address, f"{FIRST}?where=token&text=AN")
    found = [int(row[0]) for row in table(browser)]
    assert found
    for one in found:
        latent = latents[one]
        tokens = [*latent.top_inputs[:1], latent.top_logits[0], latent.bottom_logits[0]]
        assert any("an" in token.token.casefold() for token in tokens)


@pytest.mark.parametrize("width", [1280, 390])
def test_a_text_is_read(browser: Browser, address: str, width: int) -> None:
    show(browser, address, f"{FIRST}/text?text=the+%3Cb%3Ecat%3C%2Fb%3E&latent=5", width=width)
    browser.wait("document.querySelectorAll('.token').length > 3")
    assert "the <b>cat</b>" in text(browser, ".text")
    assert "Shaded by latent 5" in text(browser)
    rows = browser.evaluate(
        "document.querySelectorAll('section')[0].querySelectorAll('tbody tr').length"
    )
    assert rows == 12
    browser.evaluate("document.querySelectorAll('.token')[2].click()")
    browser.wait("document.querySelectorAll('.token')[2].getAttribute('aria-pressed') === 'true'")
    show(browser, address, f"{FIRST}/text?text=", width=width)
    browser.evaluate("document.querySelector('form').requestSubmit()")
    browser.wait("document.querySelector('[role=alert]')")
    assert "the text is empty" in text(browser, "[role=alert]")


def steered(browser: Browser, address: str, changes: str, *, width: int) -> tuple[str, str]:
    show(
        browser,
        address,
        f"{FIRST}/steer?text=the+cat&changes={changes}&new_tokens=8&seed=3",
        width=width,
    )
    browser.evaluate("document.querySelector('form').requestSubmit()")
    browser.wait(
        "document.querySelector('.sides')?.dataset.done === 'yes' || "
        "document.querySelector('[role=alert]')"
    )
    sides: list[str] = browser.evaluate(
        "[...document.querySelectorAll('[data-side]')].map(e => e.textContent)"
    )
    return sides[0], sides[1]


@pytest.mark.parametrize("width", [1280, 390])
def test_steering_changes_the_continuation(browser: Browser, address: str, width: int) -> None:
    plain, changed = steered(browser, address, "5:add:90", width=width)
    assert plain.startswith("the cat")
    assert plain != changed
    assert steered(browser, address, "5:add:0", width=width) == (plain, plain)
    # The address holds everything: it gives the same again.
    kept = browser.evaluate("location.hash")
    assert "changes=5%3Aadd%3A0" in kept


def test_two_saes_are_compared(browser: Browser, address: str) -> None:
    show(browser, address, f"compare?a={SAES[0]}&b={SAES[1]}&text=the+cat")
    browser.wait("document.querySelectorAll('.sides > section').length === 2")
    shaded: Any = browser.evaluate(
        "[...document.querySelectorAll('.sides > section')].map(e => e.textContent)"
    )
    assert shaded[0] != shaded[1]


def test_a_copy_says_what_it_cannot_do(browser: Browser, static: str) -> None:
    show(browser, static, f"{FIRST}/text?text=the")
    browser.wait("document.querySelector('[role=alert]')")
    assert 'need "sae browse"' in text(browser, "[role=alert]")


def test_everything_can_be_reached_by_keyboard_and_has_a_name(
    browser: Browser, address: str
) -> None:
    for page in ("", FIRST, f"{FIRST}/17", f"{FIRST}/text", f"{FIRST}/steer", "compare"):
        show(browser, address, page)
        nameless = browser.evaluate(
            "[...document.querySelectorAll('input, select, textarea, button, a')].filter(e => "
            "!(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).length"
        )
        assert nameless == 0
        assert browser.evaluate("document.querySelectorAll('h1').length") == 1
        assert browser.evaluate("document.querySelectorAll('main, header, nav').length") >= 3

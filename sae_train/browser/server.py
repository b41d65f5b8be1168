"""The browser's server: pages, JSON, and the live parts as lines of JSON.

It answers requests that name its own host, so that a page elsewhere can't reach it by pointing a
name at this machine; it writes nothing; and its pages may load nothing from anywhere else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from activation_cache.runtime.errors import UserError
from sae_train.browser.catalogue import Shown, index, latent_json
from sae_train.browser.listing import Listing, Query
from sae_train.browser.requests import Live, Say, explored, steered

logger = logging.getLogger(__name__)

SITE = Path(__file__).parent / "site"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_LARGEST_REQUEST = 2**20  # bytes
_OWN_NAMES = ("127.0.0.1", "localhost")
_EVERYWHERE = ("0.0.0.0", "::", "")

Ask = Callable[[Live, Say, Shown, dict[str, Any]], dict[str, Any]]


@dataclass
class Site:
    """What is shown, and what answers for it."""

    shown: Sequence[Shown]
    live: Live = field(default_factory=Live)
    lock: threading.Lock = field(default_factory=threading.Lock)  # Parquet readers take one reader

    def __post_init__(self) -> None:
        self.by_id = {one.id: one for one in self.shown if one.latents is not None}
        self.listings: dict[str, Listing] = {}

    def of(self, sae: str) -> Shown:
        """The SAE of an address; raises `UserError` if none of that name is shown."""
        if sae not in self.by_id:
            raise UserError(f"no SAE '{sae}' is shown here")
        return self.by_id[sae]

    def read_ahead(self) -> None:
        """Read what the pages of the first SAE need, before somebody waits for them."""
        for one in list(self.by_id.values())[:1]:
            # What is wrong is told by the page that needs it.
            with self.lock, contextlib.suppress(UserError, OSError, ValueError):
                latent_json(self.shown, one, 0)

    def page(self, sae: str, asked: Mapping[str, str]) -> dict[str, Any]:
        """A page of an SAE's list."""
        shown = self.of(sae)
        assert shown.latents is not None
        names = ("offset", "count", "after")
        given: dict[str, Any] = {key: _number(asked[key]) for key in names if key in asked}
        given |= {key: asked[key] for key in ("sort", "text", "where") if key in asked}
        query = Query(**given, falling=asked.get("order", "falling") == "falling")
        with self.lock:
            if sae not in self.listings:
                self.listings[sae] = Listing(shown.latents)
            listing = self.listings[sae]
        with listing.lock:
            return listing.page(query)

    def latent(self, sae: str, number: str) -> dict[str, Any]:
        """Everything about one latent."""
        with self.lock:
            return latent_json(self.shown, self.of(sae), _number(number))


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"'{text}' is not a whole number") from None


def application(site: Site, *, hosts: Sequence[str] = _OWN_NAMES) -> Starlette:
    """The ASGI application; `hosts` are the names that it answers to."""

    async def answer(make: Callable[[], Any]) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(make))
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=404)

    async def facts(request: Request) -> Response:
        return await answer(lambda: index(site.shown, live=True))

    async def page(request: Request) -> Response:
        sae = request.path_params["sae"]
        return await answer(lambda: site.page(sae, dict(request.query_params)))

    async def latent(request: Request) -> Response:
        path = request.path_params
        return await answer(lambda: site.latent(path["sae"], path["number"]))

    async def start(request: Request) -> Response:
        # Of a page elsewhere a browser would send such a request only after asking us first.
        if request.headers.get("content-type") != "application/json":
            return JSONResponse({"error": "send JSON"}, status_code=415)
        try:
            body = _body(await request.body())
            shown = site.of(request.path_params["sae"])
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=404)
        ask: Ask = {"explore": explored, "steer": steered}[request.path_params["what"]]
        messages = site.live.answers(lambda live, say: ask(live, say, shown, body))
        return StreamingResponse(_lines(messages), media_type="application/x-ndjson")

    routes = [
        Route("/data/index.json", facts),
        Route("/data/{sae}/list.json", page),
        Route("/data/{sae}/latents/{number}.json", latent),
        Route("/live/{sae}/{what:str}", start, methods=["POST"]),
        Mount("/", StaticFiles(directory=SITE, html=True)),
    ]
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        Middleware(_Headers),
    ]
    return Starlette(routes=routes, middleware=middleware)


def _body(raw: bytes) -> dict[str, Any]:
    if len(raw) > _LARGEST_REQUEST:
        raise UserError(
            f"the request has {len(raw)} bytes, and at most {_LARGEST_REQUEST} are read"
        )
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise UserError(f"the request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise UserError("the request is not a JSON object")
    return body


def _lines(messages: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    for message in messages:
        yield json.dumps(message).encode() + b"\n"


class _Headers:
    """Adds `HEADERS` to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        await self.app(scope, receive, with_headers)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address; raises `UserError` if another program has it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    own = socket.socket(family, socket.SOCK_STREAM)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((host, port))
        own.listen()
    except (OSError, OverflowError) as error:
        own.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use by another program: give another one with --port"
            ) from error
        raise UserError(f"can't listen on {host}, port {port}: {error}") from error
    return own


def serve(
    site: Site, own: socket.socket, *, host: str, stop: Callable[[], bool] = lambda: False
) -> None:
    """Answer requests on a socket until `stop` returns True."""
    hosts = ["*"] if host in _EVERYWHERE else [*_OWN_NAMES, host]
    # Its own log_config would close every handler that this process has.
    config = uvicorn.Config(
        application(site, hosts=hosts), log_config=None, log_level="warning", lifespan="off"
    )
    server = uvicorn.Server(config)
    # In a thread, since uvicorn in the main one would replace the command's handling of signals.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    try:
        site.read_ahead()
        while thread.is_alive() and not stop():
            time.sleep(0.1)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=5)
        own.close()

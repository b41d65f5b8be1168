"""An HTTP proxy in front of a storage emulator: it can fail on demand, and adds what the real
services do and the emulators don't.

gcp-storage-emulator knows no suffix ranges (`bytes=-100`), tells no generation with an object's
bytes and ignores conditions on it; moto ignores `If-None-Match: *`.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

Headers = dict[str, str]
Answer = tuple[int, Headers, bytes]
_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        fail: asked for each request with its method and path; a status to answer it with, or
            None to pass it on.
        refused: how many were answered so.
    """

    address: str
    upstream: str
    scheme: str
    fail: Callable[[str, str], int | None] = lambda method, path: None
    refused: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def answer(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        status = self.fail(method, unquote(target))
        if status is not None:
            self.refused += 1
            return status, {"Content-Type": "text/plain"}, _words(self.scheme, status)
        if self.scheme == "s3":
            return self._s3(method, target, headers, body)
        return self._google(method, target, headers, body)

    def _s3(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        if method == "PUT" and headers.get("if-none-match") == "*":
            with self.lock:
                if self.forward("HEAD", target, {}, b"")[0] == 200:
                    return 412, {}, _words("s3", 412)
                return self.forward(method, target, headers, body)
        return self.forward(method, target, headers, body)

    def _google(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        parts = urlsplit(target)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if method == "GET" and query.get("alt") == "media":
            return self._media(target, parts.path, headers)
        if method == "POST" and "ifGenerationMatch" in query and "name" in query:
            with self.lock:
                path = f"{parts.path.replace('/upload', '')}/{quote(query['name'], safe='')}"
                if self._generation(path) != query["ifGenerationMatch"]:
                    return 412, {}, b"conditionNotMet"
                return self.forward(method, target, headers, body)
        return self.forward(method, target, headers, body)

    def _media(self, target: str, path: str, headers: Headers) -> Answer:
        wanted = headers.pop("range", None)
        with self.lock:
            generation = self._generation(path.replace("/download", ""))
            status, found, data = self.forward("GET", target, headers, b"")
        found["x-goog-generation"] = generation
        ranges = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
        if status != 200 or ranges is None:
            return status, found, data
        size = len(data)
        start, stop = ranges.groups()
        first = int(start) if start else max(0, size - int(stop))
        last = min(int(stop), size - 1) if start and stop else size - 1
        found["Content-Range"] = f"bytes {first}-{last}/{size}"
        return 206, found, data[first : last + 1]

    def _generation(self, path: str) -> str:
        status, _, data = self.forward("GET", path, {}, b"")
        return json.loads(data)["generation"] if status == 200 else "0"

    def forward(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        """Ask the emulator."""
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=300)
        try:
            connection.request(method, target, body=body, headers=headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        kept = {key: value for key, value in response.getheaders() if key.lower() not in _HOP}
        if method == "HEAD" and response.getheader("Content-Length"):
            kept["Content-Length"] = str(response.getheader("Content-Length"))
        return response.status, kept, data


def _words(scheme: str, status: int) -> bytes:
    code = {403: "AccessDenied", 401: "InvalidAccessKeyId", 412: "PreconditionFailed"}
    if scheme == "s3":
        name = code.get(status, "ServiceUnavailable")
        return f"<Error><Code>{name}</Code><Message>no</Message></Error>".encode()
    return json.dumps({"error": {"code": status, "message": "no"}}).encode()


@contextmanager
def proxy_before(upstream: str, *, scheme: str) -> Iterator[Proxy]:
    """Run a proxy in front of a server for as long as the block lasts."""
    proxy = Proxy(address="", upstream=upstream, scheme=scheme)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle_one(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            headers = {key.lower(): value for key, value in self.headers.items()}
            headers = {key: value for key, value in headers.items() if key not in _HOP}
            try:
                status, found, data = proxy.answer(self.command, self.path, headers, body)
            except OSError:  # the emulator is gone
                status, found, data = 502, {}, b""
            self.send_response_only(status)
            for key, value in found.items():
                self.send_header(key, value)
            if "Content-Length" not in found:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_one

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that was killed says no farewell."""

    server = Quiet(("127.0.0.1", 0), Handler)
    proxy.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

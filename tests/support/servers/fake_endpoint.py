"""A chat endpoint whose answers and faults a test scripts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True)
class Response:
    """What the endpoint sends; a text is sent as it is, anything else as JSON."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds before it


@dataclass
class FakeEndpoint:
    """A running endpoint.

    Attributes:
        script: from a request's body to its response.
        requests: the bodies that came, and the keys beside them.
    """

    url: str = ""
    script: Callable[[Body], Response] = lambda body: completion("Explanation: words")
    requests: list[Body] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0


def completion(text: str | None, **choice: Any) -> Response:
    """A chat completion with this text; further keywords are keys of its choice."""
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"} | choice]
    return Response({"choices": choices, "usage": {"prompt_tokens": 100, "completion_tokens": 7}})


def is_explanation(body: Body) -> bool:
    """Does the request ask for an explanation, and not for a score?"""
    return "Explanation: and the" in body["messages"][0]["content"]


@contextmanager
def fake_endpoint(*, paths: Collection[str] = ("/v1/chat/completions",)) -> Iterator[FakeEndpoint]:
    """Serve these paths until the block ends."""
    state, lock = FakeEndpoint(), threading.Lock()
    running = [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running[0] += 1
                state.most_at_once = max(state.most_at_once, running[0])
                state.requests.append(body)
                state.keys.append(self.headers.get("Authorization"))
                response = state.script(body)
            time.sleep(response.delay)
            content = response.content
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            with lock:
                running[0] -= 1
            try:
                self.send_response(response.status if self.path in paths else 404)
                for name, value in response.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has given up

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

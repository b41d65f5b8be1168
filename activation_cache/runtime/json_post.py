"""POST of JSON to other people's servers: waited for while busy, and no key in any message.

httpx is an extra (`explain`, `neuronpedia`); it is imported here and nowhere else.
"""

from __future__ import annotations

import email.utils
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from activation_cache.runtime.errors import UserError

logger = logging.getLogger(__name__)

ATTEMPTS = 7
LONGEST_PAUSE = 600.0  # seconds that a server may ask us to wait
_BUSY = (408, 409, 425, 429)


class Unanswered(Exception):
    """Every attempt failed; the text says what the last one was answered.

    Attributes:
        was_unsound: the server answers, but not with what was asked for.
    """

    def __init__(self, problem: str, *, was_unsound: bool) -> None:
        super().__init__(problem)
        self.was_unsound = was_unsound


class Stopped(Exception):
    """`JsonPost.stop` was called while a request waited for its turn."""


class JsonPost:
    """Sends requests to one server; may be used by several threads, which then pause together."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        secret: str | None,
        timeout: float = 120.0,
        pause: float = 1.0,
    ) -> None:
        """A client; nothing is sent yet.

        Args:
            headers: of every request.
            secret: what must not be in a message, should the server repeat it.
            timeout: seconds for one answer.
            pause: before the second attempt, in seconds; it doubles with each.

        Raises:
            UserError: httpx is missing, or the URL or a header can't be sent.
        """
        try:
            import httpx
        except ImportError as error:
            raise UserError("this needs httpx: pip install 'open-gemma-scope[explain]'") from error
        if not re.match(r"https?://[^/\s]+", url):
            raise UserError(f"{url} is no address: it should begin with http:// or https://")
        try:
            self._client = httpx.Client(headers=dict(headers), timeout=timeout)
        except (UnicodeEncodeError, ValueError) as error:
            raise UserError(f"the key for {url} can't be sent: it isn't plain ASCII") from error
        self._httpx = httpx
        self._url, self._secret, self._timeout, self._pause = url, secret, timeout, pause
        self._stopped = threading.Event()
        self._not_before = 0.0

    def stop(self) -> None:
        """End all pauses: requests that aren't sent yet raise `Stopped`."""
        self._stopped.set()

    def send(
        self, path: str, body: Any, *, is_sound: Callable[[Any], bool] = lambda response: True
    ) -> Any:
        """The response to one request, which is repeated after pauses while the server is busy.

        Args:
            path: below `url`.
            is_sound: is a response of status 2xx what was asked for? If not it is asked again.

        Returns:
            httpx's response: sound, or of a status that no repetition mends (400, 401, 404, ...).

        Raises:
            UserError: the server asks for a pause above `LONGEST_PAUSE`.
            Unanswered: after `ATTEMPTS` it still can't be reached, is busy or answers nonsense.
            Stopped: `stop` was called.
        """
        problem, was_unsound = "", False
        for attempt in range(ATTEMPTS):
            self._wait_for_turn()
            pause = self._pause * 2**attempt * random.uniform(1.0, 1.25)
            was_unsound = False
            try:
                response = self._client.post(self._url.rstrip("/") + path, json=body)
            except self._httpx.TimeoutException:
                problem = f"gave no answer within {self._timeout:g} seconds"
            except self._httpx.HTTPError as error:
                problem = f"can't be reached ({error or type(error).__name__})"
            else:
                status = response.status_code
                if response.is_success:
                    if is_sound(response):
                        return response
                    problem, was_unsound = f"answers with {self.said(response)}", True
                elif status in _BUSY or status >= 500:
                    problem = f"answers with status {status}: {self.said(response)}"
                    pause = max(pause, self._asked_to_wait(response))
                else:
                    return response
            logger.debug("%s %s", self._url, problem)
            if attempt < ATTEMPTS - 1:
                self._not_before = max(self._not_before, time.monotonic() + pause)
        raise Unanswered(f"{problem}. Asked {ATTEMPTS} times", was_unsound=was_unsound)

    def said(self, response: Any) -> str:
        """The start of what the server sent, on one line and without the key."""
        text = response.text[:2000]
        if self._secret:
            text = text.replace(self._secret, "***")
        text = re.sub(r"\s+", " ", "".join(one if one.isprintable() else " " for one in text))
        return text.strip()[:200] or "nothing"

    def _wait_for_turn(self) -> None:
        while (seconds := self._not_before - time.monotonic()) > 0:
            if self._stopped.wait(seconds):
                break
        if self._stopped.is_set():
            raise Stopped

    def _asked_to_wait(self, response: Any) -> float:
        """Seconds that the header Retry-After asks for, which is a number or a date."""
        text = response.headers.get("Retry-After", "")
        try:
            seconds = float(text)
        except ValueError:
            date = email.utils.parsedate_to_datetime(text) if email.utils.parsedate(text) else None
            seconds = date.timestamp() - time.time() if date else 0.0
        if not seconds < LONGEST_PAUSE:
            raise UserError(
                f"{self._url} asks for a pause of {seconds:,.0f} seconds and the longest is "
                f"{LONGEST_PAUSE:g}: give the same command again later, it continues"
            )
        return max(seconds, 0.0)

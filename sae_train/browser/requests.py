"""The parts of the browser that run the model, one request at a time, in a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from activation_cache.runtime.errors import UserError
from sae_train.browser.catalogue import Shown

MOST_TOKENS = 1024  # of a text on a page
MOST_NEW_TOKENS = 256
_SAES_KEPT = 2

Say = Callable[[dict[str, Any]], None]


class Gone(Exception):
    """The reader left before the answer came."""


@dataclass
class Live:
    """The model of the shown SAEs, loaded when it is first needed.

    Attributes:
        loader: what loads a model and an SAE of a folder; `sae_train.live.load.Loader`.
    """

    loader: Any = None
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))

    def answers(self, ask: Callable[[Live, Say], Any]) -> Iterator[dict[str, Any]]:
        """Progress in words, then the result or an error; closing the iterator stops the work."""
        told: queue.Queue[dict[str, Any] | None] = queue.Queue()
        gone = threading.Event()

        def say(message: dict[str, Any]) -> None:
            if gone.is_set():
                raise Gone
            told.put(message)

        def work() -> None:
            try:
                say({"progress": "starting"})
                told.put({"result": ask(self, say)})
            except Gone:
                pass
            except UserError as error:
                told.put({"error": str(error)})
            except Exception as error:
                told.put({"error": f"a fault in the program: {type(error).__name__}: {error}"})
                raise
            finally:
                told.put(None)

        told.put({"progress": "waiting for another request to end"})
        self._worker.submit(work)
        try:
            while (message := told.get()) is not None:
                yield message
        finally:
            gone.set()

    def loaded(self, shown: Shown, say: Say) -> tuple[Any, Any]:
        """The model and the placed SAE."""
        if self.loader is None:
            say({"progress": "loading JAX"})
            from sae_train.live.load import Loader

            self.loader = Loader(saes_kept=_SAES_KEPT)
        return self.loader.load(
            shown.latents, shown.folder, say=lambda text: say({"progress": text})
        )


def explored(live: Live, say: Say, shown: Shown, body: dict[str, Any]) -> dict[str, Any]:
    """`explore` of a text, and the values of latents that are asked for by number."""
    from sae_train.live.explore import explore

    text = _of(body, "text", str)
    position = _of(body, "position", int, None)
    latents = [_whole(one) for one in _of(body, "latents", list, [])]
    model, placed = live.loaded(shown, say)
    say({"progress": "running the model"})
    found = explore(model, placed, text, position=position, at_most=MOST_TOKENS, strongest=12)
    names = (
        "tokens",
        "active",
        "strongest",
        "overall",
        "effective",
        "position",
        "predicted",
        "likely",
    )
    named = (one.latent for one in (*found.overall, *found.effective))
    wanted = dict.fromkeys([*latents, *named])
    values = found.values(list(wanted)).T.tolist()
    parts = {name: _plain(getattr(found, name)) for name in names}
    return parts | {"values": dict(zip(map(str, wanted), values, strict=True))}


def steered(live: Live, say: Say, shown: Shown, body: dict[str, Any]) -> dict[str, Any]:
    """`steer` of a text; the continuations are told as they grow."""
    from sae_train.live.steer import steer

    text, given = _of(body, "text", str), _of(body, "changes", list)
    changes: dict[int, tuple[Any, float]] = {}
    for one in given:
        if not isinstance(one, dict):
            raise UserError("each change is an object with latent, mode and strength")
        strength = float(_of(one, "strength", (int, float), 0.0))
        changes[_whole(one.get("latent"))] = (_of(one, "mode", str), strength)
    new_tokens = _of(body, "new_tokens", int, 40)
    if not 0 < new_tokens <= MOST_NEW_TOKENS:
        raise UserError(f"{new_tokens} new tokens: ask for 1 to {MOST_NEW_TOKENS}")
    model, placed = live.loaded(shown, say)
    found = steer(
        model,
        placed,
        text,
        changes,
        new_tokens=new_tokens,
        temperature=float(_of(body, "temperature", (int, float), 0.7)),
        seed=_of(body, "seed", int, 0),
        at_most=MOST_TOKENS,
        listener=lambda name, so_far: say({"progress": f"sampling: {name}", name: so_far}),
    )
    return {"plain": found.plain, "steered": found.steered}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def _of(body: dict[str, Any], key: str, kind: Any, *default: Any) -> Any:
    """A key of a request; raises `UserError` where it has another type."""
    value = body.get(key)
    if value is None and default:
        return default[0]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"'{key}' of the request is {value!r}, which is of the wrong type")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"a latent is a whole number, and {value!r} isn't")
    return value

"""Put an SAE's latents on Neuronpedia by its REST interface, for anybody with a key.

Bodies and limits are those of hijohnnylin/neuronpedia ebb8426f (apps/webapp/app/api/model/new,
source-set/new, feature/upload-batch; middleware.ts). Histograms and similar latents can't be sent
this way; the bulk layout has them. The site skips what it has, so that a request may be repeated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.json_post import JsonPost, Stopped, Unanswered
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.files import append_line
from sae_train.latents.reader import Latents
from sae_train.latents.records import Latent, TokenValue
from sae_train.release.neuronpedia import Chosen, Source, activation
from sae_train.release.neuronpedia_files import METHOD_NAMES

logger = logging.getLogger(__name__)

KEY, URL = "NEURONPEDIA_API_KEY", "NEURONPEDIA_BASE_URL"
SITE = "https://www.neuronpedia.org"
JOURNAL = "uploaded.jsonl"

MOST_LATENTS = 128  # of a request
MOST_BYTES = 4_000_000  # of a request: the site's host takes 4.5 MB
MOST_TOKENS = 1024  # of a context
MOST_TEXT = 512  # characters of an explanation
MOST_DESCRIPTION = 128
REQUESTS_AN_HOUR = 1000
_HOUR = 3600.0


def server(url: str, key: str) -> JsonPost:
    """The site, or another server of the same interface; raises `UserError` as `JsonPost`."""
    return JsonPost(url.rstrip("/") + "/api", {"X-Api-Key": key}, secret=key)


@dataclass(frozen=True)
class Batch:
    """One request: the latents, and the hash under which the journal has it."""

    features: tuple[dict[str, Any], ...]
    hash: str


@dataclass(frozen=True)
class Content:
    """What would be sent of an SAE.

    Attributes:
        left_out: latents without a context that goes along: the site takes none without.
    """

    latents: int
    left_out: int
    contexts: int
    tokens: int
    explanations: int
    subsets: tuple[str, ...]


def content(latents: Latents, chosen: Chosen) -> Content:
    """Count what would be sent, and look whose texts they are."""
    sent = contexts = tokens = explanations = 0
    subsets: set[str] = set()
    for latent in latents:
        own = chosen.of(latent)
        if not own:
            continue
        sent += 1
        contexts += len(own)
        tokens += sum(len(one.tokens) for one in own)
        explanations += len(latent.explanations)
        subsets |= {one.subset for one in own if one.subset is not None}
    return Content(
        sent, len(latents) - sent, contexts, tokens, explanations, tuple(sorted(subsets))
    )


def upload(
    latents: Latents,
    *,
    source: Source,
    chosen: Chosen,
    server: JsonPost,
    journal: Path,
    num_layers: int,
    description: str,
    stop: Callable[[], bool],
) -> int:
    """Send every latent that isn't in the journal yet; returns how many were sent.

    Model and source set are made unless they are there.

    Args:
        journal: a file of JSON lines, one per request that the site took.
        num_layers: of the model; a source of each layer is made.

    Raises:
        UserError: the site refuses the key, the set (it is another's) or a request, or can't be
            reached.
        Interrupted: a signal came. What was sent is in the journal.
    """
    done, times = _read_journal(journal)
    model = {"id": source.model, "layers": num_layers, "displayName": source.model}
    _create(server, "/model/new", model)
    own = {"name": source.set_name, "modelId": source.model}
    _create(server, "/source-set/new", own | {"description": description[:MOST_DESCRIPTION]})
    sent = 0
    with ProgressMeter(f"upload {source.id}", total=len(latents), unit="latents") as meter:
        for batch in batches(latents, chosen):
            if batch.hash not in done:
                _wait_for_window(times, stop)
                body = {"modelId": source.model, "source": source.id}
                _post(server, "/feature/upload-batch", body | {"features": batch.features})
                times.append(time.time())
                line = {"hash": batch.hash, "time": times[-1], "latents": len(batch.features)}
                append_line(journal, json.dumps(line))
                sent += len(batch.features)
            meter.update(batch.features[-1]["index"] + 1)
    return sent


def batches(latents: Latents, chosen: Chosen) -> Iterator[Batch]:
    """All latents that have a context to send, in requests within the site's limits."""
    waiting: list[dict[str, Any]] = []
    size = 0
    for latent in latents:
        one = feature(latent, latents, chosen)
        if one is None:
            continue
        own = len(json.dumps(one))
        if waiting and (len(waiting) == MOST_LATENTS or size + own > MOST_BYTES):
            yield _batch(waiting)
            waiting, size = [], 0
        waiting.append(one)
        size += own
    if waiting:
        yield _batch(waiting)


def _batch(features: list[dict[str, Any]]) -> Batch:
    digest = hashlib.sha256(json.dumps(features, sort_keys=True).encode()).hexdigest()
    return Batch(tuple(features), digest)


def feature(latent: Latent, latents: Latents, chosen: Chosen) -> dict[str, Any] | None:
    """One latent of a request, within the site's limits; None without a context to send.

    The site numbers quantiles as SAEDashboard's intervals. Explanations go without the name of
    their model: the site takes only names from a list of its own.
    """
    contexts = []
    for context in chosen.of(latent):
        one = activation(context, latent=latent, tokens=latents.record.tokens)
        bounds = {"quantileMin": one["bin_min"], "quantileMax": one["bin_max"]}
        if one["bin_contains"] >= 0:
            bounds["quantileFraction"] = min(1.0, one["bin_contains"])
        tokens = [_text(token) for token in one["tokens"][:MOST_TOKENS]]
        contexts.append({"tokens": tokens, "values": one["values"][:MOST_TOKENS], **bounds})
    if not contexts:
        return None
    explanations = [
        {"text": text[:MOST_TEXT], "methodName": METHOD_NAMES.get(one.method)}
        for one in latent.explanations
        if (text := _text(one.text).strip())
    ]
    return {
        "index": latent.index,
        "density": min(1.0, latent.frequency),
        "topLogits": _logits(latent.plain_top_logits),
        "bottomLogits": _logits(latent.plain_bottom_logits),
        "explanations": explanations,
        "activations": contexts,
    }


def _logits(tokens: tuple[TokenValue, ...]) -> list[dict[str, Any]]:
    return [{"token": _text(one.token), "value": round(one.value, 5)} for one in tokens[:20]]


def _text(text: str) -> str:
    """The site's database holds no NUL, and its interface takes no empty token."""
    return text.replace("\0", " ") or " "


def _create(server: JsonPost, path: str, body: dict[str, Any]) -> None:
    _post(server, path, body, fine="already exists")


def _post(server: JsonPost, path: str, body: dict[str, Any], *, fine: str | None = None) -> None:
    try:
        response = server.send(path, body)
    except Unanswered as error:
        raise UserError(
            f"Neuronpedia {error} ({path}); what was sent is kept, and the same command continues"
        ) from error
    except Stopped as error:
        raise Interrupted("stopped by a signal; what was sent is kept") from error
    if response.is_success or (fine is not None and fine in response.text):
        return
    if response.status_code in (401, 403):
        raise UserError(
            f"Neuronpedia answers with status {response.status_code} to the key in {KEY}: "
            f"{server.said(response)}. Your keys are on the site, under your account"
        )
    raise UserError(
        f"Neuronpedia refuses {path} with status {response.status_code}: {server.said(response)}"
    )


def _wait_for_window(times: list[float], stop: Callable[[], bool]) -> None:
    """Wait until fewer than `REQUESTS_AN_HOUR` were sent within the last hour."""
    while True:
        if stop():
            raise Interrupted("stopped by a signal; what was sent is kept")
        recent = [one for one in times if time.time() - one < _HOUR]
        if len(recent) < REQUESTS_AN_HOUR:
            return
        wait = recent[0] + _HOUR - time.time()
        logger.info("the site takes %d requests an hour: %.0f s to go", REQUESTS_AN_HOUR, wait)
        end = time.monotonic() + min(wait, 60.0)
        while time.monotonic() < end and not stop():
            time.sleep(0.5)


def _read_journal(path: Path) -> tuple[set[str], list[float]]:
    """The hashes of requests that were taken, and when; a line that a kill cut short is dropped."""
    done: set[str] = set()
    times: list[float] = []
    if path.is_file():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            path.write_bytes(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                done.add(str(entry["hash"]))
                times.append(float(entry["time"]))
            except (ValueError, LookupError, TypeError):
                logger.warning("%s: a damaged line is ignored; its request is repeated", path)
    return done, times

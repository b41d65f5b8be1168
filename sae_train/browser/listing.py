"""The list of an SAE's latents: sorted, searched, a page at a time, for a million latents."""

from __future__ import annotations

import functools
import json
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from activation_cache.runtime.errors import UserError
from sae_train.browser.catalogue import score_of
from sae_train.latents.reader import Latents
from sae_train.latents.records import text_of
from sae_train.latents.schema import CONTEXTS, GROUP

Sort = Literal[
    "latent", "frequency", "maximum", "mean", "top_logit", "bottom_logit", "nearest_cosine", "score"
]
Where = Literal["explanation", "token", "context"]

_PATIENCE = 3.0  # seconds that one search of contexts may take
_MOST_HITS = 500


@dataclass(frozen=True)
class Query:
    """What a page of the list is asked for.

    Attributes:
        text: what to look for; empty finds everything.
        where: in explanations; in the token a latent fires on most or raises or lowers most; or in
            contexts.
        after: a search of contexts starts behind this latent.
    """

    sort: str = "frequency"  # one of `Sort`
    falling: bool = True
    text: str = ""
    where: str = "token"  # one of `Where`
    offset: int = 0
    count: int = 100
    after: int = -1

    def __post_init__(self) -> None:
        for value, kind in ((self.sort, Sort), (self.where, Where)):
            if value not in get_args(kind):
                raise UserError(f"'{value}' is none of {', '.join(get_args(kind))}")
        if not (self.offset >= 0 and 0 < self.count <= 1000):
            raise UserError(f"offset {self.offset}, count {self.count}: from 0, and 1 to 1,000")


class Listing:
    """The columns of one SAE's latents in memory.

    Attributes:
        lock: a page is made by one thread at a time. No file is read meanwhile that `latents` reads
            when it is asked for a latent, so that nobody waits for a search of contexts.
    """

    def __init__(self, latents: Latents) -> None:
        self.latents = latents
        self.lock = threading.Lock()
        # Read now, so that no page reads a file of `latents`; contexts are searched in another.
        self._known = (latents.summary, latents.vocabulary, latents.explanations)
        self._searched = Latents(latents.folder, latents.record)
        self._order = functools.lru_cache(maxsize=8)(self._ordered)
        self._matches = functools.lru_cache(maxsize=8)(self._matching)

    def page(self, query: Query) -> dict[str, Any]:
        """Rows of the list, how many there are, and up to which latent contexts were searched."""
        searched = len(self.latents)
        order = self._order(query.sort, query.falling)
        if query.text:
            mask, searched = self._matches(query.text, query.where, query.after)
            order = order[mask[order]]
        chosen = order[query.offset : query.offset + query.count]
        return {"total": len(order), "searched": searched, "rows": self.rows(chosen)}

    def rows(self, chosen: Int[np.ndarray, " rows"]) -> list[dict[str, Any]]:
        """What the list shows of these latents."""
        names = ["latent", "frequency", "maximum", "top_input", "top_logit_token", "top_logit"]
        pieces, found = self.latents.vocabulary, []
        for row in self.latents.summary.select(names).take(pa.array(chosen)).to_pylist():
            explanations = self.latents.explanations.get(row["latent"], ())
            explanation = explanations[-1] if explanations else None
            tokens = {
                key: None if row[key] is None else pieces[row[key]]
                for key in ("top_input", "top_logit_token")
            }
            text = None if explanation is None else explanation.text
            score = None if explanation is None else score_of(explanation.scores)
            found.append(row | tokens | {"explanation": text, "score": score})
        return found

    def column(self, name: str) -> np.ndarray:
        """The numbers that the list is sorted by; NaN where there is none."""
        if name != "score":
            return self.latents.summary[name].to_numpy().astype(np.float64)
        known = self.latents.explanations
        # Many latents have the same scores: each JSON is read once.
        listed = known.last["scores"].combine_chunks().dictionary_encode(null_encoding="encode")
        found = [score_of(json.loads(one or "{}")) for one in listed.dictionary.to_pylist()]
        scores = np.full(len(self.latents), np.nan)
        scores[known.latents] = np.array(found, np.float64)[listed.indices.to_numpy()]
        return scores

    def _ordered(self, sort: str, falling: bool) -> Int[np.ndarray, " F"]:
        values = self.column(sort)
        order = np.argsort(-values if falling else values, kind="stable")  # NaN is last in both
        return order.astype(np.int64)

    def _matching(self, text: str, where: str, after: int) -> tuple[Bool[np.ndarray, " F"], int]:
        """Which latents match, and how many of the first were looked at."""
        mask = np.zeros(len(self.latents), bool)
        if where == "context":
            return self._contexts(text, after)
        if where == "explanation":
            known = self.latents.explanations
            hits = pc.match_substring(known.last["text"], text, ignore_case=True)
            mask[known.latents] = hits.to_numpy()
            return mask, len(mask)
        ids = np.flatnonzero(pc.match_substring(self._texts, text, ignore_case=True))
        for name in ("top_input", "top_logit_token", "bottom_logit_token"):
            mask |= np.isin(self.latents.summary[name].fill_null(-1).to_numpy(), ids)
        return mask, len(mask)

    @functools.cached_property
    def _texts(self) -> pa.Array:
        return pa.array([text_of(piece) for piece in self.latents.vocabulary], pa.string())

    def _contexts(self, text: str, after: int) -> tuple[Bool[np.ndarray, " F"], int]:
        """Row group by row group, until there are enough hits or the time is over."""
        mask = np.zeros(len(self.latents), bool)
        file = self._searched.open_file(CONTEXTS.name)
        end = time.monotonic() + _PATIENCE
        first = (after + 1) // GROUP
        for group in range(first, file.num_row_groups):
            table = file.read_row_group(group, columns=["latent", "tokens"])
            tokens = table["tokens"].combine_chunks()
            if isinstance(tokens, pa.ChunkedArray):
                tokens = pa.concat_arrays(tokens.chunks)
            words = pa.ListArray.from_arrays(tokens.offsets, self._texts.take(tokens.values))
            hits = pc.match_substring(pc.binary_join(words, ""), text, ignore_case=True)
            mask[table["latent"].filter(hits).to_numpy()] = True
            if mask.sum() >= _MOST_HITS or time.monotonic() > end:
                return mask, min((group + 1) * GROUP, len(mask))
        return mask, len(mask)

"""`sae rollout`: the model continues prompts, and its continuations become files of text.

The work is cut into parts of a fixed number of rows, a row being one continuation of one prompt. A
part is a pure function of the plan: its batches are those rows in order, and batch b draws from a
key of (seed, b). So a part made again, or by another process, has the same bytes, and a rollout
that was stopped goes on with the parts that are missing. The record `rollout.json`, written last,
makes the folder finished.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import zstandard

from activation_cache.config import Count, MeshConfig, ModelConfig, RolloutConfig, Section
from activation_cache.gemma.replicas import Placement, place_replicas
from activation_cache.gemma.sampling import Continuation, Sampling
from activation_cache.language_model.chat_template import ChatTemplate, load_chat_template
from activation_cache.language_model.checkpoint import weight_fingerprint
from activation_cache.language_model.model import LanguageModel, load_replicas, precision_on
from activation_cache.language_model.shape import read_gemma_config
from activation_cache.language_model.tokenizer import Tokenizer, load_tokenizer
from activation_cache.precision import Precision
from activation_cache.rollout.prompts import Prompt, read_prompts
from activation_cache.runtime import exchange
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.exchange import shared
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.files import StoragePath, make_folder, storage_path, write_bytes
from activation_cache.storage.locks import folder_lock
from activation_cache.storage.records import FORMAT_VERSION, read_record, write_record
from activation_cache.store.order import derive_key

logger = logging.getLogger(__name__)

PLAN_FILE, RECORD_FILE = "plan.json", "rollout.json"
PART_ROWS = 256  # continuations in a file: what a stop may cost
_END_OF_TURN = "<end_of_turn>"  # with which Gemma's instruction-tuned models end an answer


class Plan(Section):
    """`plan.json`: all that the continuations depend on."""

    format_version: int
    model: str
    fingerprint: str
    dtype: str
    precision: Precision
    model_axis: int  # devices a replica is cut over
    template_hash: str | None
    rollout: dict[str, Any]  # the section without its path, which may change


class Record(Plan):
    """`rollout.json`: the plan, and how many prompts and continuations there were."""

    prompts: Count
    skipped: Count  # too long for the model's context
    rows: Count


def rollout(
    *,
    model: ModelConfig,
    settings: RolloutConfig,
    mesh: MeshConfig,
    stop: Callable[[], bool] = lambda: False,
) -> Record:
    """Write the continuations into `settings.path`, or go on with what was begun.

    Raises:
        UserError: a mistake that the user can mend, such as a folder with other rollouts, or a
            model without a chat template.
        Interrupted: `stop` turned true; finished parts stay.
    """
    path = storage_path(settings.path)
    placement = place_replicas(mesh)  # raises before anything is read
    check_context(model, settings)
    tokenizer = load_tokenizer(model)
    template = None if settings.prompt == "text" else load_chat_template(model)
    plan = Plan(
        format_version=FORMAT_VERSION,
        model=model.weights,
        fingerprint=weight_fingerprint(model),
        dtype=model.dtype,
        precision=precision_on(model, placement.meshes[0]),
        model_axis=mesh.model,
        template_hash=None if template is None else template.fingerprint,
        rollout=settings.model_dump(exclude={"path"}),
    )
    with contextlib.ExitStack() as held:

        def begin() -> None:
            make_folder(path)
            held.enter_context(folder_lock(path))
            _begin(path, plan)

        exchange.run_on_main_and_broadcast("rollout", begin)
        work = _Work(path, plan, model, settings, placement, tokenizer, template)
        found = shared(
            "rollout",
            functools.partial(work.run, stop=stop),
            finish=lambda: work.finish().model_dump_json(),
            stop=stop,
        )
    return Record.model_validate_json(found)


def check_context(model: ModelConfig, settings: RolloutConfig) -> None:
    """Raises `UserError` if no prompt can have so many tokens after it."""
    context = read_gemma_config(model).context_length
    if settings.tokens >= context:
        raise UserError(
            f"rollout.tokens {settings.tokens} leaves no room for a prompt in the model's context "
            f"of {context}: lower it to at most {context - 1}"
        )


def _begin(path: StoragePath, plan: Plan) -> None:
    """Tie the folder to this plan; raises `UserError` if it is tied to another."""
    file = path / PLAN_FILE
    if not file.exists():
        write_record(file, plan)
        return
    begun = read_record(file, Plan)
    for field in Plan.model_fields:
        before, now = getattr(begun, field), getattr(plan, field)
        if before != now and field != "model":  # weights may have moved
            raise UserError(
                f"the rollouts at {path} were begun otherwise: {field} was {before} and is {now}. "
                "Change it back to go on, or choose another rollout.path (nothing was changed)."
            )


def part_file(path: StoragePath, part: int) -> StoragePath:
    """The file of a part."""
    return path / f"part-{part:05d}.jsonl.zst"


@dataclass(frozen=True)
class _Row:
    """One continuation to make: the prompt, and which of its samples."""

    prompt: Prompt
    sample: int


@dataclass(frozen=True)
class _Work:
    """One call of `rollout` in one process."""

    path: StoragePath
    plan: Plan
    model: ModelConfig
    settings: RolloutConfig
    placement: Placement
    tokenizer: Tokenizer
    template: ChatTemplate | None

    def run(self, *, stop: Callable[[], bool]) -> None:
        """Make this team's share of the parts that are missing."""
        team, teams = self.placement.team, self.placement.num_teams
        replicas: list[LanguageModel] = []
        with ProgressMeter("rollout", total=None, unit="continuations") as meter:
            for part, rows in enumerate(self._parts()):
                # Each part is some team's, so that which ones are there makes no difference.
                if part % teams == team and not part_file(self.path, part).exists():
                    replicas = replicas or load_replicas(self.model, meshes=self.placement.meshes)
                    lines = self._made(part, rows, replicas, stop)
                    if self.placement.member == 0:
                        write_bytes(part_file(self.path, part), zstandard.compress(lines))
                meter.update(part * PART_ROWS + len(rows))

    def finish(self) -> Record:
        """Count, and write the record."""
        fits = [self._fits(prompt) for prompt in self._prompts()]
        fitting = sum(fits)
        if not fitting:
            raise UserError(
                f"rollout.source {self.settings.source} has {len(fits)} prompts and none fits: a "
                f"prompt and rollout.tokens {self.settings.tokens} must fit the model's context of "
                f"{self._context}. Lower rollout.tokens, or name other prompts."
            )
        record = Record(
            **dict(self.plan),
            prompts=len(fits),
            skipped=len(fits) - fitting,
            rows=fitting * self.settings.per_prompt,
        )
        if record.skipped:
            logger.warning(
                "%d of %d prompts are skipped: with rollout.tokens %d they don't fit the model's "
                "context of %d",
                record.skipped,
                record.prompts,
                self.settings.tokens,
                self._context,
            )
        write_record(self.path / RECORD_FILE, record)
        logger.info("rollouts: %d continuations of %d prompts", record.rows, fitting)
        return record

    @functools.cached_property
    def _context(self) -> int:
        return read_gemma_config(self.model).context_length

    def _prompts(self) -> Iterator[Prompt]:
        return read_prompts(self.settings, tokenizer=self.tokenizer, template=self.template)

    def _fits(self, prompt: Prompt) -> bool:
        return len(prompt.ids) + self.settings.tokens <= self._context

    def _parts(self) -> Iterator[list[_Row]]:
        rows = (
            _Row(prompt, sample)
            for prompt in self._prompts()
            if self._fits(prompt)
            for sample in range(self.settings.per_prompt)
        )
        while part := list(islice(rows, PART_ROWS)):
            yield part

    def _made(
        self,
        part: int,
        rows: Sequence[_Row],
        replicas: Sequence[LanguageModel],
        stop: Callable[[], bool],
    ) -> bytes:
        """The lines of a part; its batches are dealt to this process's replicas."""
        size = self.settings.batch
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]

        def made(number: int) -> list[Continuation]:
            if self._asked_to_stop(stop):
                raise Interrupted(f"rollout stopped: the finished parts of {self.path} are kept")
            batch = list(batches[number])
            # A short last batch repeats its last row: one shape, compiled once.
            full = batch + batch[-1:] * (size - len(batch))
            replica = replicas[number % len(replicas)]
            how = self._sampling(part * PART_ROWS + number * size)
            return replica.sample([row.prompt.ids for row in full], how)[: len(batch)]

        with ThreadPoolExecutor(len(replicas)) as pool:
            found = [one for batch in pool.map(made, range(len(batches))) for one in batch]
        lines = [self._line(row, one) for row, one in zip(rows, found, strict=True)]
        return "".join(line + "\n" for line in lines).encode()

    def _asked_to_stop(self, stop: Callable[[], bool]) -> bool:
        """Teams of several processes compute in step, so that all must stop at the same batch."""

        def asked() -> bool:
            return exchange.stop_asked(stop)

        if self.placement.num_members == 1:
            return asked()
        return exchange.agree_to_stop(asked, scope=f"team {self.placement.team}")

    def _sampling(self, first_row: int) -> Sampling:
        """How the batch that begins with this row is sampled."""
        ends = [self.tokenizer.eos_id]
        turn = self.tokenizer.backend.token_to_id(_END_OF_TURN)
        if turn is not None and self.settings.prompt != "text":
            ends.append(turn)
        return Sampling(
            new_tokens=self.settings.tokens,
            temperature=self.settings.temperature,
            seed=derive_key(self.settings.seed, first_row),
            stop_ids=tuple(ends),
        )

    def _line(self, row: _Row, found: Continuation) -> str:
        ids = found.tokens[:-1] if found.stopped else found.tokens
        words = self.tokenizer.decode(list(ids))
        values = {
            "prompt": row.prompt.number,
            "sample": row.sample,
            "text": row.prompt.text + words,
            "continuation": words,
            "tokens": len(found.tokens),
            "stopped": found.stopped,
        }
        if row.prompt.messages:
            said = [{"role": one.role, "content": one.content} for one in row.prompt.messages]
            values["messages"] = [*said, {"role": "assistant", "content": words}]
        return json.dumps(values, ensure_ascii=False)

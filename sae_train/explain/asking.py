"""Ask many questions at once, each of them only if its answer isn't kept yet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.json_post import Stopped
from activation_cache.runtime.progress import ProgressMeter
from sae_train.explain.endpoint import Endpoint, QuestionRefused
from sae_train.explain.question import Answer, Answers, Question

logger = logging.getLogger(__name__)

_LOOK = 0.5  # seconds between looks at the stop flag


@dataclass
class Tally:
    """What was asked in this command: calls that were paid for, and their tokens."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    refused: list[str] = field(default_factory=list)


def ask_all(
    questions: Iterable[Question],
    *,
    endpoint: Endpoint,
    answers: Answers,
    parallel: int,
    stop: Callable[[], bool],
    tally: Tally,
    what: str,
) -> None:
    """Ask what isn't answered yet; answers are kept as they come.

    Args:
        parallel: how many questions are under way at once.
        what: the label of the progress bar.

    Raises:
        EndpointError: the endpoint doesn't work. Answers that were under way are kept first.
        Interrupted: a signal came; the same.
    """
    model = endpoint.settings.model
    todo = {key: one for one in questions if answers.get(key := one.key(model)) is None}
    pending = iter(todo.items())
    running: dict[Future[Answer], tuple[str, Question]] = {}
    error: UserError | None = None
    asked = 0
    with (
        ProgressMeter(what, total=len(todo), unit="calls") as meter,
        ThreadPoolExecutor(parallel) as pool,
    ):
        while True:
            ending = error is not None or stop()
            if ending:
                endpoint.stop()
            while not ending and len(running) < parallel and (one := next(pending, None)):
                running[pool.submit(endpoint.ask, one[1])] = one
            if not running:
                break
            done, _ = wait(running, timeout=_LOOK, return_when=FIRST_COMPLETED)
            for future in done:
                key, question = running.pop(future)
                error = _collect(future, key, question, answers=answers, tally=tally) or error
            asked += len(done)
            meter.update(asked)
    if error is not None:
        raise error
    if stop():
        raise Interrupted("stopped by a signal; the answers so far are kept")


def _collect(
    future: Future[Answer], key: str, question: Question, *, answers: Answers, tally: Tally
) -> UserError | None:
    """Keep an answer; returns the error that ends everything, if it came instead."""
    try:
        answer = future.result()
    except UserError as error:
        return error
    except QuestionRefused as refused:
        logger.warning("latent %d, %s: %s", question.latent, question.kind, refused)
        tally.refused.append(str(refused))
    except Stopped:
        pass
    else:
        answers.add(key, question, answer)
        tally.calls += 1
        tally.tokens_in += answer.tokens_in
        tally.tokens_out += answer.tokens_out
    return None

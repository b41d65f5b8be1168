"""`sae latents` beside SAEDashboard, on the same SAE, the same text and the same cores.

    python -m benchmarks.latents RUN --python OTHER/bin/python [--tokens 16384 65536 131072]
    python -m benchmarks.latents --growth            # time and memory by width and by text

RUN is a trained run whose text is there; OTHER an environment with sae-dashboard 0.8.0. Both read
the first so many tokens of the run's text, and take turns. The model's forward is timed once and
both are given its activations: SAEDashboard keeps them in files too. Ours is timed whole but for
that and for loading the model. SAEDashboard isn't timed for writing. It makes 128 latents at a time
and does the same for each 128, so the time of a few of these
batches is multiplied by their number. "Products" are what ours can't do without: one encoder
product for each token and, for each latent, two with the vocabulary, nothing kept of them. The last
ratio is that of a program that does these and takes no time for anything else.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel, conversion_folder, load_model
from activation_cache.storage.files import storage_path
from benchmarks.support.measure import markdown, prepare
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import read_run_config
from sae_train.config.latents import LatentsConfig
from sae_train.config.run import Config
from sae_train.evaluate.jobs import Models
from sae_train.inference.fold import fold
from sae_train.inference.hook_names import transformer_lens_hook
from sae_train.inference.write_formats import write_sae_lens
from sae_train.latents.compute import compute_latents
from sae_train.latents.job import LatentsJob, latents_job
from sae_train.latents.reader import open_latents

logger = logging.getLogger("latents")

_PROMPTS = 32  # of a file of SAEDashboard's cache
_BATCH = 128  # latents that SAEDashboard makes together

Seconds = dict[str, float]  # "wall" and "cpu"


def main() -> None:
    """Print a table: seconds and the ratio of latents per second, by text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--python", help="of an environment with sae-dashboard")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 65_536, 131_072])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", action="store_true")
    chosen = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    if chosen.growth:
        from benchmarks.support.growth_of_latents import growth

        growth(logger)
        return
    if not chosen.run or not chosen.python:
        parser.error("give a RUN and --python, or --growth")
    config = read_run_config(chosen.run)
    model = load_model(config.model, converted=conversion_folder(config.cache.path))
    head = ("tokens", "", "forward, s", "ours, s", "theirs, s for 128", "ratio", "with forward")
    head += ("products, s", "ratio of products")
    lines: list[list[str]] = []
    for tokens in chosen.tokens:
        with tempfile.TemporaryDirectory() as scratch:
            # The first size compiles.
            turns = chosen.rounds + (not lines)
            found = beside(
                chosen.run, Path(scratch), model, tokens=tokens, chosen=chosen, turns=turns
            )
        found["rounds"] = found["rounds"][-chosen.rounds :]
        lines += [line(found, tokens=tokens, kind=kind) for kind in ("cpu", "wall")]
        logger.info("%s", lines[-2:])
    logger.info("%s", markdown(head, lines))


def beside(
    run: Path,
    scratch: Path,
    model: LanguageModel,
    *,
    tokens: int,
    chosen: argparse.Namespace,
    turns: int,
) -> dict[str, Any]:
    """Ours and theirs in turns: seconds of the forward and of each turn."""
    own, theirs = scratch / "run", scratch / "theirs"
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("latents"))
    config = read_run_config(own)
    settings = LatentsConfig(tokens=tokens, source=config.text.source, field=config.text.field)
    job = latents_job(
        storage_path(own),
        settings=settings,
        places=(),
        models=Models(given=model),
        stop=lambda: False,
    )
    kept: Kept = {}
    forward = timed(lambda: kept.update(activations(job, config, model)))
    lay_out(job, config, theirs, model, kept)
    alone = products_alone(job, config, model, kept)
    command = [chosen.python, "-m", "benchmarks.support.their_latents", str(theirs)]
    rounds = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        while other.stdout.readline() != "ready\n":
            pass
        for number in range(turns):
            with given(kept):
                ours = timed(lambda: compute_latents([own], settings=settings, model=model))
            other.stdin.write("batch\n")
            other.stdin.flush()
            found = json.loads(other.stdout.readline())
            if number == 0:
                check(own, found)
            rounds.append({"ours": ours, "theirs": found})
            logger.info("%d tokens: %s", tokens, {"ours": ours, "theirs": found["cpu"]})
            shutil.rmtree(own / "latents")
        other.stdin.close()
    return {"forward": forward, "alone": alone, "rounds": rounds, "width": job.width}


Kept = dict[bytes, dict[Tap, np.ndarray]]  # activations by the tokens of a batch


def activations(job: LatentsJob, config: Config, model: LanguageModel) -> Kept:
    """The model's activations, in the batches of the walk."""
    ids, size = job.job.table.read(job.sequences), config.evaluation.sequences_per_batch
    batches = [ids[begin : begin + size] for begin in range(0, len(ids), size)]
    assert len(ids) % size == 0, f"{len(ids)} sequences are no batches of {size}"
    taps = [config.sae.tap]
    return {
        batch.tobytes(): {
            tap: np.asarray(acts) for tap, acts in model.activations(batch, taps).items()
        }
        for batch in batches
    }


@contextmanager
def given(kept: Kept) -> Iterator[None]:
    """The model's forward takes no time meanwhile."""
    forward = LanguageModel.activations

    def read(model: LanguageModel, tokens: np.ndarray, taps: Any) -> dict[Tap, Any]:
        return {tap: jnp.asarray(acts) for tap, acts in kept[tokens.tobytes()].items()}

    LanguageModel.activations = read  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        LanguageModel.activations = forward  # type: ignore[method-assign]


def products_alone(job: LatentsJob, config: Config, model: LanguageModel, kept: Kept) -> Seconds:
    """The encoder's product of all tokens, and two of all latents with the vocabulary.

    Operands of the latter are rounded to bfloat16, as ours are. Every product is summed, so that
    nothing is written.
    """
    sae = fold(load_trained(job.job.folder))
    encoder, decoder = jnp.asarray(sae.W_enc), jnp.asarray(sae.W_dec, jnp.bfloat16)
    vocabulary = jnp.asarray(model.params["embedding"], jnp.bfloat16)
    encode = jax.jit(lambda x_ND: (x_ND @ encoder).sum(axis=1))
    read = jax.jit(
        lambda rows_TD: jnp.dot(
            rows_TD, vocabulary.T, preferred_element_type=jnp.float32, precision="default"
        ).sum(axis=1)
    )
    batches = [one[config.sae.tap].reshape(-1, len(encoder)) for one in kept.values()]
    blocks = [decoder[start : start + 256] for start in range(0, len(decoder), 256)]
    jax.block_until_ready((encode(batches[0]), read(blocks[0])))

    def work() -> None:
        jax.block_until_ready([encode(one) for one in batches])
        jax.block_until_ready([read(one) for one in blocks for _ in range(2)])

    return timed(work)


def timed(work: Callable[[], Any]) -> Seconds:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def line(found: dict[str, Any], *, tokens: int, kind: str) -> list[str]:
    """A row of the table: medians of the rounds, the ratios with their range.

    The last ratio adds the forward to both.
    """
    batches, forward = found["width"] / _BATCH, found["forward"][kind]
    ours, theirs = ([one[who][kind] for one in found["rounds"]] for who in ("ours", "theirs"))
    told = [f"{one:.1f}" for one in (forward, statistics.median(ours), statistics.median(theirs))]
    for more in (0.0, forward):
        ratios = [
            (other * batches + more) / (own + more) for own, other in zip(ours, theirs, strict=True)
        ]
        told.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    alone = found["alone"][kind]
    told += [f"{alone:.1f}", f"{statistics.median(theirs) * batches / alone:.1f}"]
    return [f"{tokens:,}", kind.upper() if kind == "cpu" else kind, *told]


def lay_out(
    job: LatentsJob, config: Config, folder: Path, model: LanguageModel, kept: Kept
) -> None:
    """What `support.their_latents` reads, on the sequences that ours walks."""
    import torch

    hook = transformer_lens_hook(config.sae.site, config.sae.layer)
    (folder / "sae_lens").mkdir(parents=True)
    write_sae_lens(fold(load_trained(job.job.folder)), folder / "sae_lens")
    np.save(folder / "tokens.npy", job.job.table.read(job.sequences))
    np.save(folder / "W_U.npy", np.ascontiguousarray(np.asarray(model.params["embedding"]).T))
    (folder / "hook.json").write_text(json.dumps(hook))
    acts = np.concatenate([one[config.sae.tap] for one in kept.values()])
    for number, start in enumerate(range(0, len(acts), _PROMPTS)):
        part = torch.from_numpy(acts[start : start + _PROMPTS].copy())
        torch.save({hook: part}, folder / f"model_activations_{number}.pt")


def check(run: Path, found: dict[str, Any]) -> None:
    """Both found the same greatest value for each latent of the batch."""
    maxima = open_latents(run).summary["maximum"].to_numpy()[found["first"] :][:128]
    theirs = np.array([values[0] for values in found["top"]])
    differing = int((np.abs(maxima - theirs) > 2e-3 * np.maximum(maxima, 1)).sum())
    logger.info("greatest values: %d of %d latents agree", len(theirs) - differing, len(theirs))


if __name__ == "__main__":
    main()

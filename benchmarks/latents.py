"""`sae latents` beside SAEDashboard, on the same SAE, the same text and the same cores.

    python -m benchmarks.latents RUN --python OTHER/bin/python [--tokens 32768] [--rounds 3]
    python -m benchmarks.latents --growth            # time and memory by width and by text

RUN is a trained run whose store is there; OTHER an environment with sae-dashboard 0.8.0. Ours is
timed whole: the model's forward, reading and writing files. SAEDashboard is given the activations
and isn't timed for the model or for writing. The two take turns.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.language_model.model import conversion_folder, load_model
from activation_cache.store.store import open_store
from benchmarks.support.measure import prepare
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import read_run_config
from sae_train.config.latents import LatentsConfig
from sae_train.inference.fold import fold
from sae_train.inference.hook_names import transformer_lens_hook
from sae_train.inference.write_formats import write_sae_lens
from sae_train.latents.compute import compute_latents
from sae_train.latents.reader import open_latents

logger = logging.getLogger("latents")

_PROMPTS = 32  # of a file of SAEDashboard's cache


def main() -> None:
    """Print seconds and the ratio of latents per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?")
    parser.add_argument("--python", help="of an environment with sae-dashboard")
    parser.add_argument("--tokens", type=int, default=32_768)
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
    with tempfile.TemporaryDirectory() as scratch:
        beside(Path(chosen.run), Path(scratch), chosen)


def beside(run: Path, scratch: Path, chosen: argparse.Namespace) -> None:
    """Ours and theirs in turns."""
    own, theirs = scratch / "run", scratch / "theirs"
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("latents"))
    lay_out(own, theirs, tokens=chosen.tokens)
    settings = LatentsConfig(tokens=chosen.tokens)
    command = [chosen.python, "-m", "benchmarks.support.their_latents", str(theirs)]
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        while other.stdout.readline() != "ready\n":
            pass
        for number in range(chosen.rounds + 1):
            ours = timed(lambda: compute_latents([own], settings=settings))
            other.stdin.write("batch\n")
            other.stdin.flush()
            found = json.loads(other.stdout.readline())
            width = len(open_latents(own))
            if number == 0:
                check(own, found)
            else:  # the first compiles
                for kind, values in ratios.items():
                    values.append(width / ours[kind] / (128 / found[kind]))
            logger.info(
                "ours %.1f s, CPU %.1f s, for %d latents; SAEDashboard %.1f s, CPU %.1f s, for 128",
                *(ours["wall"], ours["cpu"], width, found["wall"], found["cpu"]),
            )
            shutil.rmtree(own / "latents")
        other.stdin.close()
    for kind, values in ratios.items():
        listed = ", ".join(f"{one:.0f}" for one in values)
        middle = statistics.median(values)
        logger.info(
            "latents per second of %s: %.0f times SAEDashboard's (%s)", kind, middle, listed
        )


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def lay_out(run: Path, folder: Path, *, tokens: int) -> None:
    """What `support.their_latents` reads, on the sequences that ours walks."""
    import torch

    config = read_run_config(run)
    table = open_store(config.cache.path).tokens
    sequences = table.held_out[: -(-tokens // table.sequence_length)]
    ids = table.read(sequences)
    model = load_model(config.model, converted=conversion_folder(config.cache.path))
    hook = transformer_lens_hook(config.sae.site, config.sae.layer)
    (folder / "sae_lens").mkdir(parents=True)
    write_sae_lens(fold(load_trained(run)), folder / "sae_lens")
    np.save(folder / "tokens.npy", ids)
    np.save(folder / "W_U.npy", np.ascontiguousarray(np.asarray(model.params["embedding"]).T))
    (folder / "hook.json").write_text(json.dumps(hook))
    for number, start in enumerate(range(0, len(ids), _PROMPTS)):
        parts = [
            np.asarray(model.activations(ids[begin : begin + 8], [config.sae.tap])[config.sae.tap])
            for begin in range(start, min(start + _PROMPTS, len(ids)), 8)
        ]
        acts = torch.from_numpy(np.concatenate(parts))
        torch.save({hook: acts}, folder / f"model_activations_{number}.pt")


def check(run: Path, found: dict[str, Any]) -> None:
    """Both found the same greatest value for each latent of the batch."""
    maxima = open_latents(run).summary["maximum"].to_numpy()[found["first"] :][:128]
    theirs = np.array([values[0] for values in found["top"]])
    differing = int((np.abs(maxima - theirs) > 2e-3 * np.maximum(maxima, 1)).sum())
    logger.info("greatest values: %d of %d latents agree", len(theirs) - differing, len(theirs))


if __name__ == "__main__":
    main()

"""A training step beside other libraries': same width, batch, dtype, threads and active latents.

    python -m benchmarks.trainers [--widths 16384 65536] [--l0 64] [--keep-memory]

Every trainer gets the same random rows of unit norm and thresholds set so that `--l0` latents of a
row are active; a learning rate of almost nothing keeps theirs so. The steps take turns, each
library's in a process of its own, ours with `train.step: auto`.
sparsify has no JumpReLU: its TopK SAE steps with Adam, k the same number. Needs the extra `bench`.

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.quality import of_dictionary_learning, of_sae_lens
from benchmarks.quality.trainer import Budget
from benchmarks.step import StepProgram, config_of, products, unit_rows
from benchmarks.support.apart import Ways, apart
from benchmarks.support.measure import interleaved, prepare

logger = logging.getLogger("trainers")

STILL = 1e-12  # a learning rate that moves nothing
PAUSE = 0.5  # seconds, in which the threads of the way before go to sleep


def _threshold(W_enc_FD: np.ndarray, x_BD: np.ndarray, *, l0: int) -> float:
    """The common θ that leaves `l0` latents of a row active, from a few rows."""
    pre = x_BD[:256] @ W_enc_FD.T
    return float(np.quantile(pre, 1 - l0 / W_enc_FD.shape[0]))


def dictionary_learning_step(budget: Budget, x_BD: np.ndarray, *, l0: int) -> Callable[[], Any]:
    """dictionary_learning's JumpReLU."""
    trainer = of_dictionary_learning.JumpRelu(
        budget, target_l0=l0, learning_rate=STILL, bandwidth=0.001
    )
    ae = trainer._trainer.ae
    with torch.no_grad():
        W_enc_FD = ae.W_enc.T.contiguous().numpy()
        ae.threshold.fill_(_threshold(W_enc_FD, x_BD, l0=l0))
    return lambda: trainer.step(x_BD)


def sae_lens_step(budget: Budget, x_BD: np.ndarray, *, l0: int) -> Callable[[], Any]:
    """SAELens' JumpReLU."""
    trainer = of_sae_lens.JumpRelu(
        budget,
        coefficient=0.0,
        learning_rate=STILL,
        bandwidth=0.05,
        threshold=1.0,
        norms=iter([x_BD] * 16),
    )
    sae, scale = trainer._sae, trainer._scale
    with torch.no_grad():
        W_enc_FD = sae.W_enc.T.contiguous().numpy()
        sae.threshold.fill_(_threshold(W_enc_FD, x_BD / np.float32(scale), l0=l0))
    return lambda: trainer.step(x_BD)


def sparsify_step(x_BD: np.ndarray, *, width: int, k: int) -> Callable[[], Any]:
    """sparsify's TopK SAE: its forward, its gradient projection, Adam, its normalisation."""
    if not torch.cuda.is_available():
        # With torch's build for GPUs comes Triton, by which sparsify decodes on a CPU too: in vain.
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(x_BD.shape[1], SparseCoderConfig(num_latents=width, k=k))
    optimiser = torch.optim.Adam(coder.parameters(), lr=STILL)
    x = torch.from_numpy(x_BD)

    def once() -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    return once


@dataclass(frozen=True)
class Work:
    """What every trainer is given."""

    width: int
    l0: int
    batch: int
    d_model: int

    def rows(self) -> np.ndarray:
        """The batch [B, D], the same for every trainer."""
        return unit_rows(self.batch, self.d_model, seed=2)

    def budget(self) -> Budget:
        """What the trainers need to know; its steps are more than are ever timed."""
        return Budget(
            d_model=self.d_model,
            width=self.width,
            batch_size=self.batch,
            steps=1000,
            warmup_steps=1,
            sparsity_warmup_steps=1,
            decay_steps=1,
            input_scale=1.0,
        )


def our_ways(work: Work) -> Ways:
    """The encoder's product, our step, and how many latents it finds active."""
    config = config_of(width=work.width, batch_size=work.batch, step="auto")
    ours = StepProgram(config, rows_BD=work.rows(), l0=work.l0)
    encoder = products(work.rows(), width=work.width)["encoder"]
    return {"encoder product": encoder, "ours": ours, "our L0": lambda: ours.l0}


def jumprelu_ways(library: str, work: Work) -> Ways:
    """The step of a library's JumpReLU."""
    make = dictionary_learning_step if library == "dictionary_learning" else sae_lens_step
    return {library: make(work.budget(), work.rows(), l0=work.l0)}


def sparsify_ways(work: Work) -> Ways:
    """The step of sparsify's TopK."""
    return {"sparsify": sparsify_step(work.rows(), width=work.width, k=work.l0)}


JUMPRELUS = {"dictionary_learning": "dictionary_learning JumpReLU", "SAELens": "SAELens JumpReLU"}
LIBRARIES = JUMPRELUS | {"sparsify": "sparsify TopK"}


def measure(
    work: Work, *, rounds: int, libraries: Iterable[str] = LIBRARIES, keep_memory: bool = False
) -> dict[str, Any]:
    """Seconds of each, taking turns, and ours against the others.

    Args:
        libraries: which of `LIBRARIES`.
        keep_memory: the others keep what they free, as stages of `sae` do. Three of them at width
            65536 then take more than 24 GiB.
    """
    with ExitStack() as stack:
        ours = stack.enter_context(apart(our_ways, work))
        ways = {name: ours[name] for name in ("encoder product", "ours")}
        for library in libraries:
            make = partial(jumprelu_ways, library) if library in JUMPRELUS else sparsify_ways
            other = stack.enter_context(apart(make, work, keep_memory=keep_memory))
            ways[LIBRARIES[library]] = other[library]
        times = interleaved(ways, rounds=rounds, pause=PAUSE)
        our_l0 = ours["our L0"](result=True)
    own = times["ours"].median
    found = {**asdict(work), "our_l0": our_l0, "times": times}
    if jumprelus := [times[name].median for name in JUMPRELUS.values() if name in times]:
        found["faster_than_jumprelu"] = min(jumprelus) / own
    if "sparsify TopK" in times:
        found["faster_than_sparsify"] = times["sparsify TopK"].median / own
    return found | {"of_encoder_product": own / times["encoder product"].median}


def main() -> None:
    """Log each width's table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[16_384, 65_536])
    parser.add_argument("--l0", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument(
        "--keep-memory", action="store_true", help="the others keep what they free, as ours does"
    )
    told = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    for width in told.widths:
        work = Work(width=width, l0=told.l0, batch=told.batch, d_model=told.d_model)
        found = measure(
            work, rounds=told.rounds, libraries=told.libraries, keep_memory=told.keep_memory
        )
        for name, times in found.pop("times").items():
            logger.info("%7d %-30s %s", width, name, times)
        for name in found:
            if name not in asdict(work):
                logger.info("%7d %-30s %.2f", width, name, found[name])


if __name__ == "__main__":
    main()

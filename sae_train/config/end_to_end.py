"""The section `train.end_to_end` of the YAML: the phase that trains through the language model."""

from __future__ import annotations

from collections.abc import Iterator

from activation_cache.config import MeshConfig, Positive32, PositiveCount, Section, TextConfig
from activation_cache.gemma.taps import EMBEDDING
from sae_train.config.sae import SaeConfig


class EndToEndConfig(Section):
    """The last `tokens` of a run: the loss is (MSE + α β KL) / (1 + β) and the penalty.

    The form is Gemma Scope 2's, section 2.4, which states no β; docs/numerics.md has the formula.
    """

    beta: Positive32 = 1.0
    tokens: PositiveCount


def sequences_per_step(batch_size: int, *, sequence_length: int) -> int:
    """Whole sequences whose rows, all positions but BOS, come nearest to a batch; at least one."""
    return max(1, round(batch_size / (sequence_length - 1)))


def mistakes(
    phase: EndToEndConfig | None,
    *,
    sae: SaeConfig,
    tokens: int,
    batch_size: int,
    text: TextConfig,
    mesh: MeshConfig,
) -> Iterator[str]:
    """A line for each rule of the config that the phase breaks."""
    if phase is None:
        return
    if phase.tokens > tokens:
        yield (
            f"train.end_to_end.tokens {phase.tokens} is above train.tokens {tokens}, of which it "
            "is the last part: lower it, or raise train.tokens"
        )
    if sae.tap == EMBEDDING:
        yield (
            "train.end_to_end goes through the model from text, and sae.site is embedding, whose "
            "rows are the vocabulary: leave train.end_to_end out"
        )
    if sae.whitening:
        yield (
            f"train.end_to_end can't be combined with sae.whitening {sae.whitening:g}: the model "
            "reads rows as they are, and training then has whitened ones. Leave one of the two out"
        )
    count = sequences_per_step(batch_size, sequence_length=text.sequence_length)
    if count % mesh.data:
        yield (
            f"a step of train.end_to_end has {count} whole sequences of "
            f"{text.sequence_length} tokens (train.batch_size {batch_size}), which are not "
            f"divisible by mesh axis 'data' (size {mesh.data}): make train.batch_size "
            f"{-(-count // mesh.data) * mesh.data * text.sequence_length}, or lower mesh.data"
        )

"""What the phase of a run that goes through the language model needs (`train.end_to_end`).

Work, in products, of a step:

    read        every layer once; once for all runs of a cohort, but counted for each
    layers      those above the tap three times: forward, the same recomputed, backward
    vocabulary  three products: two distributions, and the gradient of their KL
    SAE         as of other steps

Memory of a device: the state; the model's weights; the activations that a step keeps of its
sequences and what one layer needs while it is computed again; logits of some predictions; and the
arrays of an SAE's step by autodiff.

Legend: N tokens of a step, S sequence length, D model width, F latents, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax.numpy as jnp

from activation_cache.gemma.config import GemmaConfig
from activation_cache.gemma.params import cut_dims, parameter_table
from activation_cache.gemma.scores import divergence_chunk
from sae_train.config.end_to_end import sequences_per_step
from sae_train.config.run import Config
from sae_train.plan.memory import FLOAT_BYTES, STATE_ITEMS, Shape, StepMemory
from sae_train.plan.work import attention_flops, layer_flops, step_flops

# Arrays alive at once, of those sizes: [N, F] of the SAE and its gradient; [C, V] of logits.
_LATENT_ARRAYS, _LOGIT_ARRAYS = 4, 6
# Of one layer while it is computed again and its gradient made: arrays of the MLP's width, of D,
# and of the scores of a block of queries.
_MLP_ARRAYS, _STREAM_ARRAYS, _SCORE_ARRAYS = 6, 6, 3


@dataclass(frozen=True)
class EndToEndPlan:
    """The phase of one run.

    Attributes:
        steps: of the run's steps, how many go through the model.
        sequences: of each step.
        model_flops, sae_flops: of a step on all devices.
        memory: of one device in these steps.
    """

    steps: int
    sequences: int
    model_flops: int
    sae_flops: int
    memory: StepMemory


def plan_end_to_end(
    config: Config, gemma: GemmaConfig, *, state: StepMemory
) -> EndToEndPlan | None:
    """Size the phase up; None where a run has none.

    Args:
        state: the memory of the run's other steps, whose weights and second moments stay.
    """
    train, length = config.train, config.text.sequence_length
    if train.end_to_end is None:
        return None
    sequences = sequences_per_step(train.batch_size, sequence_length=length)
    rows = sequences * (length - 1)
    target = config.sae.target_tap
    first = target.layer + (target.site == "resid_post")
    shape = dataclasses.replace(Shape.of(config, gemma, capacity=None), batch_size=rows)
    return EndToEndPlan(
        steps=train.end_to_end_steps,
        sequences=sequences,
        model_flops=_model_flops(gemma, sequences=sequences, length=length, first=first),
        sae_flops=step_flops(shape),
        memory=_memory(config, gemma, shape=shape, above=gemma.num_layers - first, state=state),
    )


def _model_flops(gemma: GemmaConfig, *, sequences: int, length: int, first: int) -> int:
    """Of a step, on all devices; `first` is the lowest layer that has a gradient."""
    layers = [
        length * layer_flops(gemma) + attention_flops(gemma, layer=layer, length=length)
        for layer in range(gemma.num_layers)
    ]
    vocabulary = 3 * 2 * (length - 1) * gemma.d_model * gemma.vocab_size
    return sequences * (sum(layers) + 3 * sum(layers[first:]) + vocabulary)


def _memory(
    config: Config, gemma: GemmaConfig, *, shape: Shape, above: int, state: StepMemory
) -> StepMemory:
    """Bytes of one device; `above`: layers that have a gradient."""
    item, size = jnp.dtype(config.model.dtype).itemsize, config.mesh.model
    length = config.text.sequence_length
    sequences = shape.batch_size // (length - 1) // config.mesh.data
    N, D = sequences * length, gemma.d_model
    # The taps, the stream, the final norm's result, and the input of each layer with a gradient.
    kept = N * D * (5 + above) * item + 3 * shape.local(("B", "D")) * FLOAT_BYTES
    scores = sequences * gemma.num_heads * min(256, length) * length // size
    layer = FLOAT_BYTES * (
        _MLP_ARRAYS * N * gemma.d_ff // size + _STREAM_ARRAYS * N * D + _SCORE_ARRAYS * scores
    )
    logits = divergence_chunk(sequences * (length - 1), gemma.vocab_size) * gemma.vocab_size
    items = {name: state.items[name] for name in STATE_ITEMS}
    items |= {
        "language model": _model_bytes(gemma, item=item, size=size),
        "gradients": shape.params_bytes(),
        "activations": kept + _LATENT_ARRAYS * shape.local(("B", "F")) * FLOAT_BYTES,
        "one layer": layer,
        "logits": _LOGIT_ARRAYS * logits * FLOAT_BYTES,
    }
    return StepMemory(items=items, next_batch=0)


def _model_bytes(gemma: GemmaConfig, *, item: int, size: int) -> int:
    """The language model's weights on one device."""
    total = 0
    for parameter in parameter_table(gemma):
        cut = any(cut_dims(parameter, gemma, size=size))
        elements = math.prod(parameter.shape) // (size if cut else 1)
        total += elements * (FLOAT_BYTES if parameter.is_norm else item)
    return total

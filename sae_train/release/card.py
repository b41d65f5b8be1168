"""release/README.md: how an SAE was made, how it was measured, how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from activation_cache.config import NO_MODEL
from activation_cache.language_model.names import model_name
from sae_train.config.file import resolved_yaml
from sae_train.config.run import Config
from sae_train.config.sae import ARCHITECTURE_NAMES
from sae_train.evaluate.result import Evaluation
from sae_train.inference.sae import Sae

_LICENCE = """\
These weights were trained on activations of a Gemma model. Gemma is provided under and subject to
the Gemma Terms of Use, <https://ai.google.dev/gemma/terms>; whoever publishes or uses them decides
what those terms ask of them. This card grants no licence of its own.
"""

_LICENCE_OF_ROWS = """\
These weights were trained on activations that were imported. The terms of the model that made them
may ask something of whoever publishes or uses these. This card grants no licence of its own.
"""

_GEMMA_SCOPE = """\
| `gemma_scope/` | Gemma Scope `params.npz` | DeepMind's tutorial, SAEBench |
"""

_GEMMA_SCOPE_2 = """\
| `gemma_scope_2/` | Gemma Scope 2 `config.json`, `params.safetensors` | Gemma Scope 2's tools |
"""

_SAE_LENS = """\
| `sae_lens/` | SAELens 6 `cfg.json`, `sae_weights.safetensors` | SAELens, Neuronpedia |
"""

_CIRCUIT_TRACER = """\
| `circuit_tracer/` | `config.yaml`, `layer_N.safetensors` | circuit-tracer, with all layers |
"""

_BY_SAE_LENS = """
from sae_lens import SAE
sae = SAE.load_from_disk("sae_lens")
"""

_LOADING = """\
| folder | format | read by |
| --- | --- | --- |
{others}
```python
from sae_train import load_sae          # any of the folders
sae = load_sae("{shown}")
latents = sae.encode(activations)       # raw activations, float32 [..., D]
reconstruction = sae.decode(latents)
{sae_lens}```

Inputs are raw activations, the input scaling and the pre-encoder bias of training are folded in,
`latents = relu(z) * (z > threshold)` with `z = x @ W_enc + b_enc`{selection}.
"""


def model_card(sae: Sae, *, config: Config, evaluation: Evaluation | None) -> str:
    """The text of README.md, Markdown with the front matter of a Hub model card."""
    D, F = sae.W_enc.shape
    training = sae.metadata["training"]
    penalty = ", ".join(f"{key} {value}" for key, value in training["sparsity"].items())
    kind = ARCHITECTURE_NAMES[config.sae.architecture]
    selected = "" if config.sae.k is None else f", k = {config.sae.k}"
    alone = sae.k is not None and sae.is_transcoder  # in circuit-tracer's format and no other
    loading = _LOADING.format(
        others=_CIRCUIT_TRACER if alone else _others(sae) + _SAE_LENS,
        shown="circuit_tracer" if alone else "sae_lens",
        sae_lens="" if alone else _BY_SAE_LENS,
        selection="" if sae.k is None else f", of which a row keeps the {sae.k} largest",
    )
    facts = [
        ("model", model_words(config)),
        ("site", f"{config.sae.site} of layer {config.sae.layer}, `{sae.metadata['hook_name']}`"),
        *_target(sae, config=config),
        ("architecture", f"{kind}{selected}, {F:,} latents on vectors of {D:,}"),
        *_prefixes(sae),
        ("trained on", f"{training['tokens']:,} tokens in {training['step']:,} steps"),
        *text_facts(config),
        ("sparsity penalty", penalty),
        ("input scale C, folded in", f"{training['input_scale']:.6g}"),
        ("made with", training["library"]),
    ]
    return (
        f"{front_matter(config, [config.sae.architecture])}# {config.name}\n\n"
        f"A {kind} sparse autoencoder in the manner of Gemma Scope (arXiv 2408.05147).\n\n"
        f"{table(facts)}\n## Measured\n\n{_measured(evaluation)}\n"
        f"## Loading\n\n{loading}\n## Licence\n\n{licence(config)}\n"
        f"## Config\n\n```yaml\n{resolved_yaml(config).rstrip()}\n```\n"
    )


def model_words(config: Config) -> str:
    """The model whose activations were read, and the dtype it computed in."""
    if config.model.weights == NO_MODEL:
        return "unknown: the rows were imported"
    return f"{model_name(config.model.weights)} ({config.model.dtype})"


def licence(config: Config) -> str:
    """What a card says of the terms of use."""
    return _LICENCE_OF_ROWS if config.model.weights == NO_MODEL else _LICENCE


def text_facts(config: Config) -> list[tuple[str, str]]:
    """The rows of a card about the text; none where rows were imported."""
    if config.cache.is_imported:
        return []
    context = f"{config.text.sequence_length} tokens, each beginning with BOS"
    return [("text", ", ".join(config.text.source)), ("context", context)]


def _others(sae: Sae) -> str:
    if sae.k is not None:
        return ""
    return (_GEMMA_SCOPE if sae.W_skip is None else "") + _GEMMA_SCOPE_2


def _target(sae: Sae, *, config: Config) -> list[tuple[str, str]]:
    """The row about what a transcoder predicts; none for an SAE."""
    if not sae.is_transcoder:
        return []
    skip = "" if sae.W_skip is None else ", with an affine skip: call `sae(x)` for all of it"
    return [("predicts", f"{config.sae.target}, `{sae.metadata['hook_name_out']}`{skip}")]


def _prefixes(sae: Sae) -> list[tuple[str, str]]:
    """The row about the prefixes of a Matryoshka SAE; none for another."""
    if not sae.prefixes:
        return []
    widths = ", ".join(f"{first:,}" for first in sae.prefixes)
    return [("Matryoshka", f"the first {widths} latents each reconstruct alone")]


def front_matter(config: Config, architectures: Sequence[str]) -> str:
    """The card's YAML front matter, which the Hub reads."""
    tags = f"tags: [sparse-autoencoder, {', '.join(architectures)}, interpretability]"
    lines = ["library_name: saelens", tags]
    weights = config.model.weights
    if weights.startswith("google/"):
        lines.append(f"base_model: {json.dumps(weights)}")
    return "---\n" + "\n".join(lines) + "\n---\n\n"


def _measured(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "Not evaluated.\n"
    e = evaluation
    frequent = e.frequency_histogram.get("fraction_above_0.1")
    losses = [
        ("delta LM loss, nats per token", number(e.delta_loss)),
        ("loss without / with the SAE", f"{number(e.loss)} / {number(e.loss_spliced)}"),
        ("loss with the site zero-ablated", number(e.loss_zero_ablated)),
        ("loss recovered", number(e.loss_recovered)),
        ("delta LM loss, spliced at BOS too", number(e.delta_loss_all_positions)),
    ]
    rows = [
        ("L0", f"{e.l0:.2f}"),
        ("FVU (squared error over variance)", number(e.fvu)),
        *_not_flattered(e),
        *(losses if e.model != NO_MODEL else []),
        ("latents alive", f"{e.alive_fraction:.1%}"),
        ("latents firing on over 10% of tokens", "–" if frequent is None else f"{frequent:.2%}"),
    ]
    return f"{table(rows)}\n{_by_prefix(e)}{_on_what(e)}"


def _on_what(e: Evaluation) -> str:
    if e.model == NO_MODEL:
        return f"On {e.tokens:,} held-out rows, without a language model.\n"
    return (
        f"On {e.sequences:,} held-out sequences of {e.sequence_length} tokens "
        f"({e.loss_sequences:,} for the losses). BOS, EOS and padding are masked in every mean "
        "and, but where said, keep the model's own activations when the SAE is spliced in.\n"
    )


def _not_flattered(e: Evaluation) -> list[tuple[str, str]]:
    """FVU that tokens of many times the usual norm don't flatter; none of an older evaluation."""
    if not e.outlying:
        return []
    held = e.outlying["share_of_variance"]
    tokens = f"{e.outlying['tokens']:,}, with {number(held)} of the variance"
    return [
        ("tokens of more than five times the median norm", tokens),
        ("without them, FVU", number(e.fvu_without_outlying)),
        ("median token's error over the variance without them", number(e.fvu_median_token)),
    ]


def _by_prefix(evaluation: Evaluation) -> str:
    """A table of the prefixes of a Matryoshka SAE; nothing for another."""
    if not evaluation.by_prefix:
        return ""
    lines = [
        "| first latents | L0 | FVU | delta LM loss | alive |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in evaluation.by_prefix:
        lines.append(
            f"| {row['latents']:,} | {row['l0']:.2f} | {number(row['fvu'])} | "
            f"{number(row['delta_loss']) if evaluation.loss_sequences else '–'} | "
            f"{row['alive_fraction']:.1%} |"
        )
    return "\n".join(lines) + "\n\n"


def number(value: float | None) -> str:
    """Four decimals, or "not finite" for None."""
    return "not finite" if value is None else f"{value:.4f}"


def table(rows: list[tuple[str, str]]) -> str:
    """A Markdown table of two columns without a header."""
    lines = ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]
    return "\n".join(lines) + "\n"

"""release/README.md of a sweep: its SAEs, how they were made and measured, how to load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from activation_cache.config import NO_MODEL
from activation_cache.runtime.version import package_version
from sae_train.checkpoint.same_run import numeric_differences
from sae_train.config.file import resolved_yaml, value_at
from sae_train.config.run import Config
from sae_train.release.card import (
    front_matter,
    licence,
    model_words,
    number,
    table,
    text_facts,
)
from sae_train.release.index import CANONICAL_L0, Entry

_FORMATS = {
    "gemma_scope": "Gemma Scope `params.npz`",
    "gemma_scope_2": "Gemma Scope 2 `config.json`, `params.safetensors`",
    "sae_lens": "SAELens 6 `cfg.json`, `sae_weights.safetensors`, `sparsity.safetensors`",
    "circuit_tracer": "circuit-tracer `config.yaml`, `layer_N.safetensors`",
}
_LOADING = """\
```python
from sae_train import load_sae
sae = load_sae("{path}")
latents = sae.encode(activations)       # raw activations, float32 [..., D]
reconstruction = sae.decode(latents)
{sae_lens}```

Inputs are raw activations: the input scaling and the pre-encoder bias of training are folded in.
`saes.json` has all of the table below and each file's size, by folder.
"""
_SAE_LENS = """
from sae_lens import SAE
sae = SAE.load_from_disk("sae_lens/{folder}")
"""
_MEASURED = """\
On {sequences} held-out sequences of {length} tokens. BOS, EOS and padding are masked in every mean
and keep the model's own activations when an SAE is spliced in. FVU is squared error over variance;
"usual" is FVU without the tokens whose norm is above five times the median, "median" the median
token's squared error over the variance without them. Delta loss is what splicing adds to the
model's loss, in nats per token.
**Canonical** is of a site, layer and width the SAE whose L0 is nearest to {canonical}.
"""
_MEASURED_ON_ROWS = """\
On held-out rows, without a language model. FVU is squared error over variance; "usual" is FVU
without the rows whose norm is above five times the median, "median" the median row's squared error
over the variance without them. **Canonical** is of a site, layer and width the SAE whose L0 is
nearest to {canonical}.
"""
_HEADS = (
    "site", "layer", "width", "architecture", "L0", "FVU", "usual", "median", "delta loss", "alive",
    "sparsity", "seed", "tokens", "folder",
)  # fmt: skip


# Of a run's own settings: what the table of SAEs shows or names, and what changes no weight.
_SHOWN = (
    "sae.site", "sae.layer", "sae.target", "sae.affine_skip", "sae.width", "sae.architecture",
    "train.sparsity.penalty", "train.sparsity.coefficient", "train.sparsity.target", "train.seed",
    "train.tokens", "sae.start_from", "cache",
)  # fmt: skip


def suite_card(config: Config, entries: Sequence[Entry], *, configs: Mapping[str, Config]) -> str:
    """The text of README.md, Markdown with the front matter of a Hub model card.

    Args:
        config: of the sweep.
        configs: of each run, by its folder: an earlier config of the sweep may have made it.
    """
    sites = list(dict.fromkeys(f"{e.site} of layer {e.layer}" for e in entries))
    formats = sorted({name for entry in entries for name in entry.formats})
    facts = [
        ("model", model_words(config)),
        ("SAEs", f"{len(entries)}, {len({e.cell for e in entries})} sites, layers and widths"),
        ("sites", ", ".join(sites) if len(sites) <= 12 else f"{len(sites)}, below"),
        *text_facts(config),
        ("batch, learning rate", _optimiser(config)),
        ("made with", f"open-gemma-scope {package_version()}"),
    ]
    shown = next((e for e in entries if e.canonical), entries[0])
    loading = _LOADING.format(
        path=f"{shown.formats[0]}/{shown.folder}",
        sae_lens=_SAE_LENS.format(folder=shown.folder) if "sae_lens" in shown.formats else "",
    )
    kinds = "".join(f"- `{name}/`: {_FORMATS[name]}\n" for name in formats)
    architectures = list(dict.fromkeys(entry.architecture for entry in entries))
    return (
        f"{front_matter(config, architectures)}# {config.name}\n\n"
        "Sparse autoencoders in the manner of Gemma Scope (arXiv 2408.05147).\n\n"
        f"{table(facts)}\n## SAEs\n\n{_measured(config, entries)}\n{_saes(entries)}\n"
        f"## Loading\n\nThe same folders in each format:\n\n{kinds}\n{loading}\n"
        f"## Licence\n\n{licence(config)}\n## Config\n\n{_own_settings(config, configs)}"
        f"```yaml\n{resolved_yaml(config).rstrip()}\n```\n"
    )


def _own_settings(config: Config, configs: Mapping[str, Config]) -> str:
    """Where runs differ from the sweep's config in what the table of SAEs doesn't show."""
    rows = []
    for run, own in configs.items():
        keys = [
            key
            for key in numeric_differences(config, own)
            if not any(key == shown or key.startswith(f"{shown}.") for shown in _SHOWN)
        ]
        if keys:
            rows.append((f"`{run}`", ", ".join(f"{key} {value_at(own, key)}" for key in keys)))
    if not rows:
        return ""
    words = "Runs that differ from this config in what the table of SAEs doesn't show:"
    return f"{words}\n\n{table(rows)}\n"


def _optimiser(config: Config) -> str:
    rate, adam = config.train.learning_rate, config.train.adam
    return (
        f"{config.train.batch_size:,} rows; {rate.peak:g} after {rate.warmup_steps:,} steps of "
        f"warm-up; Adam β₁ {adam.beta1:g}, β₂ {adam.beta2:g}"
    )


def _measured(config: Config, entries: Sequence[Entry]) -> str:
    counts = [entry.sequences for entry in entries if entry.sequences is not None]
    if not counts:
        return "Not evaluated.\n"
    if config.model.weights == NO_MODEL:
        return _MEASURED_ON_ROWS.format(canonical=CANONICAL_L0)
    return _MEASURED.format(
        sequences=" to ".join(
            f"{number:,}" for number in dict.fromkeys((min(counts), max(counts)))
        ),
        length=config.text.sequence_length,
        canonical=CANONICAL_L0,
    )


def _saes(entries: Sequence[Entry]) -> str:
    lines = [f"| {' | '.join(_HEADS)} |", f"|{' --- |' * len(_HEADS)}"]
    for e in entries:
        cells: tuple[Any, ...] = (
            e.site,
            e.layer,
            f"{e.width:,}",
            e.architecture,
            "" if e.l0 is None else f"{e.l0:.1f}",
            "" if e.l0 is None else number(e.fvu),
            "" if e.fvu_without_outlying is None else number(e.fvu_without_outlying),
            "" if e.fvu_median_token is None else number(e.fvu_median_token),
            "" if e.l0 is None or e.delta_loss is None else number(e.delta_loss),
            "" if e.alive_fraction is None else f"{e.alive_fraction:.1%}",
            _sparsity(e),
            e.seed,
            f"{e.tokens:,}",
            f"`{e.folder}`" + (" **canonical**" if e.canonical else ""),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _sparsity(entry: Entry) -> str:
    penalty = entry.sparsity
    if penalty["penalty"] == "none":
        return "selection"
    target = f"target {penalty['target']:g}, " if "target" in penalty else ""
    return f"{target}λ {penalty['coefficient']:g}"

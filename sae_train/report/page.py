"""`sae report`: one self-contained page about a run or a sweep, from the files in its folder.

Whatever is there is shown: runs still going, failed, or without an evaluation appear with what
they have. The page asks nothing of the network; it links to the runs' files beside it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib import metadata, resources
from pathlib import PurePath
from string import Template
from urllib.parse import quote

from activation_cache.config import NO_MODEL
from activation_cache.storage.files import (
    AnyPath,
    StoragePath,
    make_folder,
    storage_path,
    write_text,
)
from sae_train.config.file import FILE_NAME, read_run_config
from sae_train.config.run import Config
from sae_train.config.sae import ARCHITECTURE_NAMES
from sae_train.latents.reader import has_latents, open_latents
from sae_train.probe.record import FILE as PROBES
from sae_train.report.charts import Charts, packed_library
from sae_train.report.described_runs import SYMBOLS, ReportRun, describe_runs, families_of
from sae_train.report.figures import (
    compact,
    frequency_figures,
    frontier,
    position_figures,
    prefix_figures,
    tiles,
    training_figures,
)
from sae_train.report.paper_figures import LEGEND, published_sections, section
from sae_train.report.probe_table import probe_section
from sae_train.runs.folder import EVALUATION, RunFolder, read_run, run_folders
from sae_train.runs.metrics_file import FILE as METRICS

_SECTIONS = (
    (
        "Training",
        "Over the training batches, logged as they went; the loss is the reconstruction's squared "
        "error on scaled inputs plus the sparsity penalty.",
        training_figures,
    ),
    (
        "Firing frequencies",
        "How often each latent is active on held-out tokens; latents that never fired are left "
        "out.",
        frequency_figures,
    ),
    (
        "By position in the sequence",
        "Held-out averages at each position; BOS stands at position 0.",
        position_figures,
    ),
    (
        "By prefix",
        "What the first latents of a Matryoshka SAE do alone, on held-out tokens; the last point "
        "is the whole SAE.",
        prefix_figures,
    ),
)
_PACKAGES = (
    "open-gemma-scope",
    "jax",
    "flax",
    "orbax-checkpoint",
    "tensorstore",
    "numpy",
    "plotly",
)


def write_report(folder: AnyPath) -> StoragePath:
    """Write `<folder>/report/index.html` for a run's or a sweep's folder; returns its path.

    Raises:
        UserError: the folder is neither, holds no run yet, or a file in it is damaged.
    """
    root = storage_path(folder)
    config = read_run_config(root)
    runs = describe_runs([read_run(path) for path in run_folders(root)])
    page = make_folder(root / "report") / "index.html"
    template = resources.files("sae_train.report").joinpath("page.html").read_text(encoding="utf-8")
    charts = Charts()
    parts = {"title": escape(config.name), "body": _body(config, runs, charts=charts, page=page)}
    parts |= {"charts": charts.packed(), "plotly": packed_library()}
    write_text(page, Template(template).substitute(parts))
    return page


def _body(config: Config, runs: Sequence[ReportRun], *, charts: Charts, page: StoragePath) -> str:
    return "\n".join(
        [
            _header(config, runs),
            _problems(runs),
            _frontier(charts, runs),
            _table(runs, page=page),
            probe_section(runs),
            *(section(head, note, draw(charts, runs)) for head, note, draw in _SECTIONS),
            published_sections(charts, runs),
            _configuration(page.parent.parent / FILE_NAME),
            _footer(runs),
        ]
    )


def _header(config: Config, runs: Sequence[ReportRun]) -> str:
    layers: dict[str, set[int]] = {}
    for run in runs:
        layers.setdefault(run.folder.config.sae.site, set()).add(run.folder.config.sae.layer)
    sites = [f"{site} of {_layer_words(sorted(layers[site]))}" for site in sorted(layers)]
    widths = sorted({run.folder.config.sae.width for run in runs})
    present = dict.fromkeys(run.folder.config.sae.architecture for run in runs)
    kinds = ", ".join(ARCHITECTURE_NAMES[name] for name in present)
    numbers = "".join(
        f"<li><b>{escape(number)}</b><span>{escape(words)}</span></li>"
        for number, words in tiles(runs)
    )
    return (
        f"<h1>{escape(config.name)}</h1>"
        f'<p class="lead">{kinds} sparse autoencoders of width '
        f"{' and '.join(f'{width:,}' for width in widths)} on {escape(', '.join(sites))} of "
        f"<b>{escape(_model_words(config))}</b>.</p>"
        f'<ul class="tiles">{numbers}</ul>'
    )


def _model_words(config: Config) -> str:
    weights = config.model.weights
    return "a store of imported rows" if weights == NO_MODEL else PurePath(weights).name


def _layer_words(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) > 4:
        return f"{len(layers)} layers"
    return f"layers {', '.join(map(str, layers[:-1]))} and {layers[-1]}"


def _problems(runs: Sequence[ReportRun]) -> str:
    """Runs that failed, or that are not finished or measured yet."""
    lines = []
    for run in runs:
        if run.folder.failure is not None:
            lines.append(f"<b>{escape(run.label)}</b> failed: {escape(run.folder.failure or '')}")
        elif run.folder.state != "trained":
            lines.append(
                f"<b>{escape(run.label)}</b> is {run.folder.state}, not trained to its end"
            )
        elif run.folder.evaluation is None:
            lines.append(
                f"<b>{escape(run.label)}</b> has not been evaluated: <code>sae evaluate</code>"
            )
    return f'<div class="warn">{"".join(f"<p>{one}</p>" for one in lines)}</div>' if lines else ""


def _legend(runs: Sequence[ReportRun]) -> str:
    """Buttons that switch runs on and off in every chart, a line for each family."""
    if len(runs) < 2:
        return LEGEND
    families = families_of(runs)
    lines = ""
    for family, members in families.items():
        name, labels = "", [run.label for run in members]
        if len(families) > 1 and len(members) > 1:
            name = f'<button type="button" data-family>{escape(family)}</button>'
            labels = [run.sparsity or run.label for run in members]
        buttons = "".join(
            f'<button type="button" aria-pressed="true" data-run="{escape(run.key)}">'
            f'<i style="color:{run.color}">{SYMBOLS[run.symbol]}</i>'
            f"{escape(label)}</button>"
            for run, label in zip(members, labels, strict=True)
        )
        lines += f"<li>{name}{buttons}</li>"
    words = "runs; a click switches one off and on, a double click leaves it alone"
    return f'<ul class="legend" aria-label="{words}">{lines}</ul>'


def _frontier(charts: Charts, runs: Sequence[ReportRun]) -> str:
    delta = frontier(
        charts,
        runs,
        heading="Delta loss against L0",
        metric="delta_loss",
        label="delta loss (nats)",
    )
    fvu = frontier(
        charts, runs, heading="Unexplained variance against L0", metric="fvu", label="FVU"
    )
    usual = ""
    if any(run.measured("fvu_without_outlying") is not None for run in runs):
        usual = frontier(
            charts,
            runs,
            heading="Unexplained variance without outlying tokens against L0",
            metric="fvu_without_outlying",
            label="FVU without outlying tokens",
        )
    return (
        "<h2>Sparsity and fidelity</h2>"
        f'<p class="note">{_loss_words(runs)} Lower left is better.{_outlying_words(runs)}</p>'
        f'<div class="charts wide">{delta}{fvu}{usual}</div>{_legend(runs)}'
    )


def _outlying_words(runs: Sequence[ReportRun]) -> str:
    """How much of the variance outlying tokens hold; nothing where it wasn't measured."""
    found = [(run.folder.evaluation or {}).get("outlying") or {} for run in runs]
    shares = [one["share_of_variance"] for one in found if one.get("share_of_variance") is not None]
    if not shares:
        return ""
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    held = high if low == high else f"{low} to {high}"
    return (
        " Tokens whose norm is above five times the median, up to "
        f"{max(one['tokens'] for one in found if one):,} of a run's, hold {held} of the variance, "
        "and FVU with it."
    )


def _loss_words(runs: Sequence[ReportRun]) -> str:
    evaluations = [run.folder.evaluation or {} for run in runs if run.measured("loss") is not None]
    if not evaluations and any(run.measured("fvu") is not None for run in runs):
        return "Measured on held-out rows, without a language model: there is no loss to compare."
    if not evaluations:
        return "No run has been evaluated yet; <code>sae evaluate</code> measures them."
    measured = evaluations[0]
    loss = measured["loss"]
    words = (
        f"On {measured.get('loss_sequences', 0):,} held-out sequences the model's loss is "
        f"{loss:.3f} nats per token; delta loss is what splicing the SAE's reconstruction in adds, "
        "the special tokens left as they are."
    )
    zeroed = [own["loss_zero_ablated"] for own in evaluations if own.get("loss_zero_ablated")]
    if not zeroed:
        return words
    low, high = min(zeroed), max(zeroed)
    if f"{low:.3f}" == f"{high:.3f}":
        words += (
            f" Zero-ablating the site instead brings it to {low:.3f}, that is {low - loss:+.3f}."
        )
    else:  # several sites or layers
        words += (
            f" Zero-ablating instead brings it to between {low:.3f} and {high:.3f}, depending on "
            "the site."
        )
    return words


_COLUMNS = (
    ("l0", "L0", ".1f"),
    ("fvu", "FVU", ".3f"),
    ("fvu_without_outlying", "FVU without outlying tokens", ".3f"),
    ("fvu_median_token", "median token's FVU", ".3f"),
    ("delta_loss", "delta loss", ".4f"),
    ("delta_loss_all_positions", "with BOS spliced", ".4f"),
    ("loss_recovered", "loss recovered", ".1%"),
    ("alive_fraction", "alive", ".1%"),
)


def _table(runs: Sequence[ReportRun], *, page: StoragePath) -> str:
    heads = "".join(f"<th>{words}</th>" for _, words, _ in _COLUMNS)
    cosines = [_mean_cosine(run) for run in runs]
    if any(cosine is not None for cosine in cosines):
        heads += "<th>mean |cos| of decoder rows</th>"
    else:
        cosines = []
    cells = [f"<td>{_cell(one, '.4f')}</td>" for one in cosines] or [""] * len(runs)
    rows = "".join(_row(run, more, page=page) for run, more in zip(runs, cells, strict=True))
    return (
        '<h2>Runs</h2><div class="scroll"><table><thead><tr><th>run</th><th class="left">state</th>'
        f'{heads}<th>steps</th><th>tokens/s</th><th class="left">files</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _mean_cosine(run: ReportRun) -> float | None:
    """What `sae latents` found of all pairs of decoder rows; None where it hasn't run."""
    if not has_latents(run.folder.path):
        return None
    return open_latents(run.folder.path).record.mean_abs_cosine


def _row(run: ReportRun, more: str, *, page: StoragePath) -> str:
    folder = run.folder
    cells = "".join(f"<td>{_cell(run.measured(name), form)}</td>" for name, _, form in _COLUMNS)
    done = folder.checkpoint_step or 0
    rate = run.trained("tokens_per_second")
    return (
        f"<tr><th>{escape(run.label)}</th>"
        f'<td class="left">{folder.state}</td>{cells}{more}'
        f"<td>{done:,} / {folder.config.train.steps:,}</td>"
        f"<td>{'–' if rate is None else compact(rate)}</td>"
        f'<td class="left files">{_links(folder, page=page)}</td></tr>'
    )


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _links(folder: RunFolder, *, page: StoragePath) -> str:
    files = [("config", FILE_NAME), ("metrics", METRICS), ("evaluation", EVALUATION)]
    files += [("probes", PROBES)]
    named = [(words, PurePath(name)) for words, name in files if (folder.path / name).exists()]
    weights = [f for f in folder.release if f.suffix in (".npz", ".safetensors")]
    named += [(f.parent.name, f) for f in weights if f.stem in ("params", "sae_weights")]
    return " · ".join(
        f'<a href="{escape(_relative(folder.path / file, page))}">{escape(words)}</a>'
        for words, file in named
    )


def _relative(path: StoragePath, page: StoragePath) -> str:
    return quote(PurePath(os.path.relpath(str(path), str(page.parent))).as_posix())


def _configuration(file: StoragePath) -> str:
    text = file.read_bytes().decode()
    return (
        "<h2>Configuration</h2><details><summary>The resolved config</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )


def _footer(runs: Sequence[ReportRun]) -> str:
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    newest = datetime.fromtimestamp(max(map(_last_change, runs)), UTC)
    return (
        f"<footer>The runs as of {newest:%Y-%m-%d %H:%M %Z}, read with "
        f"{escape(', '.join(found))}.</footer>"
    )


def _last_change(run: ReportRun) -> float:
    """When the newest of a run's files was written, in seconds since 1970."""
    files = (run.folder.path / name for name in (FILE_NAME, METRICS, EVALUATION))
    return max(file.stat().st_mtime for file in files if file.exists())

"""`sae check`: L0 and FVU of a released SAE against what its files declare, in a table."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from rich.table import Table

from activation_cache.config import ModelConfig
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import disk_errors, storage_path
from launch import exit_codes
from launch.console import print_table, print_text
from launch.processes.signals import StopFlag

if TYPE_CHECKING:
    from activation_cache.gemma.taps import Tap
    from sae_train.evaluate.check import Check

SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--model",
        {"required": True, "help": "the language model: an id of the Hub, a folder, .gguf"},
    ),
    ("--text", {"required": True, "help": "a file of text in UTF-8"}),
    ("--tokens", {"type": int, "default": 1024, "help": "of the text (default 1024)"}),
    ("--tap", {"help": "where it reads, if its files don't say: as resid_post.12"}),
)

_SHOWN = 6  # of the other readings


def check(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae check`: print what an SAE measures; returns 0 if it fits what is declared, else 2.

    Raises:
        UserError: the SAE, the model or the text can't be read, or don't belong together.
    """
    if arguments.tokens < 1:
        raise UserError(f"--tokens {arguments.tokens} is below 1: try 1024")
    tap = None if arguments.tap is None else _tap(arguments.tap)
    text_path = storage_path(arguments.text)
    with disk_errors(text_path, doing="read"):
        if not text_path.is_file():
            raise UserError(f"no text at {text_path}: --text names a file of text in UTF-8")
        text = text_path.read_bytes().decode(errors="replace")
    with stop.at_once():
        from activation_cache.language_model.model import load_model
        from sae_train.evaluate.check import check as run_check
        from sae_train.evaluate.check import declared_of
        from sae_train.inference.read_formats import load_sae

        sae = load_sae(arguments.target)
        card = _card(arguments.target)
        declared = declared_of(sae, tap=tap, l0=card.get("L0"), fvu=card.get("FVU"))
        model = load_model(ModelConfig(weights=arguments.model, dtype="float32"))
        result = run_check(sae, declared, model=model, text=text, tokens=arguments.tokens)
    return _show(result)


def _tap(name: str) -> Tap:
    from activation_cache.gemma.taps import Tap
    from sae_train.inference.hook_names import sites

    site, _, layer = name.partition(".")
    if site not in sites() or not (layer or "0").isdecimal():
        raise UserError(
            f"--tap {name} is no site and layer: {', '.join(sites())}, as resid_post.12"
        )
    return Tap(site, int(layer or 0))


def _card(target: str) -> dict[str, float]:
    """L0 and FVU of the card that `sae export` writes, beside the file or a folder above it."""
    given = storage_path(target)
    for folder in (given, given / "release", given.parent, given.parent.parent):
        if (folder / "README.md").is_file():
            text = (folder / "README.md").read_bytes().decode(errors="replace")
            found = re.findall(r"^\| (L0|FVU)[^|]*\| ([0-9.]+) \|$", text, re.MULTILINE)
            return {name: float(number) for name, number in found}
    return {}


def _show(result: Check) -> int:
    declared = result.declared
    place = declared.tap.name
    if declared.target != declared.tap:
        place += f" to {declared.target.name}"
    table = Table(title=f"an SAE of {place}", title_justify="left")
    table.add_column("read as", overflow="fold")
    table.add_column("L0", justify="right")
    for heading in ("FVU", "without outlying tokens", "of the median token"):
        table.add_column(heading, justify="right")
    l0, fvu = declared.l0, declared.fvu
    cells = ["-" if l0 is None else f"{l0:.1f}", "-" if fvu is None else f"{fvu:.3f}"]
    table.add_row("declared", *cells, "-", "-")
    shown = [(one.words, one) for one in result.others[:_SHOWN]]
    if result.found is not None:
        shown.insert(0, (f"measured at {place}", result.found))
    for words, one in shown:
        fvus = (one.fvu, one.fvu_without_outlying, one.fvu_median_token)
        table.add_row(words, f"{one.l0:.1f}", *(f"{fvu:.3f}" for fvu in fvus))
    print_table(table)
    if not result.problems:
        print_text("it fits what is declared")
        return exit_codes.DONE
    print_text("it doesn't fit: " + "; ".join(result.problems))
    best, own = result.others[0], result.found
    if best.fvu <= 0.5 and (own is None or best.fvu < 0.5 * own.fvu):
        print_text(f"it seems to have been trained on {best.words}")
    else:
        print_text("none of the readings tried fits: another model, other text, or damaged weights")
    return exit_codes.MISTAKE

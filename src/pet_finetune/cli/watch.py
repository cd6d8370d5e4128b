"""``pet-finetune watch``: the report of a run while it goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

from pet_finetune.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "watch",
        help="show the report of a run while it goes on",
        description="Serve the report of a run to the browsers of this computer (127.0.0.1), made "
        "anew after each epoch, until Ctrl-C.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="of the page (default: one that is free)"
    )
    parser.add_argument(
        "--every", type=int, default=5, metavar="SECONDS",
        help="after which the browser asks again (default: 5)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    if not 0 <= arguments.port < 65536:
        raise ConfigError(f"watch --port: expected a number from 0 to 65535, got {arguments.port}.")
    if arguments.every < 1:
        raise ConfigError(f"watch --every: expected a number above 0, got {arguments.every}.")
    if not arguments.folder.is_dir():
        raise ConfigError(
            f"watch: there is no folder '{arguments.folder}'. Name the one of a run, as `train` "
            "tells it in its first line."
        )
    from pet_finetune.api import ReportServer

    try:
        server = ReportServer(arguments.folder, arguments.port, arguments.every)
    except OSError as error:
        raise ConfigError(
            f"watch --port {arguments.port}: {error.strerror}. Take another, or leave it out."
        ) from error
    print(f"{server.address} shows {arguments.folder} until Ctrl-C", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0

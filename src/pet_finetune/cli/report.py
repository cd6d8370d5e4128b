"""``pet-finetune report`` and ``watch``: the page of a run, made again or while it goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

from pet_finetune.errors import ConfigError, DataError

from .common import Commands, add_command, start_log


def add_report(commands: Commands) -> None:
    """Add ``report`` to the command line."""
    parser = add_command(
        commands,
        "report",
        _report,
        "write report.html for the folder of a run",
        "Make the report of a run from the files in its folder: errors before and after, "
        "learning curves, parity plots, worst structures in 3D, and how to use the model. "
        "Training writes it at its end.",
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN", help="folder of a run, finished or not"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="another file than report.html in the folder (one run)"
    )


def _report(arguments: argparse.Namespace) -> int:
    if arguments.output is not None and len(arguments.folders) > 1:
        raise ConfigError(
            f"report: -o {arguments.output} is one file, but {len(arguments.folders)} runs are "
            "named. Leave -o out: each report goes into its own folder."
        )
    for folder in arguments.folders:
        if not Path(folder).is_dir():
            raise DataError(f"There is no folder '{folder}'. Name the folder of a run.")
    from pet_finetune.api import write_report

    start_log()
    for folder in arguments.folders:
        print(write_report(folder, arguments.output))
    return 0


def add_watch(commands: Commands) -> None:
    """Add ``watch`` to the command line."""
    parser = add_command(
        commands,
        "watch",
        _watch,
        "show the report of a run during the run",
        "Serve the report of a run to the browsers of this computer (127.0.0.1), updated after "
        "each epoch, until Ctrl-C.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="of the page (default: one that is free)"
    )
    parser.add_argument(
        "--every", type=int, default=5, metavar="SECONDS",
        help="after which the browser asks again (default: 5)",
    )  # fmt: skip


def _watch(arguments: argparse.Namespace) -> int:
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

"""The options of ``train`` and ``eval`` for runs that a file names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pet_finetune.errors import ConfigError

if TYPE_CHECKING:
    from pet_finetune.config.named_run_options import NamedRun

ROOT = "lora_adapters"


def add_arguments(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Add ``--config`` and ``--run-name``, and ``--all`` where ``several`` runs can be meant."""
    group = parser.add_argument_group("named runs")
    group.add_argument(
        "--config", metavar="FILE", help="instead of OPTIONS: a JSON or YAML file of named runs"
    )
    group.add_argument("--run-name", metavar="NAME", help="the run of that file")
    if several:
        group.add_argument(
            "--all", action="store_true", help="all runs of that file, one after the other"
        )
        group.add_argument(
            "--show-options", action="store_true", help="only show the options file of the run"
        )


def check_arguments(arguments: argparse.Namespace, first: str | None, clash: Sequence[str]) -> bool:
    """Whether named runs are meant.

    Args:
        arguments: of the command line.
        first: the options file that was given, if any.
        clash: options of the command line that named runs leave no room for, where given.

    Raises:
        ConfigError: arguments that do not go together.
    """
    every = getattr(arguments, "all", False)
    if arguments.config is None:
        shown = getattr(arguments, "show_options", False)
        asked = {"--run-name": arguments.run_name, "--all": every, "--show-options": shown}
        for name, given in asked.items():
            if given:
                raise ConfigError(f"{name} needs the file that names the runs: --config FILE.")
        return False
    if first is not None:
        raise ConfigError(
            f"--config {arguments.config} and {first} both say what to do: give one of them."
        )
    if clash:
        raise ConfigError(
            f"{clash[0]} does not go with --config: the file says where a run starts, and an "
            "interrupted run goes on by itself. Leave it out."
        )
    if every and arguments.run_name is not None:
        raise ConfigError("--run-name means one run and --all means all: give one of them.")
    return True


def read_runs(arguments: argparse.Namespace, root: str) -> list[NamedRun]:
    """The runs that are meant.

    Raises:
        ConfigError: as ``read_named_runs``, or none is named.
    """
    from pet_finetune.config.named_run_options import read_named_runs, run_names

    if arguments.run_name is None and not getattr(arguments, "all", False):
        names = ", ".join(run_names(arguments.config))
        raise ConfigError(
            f"--config {arguments.config}: which run? Give --run-name NAME"
            f"{', or --all' if hasattr(arguments, 'all') else ''}. Runs: {names}."
        )
    wanted = None if arguments.run_name is None else [arguments.run_name]
    return read_named_runs(arguments.config, wanted, arguments.override, root)

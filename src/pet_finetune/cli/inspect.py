"""``pet-finetune inspect``: a look at data before a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from pet_finetune.errors import ConfigError
from pet_finetune.progress import clear

from .arguments import (
    MODEL,
    add_reading_arguments,
    check_data,
    check_models,
    check_sets,
    systems_of,
)

_EXAMPLES = """\
examples:
  pet-finetune inspect data.xyz                          numbers, findings, a suggestion
  pet-finetune inspect data.xyz -c foundation.ckpt       and compared with a foundation
  pet-finetune inspect data.xyz -c foundation.ckpt --write-options options.yaml
  pet-finetune inspect train.xyz --validation val.xyz --test test.xyz
  pet-finetune inspect options.yaml                      the sets of an options file
"""
_YAML = {".yaml", ".yml"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "inspect",
        help="look at data before a run: units, outliers, leaks, what it takes",
        description="Say what is in the data and what is odd about it, estimate what a run takes, "
        "and suggest options. Exit status 1 where a run would break.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE",
        help="files of structures (the training data), and at most one options file (.yaml), "
        "which says how they are read and alone names the sets",
    )
    parser.add_argument("-c", "--checkpoint", help=f"the foundation to compare with: {MODEL}")
    parser.add_argument(
        "-r", "--override", action="append", default=[], metavar="KEY=VALUE",
        help="with an options file: change an option; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--validation", action="append", default=[], metavar="FILE", help="a validation file"
    )
    parser.add_argument("--test", action="append", default=[], metavar="FILE", help="a test file")
    add_reading_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--write-options", metavar="FILE", help="write the suggested options, ready to train"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="how long the foundation may predict; it sees a part of large sets (default: 20)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    options = [name for name in arguments.inputs if Path(name).suffix in _YAML]
    files = [name for name in arguments.inputs if name not in options]
    _check(arguments, options)
    from pet_finetune.log import get_logger, setup_logging

    setup_logging("WARNING" if arguments.json else "INFO")
    check_data(*files, *arguments.validation, *arguments.test)
    check_models(arguments.checkpoint)
    loaded = None
    if options:
        from pet_finetune.config.load import load_options

        loaded = load_options(
            options[0], arguments.override, arguments.checkpoint, require_start=False
        )
        check_sets(loaded.options.datasets() if not files else ())
    from pet_finetune.api import (
        inspect_data,
        request_of_files,
        request_of_options,
        write_suggestion,
    )

    if loaded is not None:
        for notice in loaded.notices:
            get_logger(__name__).warning(notice)
        request = request_of_options(loaded, files)
    else:
        request = request_of_files(
            files,
            arguments.checkpoint,
            arguments.validation,
            arguments.test,
            systems=systems_of(arguments),
        )
    inspection = inspect_data(request, device=arguments.device, seconds=arguments.seconds)
    _print(inspection, arguments.json)
    if arguments.write_options is not None:
        write_suggestion(inspection, arguments.write_options)
    return 1 if inspection.errors else 0


def _check(arguments: argparse.Namespace, options: list[str]) -> None:
    """Arguments that do not go together."""
    if len(options) > 1:
        raise ConfigError(f"inspect: one options file, not {len(options)}: {', '.join(options)}.")
    if options and (arguments.validation or arguments.test):
        raise ConfigError(
            "inspect: the options file names the sets, so --validation and --test have no place. "
            "Leave them out, or leave the options file out."
        )
    if options and systems_of(arguments):
        raise ConfigError(
            "inspect: --format and --types say how files are read, but the options file says that "
            "of its own: `format` and `types` beside `read_from` of the systems."
        )
    if arguments.override and not options:
        raise ConfigError("inspect: -r changes an option, but no options file is given.")


def _print(inspection: object, as_json: bool) -> None:
    import json
    import sys

    from pet_finetune.api import Inspection, as_dict, render

    assert isinstance(inspection, Inspection)
    clear()
    if as_json:
        print(json.dumps(as_dict(inspection), indent=2))
        return
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110)
    console.print(render(inspection))

"""``pet-finetune inspect`` and ``convert``: data before a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from pet_finetune.errors import ConfigError
from pet_finetune.files import check_new
from pet_finetune.terminal import clear

from . import common

_OF_INSPECT = """\
  pet-finetune inspect data.xyz                          numbers, findings, a suggestion
  pet-finetune inspect data.xyz -c foundation.ckpt       and compared with a foundation
  pet-finetune inspect data.xyz -c foundation.ckpt --write-options options.yaml
  pet-finetune inspect train.xyz --validation val.xyz --test test.xyz
  pet-finetune inspect options.yaml                      the sets of an options file
"""
_OF_CONVERT = """\
  pet-finetune convert data.xyz data/
  pet-finetune convert omol.aselmdb data/ --labels energy forces
  pet-finetune convert data.db data.zip
"""


def add_inspect(commands: common.Commands) -> None:
    """Add ``inspect`` to the command line."""
    parser = common.add_command(
        commands,
        "inspect",
        _inspect,
        "check data before a run: units, outliers, leaks, time and memory",
        "Describe the data and their problems, estimate time and memory of a run, and suggest "
        "options. The exit status is 1 if a run would fail.",
        _OF_INSPECT,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE",
        help="files of structures (the training data), and at most one options file (.yaml), "
        "which tells how to read them; alone, its sets are inspected",
    )
    parser.add_argument(
        "-c", "--checkpoint", help=f"the foundation to compare with: {common.MODEL}"
    )
    common.add_override(parser, "with an options file: ")
    parser.add_argument(
        "--validation", action="append", default=[], metavar="FILE", help="a validation file"
    )
    parser.add_argument("--test", action="append", default=[], metavar="FILE", help="a test file")
    common.add_options(parser, common.OF_SYSTEMS)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--write-options", metavar="FILE", help="write the suggested options, ready to train"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help=(
            "time limit for predictions of the foundation; it sees a part of large sets "
            "(default: 20)"
        ),
    )


def _inspect(arguments: argparse.Namespace) -> int:
    options = [name for name in arguments.inputs if Path(name).suffix in common.YAML]
    files = [name for name in arguments.inputs if name not in options]
    _check(arguments, options)
    log = common.start_log(level="WARNING" if arguments.json else "INFO")
    common.check_data(*files, *arguments.validation, *arguments.test)
    common.check_models(arguments.checkpoint)
    loaded = None
    if options:
        from pet_finetune.config.load import load_options

        loaded = load_options(
            options[0], arguments.override, arguments.checkpoint, require_start=False
        )
        common.check_sets(loaded.options.datasets() if not files else ())
    if arguments.write_options is not None:
        check_new(Path(arguments.write_options))
    from pet_finetune.api import (
        inspect_data,
        request_of_files,
        request_of_options,
        write_suggestion,
    )

    if loaded is not None:
        for notice in loaded.notices:
            log.warning(notice)
        request = request_of_options(loaded, files)
    else:
        request = request_of_files(
            files,
            arguments.checkpoint,
            arguments.validation,
            arguments.test,
            systems=common.systems_of(arguments),
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
    if options and common.systems_of(arguments):
        raise ConfigError(
            "inspect: --format and --types say how files are read, but the options file says that "
            "of its own: `format` and `types` next to `read_from` of the systems."
        )
    if arguments.override and not options:
        raise ConfigError("inspect: -r changes an option, but no options file is given.")


def _print(inspection: object, as_json: bool) -> None:
    import json

    from pet_finetune.api import Inspection, as_dict, render
    from pet_finetune.terminal import print_rich

    assert isinstance(inspection, Inspection)
    if as_json:
        clear()
        print(json.dumps(as_dict(inspection), indent=2))
    else:
        print_rich(render(inspection))


def add_convert(commands: common.Commands) -> None:
    """Add ``convert`` to the command line."""
    parser = common.add_command(
        commands,
        "convert",
        _convert,
        "write data as a set that stays on disk, in metatrain's format",
        "Write the structures of a file, with their labels under the same names and in the same"
        " units, as metatrain's memory-mapped folder, or as its zip. Training reads such a set "
        "from disk. After a stop the same command continues.",
        _OF_CONVERT,
    )
    parser.add_argument(
        "source",
        help="extended xyz, a database of ASE's (.db, .aselmdb), a set of metatrain's, or another "
        "file that ASE reads",
    )
    parser.add_argument("output", help="a folder, or a file that ends with .zip")
    parser.add_argument("--format", default="", help="ASE's name of the format of the source")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="names of the values to keep (default: all that are numbers)",
    )
    parser.add_argument(
        "--neighbors",
        type=float,
        metavar="CUTOFF",
        help="write neighbour lists too, for models of this cutoff (in the unit of the positions)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read and check (default: one a core, up to eight, where that pays); "
        "the result is the same",
    )


def _convert(arguments: argparse.Namespace) -> int:
    common.check_data(arguments.source)
    from pet_finetune.api import convert

    log = common.start_log()
    done = convert(
        arguments.source,
        arguments.output,
        format=arguments.format,
        labels=arguments.labels,
        neighbors=arguments.neighbors,
        workers=arguments.workers,
    )
    log.info(
        "%s %s %d structures with %s",
        done.path,
        "holds" if done.made else "is there already and holds",
        done.structures,
        ", ".join(done.labels) or "no labels",
    )
    return 0

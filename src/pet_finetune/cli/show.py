"""Looking: ``inspect`` and ``convert`` at data, ``options``, ``report`` and ``watch`` at a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pet_finetune.errors import ConfigError, DataError
from pet_finetune.files import check_new
from pet_finetune.terminal import clear

from . import common

_OF_OPTIONS = """\
  pet-finetune options                                  what there is
  pet-finetune options architecture.training.finetune   a branch with all that is below it
  pet-finetune options --schema > options.schema.json   for editors
"""


def add_options_command(commands: common.Commands) -> None:
    """Add ``options`` to the command line."""
    parser = common.add_command(
        commands,
        "options",
        _options,
        "show the reference of options files",
        "Print the reference of the options, or their JSON schema.",
        _OF_OPTIONS,
    )
    parser.add_argument("branch", nargs="?", help="dotted name of an option or a section")
    parser.add_argument(
        "--schema",
        action="store_true",
        help="print the JSON schema, with which editors check options files",
    )


def _options(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding

    from pet_finetune.config.options_reference import entries_below, option_entries, options_schema

    if arguments.schema:
        print(json.dumps(options_schema(), indent=2, ensure_ascii=False))
        return 0
    console = Console(highlight=False, soft_wrap=False)
    if arguments.branch is None:
        for entry in option_entries():
            if not entry.ignored:
                default = f" [dim]({escape(entry.default)})[/dim]" if entry.default else ""
                console.print(f"[bold]{escape(entry.name)}[/bold]{default}", soft_wrap=True)
        return 0
    for entry in entries_below(arguments.branch):
        default = f", default {entry.default}" if entry.default not in ("", "required") else ""
        default = ", required" if entry.default == "required" else default
        console.print(f"[bold]{escape(entry.name)}[/bold]")
        lines = f"[dim]{escape(entry.type + default)}[/dim]\n{escape(entry.meaning)}"
        console.print(Padding(lines.replace("`", ""), (0, 0, 0, 4)))
    return 0


def add_report(commands: common.Commands) -> None:
    """Add ``report`` to the command line."""
    parser = common.add_command(
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

    common.start_log()
    for folder in arguments.folders:
        print(write_report(folder, arguments.output))
    return 0


def add_watch(commands: common.Commands) -> None:
    """Add ``watch`` to the command line."""
    parser = common.add_command(
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
    common.add_options(parser, common.OF_SYSTEMS)
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
        **common.given(arguments, common.OF_SYSTEMS),
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

"""The ``pet-finetune`` command. Torch is imported inside a command, so that help is instant."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import os
import sys
from collections.abc import Sequence

from pet_finetune.errors import PetFinetuneError, is_out_of_memory
from pet_finetune.installation import __version__
from pet_finetune.terminal import Watch

from .dynamics import add_md, add_relax
from .evaluate import add_eval
from .models import add_adapter, add_export, add_info
from .show import add_convert, add_inspect, add_options_command, add_report, add_watch
from .train import add_pretrain, add_train

_COMMANDS = (
    add_inspect,
    add_pretrain,
    add_train,
    add_watch,
    add_eval,
    add_info,
    add_md,
    add_relax,
    add_adapter,
    add_report,
    add_export,
    add_convert,
    add_options_command,
)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="pet-finetune",
        description="Fine-tune a pre-trained PET interatomic potential on your own structures.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "zsh"),
        help="print what makes the shell complete commands and options",
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser


class _Completion(argparse.Action):
    """Prints a completion script and ends."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Print the script of the shell in ``values``."""
        import shtab

        _complete_files(parser, shtab.FILE)
        print(shtab.complete(parser, str(values)))
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, files: object) -> None:
    """Let every argument that is no choice and no switch be completed with files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _complete_files(below, files)
        elif action.choices is None and action.nargs != 0:
            action.complete = files  # type: ignore[attr-defined]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (0 done, 1 bad input, 130 interrupted)."""
    for name in ("stdout", "stderr"):  # closed: a file of ours would become what libraries print to
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # as of stderr: any name of a file can be shown
        sys.stdout.reconfigure(errors="backslashreplace")
    # Collections that look at all of torch, while it is imported and at the end, take 0.8 s.
    atexit.register(gc.freeze)
    if "pet_finetune.api" not in sys.modules:  # which enables it again
        gc.disable()
    parsed = make_parser().parse_args(arguments)
    try:
        with Watch(lambda: _doing(parsed.command)):
            _check_here()
            status: int = parsed.run(parsed)
    except PetFinetuneError as error:
        if parsed.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # A full disk, a file that vanished: whatever no one nearer to it has explained.
        if parsed.debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if parsed.debug or not is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        print(
            f"error: The memory is not enough{f' ({first})' if first else ''}. Use smaller batches "
            "(architecture.training.batch_size or max_atoms_per_batch for train, -b for eval), "
            "smaller structures, or a device with more memory.",
            file=sys.stderr,
        )
        return 1
    return status


def _check_here() -> None:
    """Refuse a current folder that was removed: libraries fail in riddles there."""
    try:
        os.getcwd()
    except OSError as error:
        raise PetFinetuneError(
            "The current folder was removed. Go to one that exists (cd), and start again."
        ) from error


def _doing(command: str) -> str:
    """Progress text of a command without progress of its own."""
    # Importing torch and what stands on it takes seconds.
    loaded = hasattr(sys.modules.get("pet_finetune.api"), "train")
    return f"pet-finetune {command}" if loaded else "loading torch"

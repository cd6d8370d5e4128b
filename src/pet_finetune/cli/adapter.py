"""``pet-finetune adapter``: look at adapter folders, check, merge and combine them."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import check_folders, check_models

_EXAMPLES = """\
examples:
  pet-finetune adapter info run/adapter
  pet-finetune adapter check run/adapter -c foundation.ckpt
  pet-finetune adapter merge run/adapter -c foundation.ckpt -o tuned.ckpt
  pet-finetune adapter combine water/ ice/ --weights 0.5 0.5 -o mixed/
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "adapter",
        help="look at adapters, check, merge and combine them",
        description="What one does with adapter folders, ours or Hugging Face PEFT's.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    info = actions.add_parser("info", help="what a folder holds")
    info.add_argument("folder", nargs="+")
    info.set_defaults(run=_info)

    check = actions.add_parser(
        "check",
        help="whether folders can be used",
        description="Exit status 1 where one cannot.",
    )
    check.add_argument("folder", nargs="+")
    check.add_argument("-c", "--checkpoint", help="the base: whether they fit it")
    check.set_defaults(run=_check)

    merge = actions.add_parser("merge", help="base and adapter as one plain checkpoint")
    merge.add_argument("folder")
    merge.add_argument("-c", "--checkpoint", required=True, help="the base")
    merge.add_argument("-o", "--output", required=True, help="the new checkpoint")
    merge.set_defaults(run=_merge)

    combine = actions.add_parser("combine", help="a weighted sum of adapters as a new one")
    combine.add_argument("folder", nargs="+")
    combine.add_argument(
        "--weights", nargs="+", type=float, help="one for each (default: equal ones)"
    )
    combine.add_argument(
        "--combination",
        default="cat",
        metavar="KIND",
        help="cat: exact, ranks add up; svd: its best approximation of a given rank; linear: "
        "PEFT's sum of factors (default: cat)",
    )
    combine.add_argument("--rank", type=int, help="of the result, for svd")
    combine.add_argument("-c", "--checkpoint", help="the base, where the weights do not sum to 1")
    combine.add_argument("-o", "--output", required=True, help="the new folder")
    combine.set_defaults(run=_combine)


def _info(arguments: argparse.Namespace) -> int:
    check_folders(*arguments.folder)
    from pet_finetune.api import describe_adapter, show

    for folder in arguments.folder:
        show(describe_adapter(folder))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    check_models(arguments.checkpoint)
    if not any(Path(folder).is_dir() for folder in arguments.folder):
        check_folders(*arguments.folder)
    from pet_finetune.api import check_adapters

    findings = check_adapters(arguments.folder, arguments.checkpoint)
    for finding in findings:
        print(f"{finding.folder}: {'ok' if finding.sound else 'WRONG'}: {finding.text}")
    return 0 if all(finding.sound for finding in findings) else 1


def _merge(arguments: argparse.Namespace) -> int:
    check_models(arguments.checkpoint)
    check_folders(arguments.folder)
    from pet_finetune.api import merge_adapter

    print(merge_adapter(arguments.folder, arguments.checkpoint, arguments.output))
    return 0


def _combine(arguments: argparse.Namespace) -> int:
    check_models(arguments.checkpoint)
    check_folders(*arguments.folder)
    from pet_finetune.api import combine_adapters

    folder = combine_adapters(
        [Path(folder) for folder in arguments.folder],
        arguments.output,
        weights=arguments.weights,
        combination=arguments.combination,
        rank=arguments.rank,
        checkpoint=arguments.checkpoint,
    )
    print(folder)
    return 0

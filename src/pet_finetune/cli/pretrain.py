"""``pet-finetune pretrain``: a foundation learns the user's system at a cheap level of theory."""

from __future__ import annotations

import argparse

from .arguments import MODEL, add_reading_arguments, check_data, check_models, systems_of

_EXAMPLES = """\
examples:
  pet-finetune pretrain structures.xyz -c foundation.ckpt -o pretrained.ckpt
  pet-finetune pretrain structures.xyz -c foundation.ckpt --teacher larger.ckpt -n 1000 -o pretrained.ckpt
  pet-finetune pretrain structures.xyz -c foundation.ckpt --teacher my_module:my_calculator -o pretrained.ckpt
  pet-finetune train options.yaml -c pretrained.ckpt     then fine-tune from it
The same command goes on where it was stopped.
"""  # noqa: E501
#: Settings by the name of their argument, with type, placeholder and help.
_SETTINGS: dict[str, tuple[type, str, str]] = {
    "n": (int, "N", "frames that the teacher labels (default: 2000)"),
    "epochs": (int, "N", "passes over them (default: 10)"),
    "batch_size": (int, "N", "structures in a batch of the training (default: 10)"),
    "learning_rate": (float, "X", "of the training (default: 2e-4)"),
    "max_force": (float, "X", "drop frames with larger forces, in eV/A (default: 20)"),
    "max_energy": (
        float,
        "X",
        "drop frames so much above the one they began from, in eV/atom (default: 1)",
    ),
    "seed": (int, "N", "of dynamics, displacements and training (default: 0)"),
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "pretrain",
        help="before fine-tuning: the foundation learns your system at a cheap level",
        description="Explore structures like yours with the foundation, label them with a cheap "
        "teacher and train on them, so that fine-tuning needs fewer labels of your own.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("structures", help="any file ASE reads; its labels are not used")
    parser.add_argument("-c", "--checkpoint", required=True, help=f"the foundation: {MODEL}")
    parser.add_argument("-o", "--output", required=True, help="the checkpoint to write")
    parser.add_argument(
        "--teacher", metavar="NAME",
        help="gfn2 (default) or gfn1, which need tblite; an ASE calculator as module:name; or a "
        "checkpoint",
    )  # fmt: skip
    for name, (kind, shown, words) in _SETTINGS.items():
        flags = ["-n"] if name == "n" else ["--" + name.replace("_", "-")]
        parser.add_argument(*flags, type=kind, metavar=shown, help=words)
    parser.add_argument(
        "--temperatures", type=float, nargs="+", metavar="K",
        help="of the molecular dynamics (default: 300 600 1000)",
    )  # fmt: skip
    parser.add_argument(
        "--work", metavar="DIR", help="folder of the stages (default: OUTPUT with .work)"
    )
    add_reading_arguments(parser)
    parser.add_argument("--target", help="which energy, where the foundation has several")
    parser.add_argument("--device", help="auto, cpu or cuda (default: auto)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    check_data(arguments.structures)
    check_models(arguments.checkpoint)
    from pet_finetune.api import pretrain
    from pet_finetune.log import setup_logging

    setup_logging()
    names = (*_SETTINGS, "teacher", "target", "device", "work")
    given = {name: getattr(arguments, name) for name in names}
    if arguments.temperatures is not None:
        given["temperatures"] = tuple(arguments.temperatures)
    pretrain(
        arguments.checkpoint,
        arguments.structures,
        output=arguments.output,
        systems=systems_of(arguments),
        **{name: value for name, value in given.items() if value is not None},
    )
    return 0

"""How to use what a run made: lines to copy."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from .record import RunRecord

_STRUCTURE = "structure.xyz"
_DYNAMICS = f"{_STRUCTURE} --ensemble nvt --temperature 300 --steps 10000 --timestep 0.5"


@dataclass(frozen=True)
class Recipe:
    """Lines to copy: what they are for, in which language, and a note below."""

    title: str
    language: str
    code: str
    note: str = ""


def recipes(run: RunRecord) -> list[Recipe]:
    """What can be done with the files of the run, the usual first."""
    names = set(run.files)
    made = []
    if run.committee is not None:
        made += _committee(run)
    elif "best_model.ckpt" in names:
        made += _single(run)
    if "adapter" in names:
        made.append(_adapter(run))
    made.append(_again(run))
    return made


def _path(run: RunRecord, name: str) -> str:
    return f"{run.folder.rstrip('/')}/{name}"


def _foundation(run: RunRecord) -> str:
    return str(run.finetune.get("read_from") or "foundation.ckpt")


def _python(*calculator: str) -> str:
    lines = [
        "from ase.io import read",
        "from pet_finetune import PETCalculator",
        "",
        f'atoms = read("{_STRUCTURE}")',
        *calculator,
        "print(atoms.get_potential_energy())  # eV",
        "print(atoms.get_forces())  # eV/Å",
    ]
    return "\n".join(lines)


def _single(run: RunRecord) -> list[Recipe]:
    best = _path(run, "best_model.ckpt")
    shell = shlex.quote(best)
    species = list(run.start.get("data_species") or ["H", "C", "O"])
    return [
        Recipe("In ASE", "python", _python(f"atoms.calc = PETCalculator({best!r})")),
        Recipe(
            "Errors on other structures", "shell", f"pet-finetune eval {shell} other_structures.xyz"
        ),
        Recipe("A first look at dynamics", "shell", f"pet-finetune md {shell} {_DYNAMICS}"),
        Recipe(
            "In LAMMPS, i-PI and other engines",
            "shell",
            f"pet-finetune export {shell} -o model.pt\n"
            "\n"
            "# in the input of LAMMPS; the atomic numbers are those of its types, in order:\n"
            "#   pair_style metatomic model.pt\n"
            f"#   pair_coeff * * {' '.join(_atomic_numbers(species))}",
            "The file runs wherever metatomic does.",
        ),
    ]


def _atomic_numbers(symbols: list[str]) -> list[str]:
    from ase.data import atomic_numbers

    return [str(atomic_numbers[symbol]) for symbol in symbols]


def _committee(run: RunRecord) -> list[Recipe]:
    base, folder = _foundation(run), run.folder
    return [
        Recipe(
            "In ASE, with uncertainties",
            "python",
            _python(f"atoms.calc = PETCalculator({base!r}, adapters={folder!r})")
            + '\nprint(atoms.calc.results["forces_uncertainty"])  # eV/Å, one an atom',
        ),
        Recipe(
            "Dynamics, with an uncertainty at every step",
            "shell",
            f"pet-finetune md {shlex.quote(base)} {_DYNAMICS} --adapter {shlex.quote(folder)}",
        ),
        Recipe(
            "One member alone",
            "shell",
            f"pet-finetune eval {shlex.quote(_path(run, 'member_0/best_model.ckpt'))} "
            "other_structures.xyz",
        ),
    ]


def _adapter(run: RunRecord) -> Recipe:
    adapter = _path(run, "adapter")
    return Recipe(
        "The adapter on its foundation",
        "python",
        _python(f"atoms.calc = PETCalculator({_foundation(run)!r}, adapter={adapter!r})"),
        "Small to keep and to send; it says the same as best_model.ckpt.",
    )


def _again(run: RunRecord) -> Recipe:
    options = shlex.quote(_path(run, "options.yaml"))
    if run.status == "finished":
        return Recipe(
            "The same run again",
            "shell",
            f"pet-finetune train {options} -o another_folder",
            "The file names every option and the seed.",
        )
    folder = shlex.quote(run.folder)
    return Recipe(
        "Go on with this run", "shell", f"pet-finetune train {options} --restart {folder}"
    )

"""Teachers that label frames: tblite, an ASE calculator, or a checkpoint."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculatorError, PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols

from pet_finetune.calculator import PETCalculator
from pet_finetune.data.structure import DEFAULT_CHARGE_KEYS, DEFAULT_SPIN_KEYS, usual_integer
from pet_finetune.errors import ConfigError, PetFinetuneError, did_you_mean
from pet_finetune.hub import find_model, is_address
from pet_finetune.installation import missing_extra

from .explore import DROPPED, NAME, bare

#: Names of the tight-binding methods, and tblite's names of them.
TIGHT_BINDING = {"gfn2": "GFN2-xTB", "gfn1": "GFN1-xTB"}
_MOST_TIGHT_BINDING = 86  # radon: both methods have parameters up to it
#: tblite has the Gamma point only. Cells lower than this are repeated before it sees them, and
#: the forces on the copies averaged: Å.
_LEAST_HEIGHT = 6.4
#: What ASE's calculators raise where they cannot compute a structure.
_FAILURES = (
    CalculatorError,
    PropertyNotImplementedError,
    PetFinetuneError,
    ArithmeticError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


class Teacher:
    """Gives frames energies, forces, and stresses where they are periodic.

    Args:
        name: as it is shown.
        calculator: makes the ASE calculator for a frame.
        unknown: elements, of those given, that it does not know.
        least_height: cells lower than this are repeated before they are computed, Å.
    """

    def __init__(
        self,
        name: str,
        calculator: Callable[[Atoms], Any],
        unknown: Callable[[set[int]], set[int]] = lambda elements: set(),
        least_height: float = 0.0,
    ) -> None:
        self.name = name
        self._calculator, self._unknown = calculator, unknown
        self._least_height = least_height

    def label(self, atoms: Atoms, max_force: float) -> Atoms:
        """A copy with the teacher's results, or with the reason why it has none in ``info``."""
        frame = bare(atoms)
        frame.info[NAME] = atoms.info.get(NAME, "")
        unknown = self._unknown({int(z) for z in atoms.numbers})
        if unknown:
            names = ", ".join(chemical_symbols[z] for z in sorted(unknown))
            frame.info[DROPPED] = f"element not known: {names}"
            return frame
        try:
            results = self._results(frame)
        except _FAILURES as error:
            first = (str(error).strip().splitlines() or ["no reason given"])[0]
            frame.info[DROPPED] = f"not computed ({type(error).__name__}: {first[:80]})"
            return frame
        numbers = np.concatenate([np.ravel(value) for value in results.values()])
        if not np.isfinite(numbers).all():
            frame.info[DROPPED] = "not computed (numbers that are not finite)"
        elif np.linalg.norm(results["forces"], axis=1).max() > max_force:
            frame.info[DROPPED] = "force too large"
        else:
            frame.calc = SinglePointCalculator(frame, **results)
        return frame

    def _results(self, frame: Atoms) -> dict[str, Any]:
        """Energy, forces, and stress; of a repeated cell those of one copy."""
        repeats = [
            max(1, int(np.ceil(self._least_height / height))) if periodic else 1
            for periodic, height in zip(frame.pbc, _heights(frame), strict=True)
        ]
        copies = int(np.prod(repeats))
        whole = frame.repeat(repeats) if copies > 1 else frame.copy()
        whole.info = dict(frame.info)
        whole.calc = self._calculator(whole)
        try:
            return self._computed(whole, copies)
        except _FAILURES:
            whole.calc.reset()  # some calculators keep half of what they could not compute
            raise

    @staticmethod
    def _computed(whole: Atoms, copies: int) -> dict[str, Any]:
        energy = float(whole.get_potential_energy()) / copies
        forces = whole.get_forces().reshape(copies, -1, 3).mean(axis=0)
        results: dict[str, Any] = {"energy": energy, "forces": forces}
        if whole.pbc.all():
            # Energies and forces are worth training on without it.
            with suppress(NotImplementedError, PropertyNotImplementedError):
                results["stress"] = whole.get_stress()
        return results


def _heights(atoms: Atoms) -> np.ndarray:
    """Distances between opposite faces of the cell, Å; infinite where not periodic."""
    heights = np.full(3, np.inf)
    if atoms.pbc.any():
        cell = atoms.cell.complete()
        areas = np.linalg.norm(cell.reciprocal().array, axis=1)
        heights[atoms.pbc] = 1.0 / areas[atoms.pbc]
    return heights


def teacher_of(text: str, device: str = "auto") -> Teacher:
    """The teacher of a name.

    Args:
        text: ``gfn2``, ``gfn1``, ``module:name``, or a checkpoint, by path, address or name.
        device: of a checkpoint.

    Raises:
        ConfigError: none of these, or its library is not installed.
        PetFinetuneError: the checkpoint cannot be read.
    """
    if text in TIGHT_BINDING:
        return _tight_binding(TIGHT_BINDING[text])
    if Path(text).is_file() or is_address(text):
        path = find_model(text)
        calculator = PETCalculator(path, device=device)
        known = set(calculator.model.species)
        return Teacher(path.name, lambda atoms: calculator, lambda asked: asked - known)
    module, colon, name = text.partition(":")
    if colon and module and name:
        return _by_path(text, module, name)
    raise ConfigError(
        f"pretrain: the teacher {text!r} is not one of gfn2, gfn1, an ASE calculator "
        "(module:name, e.g. tblite.ase:TBLite), or a checkpoint file."
        f"{did_you_mean(text, TIGHT_BINDING)}"
    )


def _tight_binding(method: str) -> Teacher:
    """GFN2-xTB or GFN1-xTB with tblite's own defaults."""
    if (problem := missing_extra("tblite", "xtb")) is not None:
        raise ConfigError(f"pretrain: the teacher {method} {problem}")
    from tblite.ase import TBLite

    def calculator(atoms: Atoms) -> Any:
        charge, _ = usual_integer(atoms.info, DEFAULT_CHARGE_KEYS, 0)
        spin, _ = usual_integer(atoms.info, DEFAULT_SPIN_KEYS, 1)
        odd = (int(atoms.numbers.sum()) - charge) % 2
        if spin < 1 or (spin - 1) % 2 != odd:
            spin = 1 + odd  # the lowest that there can be
        return TBLite(method=method, charge=charge, multiplicity=spin, verbosity=0)

    return Teacher(
        method,
        calculator,
        lambda asked: {z for z in asked if z > _MOST_TIGHT_BINDING},
        _LEAST_HEIGHT,
    )


def _by_path(text: str, module: str, name: str) -> Teacher:
    """An ASE calculator, its class, or a function that makes one, by import path."""
    try:
        found = getattr(importlib.import_module(module), name)
    except AttributeError:
        raise ConfigError(
            f"pretrain: the module of the teacher {text!r} has no '{name}'."
        ) from None
    except Exception as error:  # whatever a module of the user's does
        raise ConfigError(f"pretrain: the teacher {text!r} cannot be imported: {error}.") from error
    try:
        made = found() if inspect.isclass(found) or not hasattr(found, "calculate") else found
    except Exception as error:
        raise ConfigError(
            f"pretrain: the teacher {text!r} cannot be made ({type(error).__name__}: {error}). "
            "Name a calculator, or a class or function that takes no arguments."
        ) from error
    if not hasattr(made, "get_potential_energy"):
        raise ConfigError(
            f"pretrain: the teacher {text!r} gives {type(made).__name__}, which is no ASE "
            "calculator. Name one, its class, or a function without arguments that makes one."
        )
    return Teacher(text, lambda atoms: made)

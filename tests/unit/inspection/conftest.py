"""Labelled structures to inspect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from inspected import copper, read
from pet_finetune.data.structure import Structure


@pytest.fixture(scope="session")
def molecules_of(repository: Path) -> Callable[[str], list[Structure]]:
    """The shipped molecules: ``train``, ``val`` or ``test``."""
    sets = {
        name: read(repository / "datasets" / f"molecules_pbe0_{name}.xyz")
        for name in ("train", "val", "test")
    }
    return lambda name: list(sets[name])


@pytest.fixture(scope="session")
def _strained() -> list[Structure]:
    return copper(40)


@pytest.fixture
def strained(_strained: list[Structure]) -> list[Structure]:
    """Strained crystals with energies, forces and stress."""
    return list(_strained)

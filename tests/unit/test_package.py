"""The package as a user first meets it: importing it, and running it as a module."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

import pet_finetune


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, pet_finetune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", pet_finetune.__all__)
def test_public_names_can_be_imported(name: str) -> None:
    assert getattr(pet_finetune, name) is not None
    assert name in dir(pet_finetune)


@pytest.mark.slow
def test_no_folder_of_the_package_hides_a_public_name() -> None:
    code = (
        "import gc; gc.disable(); "  # as the command line
        "import pet_finetune.export.export, pet_finetune; "
        "import pet_finetune.keywords; "
        "assert pet_finetune.export.__name__ == 'export', pet_finetune.export; "
        "from pet_finetune.export import write; from pet_finetune import export; "
        "assert callable(export) and not callable(write) and gc.isenabled()"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'PETCalculater'"):
        pet_finetune.PETCalculater  # noqa: B018


def test_the_network_imports_neither_ase_nor_pydantic():
    code = (
        "import sys, pet_finetune.model.potential; "
        "sys.exit(bool({'ase', 'pydantic', 'omegaconf', 'vesin'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def in_order(graph):
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    return list(TopologicalSorter(imports).static_order())


def test_no_files_import_each_other_in_a_circle():
    graph = grimp.build_graph("pet_finetune", cache_dir=None)  # imports for types count too
    assert len(in_order(graph)) > 100
    graph.add_import(
        importer="pet_finetune.data.structure", imported="pet_finetune.training.trainer"
    )
    with pytest.raises(CycleError):
        in_order(graph)


def names_passed_on(code):
    """What modules of the package import from others of it that have it from elsewhere."""
    imports = {
        name: [one for one in ast.walk(ast.parse(text)) if isinstance(one, ast.ImportFrom)]
        for name, text in code.items()
    }
    borrowed = {
        name: {alias.name for one in several if one.module for alias in one.names}
        for name, several in imports.items()
    }
    found = []
    for name, several in imports.items():
        for one in several:
            above = name.split(".")[: -one.level] if one.level else []
            home = ".".join([*above, one.module or ""])
            if home not in ("pet_finetune", "pet_finetune.api"):
                found += [
                    f"{name} has {alias.name} from {home}"
                    for alias in one.names
                    if alias.name in borrowed.get(home, ())
                ]
    return found


def test_each_name_is_imported_from_the_module_that_defines_it():
    package = Path(pet_finetune.__file__).parent
    code = {
        ".".join(("pet_finetune", *path.relative_to(package).with_suffix("").parts)).replace(
            ".__init__", ""
        ): path.read_text()
        for path in package.rglob("*.py")
        if path.parent.name != "cli" or path.name != "__init__.py"
    }
    assert names_passed_on(code) == []
    code["pet_finetune.data.loader"] += "\nfrom pet_finetune.model.pet import PET\n"
    code["pet_finetune.api"] += "\nfrom pet_finetune.data.loader import PET\n"
    assert names_passed_on(code) == ["pet_finetune.api has PET from pet_finetune.data.loader"]

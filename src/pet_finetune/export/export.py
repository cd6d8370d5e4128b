"""Exporting a checkpoint for simulation engines."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from rich.table import Table

from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.adapters.inject import active_adapter, merged_copy
from pet_finetune.adapters.peft_files import load_adapter
from pet_finetune.checkpoint.archive import Checkpoint, TorchArchive
from pet_finetune.checkpoint.metatrain import is_metatrain
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.committee.committee_files import COMMITTEE_FILE, Adapters, committee_members
from pet_finetune.committee.llpr import fresh
from pet_finetune.config.run_options import Options
from pet_finetune.data.readers import probe_structures
from pet_finetune.data.structure import Structure
from pet_finetune.device import choose_dtype, plain_torch, torchscript
from pet_finetune.errors import CheckpointError, ConfigError
from pet_finetune.files import check_writable, size_text
from pet_finetune.hub import find_model
from pet_finetune.installation import __version__
from pet_finetune.keys import main_energy
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.terminal import facts_table

_LOG = get_logger(__name__)
# Enough to notice an error, few enough to cost a second.
_STRUCTURES = 6
_FORMATS = {
    "metatomic": "metatomic (TorchScript)",
    "metatrain": "metatrain (checkpoint of PET, format 16)",
}


@dataclass(frozen=True)
class ExportOutcome:
    """A file that was written.

    Attributes:
        path: the file.
        outputs: the name of each output in the file, and the target it is.
        interaction_range: how far away an atom can lie that matters to an atom, Angstrom.
        dtype: floating type of inputs and outputs.
        difference: the largest to the model's predictions, relative to 1 plus the largest.
        format: ``metatomic`` or ``metatrain``.
        notices: what the user should know about the conversion, one line each.
    """

    path: Path
    outputs: dict[str, str]
    interaction_range: float
    dtype: str
    difference: float
    format: str = "metatomic"
    notices: tuple[str, ...] = ()


@plain_torch()
@torchscript()
def export_model(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    adapter: Adapters | None = None,
    target: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
    authors: Sequence[str] = (),
) -> ExportOutcome:
    """Write a model for other programs, once its predictions are found to be the model's.

    Args:
        checkpoint: ours or metatrain's.
        output: the file; one that exists is replaced.
        format: ``metatomic``, for simulation engines, or ``metatrain``, a checkpoint that metatrain
            evaluates, trains and exports; None for ``metatrain`` where ``output`` ends with
            ``.ckpt``, else ``metatomic``.
        adapter: an adapter folder to merge into it; then its targets are the only outputs. Several,
            or the folder of a run with ``finetune.ensemble``, are a committee: its mean, its
            calibrated spread and what each member says are in the file.
        target: the energy that engines get as ``energy``. Without it: the only one of the adapter,
            or of the model where there is none, else ``energy``. For metatrain: the only target to
            write.
        dtype: ``float32`` or ``float64``, of all that is computed and of what engines give and
            get; None for the model's own inside and float64 outside, so that energies of large
            systems are not rounded.
        name: of the model, in the file's metadata; None for the file's name.
        authors: for the metadata.

    Raises:
        ConfigError: an argument is not what it can be.
        CheckpointError: the checkpoint cannot be read, or the file not be written.
        AdapterError: the adapter cannot be read or belongs to another base.
    """
    wanted = choose_dtype(dtype)
    format = _format(format, Path(output))
    source = find_model(checkpoint)
    path = check_output(output, source)
    opened = load_checkpoint(source)
    potentials, of_adapter, calibration = _merged(opened.model, adapter, target, wanted)
    _drop_stale(potentials)
    for potential in potentials if wanted is not None else ():
        potential.to(wanted)
    card = _card(potentials[0], opened, adapter)
    about = {"name": name or path.stem, "authors": authors, "card": card}
    if format == "metatrain":
        return _write_metatrain(path, potentials, target, of_adapter, about)
    outside = wanted or torch.float64
    return _write_metatomic(path, potentials, target, of_adapter, about, outside, calibration)


def _write_metatomic(
    path: Path,
    potentials: Sequence[Potential],
    target: str | None,
    of_adapter: tuple[str, ...],
    about: Mapping[str, Any],
    outside: torch.dtype,
    calibration: float,
) -> ExportOutcome:
    """Write a model for engines; ``about`` is the metadata of the file."""
    from .targets import choose_outputs, uncertainty_outputs
    from .write import ModelCheck, interaction_range, write_model

    potential = potentials[0]
    energy = _energy(potential, target, of_adapter)
    outputs = choose_outputs(potential, energy, of_adapter or None)
    _say_left_out([name for name in potential.targets if name not in outputs.values()])
    unsaid = [t for t in potential.uncertainties if not potential.target(t).is_energy]
    if unsaid:
        _LOG.warning(
            "The last-layer uncertainty (LLPR) of %s is not in the file: engines are told that of "
            "energies. --format metatrain keeps it.",
            ", ".join(f"'{target}'" for target in unsaid),
        )
    check = ModelCheck(potentials, _structures(potential), outputs, outside, calibration)
    reach, inside = interaction_range(potential), potential.dtype
    floating = str(outside).removeprefix("torch.")
    if inside != outside:
        floating += f" outside, {str(inside).removeprefix('torch.')} in the network"
    named = dict(outputs)
    for uncertain in uncertainty_outputs(potentials, outputs):
        named |= {other: outputs[name] for name, other in uncertain.items()}
    write_model(
        path, potentials, outputs, **about, check=check, dtype=outside, calibration=calibration
    )
    return ExportOutcome(path, named, reach, floating, check.difference)


def _write_metatrain(
    path: Path,
    potentials: Sequence[Potential],
    target: str | None,
    of_adapter: tuple[str, ...],
    about: Mapping[str, Any],
) -> ExportOutcome:
    """Write a model for metatrain, and read it back."""
    from pet_finetune.checkpoint.to_metatrain import save_metatrain

    from .write import ModelCheck, interaction_range

    if len(potentials) > 1:
        raise ConfigError(
            f"format: metatrain's PET holds no committee, and {len(potentials)} adapters were "
            "given. Write one file for each adapter, or all of them into one metatomic file (.pt)."
        )
    potential = potentials[0]
    only = of_adapter if target is None else (potential.target(target).name,)
    others = [other for other in potential.targets if only and other not in only]
    for other in others:
        potential.remove_target(other)
    if target is None:
        _say_left_out(others)
    check = ModelCheck(
        [potential], _structures(potential), {name: name for name in potential.targets}
    )
    written = save_metatrain(path, potential, **about, check=check.read_back)
    for notice in written.notices:
        _LOG.info("%s", notice)
    floating = str(potential.dtype).removeprefix("torch.")
    return ExportOutcome(
        path,
        written.targets,
        interaction_range(potential),
        floating,
        check.difference,
        "metatrain",
        written.notices,
    )


def _say_left_out(targets: Sequence[str]) -> None:
    if targets:
        _LOG.info("Left out, because the adapter was not trained for them: %s", ", ".join(targets))


def export_table(outcome: ExportOutcome) -> Table:
    """Table of the written outputs."""
    named = [
        name if name in (target, f"mtt::{target}") else f"{name} (target '{target}')"
        for name, target in outcome.outputs.items()
    ]
    facts = {
        "file": f"{size_text(outcome.path.stat().st_size)}, {_FORMATS[outcome.format]}",
        "outputs": ", ".join(named),
        "interaction range": f"{outcome.interaction_range:g} A".replace(
            "inf A", "the whole structure"
        ),
        "dtype": outcome.dtype,
        "checked": f"predictions are the checkpoint's, to {outcome.difference:.0e} of their size",
    }
    return facts_table(outcome.path, facts)


def _format(wanted: str | None, output: Path) -> str:
    """The format that is meant."""
    if wanted is None:
        return "metatrain" if output.suffix == ".ckpt" else "metatomic"
    if wanted not in _FORMATS:
        raise ConfigError(f"format: '{wanted}' is not one of {', '.join(_FORMATS)}.")
    if wanted == "metatrain" and output.suffix != ".ckpt":
        raise ConfigError(
            f"-o: metatrain takes only files that end with .ckpt for checkpoints; '{output}' does "
            f"not. Name it, e.g., {output.with_suffix('.ckpt')}."
        )
    return wanted


def check_output(output: str | os.PathLike[str], checkpoint: Path) -> Path:
    """Output path, checked to be writable and not to replace other data."""
    path = Path(output)
    if path.is_dir():
        raise ConfigError(f"-o: '{path}' is a folder. Name the file, e.g. {path / 'model.pt'}.")
    try:
        check_writable(path)
    except OSError as error:
        raise ConfigError(
            f"-o: '{path}' cannot be written ({error.filename}: {error.strerror}). Choose another "
            "place."
        ) from error
    if path.exists() and checkpoint.exists() and path.samefile(checkpoint):
        raise ConfigError(
            f"-o: '{path}' is the checkpoint itself, which the exported model would replace. "
            "Choose another name with -o: it holds what the exported one does not."
        )
    if path.exists() and not _is_export(path):
        raise ConfigError(
            f"-o: '{path}' is there and is no exported model, so it is not replaced. Choose "
            "another name with -o, or remove it."
        )
    return path


def _is_export(path: Path) -> bool:
    """Whether a file is TorchScript or a checkpoint of metatrain, not one of ours or other data."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return True
    try:
        with TorchArchive(path) as stored:
            return is_metatrain(stored.content())
    except CheckpointError:
        return False


def check_output_of_run(options: Options, output: Path) -> None:
    """Refuse the file of an export that cannot be made of what a run will give."""
    start = options.finetune.read_from
    check_output(output, Path() if start is None else find_model(start))
    if output.suffix == ".ckpt" and (options.is_committee or options.finetune.method == "prompt"):
        what = "committee" if options.is_committee else "prompts"
        raise ConfigError(
            f"-o: '{output}' would be a checkpoint of metatrain, whose PET has no {what}. Name a "
            f"metatomic file, e.g. {output.with_suffix('.pt')}, or the folder of the run."
        )


def _merged(
    model: Potential, adapter: Adapters | None, target: str | None, dtype: torch.dtype | None
) -> tuple[list[Potential], tuple[str, ...], float]:
    """Models without adapters, the targets of those that went into them, and a calibration.

    They are one, or the members of a committee.
    """
    folders = [adapter] if isinstance(adapter, (str, os.PathLike)) else list(adapter or ())
    of_run = len(folders) == 1 and (Path(folders[0]) / COMMITTEE_FILE).exists()
    if of_run or len(folders) > 1:
        chosen = folders[0] if of_run else folders
        members, energy, calibration = committee_members(model, chosen, target)
        return _sharing(list(members)), (energy,), calibration.energy
    if folders:
        load_adapter(model, os.fspath(folders[0]))
    if dtype is not None:  # before the sum of weights and adapter is rounded
        model.to(dtype)
    config = active_adapter(model)
    if config is None:
        return [model], (), 1.0
    return [merged_copy(model)], tuple(config.targets), 1.0


def _drop_stale(potentials: Sequence[Potential]) -> None:
    """Leave out last-layer uncertainties that do not hold, and those of the members' base."""
    first, *others = potentials
    known = {} if others else fresh(first)
    for potential in potentials:
        for target in [name for name in potential.uncertainties if name not in known]:
            del potential.uncertainties[target]


def _sharing(members: list[Potential]) -> list[Potential]:
    """Members that hold one tensor where they have the same weights."""
    first = members[0].network
    for member in members[1:]:
        for path, parameter in list(member.network.named_parameters()):
            shared = first.get_parameter(path)
            if torch.equal(shared, parameter):
                module, _, name = path.rpartition(".")
                setattr(member.network.get_submodule(module), name, shared)
    return members


def _energy(potential: Potential, wanted: str | None, of_adapter: Sequence[str]) -> str | None:
    """The target that engines get as their energy, if the choice is clear."""
    among = of_adapter or potential.targets
    energies = [name for name in among if potential.target(name).is_energy]
    if wanted is None and main_energy(energies) is None:
        if energies:
            _LOG.warning(
                "None of the energies %s is called 'energy': tell the engine which variant to use, "
                "or choose one with --target.", ", ".join(energies)
            )  # fmt: skip
        return None
    return potential.energy_target(wanted, of_adapter)


def _structures(potential: Potential) -> list[Structure]:
    """Structures to ask the model and the file about."""
    probe = probe_structures(potential.species)
    step = max(1, len(probe) // _STRUCTURES)
    numbers = torch.tensor(potential.species)
    # One atom of each element, none of which need to be neighbours in the probe set.
    positions = torch.randn(len(numbers), 3, generator=torch.Generator().manual_seed(0)) * 0.5
    positions[:, 0] += 1.5 * torch.arange(len(numbers))
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    row = Structure(
        0, "row", numbers, positions.double(), nothing, torch.zeros(3, dtype=torch.bool)
    )
    return [row, *probe[::step][:_STRUCTURES]]


def _card(potential: Potential, opened: Checkpoint, adapter: Adapters | None) -> dict[str, str]:
    """Provenance in the file, as text."""
    card: dict[str, Any] = {
        "source": opened.path.name,
        "fingerprint": weights_fingerprint(potential),
        "pet_finetune": __version__,
        "elements": " ".join(chemical_symbols[number] for number in potential.species),
        "provenance": json.dumps(opened.provenance, default=str),
    }
    if adapter is not None:
        given = [adapter] if isinstance(adapter, (str, os.PathLike)) else adapter
        card["adapter"] = ", ".join(Path(folder).name for folder in given)
    return card

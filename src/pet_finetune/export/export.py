"""Exporting a checkpoint for simulation engines."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from rich.table import Table

from pet_finetune.adapters import active_adapter, load_adapter, merged_copy
from pet_finetune.checkpoint import Checkpoint, load_checkpoint, weights_fingerprint
from pet_finetune.data.probe import probe_structures
from pet_finetune.data.structure import Structure
from pet_finetune.device import choose_dtype
from pet_finetune.errors import ConfigError
from pet_finetune.files import size_text
from pet_finetune.log import get_logger
from pet_finetune.model import Potential
from pet_finetune.version import __version__

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
        difference: the largest difference to the model found in predictions, relative to 1 plus
            the largest of them.
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


@torch.inference_mode(False)
def export_model(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
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
        adapter: an adapter folder to merge into it; then its target is the only output.
        target: the energy that engines get as ``energy``. Without it: the adapter's, else the only
            one there is, else ``energy``. For metatrain: the only target to write.
        dtype: ``float32`` or ``float64``; None for the model's own.
        name: of the model, in the file's metadata; None for the file's name.
        authors: for the metadata.

    Raises:
        ConfigError: an argument is not what it can be.
        CheckpointError: the checkpoint cannot be read, or the file not be written.
        AdapterError: the adapter cannot be read or belongs to another base.
    """
    wanted = choose_dtype(dtype)
    format = _format(format, Path(output))
    path = _output(Path(output), Path(checkpoint))
    opened = load_checkpoint(checkpoint)
    potential, of_adapter = _merged(opened.model, adapter)
    if wanted is not None:
        potential.to(wanted)
    card = _card(potential, opened, adapter)
    write = _write_metatrain if format == "metatrain" else _write_metatomic
    return write(path, potential, target, of_adapter, name or path.stem, authors, card)


def _write_metatomic(
    path: Path,
    potential: Potential,
    target: str | None,
    of_adapter: str | None,
    name: str,
    authors: Sequence[str],
    card: dict[str, str],
) -> ExportOutcome:
    """Write a model for engines."""
    from .check import ModelCheck
    from .targets import choose_outputs
    from .write import interaction_range, write_model

    energy = _energy(potential, target or of_adapter)
    outputs = choose_outputs(potential, energy, None if of_adapter is None else {of_adapter})
    _say_left_out([name for name in potential.targets if name not in outputs.values()])
    check = ModelCheck(potential, _structures(potential), outputs)
    reach, floating = interaction_range(potential), str(potential.dtype).removeprefix("torch.")
    with warnings.catch_warnings():
        # Of torch about TorchScript, which metatomic's format is made of.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        write_model(path, potential, outputs, name, authors, card, check)
    return ExportOutcome(path, outputs, reach, floating, check.difference)


def _write_metatrain(
    path: Path,
    potential: Potential,
    target: str | None,
    of_adapter: str | None,
    name: str,
    authors: Sequence[str],
    card: dict[str, str],
) -> ExportOutcome:
    """Write a model for metatrain, and read it back."""
    from pet_finetune.checkpoint.to_metatrain import save_metatrain

    from .check import ModelCheck
    from .write import interaction_range

    only = target or of_adapter
    if only is not None:
        others = [other for other in potential.targets if other != potential.target(only).name]
        for other in others:
            potential.remove_target(other)
        if target is None:
            _say_left_out(others)
    check = ModelCheck(
        potential, _structures(potential), {name: name for name in potential.targets}
    )
    written = save_metatrain(
        path, potential, name=name, authors=authors, card=card, check=check.read_back
    )
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
    """What was written, for people."""
    table = Table(title=str(outcome.path), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    named = [
        name if name in (target, f"mtt::{target}") else f"{name} (target '{target}')"
        for name, target in outcome.outputs.items()
    ]
    rows = {
        "file": f"{size_text(outcome.path.stat().st_size)}, {_FORMATS[outcome.format]}",
        "outputs": ", ".join(named),
        "interaction range": f"{outcome.interaction_range:g} A",
        "dtype": outcome.dtype,
        "checked": f"predictions are the checkpoint's, to {outcome.difference:.0e} of their size",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


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


def _output(path: Path, checkpoint: Path) -> Path:
    """Where to write, if that is possible and nothing to be sorry for."""
    if path.is_dir():
        raise ConfigError(f"-o: '{path}' is a folder. Name the file, e.g. {path / 'model.pt'}.")
    if path.exists() and checkpoint.exists() and path.samefile(checkpoint):
        raise ConfigError(
            f"-o: '{path}' is the checkpoint itself, which the exported model would replace. "
            "Choose another name with -o: it holds what the exported one does not."
        )
    return path


def _merged(
    model: Potential, adapter: str | os.PathLike[str] | None
) -> tuple[Potential, str | None]:
    """The model without adapters, and the target of the one that went into it, if any."""
    if adapter is not None:
        load_adapter(model, os.fspath(adapter))
    config = active_adapter(model)
    return (model, None) if config is None else (merged_copy(model), config.target)


def _energy(potential: Potential, wanted: str | None) -> str | None:
    """The target that engines get as their energy, if the model has one that stands out."""
    energies = [spec.name for spec in potential.targets.values() if spec.is_energy]
    if wanted is None and len(energies) != 1 and "energy" not in energies:
        if energies:
            _LOG.warning(
                "None of the energies %s is called 'energy': tell the engine which variant to use, "
                "or choose one with --target.", ", ".join(energies)
            )  # fmt: skip
        return None
    return potential.energy_target(wanted)


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


def _card(
    potential: Potential, opened: Checkpoint, adapter: str | os.PathLike[str] | None
) -> dict[str, str]:
    """What the file says of where it comes from, as text, which is all it can hold."""
    card: dict[str, Any] = {
        "source": opened.path.name,
        "fingerprint": weights_fingerprint(potential),
        "pet_finetune": __version__,
        "elements": " ".join(chemical_symbols[number] for number in potential.species),
        "provenance": json.dumps(opened.provenance, default=str),
    }
    if adapter is not None:
        card["adapter"] = Path(adapter).name
    return card

"""What is inside a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols
from rich.table import Table

from pet_finetune.config import ModelOptions
from pet_finetune.files import size_text

from . import load_checkpoint, weights_fingerprint

_SHOWN_BY_ITSELF = {"cutoff", "cutoff_function", "cutoff_width"}


def describe_checkpoint(path: str | Path) -> tuple[Table, ...]:
    """Tables with what a checkpoint holds: sizes, species, targets, cutoff, provenance.

    Raises:
        CheckpointError: the file cannot be read.
    """
    checkpoint = load_checkpoint(path)
    model = checkpoint.model
    size = Path(path).stat().st_size
    main = Table(title=str(path), title_justify="left", show_header=False)
    main.add_column(style="bold")
    main.add_column(overflow="fold")
    hypers = model.hypers
    rows = {
        "format": checkpoint.kind + (", can be resumed" if checkpoint.training else ""),
        "file": size_text(size),
        "parameters": f"{model.num_parameters():,} ({str(model.dtype).removeprefix('torch.')})",
        "species": " ".join(chemical_symbols[number] for number in model.species),
        "cutoff": f"{hypers.cutoff} A ({hypers.cutoff_function}, {hypers.cutoff_width} A wide)",
        "network": _changed(hypers),
        "fingerprint": weights_fingerprint(model),
    }
    for name, value in rows.items():
        main.add_row(name, value)
    targets = Table(title="targets", title_justify="left")
    for name in ("name", "form", "quantity", "unit", "scale", "description"):
        targets.add_column(name)
    for spec in model.targets.values():
        scale = f"{float(model.scale.get(spec.name)):.6g}"
        targets.add_row(spec.name, spec.form, spec.quantity, spec.unit, scale, spec.description)
    return main, targets, _baselines(checkpoint.model), _provenance(checkpoint.provenance)


def _changed(hypers: ModelOptions) -> str:
    """The hyperparameters: sizes always, others where they are not the default."""
    sizes = ("d_pet", "d_node", "d_head", "d_feedforward", "num_heads", "num_gnn_layers",
             "num_attention_layers")  # fmt: skip
    parts = [f"{name} {getattr(hypers, name)}" for name in sizes]
    default = ModelOptions()
    for name in type(hypers).model_fields:
        value = getattr(hypers, name)
        if name not in sizes and name not in _SHOWN_BY_ITSELF and value != getattr(default, name):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def _baselines(model: Any) -> Table:
    table = Table(title="baseline per species", title_justify="left")
    table.add_column("element")
    scalars = [spec for spec in model.targets.values() if spec.rank == 0]
    for spec in scalars:
        unit = f" ({spec.unit})" if spec.unit else ""
        for index in range(spec.num_subtargets):
            number = f" [{index}]" if spec.num_subtargets > 1 else ""
            table.add_column(f"{spec.name}{number}{unit}", justify="right")
    for index, number in enumerate(model.species):
        values: list[str] = []
        for spec in scalars:
            row = model.composition.get(spec.name)[index].reshape(-1).expand(spec.num_subtargets)
            values += [f"{value:.4f}" for value in row.tolist()]
        table.add_row(chemical_symbols[number], *values)
    return table


def _provenance(provenance: Mapping[str, Any]) -> Table:
    table = Table(title="provenance", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _flat(provenance) or [("parent", "not recorded in the file")]:
        table.add_row(name, value)
    return table


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows; the options of the run are only counted, as they fill pages."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if name == "options" and isinstance(value, Mapping):
            method = value.get("architecture", {}).get("training", {}).get("finetune", {})
            rows.append((f"{prefix}method", str(method.get("method", ""))))
        elif isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None and value != "":
            rows.append((f"{prefix}{name}", str(value)))
    return rows

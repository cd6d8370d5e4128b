"""What is inside a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols
from rich.markup import escape
from rich.table import Table

from pet_finetune.committee.llpr import fresh
from pet_finetune.config.run_options import ModelOptions
from pet_finetune.files import size_text
from pet_finetune.model.fingerprint import weights_fingerprint
from pet_finetune.model.potential import Potential

from .opening import load_checkpoint

#: A screen of 40 lines has room for as many trainings with a note, in lines of 80 characters.
_GENERATIONS, _WIDTH = 12, 78
#: Of the table of baselines: so many rows and, where there are more elements, columns.
_ROWS, _COLUMNS = 24, 6

_SHOWN_BY_ITSELF = {"cutoff", "cutoff_function", "cutoff_width"}


def describe_checkpoint(path: str | Path) -> tuple[Table, ...]:
    """Tables with what a checkpoint holds: sizes, species, targets, cutoff, provenance.

    Raises:
        CheckpointError: the file cannot be read.
    """
    checkpoint = load_checkpoint(path)
    model = checkpoint.model
    size = checkpoint.path.stat().st_size
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
    if model.uncertainties:
        rows["uncertainty"] = "; ".join(
            f"{target} (last layer, {facts['members'] or 'no'} members)"
            for target, facts in _uncertainties(model).items()
        )
    for name, value in rows.items():
        main.add_row(name, value)
    targets = Table(title="targets", title_justify="left")
    for name in ("name", "form", "quantity", "unit", "scale", "description"):
        targets.add_column(name)
    for spec in model.targets.values():
        scale = f"{float(model.scale.get(spec.name)):.6g}"
        targets.add_row(spec.name, spec.form, spec.quantity, spec.unit, scale, spec.description)
    return main, targets, _baselines(checkpoint.model), _family(checkpoint.provenance)


def _uncertainties(model: Potential) -> dict[str, dict[str, Any]]:
    """What last-layer uncertainties (LLPR) there are, by target."""
    return {
        target: {"kind": "llpr", "factor": float(layer.multiplier), "members": layer.num_members}
        for target, layer in fresh(model).items()
    }


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
    """The energies of the elements; those of a universal model side by side."""
    table = Table(title="baseline per species", title_justify="left")
    headings = ["element"]
    scalars = [spec for spec in model.targets.values() if spec.rank == 0]
    for spec in scalars:
        unit = f" ({spec.unit})" if spec.unit else ""
        for index in range(spec.num_subtargets):
            number = f" [{index}]" if spec.num_subtargets > 1 else ""
            headings.append(f"{spec.name}{number}{unit}")
    cells = []
    for index, number in enumerate(model.species):
        values = [chemical_symbols[number]]
        for spec in scalars:
            row = model.composition.get(spec.name)[index].reshape(-1).expand(spec.num_subtargets)
            values += [f"{value:.4f}" for value in row.tolist()]
        cells.append(values)
    aside = max(1, min(-(-len(cells) // _ROWS), _COLUMNS // len(headings)))
    rows = -(-len(cells) // aside)
    for heading in headings * aside:
        table.add_column(heading, justify="left" if heading == headings[0] else "right")
    for first in range(rows):
        table.add_row(*(value for some in cells[first::rows] for value in some))
    return table


def _family(provenance: Mapping[str, Any]) -> Table:
    """The training that made the file and, below it, that of its ancestors; a line or two each."""
    table = Table(title="family tree", title_justify="left", show_header=False, box=None)
    table.add_column(overflow="fold")
    generations: list[Mapping[str, Any]] = [provenance]
    while isinstance(parent := generations[-1].get("parent_provenance"), Mapping) and parent:
        generations.append(parent)
    for depth, own in enumerate(generations[:_GENERATIONS]):
        indent = "  " * depth
        name = "this file" if depth == 0 else str(generations[depth - 1].get("parent") or "unnamed")
        table.add_row(escape(f"{indent}{'└ ' if depth else ''}{name}: {_training(own)}"))
        if own.get("note"):
            room = _WIDTH - len(indent) - 2
            note = " ".join(str(own["note"]).split())
            shown = note if len(note) <= room else note[: room - 1] + "…"
            table.add_row(escape(f"{indent}  {shown}"))
    hidden = len(generations) - _GENERATIONS
    if hidden > 0:
        table.add_row(f"and {hidden} earlier ones (--json lists all)")
    elif generations[-1].get("parent"):
        last, mark = generations[-1], str(generations[-1].get("parent_fingerprint") or "")[:12]
        indent = "  " * len(generations)
        table.add_row(escape(f"{indent}└ {last['parent']}{f' ({mark})' if mark else ''}"))
    return table


def _training(own: Mapping[str, Any]) -> str:
    """How one model was trained, in a few words."""
    options = own.get("options")
    parts = []
    if isinstance(options, Mapping):
        method = options.get("architecture", {}).get("training", {}).get("finetune", {})
        parts.append(str(method.get("method") or "") if isinstance(method, Mapping) else "")
    if isinstance(own.get("adapter"), str):
        parts.append(f"adapter {own['adapter']}")
    data = own.get("data")
    train = data.get("train") if isinstance(data, Mapping) else None
    if isinstance(train, Mapping) and isinstance(train.get("structures"), int):
        parts.append(f"{train['structures']:,} structures")
    if own.get("epoch") is not None:
        parts.append(f"epoch {own['epoch']}")
    if own.get("new_elements"):
        parts.append(f"new elements {' '.join(map(str, own['new_elements']))}")
    if own.get("format") == "metatrain":
        parts.append(f"metatrain, model format {own.get('format_version')}")
        metadata = own.get("metadata")
        parts.append(str(metadata.get("name") or "") if isinstance(metadata, Mapping) else "")
    parts.append(str(own.get("written") or "")[:10])
    return ", ".join(part for part in parts if part) or "not recorded in the file"


def checkpoint_facts(path: str | Path) -> dict[str, Any]:
    """All that a checkpoint holds beside its weights, as plain values for JSON.

    Raises:
        CheckpointError: the file cannot be read.
    """
    checkpoint = load_checkpoint(path)
    model = checkpoint.model
    return {
        "file": str(path),
        "format": checkpoint.kind,
        "can_be_resumed": checkpoint.training is not None,
        "bytes": Path(path).stat().st_size,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "species": [chemical_symbols[number] for number in model.species],
        "hypers": model.hypers.model_dump(),
        "fingerprint": weights_fingerprint(model),
        "targets": {name: asdict(spec) for name, spec in model.targets.items()},
        "scale": {name: float(model.scale.get(name)) for name in model.targets},
        "baselines": {name: model.composition.get(name).tolist() for name in model.targets},
        "uncertainties": _uncertainties(model),
        "provenance": checkpoint.provenance,
    }

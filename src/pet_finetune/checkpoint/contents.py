"""Contents of checkpoints and adapter folders; checking, merging and combining adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from rich.table import Table

from pet_finetune.adapters.at_rest import Adapter, install
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.adapters.combine import combine
from pet_finetune.adapters.inject import lora_layers, merged_copy
from pet_finetune.adapters.peft_files import read_adapter, write_adapter
from pet_finetune.committee.llpr import fresh
from pet_finetune.config.run_options import ModelOptions
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.errors import AdapterError
from pet_finetune.files import size_text
from pet_finetune.model.potential import Potential
from pet_finetune.terminal import facts_table

from .native import save_checkpoint
from .opening import load_checkpoint

#: A screen of 40 lines has room for as many trainings with a note, in lines of 80 characters.
_GENERATIONS, _WIDTH = 12, 78
#: Of the table of baselines: so many rows and, where there are more elements, columns.
_ROWS, _COLUMNS = 24, 6

_SHOWN_BY_ITSELF = {"cutoff", "cutoff_function", "cutoff_width"}


def describe_checkpoint(path: str | Path) -> tuple[Table, ...]:
    """Tables with what a checkpoint holds: sizes, species, targets, cutoff, provenance."""
    checkpoint = load_checkpoint(path)
    model = checkpoint.model
    size = checkpoint.path.stat().st_size
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
    headings = ("name", "form", "quantity", "unit", "scale", "description")
    targets = Table(*headings, title="targets", title_justify="left")
    for spec in model.targets.values():
        scale = f"{float(model.scale.get(spec.name)):.6g}"
        targets.add_row(spec.name, spec.form, spec.quantity, spec.unit, scale, spec.description)
    return (
        facts_table(path, rows),
        targets,
        _baselines(checkpoint.model),
        _family(checkpoint.provenance),
    )


def _uncertainties(model: Potential) -> dict[str, dict[str, Any]]:
    """Last-layer uncertainties (LLPR) by target."""
    return {
        target: {"kind": "llpr", "factor": float(layer.multiplier), "members": layer.num_members}
        for target, layer in fresh(model).items()
    }


def _changed(hypers: ModelOptions) -> str:
    """Hyperparameters: all sizes, and others that differ from the default."""
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
    """Energies of the elements, in columns for a universal model."""
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
        table.add_row(f"{indent}{'└ ' if depth else ''}{name}: {_training(own)}")
        if own.get("note"):
            room = _WIDTH - len(indent) - 2
            note = " ".join(str(own["note"]).split())
            shown = note if len(note) <= room else note[: room - 1] + "…"
            table.add_row(f"{indent}  {shown}")
    hidden = len(generations) - _GENERATIONS
    if hidden > 0:
        table.add_row(f"and {hidden} earlier ones (--json lists all)")
    elif generations[-1].get("parent"):
        last, mark = generations[-1], str(generations[-1].get("parent_fingerprint") or "")[:12]
        indent = "  " * len(generations)
        table.add_row(f"{indent}└ {last['parent']}{f' ({mark})' if mark else ''}")
    return table


def _training(own: Mapping[str, Any]) -> str:
    """Short description of the training of one model."""
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
    """Everything in a checkpoint except its weights, as plain values for JSON."""
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


# An update larger than the weight it adapts has forgotten it.
_LARGE = 1.0


@dataclass(frozen=True)
class AdapterFinding:
    """One result of a check.

    Attributes:
        folder: of the adapter.
        sound: False where the adapter cannot be used as it is.
        text: what was found.
    """

    folder: str
    sound: bool
    text: str


def describe_adapter(directory: str | Path) -> Table:
    """A table of what an adapter folder holds."""
    adapter = read_adapter(directory)
    config = adapter.config
    endings = sorted({".".join(path.split(".")[-2:]) for path in config.target_modules})
    size = sum(path.stat().st_size for path in Path(directory).iterdir())
    of_updates = {
        "rank, alpha": f"{config.rank}, {config.alpha:g}" + _patterns(adapter),
        "dropout": f"{config.dropout:g}",
        "layers": f"{len(config.target_modules)}: {', '.join(endings)}",
    }
    rows = {
        "method": _method(adapter),
        **({} if config.num_prompts else of_updates),
        "trained whole": ", ".join(config.modules_to_save or ()) or "nothing",
        "parameters": f"{adapter.num_parameters:,}",
        "size": size_text(size),
        "base": f"{adapter.base_name or 'unnamed'} ({adapter.fingerprint or 'not recorded'})",
        "targets": ", ".join(t.spec.name for t in adapter.targets) or "not recorded",
    }
    return facts_table(directory, rows)


def _method(adapter: Adapter) -> str:
    config = adapter.config
    if config.num_prompts:
        return f"prompts, {config.num_prompts} tokens in each attention layer"
    name = "DoRA" if config.use_dora else "LoRA"
    return f"rank-stabilised {name}" if config.use_rslora else name


def _patterns(adapter: Adapter) -> str:
    config = adapter.config
    parts = [f"{key}: rank {rank}" for key, rank in config.rank_pattern.items()]
    parts += [f"{key}: alpha {alpha:g}" for key, alpha in config.alpha_pattern.items()]
    return f" ({'; '.join(parts)})" if parts else ""


def merge_adapter(directory: str | Path, checkpoint: str | Path, output: str | Path) -> Path:
    """Write base and adapter as one plain checkpoint.

    Args:
        directory: the adapter folder.
        checkpoint: its base.
        output: the new checkpoint; a file that exists is left alone.

    Raises:
        AdapterError: the adapter cannot be read, belongs to another base, or ``output`` exists.
        CheckpointError: the base cannot be read, or the new file not be written.
    """
    if Path(output).exists():
        raise AdapterError(f"'{output}' exists already. Choose another name with -o.")
    adapter = read_adapter(directory)
    base = load_checkpoint(checkpoint)
    install(base.model, adapter)
    provenance = {
        "parent": base.path.stem,
        "parent_fingerprint": adapter.fingerprint,
        "parent_provenance": base.provenance,
        "adapter": str(directory),
    }
    return save_checkpoint(output, merged_copy(base.model), provenance=provenance)


def combine_adapters(
    directories: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    combination: str = "cat",
    rank: int | None = None,
    checkpoint: str | Path | None = None,
) -> Path:
    """Blend adapter folders into a new one.

    Args:
        directories: at least one.
        output: the new folder; one that holds an adapter is left alone.
        weights: one for each; equal ones that sum to 1 when left out.
        combination: as for :func:`pet_finetune.adapters.combine`.
        rank: likewise.
        checkpoint: the base; needed where the weights do not sum to 1.

    Raises:
        AdapterError: the adapters cannot be read or do not go together, the number of weights is
            another, or ``output`` holds an adapter.
    """
    weights = [1.0 / len(directories)] * len(directories) if weights is None else list(weights)
    if len(weights) != len(directories):
        raise AdapterError(
            f"{len(directories)} adapters and {len(weights)} weights: give one weight for each."
        )
    if Path(output).is_dir() and any(Path(output).iterdir()):
        raise AdapterError(f"'{output}' is not empty. Choose another folder with -o.")
    parts = list(zip(map(read_adapter, directories), weights, strict=True))
    base = None if checkpoint is None else load_checkpoint(checkpoint).model
    mixed = combine(parts, combination, rank=rank, base=base, name=str(output))
    return write_adapter(mixed, output)


def check_adapters(
    directories: Sequence[str | Path], checkpoint: str | Path | None = None
) -> list[AdapterFinding]:
    """Check adapter folders alone, with their base (if given), and with each other.

    Raises:
        CheckpointError: the base cannot be read.
    """
    base = None if checkpoint is None else load_checkpoint(checkpoint).model
    findings, sound = [], []
    for directory in directories:
        try:
            adapter = read_adapter(directory)
            found = list(_check_alone(adapter))
            if base is not None:
                found += _check_on_base(adapter, base)
        except AdapterError as error:
            found = [AdapterFinding(str(directory), False, str(error))]
        else:
            sound.append(adapter)
        findings += found
    if len(sound) > 1:
        findings.append(_check_blend(sound, base))
    return findings


def _check_alone(adapter: Adapter) -> Iterator[AdapterFinding]:
    wrong = [name for name, value in adapter.tensors.items() if not bool(value.isfinite().all())]
    if wrong:
        text = f"{len(wrong)} tensors hold numbers that are not finite, such as {wrong[0]}."
        yield AdapterFinding(adapter.name, False, text)
        return
    text = f"{len(adapter.tensors)} tensors, {adapter.num_parameters:,} numbers, all finite"
    yield AdapterFinding(adapter.name, True, text)
    factors = {n: t for n, t in adapter.tensors.items() if n.endswith(".lora_B")}
    if factors and not any(t.any() for t in factors.values()):
        yield AdapterFinding(
            adapter.name, True, "the update is zero: the adapter was never trained"
        )


def _check_on_base(adapter: Adapter, base: Potential) -> Iterator[AdapterFinding]:
    """Check an adapter on its base: names and shapes, size of the update, finite predictions."""
    model = merged_copy(base)
    config = install(model, adapter)
    yield AdapterFinding(adapter.name, True, f"fits the base ({weights_fingerprint(base)[:12]})")
    with torch.no_grad():
        ratios = {
            path: float((layer.updated_weight() - layer.weight).norm() / layer.weight.norm())
            for path, layer in lora_layers(model)
        }
    if ratios:
        path, largest = max(ratios.items(), key=lambda item: item[1])
        text = f"largest update: {100 * largest:.1f} % of the weight of {path}"
        text += " (more than the weight itself: look at its errors)" if largest > _LARGE else ""
        yield AdapterFinding(adapter.name, True, text)
    pairs = [Atoms([z, z], [[0, 0, 0], [0, 0, 2.2 * covalent_radii[z]]]) for z in model.species]
    batch = batch_from_atoms(pairs, model.cutoff, model.dtype)
    wanted = {name: (model.target(name).is_energy, False) for name in config.targets}
    for name, found in model.predict_targets(batch, wanted).items():
        values = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
        finite = all(bool(value.isfinite().all()) for value in values)
        kinds = f"'{name}' and its forces" if wanted[name][0] else f"'{name}'"
        text = f"{kinds} of a pair of atoms of each element: {'' if finite else 'not '}finite"
        yield AdapterFinding(adapter.name, finite, text)


def _check_blend(adapters: Sequence[Adapter], base: Potential | None) -> AdapterFinding:
    """In which ways the adapters can be combined."""
    possible, reason = [], ""
    weight = 1.0 / len(adapters)
    for combination in ("cat", "svd", "linear"):
        try:
            combine([(adapter, weight) for adapter in adapters], combination, base=base)
            possible.append(combination)
        except AdapterError as error:
            reason = str(error)
    text = f"can be combined by {', '.join(possible)}. " if possible else ""
    return AdapterFinding("together", True, (text + reason).strip())

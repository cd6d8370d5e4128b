"""Errors of a finished model on labelled structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pet_finetune import kernels
from pet_finetune.checkpoint import open_potential
from pet_finetune.config import DatasetOptions, Options
from pet_finetune.config.load import parse_options
from pet_finetune.data.charges import check_charges
from pet_finetune.data.loader import Loader
from pet_finetune.data.readers import read_structures
from pet_finetune.data.species import check_species
from pet_finetune.data.splits import make_splits
from pet_finetune.data.structure import Structure
from pet_finetune.device import choose_device
from pet_finetune.errors import ConfigError, DataError, did_you_mean
from pet_finetune.keys import TargetSpec, direct_quantity, forces_key, stress_key
from pet_finetune.log import get_logger
from pet_finetune.model import Potential
from pet_finetune.report.tables import error_table, show
from pet_finetune.training import Metrics, Spread, evaluate, rotational_spread

_logger = get_logger(__name__)
_BATCH = 32  # structures


@dataclass(frozen=True)
class EvaluationResult:
    """Errors by data set and target; where asked for, also what turning changes."""

    errors: dict[str, dict[str, Metrics]]
    spreads: dict[str, dict[str, Spread]] = field(default_factory=dict)


def _open(
    checkpoint: str | Path, adapter: str | Path | None, device: str
) -> tuple[Potential, str | None]:
    """A model ready to predict, and the target of its adapter."""
    model, target = open_potential(checkpoint, adapter)
    chosen = choose_device(device)
    kernels.prepare(chosen)
    return model.to(chosen).eval(), target


def evaluate_files(
    checkpoint: str | Path,
    files: Sequence[str | Path],
    *,
    adapter: str | Path | None = None,
    target: str | None = None,
    device: str = "auto",
    rotations: int = 0,
) -> EvaluationResult:
    """Errors on whole files with energies, forces and stresses under ASE's names.

    Values of a target that is no energy are looked for under its name.

    Args:
        checkpoint: ours or metatrain's.
        files: anything ASE reads, in eV and Angstrom.
        adapter: folder of an adapter of this checkpoint.
        target: which target of the model is compared; None for the adapter's, or the only energy.
        device: as in the options.
        rotations: in how many random orientations energies and forces are compared with each
            other; none with 0.
    """
    model, adapted = _open(checkpoint, adapter, device)
    spec = _chosen(model, target or adapted)
    sets = {}
    for file in files:
        options = _file_options(file, spec)
        sets[str(file)] = read_structures(options)
    return _evaluate(model, sets, [spec.name], rotations)


def _chosen(model: Potential, wanted: str | None) -> TargetSpec:
    """The target that is meant: any that is named, else the energy, else the only one."""
    if wanted is None and len(model.targets) == 1:
        wanted = next(iter(model.targets))
    if wanted is None or model.target(wanted).is_energy:
        wanted = model.energy_target(wanted)
    return model.target(wanted)


def evaluate_options(
    options: Options,
    checkpoint: str | Path,
    *,
    adapter: str | Path | None = None,
    target: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    rotations: int = 0,
) -> EvaluationResult:
    """Errors on the validation and test sets of an options file, or on the training set.

    The sets are drawn with the options' seed; a run's own sets are evaluated by giving the
    ``options.yaml`` of its folder, which names the seed.

    Args:
        options: checked options.
        checkpoint: ours or metatrain's.
        adapter: folder of an adapter of this checkpoint.
        target: the one target to compare; None for all that options and model share.
        device: instead of that of the options.
        seed: used where the options name none.
        rotations: as for :func:`evaluate_files`.
    """
    specs = options.target_specs()
    if target is not None and target not in specs:
        raise ConfigError(
            f"training_set.targets has no '{target}'.{did_you_mean(target, specs)} "
            f"Targets: {', '.join(specs)}."
        )
    model, _ = _open(checkpoint, adapter, device or options.device)
    targets = [name for name in specs if name in model.targets and target in (None, name)]
    if not targets:
        model.target(target or next(iter(specs)))  # says what the model has
    if options.seed is None and seed is None:
        _logger.warning("no seed in the options: sets drawn by fraction are not those of training")
    splits = make_splits(options, options.seed if options.seed is not None else seed or 0)
    sets = {"validation": splits.validation, "test": splits.test}
    sets = {name: structures for name, structures in sets.items() if structures}
    return _evaluate(model, sets or {"train": splits.train}, targets, rotations)


#: ASE's names of what the quantity of a direct prediction is.
_ASE_NAMES = {"force": "forces", "pressure": "stress"}


def _file_options(file: str | Path, spec: TargetSpec) -> DatasetOptions:
    """Options that read one target from a file in the package's units."""
    name, direct = spec.name, direct_quantity(spec.name)
    target = {
        "quantity": spec.quantity,
        "key": "energy" if spec.is_energy else _ASE_NAMES[direct] if direct else name,
        "unit": spec.unit,
        "sample_kind": "atom" if spec.per_atom else "system",
        "type": {"cartesian": {"rank": spec.rank}} if spec.rank else "scalar",
        "num_subtargets": spec.num_subtargets,
    }
    section = {"systems": {"read_from": str(file)}, "targets": {name: target}}
    return parse_options({"training_set": section}, require_start=False).options.training_set[0]


def _evaluate(
    model: Potential, sets: Mapping[str, Sequence[Structure]], targets: list[str], rotations: int
) -> EvaluationResult:
    if rotations == 1 or rotations < 0:
        raise ConfigError(
            f"rotations: {rotations} orientations are nothing to compare. Give 2 or more."
        )
    errors, spreads = {}, {}
    for name, structures in sets.items():
        if not structures:
            raise DataError(f"'{name}' holds no structures.")
        check_species(structures, model.species)
        if model.hypers.system_conditioning:
            check_charges(structures, model.hypers.max_charge, model.hypers.max_spin_multiplicity)
        loader = Loader(structures, model.cutoff, batch_size=_BATCH, dtype=model.dtype)
        wanted = {
            t: (forces_key(t) in loader.label_names, stress_key(t) in loader.label_names)
            for t in targets
        }
        errors[name] = evaluate(model, loader, wanted)
        if rotations:
            energies = [t for t in targets if model.targets[t].is_energy]
            spreads[name] = {t: rotational_spread(model, loader, t, rotations) for t in energies}
        title = f"{name} ({len(structures)} structures)"
        show(error_table({"": {"error": errors[name]}}, title=title))
        for target, spread in spreads.get(name, {}).items():
            _logger.info("%s", _spread_text(rotations, target, spread, errors[name][target]))
    return EvaluationResult(errors, spreads)


def _spread_text(rotations: int, target: str, spread: Spread, errors: Metrics) -> str:
    error = errors.mae("forces")
    share = f" ({100 * spread.forces / error:.0f} % of their MAE)" if error > 0 else ""
    return (
        f"{rotations} random orientations: {target} {1000 * spread.energy:.2f} meV/atom, forces "
        f"{1000 * spread.forces:.2f} meV/A{share} from the mean over them"
    )

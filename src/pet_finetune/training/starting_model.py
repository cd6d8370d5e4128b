"""The model that a run starts from: which parameters train, its energies before they change."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols
from torch import Tensor
from torch.nn import ModuleDict

from pet_finetune.adapters.adapter_config import AdapterConfig, default_modules_to_save
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.adapters.inject import freeze, inject
from pet_finetune.adapters.layers import train_new_rows
from pet_finetune.checkpoint.legacy_state_dict import load_oldest_start
from pet_finetune.checkpoint.opening import load_checkpoint, load_numbers
from pet_finetune.checkpoint.stored_targets import StoredTarget
from pet_finetune.config.finetune import METHOD_KEYS
from pet_finetune.config.run_options import Options
from pet_finetune.data.loader import Loader
from pet_finetune.data.splits import Splits
from pet_finetune.data.structure_sets import find_species, joined
from pet_finetune.errors import ConfigError, did_you_mean
from pet_finetune.keys import TargetSpec
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential

from .extend import add_new_elements, add_targets
from .step import difference_text

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Start:
    """A model about to be trained.

    Attributes:
        model: with heads for every target of the options.
        name: what it is called, in adapter files and logs.
        fingerprint: of its weights as they were read; None from scratch.
        provenance: what its file says of itself.
        fresh: targets whose heads are new and random.
        inherited: new targets and those whose heads they started from.
        new_species: elements that were added, and those that they start from (None: random).
    """

    model: Potential
    name: str
    fingerprint: str | None
    provenance: dict[str, Any]
    fresh: tuple[str, ...]
    inherited: dict[str, str]
    new_species: dict[int, int | None] = field(default_factory=dict)


def start_model(options: Options, splits: Splits) -> Start:
    """Read or make the model that the options start from.

    Raises:
        ConfigError: targets that cannot be trained or inherited.
        CheckpointError: the checkpoint cannot be read.
    """
    specs = options.target_specs()
    if options.is_finetuning:
        model, name, provenance = read_start(options)
        fingerprint = weights_fingerprint(model)
        if model.uncertainties:
            model.uncertainties.clear()
            _logger.info(
                "the last-layer uncertainty (LLPR) of '%s' does not hold for new weights and is "
                "left out; finetune.llpr: true makes one for them",
                name,
            )
        new_species = add_new_elements(model, options, splits)
        fresh, inherited = add_targets(model, specs, options.finetune.inherit_heads)
        return Start(model, name, fingerprint, provenance, fresh, inherited, new_species)
    structures = joined([splits.train, splits.validation, splits.test])
    species = options.architecture.atomic_types or find_species(structures)
    model = Potential(options.model, species, specs.values())
    _logger.info(
        "a new model for %s", ", ".join(chemical_symbols[number] for number in model.species)
    )
    return Start(model, "scratch", None, {}, tuple(specs), {})


def read_start(options: Options) -> tuple[Potential, str, dict[str, Any]]:
    """The model that the options name to start from, what it is called, and its provenance."""
    finetune, legacy = options.finetune, options.finetune.legacy_start
    if finetune.read_from is not None:
        checkpoint = load_checkpoint(finetune.read_from)
        return checkpoint.model, checkpoint.path.stem, checkpoint.provenance
    assert legacy is not None, "training from scratch starts from no model"
    model = load_oldest_start(
        legacy.model, legacy.all_species, legacy.self_contributions, options.model
    )
    return model, Path(legacy.model).stem, {}


def with_stated_numbers(options: Options) -> Options:
    """Options with the numbers of the files that ``atomic_baseline`` and the scales name.

    Raises:
        ConfigError: a file has not all that the targets need.
        CheckpointError: it cannot be read.
    """
    training = options.training
    numbers: dict[str, Any] = {}
    if isinstance(training.atomic_baseline, str):
        path = training.atomic_baseline
        species, known = load_numbers(path)
        scalars = {n: spec for n, spec in options.target_specs().items() if spec.rank == 0}
        found = _in_file("atomic_baseline", path, scalars, known)
        numbers["atomic_baseline"] = {
            name: dict(zip(species, stored.composition.tolist(), strict=True))
            for name, stored in found.items()
            if stored.composition is not None and stored.composition.dim() == 1
        }
        _all_there("atomic_baseline", path, scalars, numbers, "one baseline for each element")
    if isinstance(training.fixed_scaling_weights, str):
        path, specs = training.fixed_scaling_weights, options.target_specs()
        found = _in_file("fixed_scaling_weights", path, specs, load_numbers(path)[1])
        numbers["fixed_scaling_weights"] = {
            name: stored.scale for name, stored in found.items() if stored.relative is None
        }
        _all_there("fixed_scaling_weights", path, specs, numbers, "one scale for all elements")
    return options.with_training(**numbers)


def _in_file(
    option: str, path: str, specs: Mapping[str, TargetSpec], known: Sequence[StoredTarget]
) -> dict[str, StoredTarget]:
    """Values of the targets in a file, each with the same meaning there."""
    there = {stored.spec.name: stored for stored in known}
    for name, spec in specs.items():
        other = there[name].spec if name in there else spec
        if (other.form, other.unit) != (spec.form, spec.unit):
            raise ConfigError(
                f"architecture.training.{option}: '{name}' is {spec.form} in "
                f"{spec.unit or 'no unit'}, but {other.form} in {other.unit or 'no unit'} in "
                f"'{path}'. Give numbers instead."
            )
    return {name: there[name] for name in specs if name in there}


def _all_there(
    option: str,
    path: str,
    specs: Mapping[str, TargetSpec],
    numbers: Mapping[str, Mapping[str, Any]],
    what: str,
) -> None:
    """Make sure that each target has its numbers."""
    missing = [name for name in specs if name not in numbers[option]]
    if missing:
        raise ConfigError(
            f"architecture.training.{option}: '{path}' has not {what} for {', '.join(missing)}; "
            f"it has for {', '.join(numbers[option]) or 'no target of this run'}. Give numbers "
            "instead: {target: number}."
        )


def check_targets(options: Options) -> None:
    """Make sure, before any file is read, that the targets have names that the network can have."""
    for name in options.target_specs():
        if "." in name or hasattr(ModuleDict(), name):
            raise ConfigError(
                f"training_set.targets: a target cannot be called '{name}', because parts of the "
                "network are named after it and torch has no such names. Use letters, digits, "
                "_, - and /; the name in the file is given with `key`."
            )


def choose_trainable(start: Start, options: Options, keep: Collection[str] = ()) -> None:
    """Inject adapters or freeze, as ``finetune.method`` says.

    Heads of targets that are not trained go where the features under them change: they would
    predict nonsense. Those in ``keep`` stay: they are replayed.
    """
    model, finetune = start.model, options.finetune
    targets = list(options.target_specs())
    method = finetune.method if options.is_finetuning else "full"
    if method == "heads":
        _freeze_heads(start, options, targets)
        return
    for stale in [name for name in model.targets if name not in (*targets, *keep)]:
        model.remove_target(stale)
        _logger.info("target '%s' is not trained and is dropped from the new model", stale)
    if method == "full":
        freeze(model, train=None)
        return
    # How fast its factors learn is the optimiser's concern.
    settings = finetune.config.model_dump(include=set(METHOD_KEYS[method]) - {"loraplus_lr_ratio"})
    if settings.get("target_modules") == ("all-linear",):
        settings["target_modules"] = "all-linear"
    inject(
        model,
        AdapterConfig(**settings, targets=targets),
        fingerprint=start.fingerprint,
        inherited=start.inherited,
        brought_targets=[*start.fresh, *start.inherited],
        brought_species=tuple(start.new_species),
    )


def _freeze_heads(start: Start, options: Options, targets: list[str]) -> None:
    config = options.finetune.config
    if config.head_modules is None and config.last_layer_modules is None:
        network = start.model.network
        freeze(start.model, [p for t in targets for p in default_modules_to_save(network, t)])
    else:
        named = [*(config.head_modules or ()), *(config.last_layer_modules or ())]
        freeze(start.model, [name.removeprefix("backend.") for name in named])
    train_new_rows(start.model, list(start.new_species))


@contextmanager
def rounding_told(options: Options, model: Potential, loader: Loader) -> Iterator[None]:
    """Log what happens to the predictions on the first batch within this context.

    Does nothing unless ``finetune.config.quant_bits`` is given, or where no energy is trained.
    """
    bits = options.finetune.config.quant_bits
    energies = [name for name in options.target_specs() if model.target(name).is_energy]
    if bits is None or not options.is_finetuning or not energies:
        yield
        return
    batch = next(iter(loader.view())).graph.to(model.device)
    before = model.predict(batch, energies[0])
    yield
    _logger.info(
        "holding the frozen weights in %d bits changes the predictions of the first batch: %s",
        bits,
        difference_text(model.predict(batch, energies[0]), before, batch),
    )


@dataclass(frozen=True)
class FoundationEnergies:
    """The starting model's energies, before heads go and baselines move.

    Attributes:
        species: atomic numbers it knows, without those that were added to it.
        energies: those it predicts itself.
        sources: for each trained energy that began with a head of the foundation, which one.
        baselines: of all its energies and those in ``sources``, [n_species], eV.
    """

    species: tuple[int, ...]
    energies: tuple[str, ...]
    sources: dict[str, str]
    baselines: dict[str, Tensor]

    def heads_of(self, source: str) -> list[str]:
        """The trained energies that began with the head of ``source``."""
        return [target for target, own in self.sources.items() if own == source]

    def shift(self, model: Potential, target: str) -> Tensor:
        """By how much the baseline of an energy has moved since, [n_species], eV."""
        return model.composition.get(target).cpu() - self.baselines[target]


def foundation_of(start: Start, options: Options) -> FoundationEnergies:
    """Note what has to be known later; call it before anything of the model is changed."""
    model, added = start.model, {*start.fresh, *start.inherited}
    energies = [
        name
        for name, spec in model.targets.items()
        if spec.is_energy and not spec.per_atom and spec.num_outputs == 1
    ]
    own = tuple(name for name in energies if name not in added)
    sources = {
        target: start.inherited.get(target, target)
        for target in options.target_specs()
        if target in energies and target not in start.fresh
    }
    baselines = {name: model.composition.get(name).cpu().clone() for name in energies}
    known = tuple(z for z in model.species if z not in start.new_species)
    return FoundationEnergies(known, own, sources, baselines)


def named_energy(targets: Mapping[str, object], foundation: FoundationEnergies, path: str) -> str:
    """The one target of a data set, which must be one of the foundation's energies.

    Raises:
        ConfigError: it is not; ``path`` is the option that names the data set.
    """
    (source,) = targets
    if source not in foundation.energies:
        raise ConfigError(
            f"{path}.targets: the starting model has no energy '{source}'."
            f"{did_you_mean(source, foundation.energies)} It has: "
            f"{', '.join(foundation.energies) or 'none'}. The name in the file is given with `key`."
        )
    return source

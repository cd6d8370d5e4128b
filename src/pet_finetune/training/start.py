"""The model that a run starts from, and which of its parameters train."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ase.data import chemical_symbols
from torch.nn import ModuleDict

from pet_finetune.adapters import AdapterConfig, freeze, inject
from pet_finetune.adapters.config import default_modules_to_save
from pet_finetune.adapters.new_rows import train_new_rows
from pet_finetune.checkpoint import load_checkpoint, load_oldest_start
from pet_finetune.config import Options
from pet_finetune.config.finetune import METHOD_KEYS
from pet_finetune.data.species import find_species
from pet_finetune.data.splits import Splits
from pet_finetune.errors import ConfigError
from pet_finetune.keys import TargetSpec
from pet_finetune.log import get_logger
from pet_finetune.model import Potential
from pet_finetune.model.fingerprint import weights_fingerprint

from .elements import add_new_elements
from .new_targets import add_targets

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
        return _extend(model, name, provenance, options, specs, splits)
    structures = [*splits.train, *splits.validation, *splits.test]
    species = options.architecture.atomic_types or find_species(structures)
    model = Potential(options.model, species, specs.values())
    _logger.info(
        "a new model for %s", ", ".join(chemical_symbols[number] for number in model.species)
    )
    return Start(model, "scratch", None, {}, tuple(specs), {})


def read_start(options: Options) -> tuple[Potential, str, dict[str, Any]]:
    """The model that the options name to start from, what it is called, and its provenance.

    Raises:
        CheckpointError: it cannot be read.
    """
    finetune, legacy = options.finetune, options.finetune.legacy_start
    if finetune.read_from is not None:
        checkpoint = load_checkpoint(finetune.read_from)
        return checkpoint.model, Path(finetune.read_from).stem, checkpoint.provenance
    assert legacy is not None, "training from scratch starts from no model"
    model = load_oldest_start(
        legacy.model, legacy.all_species, legacy.self_contributions, options.model
    )
    return model, Path(legacy.model).stem, {}


def check_targets(options: Options) -> None:
    """Make sure, before any file is read, that the targets have names that the network can have.

    Raises:
        ConfigError: naming one that has not.
    """
    for name in options.target_specs():
        if "." in name or hasattr(ModuleDict(), name):
            raise ConfigError(
                f"training_set.targets: a target cannot be called '{name}', because parts of the "
                "network are named after it and torch has no such names. Use letters, digits, "
                "_, - and /; the name in the file is given with `key`."
            )


def _extend(
    model: Potential,
    name: str,
    provenance: dict[str, Any],
    options: Options,
    specs: dict[str, TargetSpec],
    splits: Splits,
) -> Start:
    """Give a model that was read the targets of the options and the elements of the data."""
    fingerprint = weights_fingerprint(model)
    new_species = add_new_elements(model, options, splits)
    fresh, inherited = add_targets(model, specs, options.finetune.inherit_heads)
    return Start(model, name, fingerprint, provenance, fresh, inherited, new_species)


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
    if len(targets) > 1:
        raise ConfigError(f"finetune.method {method}: an adapter is for one target; found "
                          f"{', '.join(targets)}. Use method full.")  # fmt: skip
    # How fast its factors learn is the optimiser's concern.
    settings = finetune.config.model_dump(include=set(METHOD_KEYS[method]) - {"loraplus_lr_ratio"})
    if settings.get("target_modules") == ("all-linear",):
        settings["target_modules"] = "all-linear"
    config = AdapterConfig(**settings, target=targets[0])
    inject(
        model,
        config,
        fingerprint=start.fingerprint,
        inherited_from=start.inherited.get(targets[0]),
        brought_target=targets[0] in {*start.fresh, *start.inherited},
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

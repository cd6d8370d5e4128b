"""Giving a model what a run needs and it lacks: elements of the data, targets of the options."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ase.data import atomic_numbers, chemical_symbols

from pet_finetune.config.run_options import Options
from pet_finetune.data.splits import Splits
from pet_finetune.data.structure import Structure, check_charges
from pet_finetune.data.structure_sets import OnDisk, check_species, find_species, joined
from pet_finetune.errors import ConfigError, DataError, SpeciesError, did_you_mean
from pet_finetune.keys import TargetSpec, direct_quantity
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.nn.gnn_layer import PARTLY_PERIODIC

_logger = get_logger(__name__)
_OPTION = "finetune.new_elements"
_NOBLE_GASES = (2, 10, 18, 36, 54, 86, 118)

#: What to do about an unknown element where a run may add it.
ADVICE = (
    f"To let fine-tuning add them, set {_OPTION}: nearest (or name the element each starts from)."
)


def add_new_elements(model: Potential, options: Options, splits: Splits) -> dict[int, int | None]:
    """Add the elements of the data that a model lacks, as ``finetune.new_elements`` says.

    Returns:
        The element that each new one starts from, or None where it starts at random.

    Raises:
        ConfigError: the option names known elements, or sources that the model lacks, or not
            all elements that are needed.
        SpeciesError: an element that no training structure holds.
    """
    chosen = options.finetune.new_elements
    if chosen is None:
        return {}
    everything = find_species(joined([splits.train, splits.validation, splits.test]))
    unknown = [number for number in everything if number not in model.species]
    if isinstance(chosen, Mapping):
        sources = _named_sources(chosen, model, unknown)
    else:
        sources = {
            number: nearest_element(number, model.species) if chosen == "nearest" else None
            for number in unknown
        }
    untrained = sorted(set(sources) - set(find_species(splits.train)))
    if untrained:
        raise SpeciesError(
            f"{_names(untrained)}: in validation or test structures only. The embeddings of a new "
            "element must be trained: put structures that hold it into the training set."
        )
    model.add_species(sources, {new: old for new, old in sources.items() if old is not None})
    for new, old in sources.items():
        start = "at random" if old is None else f"with the embeddings of {chemical_symbols[old]}"
        _logger.info("element %s is new and starts %s", chemical_symbols[new], start)
    return sources


def _named_sources(
    chosen: Mapping[str, str], model: Potential, unknown: list[int]
) -> dict[int, int | None]:
    """The mapping of the options in atomic numbers, for the elements that are needed."""
    problems = []
    wanted = {atomic_numbers[new]: atomic_numbers[old] for new, old in chosen.items()}
    for new, old in wanted.items():
        name, source = chemical_symbols[new], chemical_symbols[old]
        if new in model.species:
            problems.append(f"{_OPTION}.{name}: the model knows it already. Remove it.")
        elif old not in model.species:
            nearest = chemical_symbols[nearest_element(new, model.species)]
            problems.append(
                f"{_OPTION}.{name}: the model lacks {source} too. It knows "
                f"{_names(model.species)}; the nearest to {name} is {nearest}."
            )
        elif new not in unknown:
            _logger.warning("%s: no structure holds %s; it is not added", _OPTION, name)
    for new in (number for number in unknown if number not in wanted):
        name = chemical_symbols[new]
        nearest = chemical_symbols[nearest_element(new, model.species)]
        problems.append(
            f"{_OPTION}: the structures hold {name} too, which the model lacks. Add {name}: "
            f"{nearest} (or another element that it knows)."
        )
    if problems:
        raise ConfigError("\n".join(problems), problems)
    return {new: wanted[new] for new in unknown}


def _names(numbers: tuple[int, ...] | list[int]) -> str:
    return ", ".join(chemical_symbols[number] for number in numbers)


def period_and_group(number: int) -> tuple[int, int]:
    """Row (1 to 7) and column (1 to 18) of the periodic table.

    Hydrogen stands in column 1; lanthanides and actinides stand in column 3 with scandium, as in
    the short form of the table.
    """
    period = next(i for i, last in enumerate(_NOBLE_GASES, 1) if number <= last)
    last = _NOBLE_GASES[period - 1]
    first = _NOBLE_GASES[period - 2] + 1 if period > 1 else 1
    column = number - first + 1
    if number == 2:
        return 1, 18
    if column > 2:
        # Counted from the noble gas; what does not fit between are the f elements.
        column = max(18 - (last - number), 3)
    return period, column


def nearest_element(number: int, known: Collection[int]) -> int:
    """The nearest known element in the periodic table.

    One of the same column before any other, and there the fewest rows away; else the fewest
    rows and columns away. Ties go to the nearest, then to the lower, atomic number.
    """
    period, group = period_and_group(number)

    def distance(other: int) -> tuple[bool, int, int, int]:
        its_period, its_group = period_and_group(other)
        steps = abs(its_period - period) + abs(its_group - group)
        return its_group != group, steps, abs(other - number), other

    return min(known, key=distance)


def check_known(structures: Sequence[Structure], model: Potential, advice: str = "") -> None:
    """Make sure that a model can compute all structures.

    Args:
        structures: to be predicted or trained on.
        model: whose elements, and charges and spins where it reads them, are allowed.
        advice: what to do about an element that it lacks.

    Raises:
        SpeciesError: an element that the model does not know.
        DataError: a charge or multiplicity that it does not know, or a structure that is periodic
            in one or two directions where it has long-range features.
    """
    check_species(structures, model.species, advice)
    if model.hypers.long_range.enable and not isinstance(structures, OnDisk):
        partly = [s for s in structures if bool(s.pbc.any()) and not bool(s.pbc.all())]
        if partly:
            count = f"{len(partly)} of {len(structures)} structures"
            raise DataError(f"{partly[0].where}: {PARTLY_PERIODIC} It is so in {count}.")
    if model.hypers.system_conditioning:
        if isinstance(structures, OnDisk):
            structures = structures.one_of_each_condition()
        check_charges(structures, model.hypers.max_charge, model.hypers.max_spin_multiplicity)


def add_targets(
    model: Potential, specs: Mapping[str, TargetSpec], inherit: Mapping[str, str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Make heads for the targets that a model lacks, in place.

    Args:
        model: as read.
        specs: the targets of the options.
        inherit: ``finetune.inherit_heads``, the existing target whose heads a new one starts with.

    Returns:
        Targets with fresh heads, and new ones with those they inherited from.

    Raises:
        ConfigError: a target that the model knows as something else, or whose heads cannot be had.
    """
    fresh, inherited = [], {}
    original = dict(model.targets)
    for target in inherit:
        if target not in specs:
            raise ConfigError(
                f"finetune.inherit_heads: '{target}' is no target of training_set. "
                f"Its targets are {', '.join(specs)}."
            )
    for name, spec in specs.items():
        if name in original:
            check_meaning(model, spec)
            if name in inherit:
                _logger.warning(
                    "finetune.inherit_heads: '%s' keeps its own heads, which the model has", name
                )
            continue
        source = _named(original, spec, inherit) or _obvious(original, spec)
        if source is not None and spec.per_volume != original[source].per_volume:
            spec = replace(spec, per_volume=original[source].per_volume)
        model.add_target(spec, inherit_from=source)
        if source is None:
            fresh.append(name)
            _logger.info("target '%s' is new and starts with random heads", name)
        else:
            inherited[name] = source
            _logger.info("target '%s' is new and starts with the heads of '%s'", name, source)
    return tuple(fresh), inherited


def check_meaning(
    model: Potential, spec: TargetSpec, where: str = "training_set.targets", of: str = "starting "
) -> None:
    """Make sure that the model means the same by a target; errors are counted as options say.

    Args:
        model: which has a target of this name.
        spec: the target of the options.
        where: the section that describes it.
        of: which model it is.

    Raises:
        ConfigError: another form, quantity or unit.
    """
    own = model.targets[spec.name]
    for what, wanted, found in (
        ("", spec.form, own.form),
        ("quantity ", spec.quantity, own.quantity),
        ("in ", spec.unit, own.unit),
    ):
        # A quantity or unit that one side does not name contradicts nothing.
        if wanted and found and wanted.casefold() != found.casefold():
            raise ConfigError(
                f"{where}.{spec.name}: it is {what}{wanted} here, but {what}{found} "
                f"in the {of}model. Change the options (`sample_kind`, `type`, "
                "`num_subtargets`, `quantity`, `unit`), or give the target a name of its own."
            )
    model.targets[spec.name] = replace(own, intensive=spec.intensive)


def _named(
    original: Mapping[str, TargetSpec], spec: TargetSpec, inherit: Mapping[str, str]
) -> str | None:
    """The target to inherit from that the options name."""
    source = inherit.get(spec.name)
    if source is None:
        return None
    path = f"finetune.inherit_heads.{spec.name}"
    alike = [name for name, other in original.items() if other.form == spec.form]
    if source not in original:
        raise ConfigError(
            f"{path}: the starting model has no target '{source}'."
            f"{did_you_mean(source, original)} It has: {', '.join(original) or 'none'}."
        )
    if source not in alike:
        raise ConfigError(
            f"{path}: '{spec.name}' is {spec.form}, but '{source}' is {original[source].form}, and "
            "heads pass on between targets of one kind only. Remove it to start with random "
            f"heads. Targets of this kind: {', '.join(alike) or 'none'}."
        )
    return source


def _obvious(original: Mapping[str, TargetSpec], spec: TargetSpec) -> str | None:
    """The one target that a new one can only be another version of, or None.

    Energies are versions of each other, and so are direct forces, and direct stresses.
    """
    quantity = direct_quantity(spec.name)

    def version(name: str, other: TargetSpec) -> bool:
        if spec.is_energy or other.is_energy:
            return spec.is_energy and other.is_energy
        return quantity is not None and direct_quantity(name) == quantity

    alike = [n for n, other in original.items() if other.form == spec.form and version(n, other)]
    return alike[0] if len(alike) == 1 else None

"""Elements that the data hold: whether a model knows them, and adding those that it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pet_finetune.config import Options
from pet_finetune.data.computable import check_charges
from pet_finetune.data.on_disk import OnDisk, joined
from pet_finetune.data.species import check_species, find_species
from pet_finetune.data.splits import Splits
from pet_finetune.data.structure import Structure
from pet_finetune.elements import atomic_number, nearest_element, symbol_of
from pet_finetune.errors import ConfigError, SpeciesError
from pet_finetune.log import get_logger
from pet_finetune.model import Potential

_logger = get_logger(__name__)
_OPTION = "finetune.new_elements"

#: What to do about an unknown element where a run may add it.
ADVICE = (
    f"To let fine-tuning add them, set {_OPTION}: nearest (or name the element each starts from)."
)


def add_new_elements(model: Potential, options: Options, splits: Splits) -> dict[int, int | None]:
    """Add the elements of the data that a model lacks, as ``finetune.new_elements`` says.

    Returns:
        The element that each new one starts from, or None where it starts at random; nothing
        without the option.

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
        start = "at random" if old is None else f"with the embeddings of {symbol_of(old)}"
        _logger.info("element %s is new and starts %s", symbol_of(new), start)
    return sources


def _named_sources(
    chosen: Mapping[str, str], model: Potential, unknown: list[int]
) -> dict[int, int | None]:
    """The mapping of the options in atomic numbers, for the elements that are needed."""
    problems = []
    wanted = {atomic_number(new): atomic_number(old) for new, old in chosen.items()}
    for new, old in wanted.items():
        if new in model.species:
            problems.append(f"{_OPTION}.{symbol_of(new)}: the model knows it already. Remove it.")
        elif old not in model.species:
            nearest = symbol_of(nearest_element(new, model.species))
            problems.append(
                f"{_OPTION}.{symbol_of(new)}: the model lacks {symbol_of(old)} too. It knows "
                f"{_names(model.species)}; the nearest to {symbol_of(new)} is {nearest}."
            )
        elif new not in unknown:
            _logger.warning("%s: no structure holds %s; it is not added", _OPTION, symbol_of(new))
    for new in unknown:
        if new not in wanted:
            nearest = symbol_of(nearest_element(new, model.species))
            problems.append(
                f"{_OPTION}: the structures hold {symbol_of(new)} too, which the model lacks. Add "
                f"{symbol_of(new)}: {nearest} (or another element that it knows)."
            )
    if problems:
        raise ConfigError("\n".join(problems), problems)
    return {new: wanted[new] for new in unknown}


def _names(numbers: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(symbol_of, numbers))


def check_known(structures: Sequence[Structure], model: Potential, advice: str = "") -> None:
    """Make sure that a model can compute all structures.

    Args:
        structures: to be predicted or trained on.
        model: whose elements, and charges and spins where it reads them, are allowed.
        advice: what to do about an element that it lacks.

    Raises:
        SpeciesError: an element that the model does not know.
        DataError: a charge or multiplicity that it does not know.
    """
    check_species(structures, model.species, advice)
    if model.hypers.system_conditioning:
        if isinstance(structures, OnDisk):
            structures = structures.one_of_each_condition()
        check_charges(structures, model.hypers.max_charge, model.hypers.max_spin_multiplicity)

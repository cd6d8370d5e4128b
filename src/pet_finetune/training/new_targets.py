"""Giving a model that was read the targets of a run: which are new, and what heads they get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pet_finetune.errors import ConfigError, did_you_mean
from pet_finetune.keys import TargetSpec, direct_quantity
from pet_finetune.log import get_logger
from pet_finetune.model import Potential

_logger = get_logger(__name__)


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
        ConfigError: a target that the model knows as something else, or that cannot inherit the
            heads it is to.
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
            _take_over(model, spec)
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


def _take_over(model: Potential, spec: TargetSpec) -> None:
    """Make sure that the model means the same by a target; errors are counted as options say."""
    own = model.targets[spec.name]
    for what, wanted, found in (
        ("", spec.form, own.form),
        ("quantity ", spec.quantity, own.quantity),
        ("in ", spec.unit, own.unit),
    ):
        # A quantity or unit that one side does not name contradicts nothing.
        if wanted and found and wanted.casefold() != found.casefold():
            raise ConfigError(
                f"training_set.targets.{spec.name}: it is {what}{wanted} here, but {what}{found} "
                "in the starting model. Change the options (`sample_kind`, `type`, "
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

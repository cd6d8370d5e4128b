"""Arguments of the Python functions: options as one tree, models and structures as files.

Nothing is checked here and no default stands here: the schema does both, and its errors are told
with the names that the caller used.
"""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from ase.db.row import AtomsRow
from pydantic import BaseModel

from pet_finetune.adapters.adapted import AdaptedPotential
from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint, no_model
from pet_finetune.config.finetune import (
    METHOD_KEYS,
    METHOD_SHORTHANDS,
    AnchorOptions,
    FinetuneConfig,
    FinetuneOptions,
    ReplayOptions,
    RetentionOptions,
)
from pet_finetune.config.load import LoadedOptions, parse_options, read_yaml
from pet_finetune.config.problems import config_error, format_path
from pet_finetune.config.run_options import Options
from pet_finetune.data.ase_databases import frame_of, write_exact
from pet_finetune.errors import ConfigError, DataError, PetFinetuneError
from pet_finetune.log import shown_names
from pet_finetune.model.potential import Potential

#: A checkpoint, or a model that was loaded.
Model = str | os.PathLike[str] | AdaptedPotential | Potential

_TRAINING = ("architecture", "training")
_FINETUNE = (*_TRAINING, "finetune")
_YAML = (".yaml", ".yml")
#: Shorter names of options.
_SHORT = {"epochs": "num_epochs"}
_SETS = {"train": "training_set", "validation": "validation_set", "test": "test_set"}
#: Structures given as Atoms are in ASE's units, with ASE's names.
_TARGETS = {"energy": {"quantity": "energy", "key": "energy", "unit": "eV"}}


class Keywords:
    """Options given as an object; :attr:`settings` are checked together with all others."""

    #: The section under ``architecture.training.finetune``.
    place: ClassVar[str] = ""

    def __init_subclass__(cls, place: str = "", schema: type[BaseModel] | None = None) -> None:
        """Note what the class is a section of, and describe it as the schema does."""
        cls.place = place or cls.place
        if schema is not None:
            cls._describe(schema, schema.model_fields)

    @classmethod
    def _describe(cls, schema: type[BaseModel], names: Collection[str]) -> None:
        """Give the class the arguments, defaults and descriptions that the schema has."""
        fields = {name: f for name, f in schema.model_fields.items() if name in names}
        empty, kind = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter(name, kind, default=empty if f.is_required() else f.default)
            for name, f in fields.items()
        ]
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        lines = [f"    {name}: {f.description}" for name, f in fields.items()]
        cls.__doc__ = "\n".join([f"{cls.__doc__}\n", "Args:", *lines])

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def __repr__(self) -> str:
        """Source form."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{type(self).__name__}({given})"


class Method(Keywords, place="config"):
    """Fine-tuning method: ``finetune.method`` and its settings ``finetune.config``."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """The method is called as the class is."""
        super().__init_subclass__()
        cls.name = cls.__name__.lower()
        base, given = METHOD_SHORTHANDS.get(cls.name, (cls.name, {}))
        cls._describe(FinetuneConfig, [k for k in METHOD_KEYS[base] if k not in given])  # type: ignore[index]


class Lora(Method):
    """Low-rank updates of the linear layers, and the heads."""


class Dora(Method):
    """LoRA that trains the lengths of the weights' rows separately from their directions."""


class Qlora(Method):
    """LoRA over frozen weights in 4 or 8 bits."""


class Prompt(Method):
    """Learned tokens in the attention layers, and the heads."""


class Heads(Method):
    """Only the heads."""


class Full(Method):
    """All weights."""


class Replay(Keywords, place="replay", schema=ReplayOptions):
    """Train on structures labelled by the foundation, in addition to the new data."""


class Anchor(Keywords, place="anchor", schema=AnchorOptions):
    """Keep the weights near those of the foundation."""


class Retention(Keywords, place="retention", schema=RetentionOptions):
    """The forgetting report."""


@dataclass
class Arguments:
    """A tree of options that grows from arguments.

    Attributes:
        folder: where structures given as ``Atoms`` are written.
        tree: raw options.
        names: what the caller called the options that stand at a path.
        files: what the caller called the structures that are written to a file.
    """

    folder: Path
    tree: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    _writes: list[Callable[[], object]] = field(default_factory=list)

    def data(self, given: Any, targets: Mapping[str, Any] | None) -> None:
        """The training set: structures, a path or a section; or a whole tree of options."""
        if targets is not None and not isinstance(targets, Mapping):
            raise ConfigError(
                'targets: expected a dictionary, such as {"energy": {"key": "REF_energy", "unit": '
                f'"eV"}}}}, got {type(targets).__name__}.'
            )
        if isinstance(given, (str, os.PathLike)) and Path(given).suffix in _YAML:
            given = read_yaml(os.fspath(given))
        if isinstance(given, Mapping) and "systems" not in given:
            self.tree = copy.deepcopy(dict(given))
            if targets is not None:
                raise ConfigError(
                    "targets: the options name them in training_set.targets. Change them there."
                )
        else:
            self.structures("train", given, targets)

    def structures(self, name: str, given: Any, targets: Mapping[str, Any] | None) -> None:
        """Add the set ``train``, ``validation`` or ``test``."""
        self._set((_SETS[name],), name, self._dataset(given, name, targets))

    def method(self, method: Method | type[Method] | str | None) -> None:
        """Fine-tuning method as an object, a class or a name."""
        if isinstance(method, type) and issubclass(method, Method):
            method = method()
        if isinstance(method, Method):
            self._set((*_FINETUNE, "method"), "method", method.name)
            self._set((*_FINETUNE, "config"), "method", dict(method.settings))
        elif method is not None:
            self._set((*_FINETUNE, "method"), "method", method)

    def features(self, sections: Sequence[Keywords | type[Keywords]]) -> None:
        """The features that are sections of the options."""
        known: set[str] = set()
        for section in sections:
            if isinstance(section, type) and issubclass(section, Keywords):
                section = section()
            name = type(section).__name__
            if not isinstance(section, Keywords) or isinstance(section, Method):
                raise ConfigError(
                    f"features: expected Replay, Anchor, Retention or a Feature, got {name}."
                )
            if section.place in known:
                raise ConfigError(f"features: {name} is given more than once.")
            known.add(section.place)
            settings = dict(section.settings)
            settings |= {k: listed(v) for k, v in settings.items() if k == "read_from"}
            if is_structures(settings.get("read_from")):
                settings["read_from"] = self._dataset(settings["read_from"], section.place, None)
            self._set((*_FINETUNE, section.place), name, settings)

    def options(self, given: Mapping[str, Any]) -> None:
        """Set options by their names, at any place of the tree."""
        for name, value in given.items():
            option = _SHORT.get(name, name)
            if option in Options.model_fields:
                path: tuple[str, ...] = (option,)
            elif option in FinetuneOptions.model_fields:
                path = (*_FINETUNE, option)
            else:
                path = (*_TRAINING, option)
            self._set(path, name, value)

    def parse(self, checkpoint: str | None, source: str) -> LoadedOptions:
        """The checked options; structures are written once they are known to be right.

        Raises:
            ConfigError: one line for each problem, with the caller's names.
        """
        try:
            loaded = parse_options(as_written(self.tree), checkpoint, source=source)
        except ConfigError as error:
            lines = [self._renamed(line) for line in error.problems]
            raise config_error(lines, source) from None
        for write in self._writes:
            write()
        return loaded

    def _dataset(self, given: Any, name: str, targets: Mapping[str, Any] | None) -> Any:
        """A set as options have it; what is no data is left for the schema to refuse."""
        given = listed(given)
        if is_structures(given):
            frames = [given] if isinstance(given, Atoms) else list(given)
            path = (self.folder / f"{_SETS.get(name, name)}.db").absolute()
            self._writes.append(lambda: write_exact(path, frames))
            self.files[str(path)] = _called(name, frames)
            systems = {"read_from": str(path), "length_unit": "angstrom"}
            return {"systems": systems, "targets": dict(targets or _TARGETS)}
        if isinstance(given, (str, os.PathLike)):
            path_text = os.fspath(given)
            return path_text if targets is None else {
                "systems": {"read_from": path_text}, "targets": dict(targets)
            }  # fmt: skip
        return given

    def _set(self, path: tuple[str, ...], name: str, value: Any) -> None:
        place = format_path(path)
        for other, given in self.names.items():
            if f"{place}.".startswith(f"{other}.") or other.startswith(f"{place}."):
                raise ConfigError(f"{given} and {name} set the same option, {place}: give one.")
        node = self.tree
        for key in path[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        node[path[-1]] = value
        self.names[place] = name

    def _renamed(self, line: str) -> str:
        """A problem with the caller's name of the option in front of that of the file."""
        place, colon, text = line.partition(": ")
        found = [p for p in self.names if place == p or place.startswith((f"{p}.", f"{p}["))]
        if not colon or not found:
            return line
        path = max(found, key=len)
        name = self.names[path]
        return line if name == place else f"{name}{place[len(path) :]}: {text} (option {place})"


def as_written(value: Any) -> Any:
    """An argument as an options file has it: NumPy's numbers, paths and devices as plain values."""
    if isinstance(value, Mapping):
        return {key: as_written(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_written(one) for one in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value) if isinstance(value, torch.device) else value


def _called(name: str, frames: Sequence[Atoms]) -> str:
    """What messages call structures in memory."""
    idle = any(one.calc is not None and not getattr(one.calc, "results", None) for one in frames)
    return f"{name} (whose calculators have computed nothing yet)" if idle else name


@contextmanager
def with_own_names(files: Mapping[str, str]) -> Iterator[None]:
    """Errors and log name structures in memory as the caller did, not the file made of them."""
    try:
        shown_names.update(files)
        yield
    except PetFinetuneError as error:
        error.args = renamed(error.args, files)
        raise
    finally:
        for path in files:
            shown_names.pop(path, None)


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A value, and all that it holds, with the caller's names in its texts."""
    if isinstance(value, str):
        for path, name in names.items():
            value = value.replace(path, name)
        return value
    if isinstance(value, Mapping):
        return {renamed(key, names): renamed(one, names) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([renamed(one, names) for one in value])
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: renamed(getattr(value, f.name), names) for f in fields(value)}
        )
    return value


def listed(given: Any) -> Any:
    """Structures of a generator, a trajectory or rows of ASE's as a list; the rest as it is."""
    if isinstance(given, (Atoms, Mapping, str, os.PathLike)) or not isinstance(given, Iterable):
        return given
    items = given if isinstance(given, Sequence) else list(given)
    if any(isinstance(one, AtomsRow) for one in items):
        items = [frame_of(one, {}) if isinstance(one, AtomsRow) else one for one in items]
    return items


def is_structures(given: Any) -> bool:
    """Whether these are structures in memory; an empty list is one of them."""
    if isinstance(given, Atoms):
        return True
    several = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    return several and all(isinstance(one, Atoms) for one in given)


def as_model(model: Model) -> str | Potential:
    """A model as one that is evaluated."""
    if isinstance(model, AdaptedPotential):
        return model.potential
    return model if isinstance(model, Potential) else _address(model)


def _address(model: Any) -> str:
    """The path or address of a checkpoint; what is something else is refused."""
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model)
    raise no_model(model)


def checkpoint_of(model: Model, spare: Path, *, write: bool = True) -> str:
    """The file that a model is read from: its own where it is still that model, or ``spare``.

    One that lives in memory only is written there, if ``write``.
    """
    if not isinstance(model, (AdaptedPotential, Potential)):
        return _address(model)
    source = model.source if isinstance(model, AdaptedPotential) else None
    if source is not None and source.exists() and model.active_adapter is None:
        own = weights_fingerprint(load_checkpoint(source).model)
        if own == weights_fingerprint(model.potential):
            return os.fspath(source)
    if write:
        save_checkpoint(spare, model.potential if isinstance(model, AdaptedPotential) else model)
    return os.fspath(spare.absolute())


@contextmanager
def as_files(structures: Any, name: str) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Structures as files, and what to call those that are made for it."""
    structures = listed(structures)
    if isinstance(structures, Atoms):
        structures = [structures] if len(structures) else []
    if structures and is_structures(structures):
        with tempfile.TemporaryDirectory(prefix="pet-finetune-") as above:
            path = str(Path(above, f"{name}.db"))
            write_exact(path, structures)
            with with_own_names({path: _called(name, structures)}):
                yield [path], {path: name}
        return
    single = isinstance(structures, str) or not isinstance(structures, Sequence)
    paths = [structures] if single else structures
    for one in paths:
        if not isinstance(one, (str, os.PathLike)):
            kind = type(one).__name__
            raise DataError(f"{name}: expected structures, or names of files, got {kind}.")
    yield [os.fspath(path) for path in paths], {}

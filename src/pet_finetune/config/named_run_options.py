"""Many runs in one file: a run's entry translated into the ordinary options.

A file maps names of runs to short, flat settings, in the words that PEFT's users know:

    {"defaults": {"base_model": "foundation.ckpt", "dataset_path": "water.xyz"},
     "water_r8": {"lora_r": 8}, "water_r8_dora": {"lora_r": 8, "peft_use_dora": true}}

Every setting stands for one option, so what an entry says is checked and run as an options file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pet_finetune.errors import ConfigError, did_you_mean

from .finetune import FinetuneConfig, FinetuneOptions
from .load import LoadedOptions, neighbours, parse_options, parse_override, read_yaml
from .problems import Path, format_path
from .run_options import Options
from .training import TrainingOptions

#: The entry whose settings all others share.
DEFAULTS = "defaults"

_TRAINING: Path = ("architecture", "training")
_FINETUNE: Path = (*_TRAINING, "finetune")
_CONFIG: Path = (*_FINETUNE, "config")

#: Settings and the one option that each stands for.
_SHORT: dict[str, Path] = {
    "base_model": (*_FINETUNE, "read_from"),
    "lora_r": (*_CONFIG, "rank"),
    "lora_alpha": (*_CONFIG, "alpha"),
    "lora_dropout": (*_CONFIG, "dropout"),
    "quant_bits": (*_CONFIG, "quant_bits"),
    "peft_use_rslora": (*_CONFIG, "use_rslora"),
    "peft_use_dora": (*_CONFIG, "use_dora"),
    "max_grad_norm": (*_TRAINING, "grad_clip_norm"),
}
#: Settings of the data, and the set that each makes or, for names and units, describes.
_DATA: dict[str, Path] = {
    "dataset_path": ("training_set",),
    "validation_path": ("validation_set",),
    "validation_fraction": ("validation_set",),
    "test_path": ("test_set",),
    "test_fraction": ("test_set",),
    **{name: (name,) for name in ("length_unit", "energy_unit", "energy_key", "forces_key",
                                  "stress_key")},
}  # fmt: skip
_DEFAULT_FRACTION = 0.1
#: Sections whose options may be named without the way there.
_SECTIONS: tuple[tuple[Any, Path], ...] = (
    (Options, ()),
    (TrainingOptions, _TRAINING),
    (FinetuneOptions, _FINETUNE),
    (FinetuneConfig, _CONFIG),
)
_LORA_METHODS = ("lora", "dora", "qlora")
#: What stands for "not quantised" in such files.
_UNQUANTISED = (16, 32, 64)


@dataclass(frozen=True)
class NamedRun:
    """One run of a file.

    Attributes:
        name: of the run.
        raw: its options, as an options file would hold them.
        loaded: the same, checked.
        folder: where its results go.
    """

    name: str
    raw: dict[str, Any]
    loaded: LoadedOptions
    folder: FilePath


def read_named_runs(
    path: str | FilePath,
    wanted: Sequence[str] | None,
    overrides: Sequence[str] = (),
    root: str | FilePath = "lora_adapters",
) -> list[NamedRun]:
    """Read runs of a file and check them.

    Args:
        path: JSON, or YAML where the name ends in .yaml or .yml.
        wanted: names of runs; None for all, in the order of the file.
        overrides: ``key=value`` for every run, with the file's settings or dotted options.
        root: the folder below which results go.

    Raises:
        ConfigError: the file cannot be read, has no such run, or with a line for each problem.
    """
    shared, entries = _read(path)
    for name in wanted or ():
        if name not in entries:
            raise ConfigError(
                f"{path}: there is no run '{name}'.{did_you_mean(name, entries)} "
                f"Runs: {', '.join(entries)}."
            )
    last = dict(parse_override(text) for text in overrides)
    runs, problems = [], []
    for name in entries if wanted is None else wanted:
        try:
            runs.append(_run(f"{path}: run '{name}'", name, (shared, entries[name], last), root))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems), problems)
    return runs


def run_names(path: str | FilePath) -> list[str]:
    """The names of all runs of a file."""
    return list(_read(path)[1])


def _read(path: str | FilePath) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Shared settings of a file of runs, and its entries."""
    yaml = FilePath(path).suffix in (".yaml", ".yml")
    content = read_yaml(path) if yaml else read_json(path)
    for name, entry in content.items():
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}: {name}: expected a section of settings, got {entry!r}.")
        if not name or FilePath(name).name != name:
            raise ConfigError(f"{path}: '{name}' cannot be a run's name: a folder is named so.")
    shared = content.pop(DEFAULTS, {})
    if not content:
        raise ConfigError(f"{path}: the file names no run. Write {{name: {{base_model: ...}}}}.")
    return shared, content


#: Options with the setting that named each and its value.
_Settings = dict[Path, tuple[str, Any]]


def _run(
    where: str, name: str, levels: Sequence[Mapping[str, Any]], root: str | FilePath
) -> NamedRun:
    """Translate and check one run; later levels win over earlier ones, which are shared."""
    shared, *own = [_settings(level, where) for level in levels]
    settings = {option: value for level in own for option, value in level.items()}
    method = {**shared, **settings}.get((*_FINETUNE, "method"), ("", "lora"))[1]
    for option, value in shared.items():
        # Shared settings of LoRA mean nothing to a run of another method.
        foreign = option[: len(_CONFIG)] == _CONFIG and method not in _LORA_METHODS
        if not foreign:
            settings.setdefault(option, value)
    raw = _options(settings, where)
    try:
        loaded = parse_options(raw, source=where)
    except ConfigError as error:
        lines = [_in_words_of_the_file(line, settings) for line in error.problems]
        raise ConfigError(f"{where}: {'; '.join(lines)}", lines) from None
    return NamedRun(name, raw, loaded, FilePath(root, _kind(loaded.options), name))


def _settings(level: Mapping[str, Any], where: str) -> _Settings:
    """Settings of one section by option."""
    found: _Settings = {}
    for setting, value in level.items():
        option = _option(setting, where)
        if option in found:
            raise ConfigError(
                f"{where}: {found[option][0]} and {setting} are the same option. Keep one of them."
            )
        found[option] = (setting, value)
    return found


def _option(setting: str, where: str) -> Path:
    """Path of the option that a setting sets."""
    if setting in _SHORT:
        return _SHORT[setting]
    if setting in _DATA:
        return _DATA[setting]
    if "." in setting:
        return tuple(setting.split("."))
    for section, path in _SECTIONS:
        if setting in section.model_fields:
            return (*path, setting)
    fields = [name for section, _ in _SECTIONS for name in section.model_fields]
    raise ConfigError(
        f"{where}: unknown setting '{setting}'.{did_you_mean(setting, [*_SHORT, *_DATA, *fields])} "
        f"Known are {', '.join([*_SHORT, *_DATA])}, and every option of the reference, such as "
        "num_epochs or architecture.training.loss."
    )


def _options(settings: _Settings, where: str) -> dict[str, Any]:
    """The options that all settings of a run mean together."""
    settings = dict(settings)
    _settle_bits(settings)
    names = {key: settings.pop((key,))[1] for key in _DATA if (key,) in settings}
    raw: dict[str, Any] = {"architecture": {"name": "pet"}}
    # Whole sections first, so that single options can be laid over them.
    for option, (setting, value) in sorted(settings.items(), key=lambda item: len(item[0])):
        if setting in _DATA and setting.endswith("_path"):
            value = _dataset(value, names)
        _put(raw, option, value, where)
    finetune = raw["architecture"].get("training", {}).get("finetune", {})
    if not finetune.get("read_from") and not finetune.get("legacy_start"):
        raise ConfigError(f"{where}: base_model is missing: the checkpoint that is fine-tuned.")
    finetune.setdefault("method", "lora")
    if "training_set" not in raw:
        raise ConfigError(f"{where}: dataset_path is missing: the structures to learn from.")
    raw.setdefault("seed", 0)  # one for all runs: they are compared on the same structures
    raw.setdefault("validation_set", _DEFAULT_FRACTION)
    raw.setdefault("test_set", _DEFAULT_FRACTION)
    return raw


def _settle_bits(settings: _Settings) -> None:
    """Read quant_bits of an unquantised run: bits of the numbers, or 16 for those of products."""
    option = (*_CONFIG, "quant_bits")
    setting, bits = settings.get(option, ("", 0))
    if bits is None or bits in _UNQUANTISED:
        del settings[option]
        if bits == 16:
            settings.setdefault((*_TRAINING, "precision"), (setting, "bf16-mixed"))
        elif bits is not None:
            settings.setdefault(("base_precision",), (setting, bits))


def _put(raw: dict[str, Any], option: Path, value: Any, where: str) -> None:
    """Set one option; a section that is there already is added to."""
    node: Any = raw
    for key in option[:-1]:
        node = node.setdefault(str(key), {})
        if not isinstance(node, dict):
            raise ConfigError(f"{where}: {format_path(option)}: {key} is no section here.")
    last = str(option[-1])
    if isinstance(value, dict) and isinstance(node.get(last), dict):
        for key, item in value.items():
            _put(node[last], (str(key),), item, where)
    else:
        node[last] = copy.deepcopy(value)


def _dataset(path: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """Options of one data set, with the units and names from the settings."""
    energy = {"key": names.get("energy_key", "energy"), "unit": names.get("energy_unit", "eV")}
    for name in ("forces", "stress"):
        if f"{name}_key" in names:
            key = names[f"{name}_key"]
            energy[name] = "off" if key is None else {"key": key}
    systems = {"read_from": path, "length_unit": names.get("length_unit", "angstrom")}
    return {"systems": systems, "targets": {"energy": energy}}


def _in_words_of_the_file(line: str, settings: _Settings) -> str:
    """A problem of the options in terms of its setting in the file."""
    for option, (setting, _) in settings.items():
        path = format_path(option)
        if line.startswith(f"{path}:"):
            return f"{setting}{line[len(path) :]}"
    return line


def _kind(options: Options) -> str:
    """The folder that a run's kind has: its bits, and its rank and variant or its method."""
    finetune = options.finetune
    config = finetune.config
    unquantised = 16 if options.training.precision else options.base_precision
    bits = config.quant_bits or unquantised
    if finetune.method != "lora":
        return f"{bits}bits_{finetune.method}"
    variants = {"_dora": config.use_dora, "_rslora": config.use_rslora}
    return f"{bits}bits_r{config.rank}" + "".join(name for name, on in variants.items() if on)


def read_json(path: str | FilePath) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConfigError: if the file cannot be read, is no JSON (with line and column), holds no object,
            or a name twice.
    """
    try:
        text = FilePath(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        found = neighbours(FilePath(path), (".json", ".yaml", ".yml"))
        raise ConfigError(f"{path}: no such file of runs.{found}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8.") from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"{path}: '{twice}' stands twice in one section. Rename one.")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: is no JSON: {error.msg}. A comma "
            "after the last entry and comments are not allowed in JSON."
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected runs by name, {{...}}, got {type(content).__name__}.")
    return content

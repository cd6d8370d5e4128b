"""Options files as metatrain expands them and as we do: every difference stands in the docs.

``METATRAIN_FILES`` may name folders (a source distribution of metatrain, its repository) whose own
options files are then compared too.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pet_finetune.config.base import to_plain
from pet_finetune.config.load import load_evaluation, parse_options
from pet_finetune.config.run_options import Options
from pet_finetune.errors import ConfigError

expansion = pytest.importorskip("metatrain.utils.omegaconf")

DOCS = Path(__file__).parents[2] / "docs" / "from-metatrain.md"
SETS = ("training_set", "validation_set", "test_set")
#: Files in the ways that metatrain's users write them.
FILES = {
    "least": "{training_set: a.xyz, validation_set: 0.1, architecture: {name: pet}}",
    "keys and units": """
        architecture: {name: pet, training: {num_epochs: 7, learning_rate: 0.001}}
        training_set:
          systems: {read_from: a.xyz, length_unit: Angstrom}
          targets: {energy: {key: U0, unit: eV}}
        validation_set: 0.1
        test_set: 0.2
        """,
    "fine-tuning": """
        architecture:
          name: pet
          training: {batch_size: 8, finetune: {method: full, read_from: base.ckpt}}
        training_set:
          systems: {read_from: a.xyz, reader: ase, length_unit: angstrom}
          targets:
            energy/finetune:
              {quantity: energy, read_from: b.xyz, reader: ase, key: E, unit: eV,
               description: PBE, forces: {read_from: c.xyz, reader: ase, key: F}}
        validation_set: 0.1
        """,
    "lora": """
        architecture:
          name: pet
          training:
            finetune:
              {method: lora, read_from: base.ckpt, config: {rank: 4, alpha: 8.0}}
        training_set: {systems: a.xyz, targets: {energy: a.xyz}}
        validation_set: 0.1
        """,
    "heads and inherited ones": """
        architecture:
          name: pet
          training:
            finetune:
              {method: heads, read_from: base.ckpt, inherit_heads: {mtt::pbe: energy},
               config: {head_modules: [node_heads], last_layer_modules: [node_last_layers]}}
        training_set:
          systems: a.xyz
          targets: {mtt::pbe: {key: energy, unit: eV, forces: true}}
        validation_set: 0.1
        """,
    "a variant without a quantity": """
        architecture: {name: pet}
        training_set: {systems: a.xyz, targets: {energy/pbe: {key: E, unit: eV}}}
        validation_set: 0.1
        """,
    "several sets": """
        architecture: {name: pet, atomic_types: [1, 8]}
        training_set:
          - systems: {read_from: a.xyz, length_unit: bohr}
            targets: {energy: {unit: hartree, forces: on, stress: off}}
          - systems: {read_from: b.xyz, length_unit: bohr}
            targets: {mtt::E: {key: energy, unit: hartree, forces: f.xyz}}
        validation_set:
          - {systems: {read_from: v.xyz, length_unit: bohr}, targets: {energy: {unit: hartree}}}
          - systems: {read_from: w.xyz, length_unit: bohr}
            targets: {mtt::E: {key: energy, unit: hartree}}
        test_set: 0.1
        """,
    "virial and a loss": """
        architecture:
          name: pet
          training:
            loss: {energy: {type: huber, weight: 2.0, forces: {weight: 5.0}, virial: mae}}
        training_set: {systems: a.xyz, targets: {energy: {unit: eV, virial: {key: W}}}}
        validation_set: {indices: [0, 1]}
        test_set: {indices: [3, 4]}
        """,
    "one loss": """
        architecture: {name: pet, training: {loss: mae}}
        training_set: {systems: a.xyz, targets: {energy: {unit: eV, forces: {}, stress: off}}}
        validation_set: 0.2
        """,
    "losses of gradients": """
        architecture:
          name: pet
          training:
            loss: {energy: {gradients: {positions: {type: huber, delta: 0.1}, strain: {type: mae}}}}
        training_set: {systems: a.xyz, targets: {energy: {unit: eV, stress: on}}}
        validation_set: 0.2
        """,
    "other targets": """
        architecture:
          name: pet
          training:
            per_structure_targets: [mtt::gap]
            atomic_baseline: {mtt::dos: 0.0}
            fixed_scaling_weights: {mtt::gap: 2.0}
            loss: {mtt::dos: mse, mtt::gap: {type: mae, weight: 3.0}}
        training_set:
          systems: a.xyz
          targets:
            mtt::dos: {key: dos, num_subtargets: 30}
            mtt::gap: {quantity: gap, key: gap, unit: eV}
            mtt::dipole: {unit: Debye, type: {cartesian: {rank: 1}}}
            mtt::charges: {quantity: charge, per_atom: true}
            mtt::norm: {unit: Debye}
            non_conservative_force:
              {key: f, quantity: force, unit: eV/A, sample_kind: atom,
               type: {cartesian: {rank: 1}}}
            non_conservative_stress:
              {key: s, quantity: pressure, unit: eV/A^3, type: {cartesian: {rank: 2}}}
        validation_set: 0.2
        """,
    "charges, and many options of training": """
        seed: 42
        device: cpu
        base_precision: 64
        final_eval: false
        architecture:
          name: pet
          model: {cutoff: 5.0, num_neighbors_adaptive: 16, system_conditioning: true}
          training:
            {max_atoms_per_batch: 500, min_atoms_per_batch: 10, warmup_fraction: 0.1,
             weight_decay: 0.01, log_interval: 5, checkpoint_interval: 25, scale_targets: false,
             best_model_metric: rmse_prod, grad_clip_norm: 0.5}
        training_set:
          systems: a.xyz
          targets: {energy: {unit: eV}}
          extra_data: {charge: {key: q}, spin_multiplicity: a.xyz}
          indices: [0, 1, 2]
        validation_set: 0.2
        """,
}  # fmt: skip
EVALUATIONS = {
    "plain": "{systems: a.xyz, targets: {energy: {key: U0, unit: eV}}}",
    "in full": """
        systems: {read_from: a.xyz, length_unit: Angstrom}
        targets: {energy/ft: {key: energy, unit: eV, forces: {key: forces}}}
        indices: [0, 2]
        """,
    "several": """
        - {systems: a.xyz, targets: {energy: {unit: eV}}}
        - {systems: b.xyz, targets: {energy: {unit: eV, stress: off}}}
        """,
    "no targets": "{systems: {read_from: a.xyz, length_unit: angstrom}}",
}
#: What metatrain takes and we refuse: the option as the docs name it, and how it is given.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "architecture.name": ("{architecture: {name: soap_bpnn}}", {}),
    "base_precision": ("{base_precision: 16}", {}),
    "validation_set": ("{validation_set: 0.0}", {}),
    "fixed_scaling_weights": (
        "{architecture: {training: {fixed_scaling_weights: {energy: {1: 2.0}}}}}", {}),
    "loss.<target>.type": ("{architecture: {training: {loss: masked_mse}}}", {}),
    "loss.<target>.reduction": (
        "{architecture: {training: {loss: {energy: {reduction: sum}}}}}", {}),
    "targets.<target>.type": (
        "{}", {"type": {"spherical": {"irreps": [{"o3_lambda": 1, "o3_sigma": 1}]}}}),
    "targets.<target>.sample_kind": ("{}", {"sample_kind": "atom_pair"}),
    "reader": ("{}", {"reader": "metatensor"}),
    "extra_data": (
        "{training_set: {systems: a.xyz, targets: {energy: {}}, extra_data: {mtt::x: {}}}}", {}),
}  # fmt: skip


def of_metatrain(raw: dict[str, Any]) -> dict[str, Any]:
    """A file as ``mtt train`` expands it."""
    from metatrain.utils.architectures import check_architecture_options, get_default_hypers
    from metatrain.utils.pydantic import validate_base_options
    from omegaconf import OmegaConf

    given = OmegaConf.create(validate_base_options(copy.deepcopy(raw)))
    default = {"architecture": get_default_hypers("pet")}
    options = OmegaConf.merge(expansion.BASE_OPTIONS, default, given)
    plain = OmegaConf.to_container(options["architecture"])
    check_architecture_options(name="pet", options=plain)
    for name in SETS:
        value = options[name]
        alone = OmegaConf.is_dict(value) and list(value) == ["indices"]
        if isinstance(value, (int, float)) or alone:
            continue
        options[name] = expansion.expand_dataset_config(value)
    expanded: Any = OmegaConf.to_container(expansion.expand_loss_config(options), resolve=True)
    return dict(expanded)


def of_ours(options: Options) -> dict[str, Any]:
    """The same options in metatrain's shape."""
    plain = options.resolved()
    training = plain["architecture"]["training"]
    energies = {name for name, spec in options.target_specs().items() if spec.is_energy}
    for name in ("batch_size", "num_epochs"):
        training[name] = training.get(name) or "null"
    training["loss"] = {}
    for name in options.target_specs():
        whole = options.training.loss_for(name)
        terms = {"positions": whole.forces_term(), "strain": whole.stress_term()}
        gradients = {kind: to_plain(term) for kind, term in terms.items() if name in energies}
        own = to_plain(whole)
        training["loss"][name] = {
            **{key: own[key] for key in ("type", "weight", "reduction", "delta")},
            "gradients": gradients,
        }
    return plain


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Options by their dotted names."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            yield from flat(item, f"{path}[{index}]")
    else:
        yield path, value


def gradients_spelled_out(value: Any) -> Any:
    """``forces`` and its like as sections with a mode; what is off has no file and no name."""
    if isinstance(value, list):
        return [gradients_spelled_out(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, item in value.items():
        if key in ("forces", "stress", "virial") and "unit" in value:
            if item is False or (isinstance(item, dict) and item.get("mode") == "off"):
                result[key] = {"mode": "off"}
            else:
                result[key] = {"mode": "on", **item}
        else:
            result[key] = gradients_spelled_out(item)
    return result


Difference = tuple[str, str, str]


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> set[Difference]:
    """Options of metatrain's that have another value here, or none."""
    own = dict(flat(gradients_spelled_out(ours)))
    found = set()
    for path, value in flat(gradients_spelled_out(theirs)):
        if path not in own and value in (None, {}, []):
            continue
        if path in ("device", "seed") and own.get(path) in (None, "auto"):
            continue  # chosen when the run starts, by both
        other = own.get(path, "no effect")
        if other == value or (other == "no effect" and ".gradients" in path):
            continue
        if ".loss." in path and path.endswith(".delta") and path not in own:
            continue
        found.add((general(path), str(value), str(other)))
    return found


def general(path: str) -> str:
    """The name of an option without the number of its set and the name of its target."""
    path = re.sub(r"^(?:training|validation|test)_set(?:\[\d+\])?\.", "*_set.", path)
    path = re.sub(r"\.targets\.[^.]+\.", ".targets.<target>.", path)
    path = re.sub(r"\.loss\.[^.]+\.", ".loss.<target>.", path)
    path = re.sub(r"\.(?:forces|stress)\.mode$", ".forces, stress", path)
    path = re.sub(r"\.extra_data\.\w+\.(?!key|reader|read_from)\w+$", ".extra_data", path)
    path = re.sub(r"\.gradients\.(?:positions|strain)\.", ".gradients.", path)
    return path.removeprefix("architecture.")


def documented(heading: str) -> list[list[str]]:
    """The rows of the table below a heading of the page."""
    text = DOCS.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if "|" in line]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def in_code(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def compared(raw: dict[str, Any]) -> set[Difference]:
    return differences(of_metatrain(raw), of_ours(parse_options(copy.deepcopy(raw)).options))


@pytest.mark.parametrize("name", FILES)
def test_metatrain_takes_the_file(name: str) -> None:
    of_metatrain(yaml_12(FILES[name]))


def yaml_12(text: str) -> Any:
    """YAML as both programs read it."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(yaml.safe_load(text)))


def all_differences() -> set[Difference]:
    return set().union(*(compared(yaml_12(text)) for text in FILES.values()))


def test_every_difference_of_an_options_file_is_documented_and_every_documented_one_is_there() -> (
    None
):
    found: dict[str, tuple[set[str], set[str]]] = {}
    for option, theirs, ours in all_differences():
        cells = found.setdefault(option, (set(), set()))
        cells[0].add(theirs or "empty")
        cells[1].add(ours or "empty")
    rows = documented("Defaults that differ")
    listed = {row[0].strip("`"): (in_code(row[1]), in_code(row[2])) for row in rows}
    assert found == listed


@pytest.mark.parametrize("name", EVALUATIONS)
def test_options_of_mtt_eval_are_read_alike(name: str, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    raw = yaml_12(EVALUATIONS[name])
    theirs = OmegaConf.to_container(
        expansion.expand_dataset_config(OmegaConf.create(copy.deepcopy(raw))), resolve=True
    )
    file = tmp_path / "eval.yaml"
    file.write_text(EVALUATIONS[name])
    ours = [to_plain(one) for one in load_evaluation(file)[0]]
    known = {option for option, *_ in all_differences()}
    different = differences({"training_set": theirs}, {"training_set": ours})
    assert {option for option, *_ in different} <= known
    assert [len(one.get("targets", {})) for one in theirs] == [len(one["targets"]) for one in ours]


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_refused_is_documented(option: str) -> None:
    text, target = REFUSED[option]
    targets = {"energy": {"key": "energy", **target}}
    raw = {"training_set": {"systems": "a.xyz", "targets": targets}, "validation_set": 0.1}
    with pytest.raises(ConfigError):
        parse_options({**raw, **yaml_12(text)})
    parse_options({**raw, "training_set": {"systems": "a.xyz", "targets": {"energy": {}}}})
    assert option in [row[0].strip("`") for row in documented("What is refused")]


def test_nothing_is_listed_as_refused_that_is_not() -> None:
    assert {row[0].strip("`") for row in documented("What is refused")} == set(REFUSED)


def command_lines() -> Iterator[tuple[str, str, str, bool]]:
    """Options of ``mtt``'s commands: the command, its name and default, and whether we have it."""
    import argparse

    from metatrain.cli import eval as mtt_eval
    from metatrain.cli import export as mtt_export
    from metatrain.cli import train as mtt_train

    from pet_finetune.cli import make_parser

    theirs = argparse.ArgumentParser().add_subparsers()
    mtt_train._add_train_model_parser(theirs)
    mtt_eval._add_eval_model_parser(theirs)
    mtt_export._add_export_model_parser(theirs)
    ours: Any = next(
        action for action in make_parser()._actions if isinstance(action.choices, dict)
    )
    for command, parser in theirs.choices.items():
        own = {name: a for a in ours.choices[command]._actions for name in a.option_strings}
        for action in parser._actions:
            for name in action.option_strings[:1]:
                same = name in own and own[name].default == action.default
                yield command, name, str(action.default), same


def test_options_of_mtts_command_line_that_differ_are_documented() -> None:
    found = {f"{command} {name}" for command, name, _, same in command_lines() if not same}
    assert found == {row[0].strip("`") for row in documented("The command line")}


def metatrains_own() -> list[Path]:
    folders = os.environ.get("METATRAIN_FILES", "").split(os.pathsep)
    return sorted(file for one in folders if one for file in Path(one).rglob("*.yaml"))


def refused(raw: dict[str, Any]) -> tuple[str, ...]:
    """What we say against a file."""
    try:
        parse_options(copy.deepcopy(raw))
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize("file", metatrains_own() or [None], ids=str)
def test_metatrains_own_files(file: Path | None, tmp_path: Path) -> None:
    if file is None:
        pytest.skip("METATRAIN_FILES names no folder of options files of metatrain's")
    from omegaconf import OmegaConf

    raw = OmegaConf.to_container(OmegaConf.load(file))
    if isinstance(raw, dict) and "training_set" in raw:
        if raw["architecture"]["name"] != "pet":
            raw["architecture"] = {"name": "pet"}  # the data alone
        refusal = refused(raw)
        if refusal:
            named = [row[0].strip("`") for row in documented("What is refused")]
            pattern = "|".join(re.escape(name.split(".")[-1]) for name in named)
            assert all(re.search(pattern, line) for line in refusal), refusal
            pytest.skip(f"refused: {refusal[0]}")
        different = compared(raw)
    elif isinstance(raw, list) or "systems" in raw:
        expanded = expansion.expand_dataset_config(OmegaConf.create(copy.deepcopy(raw)))
        theirs = OmegaConf.to_container(expanded, resolve=True)
        ours = [to_plain(one) for one in load_evaluation(file)[0]]
        different = differences({"training_set": theirs}, {"training_set": ours})
    else:
        pytest.skip("no options file")
    listed = {row[0].strip("`") for row in documented("Defaults that differ")}
    assert {option for option, *_ in different} <= listed, different

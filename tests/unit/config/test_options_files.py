"""Reading YAML: interpolations, overrides, and files that cannot be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pet_finetune.config.load import load_options
from pet_finetune.errors import ConfigError

# A file of a metatrain user, with every kind of shorthand and many of its options.
METATRAIN = """
seed: 42
device: gpu
base_precision: 64
print_stats: auto
final_eval: true
wandb:
  project: ethanol
architecture:
  name: pet
  atomic_types: [8, 1, 6]
  model:
    cutoff: 4.5
    long_range: {enable: false, use_ewald: false, smearing: 1.4}
    zbl: off
  training:
    distributed: false
    distributed_port: 39591
    num_workers: 2
    batch_size: 8
    num_epochs: 10
    learning_rate: 6e-4
    warmup_fraction: 0.03
    weight_decay: null
    log_interval: 1
    checkpoint_interval: 25
    atomic_baseline: {energy: {1: -13.6, 6: -1027.0}}
    fixed_scaling_weights: {}
    per_structure_targets: []
    log_mae: true
    log_separate_blocks: false
    best_model_metric: mae_prod
    grad_clip_norm: 1.0
    max_atoms_per_batch: null
    loss:
      energy:
        type: mse
        weight: 1.0
        reduction: mean
        forces: {type: huber, weight: 0.1, delta: 0.5}
        gradients:
          strain: mae
    finetune:
      read_from: pet-mad.ckpt
      method: full
      config: {}
      inherit_heads: {}
training_set:
  systems: train.xyz
  targets:
    energy:
      quantity: energy
      key: energy_dft
      unit: kcal/mol
      per_atom: false
      num_subtargets: 1
      description: PBE0
      forces: on
      stress: off
      virial: false
validation_set:
  systems: {read_from: val.xyz, reader: ase, length_unit: Angstrom}
  targets:
    energy: {quantity: energy, unit: kcal/mol, forces: {key: forces, reader: null}}
test_set: 0.1
"""
SMALL = "training_set: a.xyz\n"


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "options.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_options(path, overrides)
    return str(caught.value)


def test_a_metatrain_file_runs_unchanged(write) -> None:
    loaded = load_options(write(METATRAIN))
    options = loaded.options
    assert options.training.learning_rate == 6e-4
    assert options.training.atomic_baseline == {"energy": {1: -13.6, 6: -1027.0}}
    assert options.architecture.atomic_types == (1, 6, 8)
    energy = options.training_set[0].targets["energy"]
    assert (energy.key, energy.unit, energy.per_atom) == ("energy_dft", "kcal/mol", False)
    assert (energy.forces.mode, energy.forces.key) == ("on", "forces")
    assert (energy.stress.mode, energy.virial.mode) == ("off", "off")
    loss = options.training.loss_for("energy")
    assert (loss.forces_term().type, loss.forces_term().delta) == ("huber", 0.5)
    assert loss.stress_term().type == "mae"
    assert (options.finetune.method, options.finetune.read_from) == ("full", "pet-mad.ckpt")
    told = "\n".join(loaded.notices)
    assert (options.training.distributed, options.training.distributed_port) == (False, 39591)
    for name in ("num_workers", "log_mae", "print_stats"):
        assert name in told
    assert "distributed" not in told
    assert "training_set.targets.energy.per_atom is an older spelling; today: sample_kind" in told
    assert "length_unit not given, taken as angstrom: training_set." in told


def test_a_smallest_file_and_what_it_assumes(write) -> None:
    loaded = load_options(write(SMALL))
    assert loaded.options.training.batch_size is None
    assert loaded.notices == (
        "length_unit not given, taken as angstrom: training_set.",
        "unit not given, taken as eV: training_set.targets.energy.",
    )
    assert loaded.raw == {"training_set": "a.xyz"}


@pytest.mark.parametrize(
    ("text", "value"), [("6e-4", 6e-4), ("1E-3", 1e-3), ("5e+0", 5.0), (".5", 0.5), ("1", 1.0)]
)
def test_scientific_notation_is_a_number(write, text: str, value: float) -> None:
    path = write(f"{SMALL}architecture: {{training: {{learning_rate: {text}}}}}\n")
    assert load_options(path).options.training.learning_rate == value
    override = f"architecture.training.learning_rate={text}"
    assert load_options(write(SMALL), [override]).options.training.learning_rate == value


def test_interpolations_are_resolved(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DATA", "folder")
    path = write(
        "seed: 3\n"
        "training_set: {systems: '${oc.env:MY_DATA}/a.xyz', targets: {energy: {}}}\n"
        "architecture: {training: {batch_size: '${seed}'}}\n"
    )
    options = load_options(path).options
    assert options.training.batch_size == 3
    assert options.training_set[0].systems.read_from == "folder/a.xyz"


def test_overrides_set_change_and_remove(write) -> None:
    path = write(METATRAIN)
    options = load_options(
        path,
        [
            "architecture.training.num_epochs=3",
            "architecture.training.finetune.method=lora",
            "architecture.training.finetune.config={rank: 2, alpha: 1}",
            "architecture.atomic_types=[1,6]",
            "validation_set=0.2",
            "device=cpu",
            "seed=",
            "training_set.systems.read_from=b=c.xyz",
        ],
    ).options
    assert options.training.num_epochs == 3
    assert (options.finetune.method, options.finetune.config.rank) == ("lora", 2)
    assert options.architecture.atomic_types == (1, 6)
    assert options.validation_set == 0.2
    assert options.device == "cpu"
    assert options.seed is None
    assert options.training.batch_size == 8


def test_overrides_reach_into_lists(write) -> None:
    text = "training_set:\n  - {systems: {read_from: a}, targets: {energy: {}}}\n"
    path = write(text + "  - {systems: {read_from: b}, targets: {energy: {}}}\n")
    options = load_options(path, ["training_set[1].systems.read_from=c"]).options
    assert [d.systems.read_from for d in options.training_set] == ["a", "c"]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("num_epochs", "'num_epochs': expected key=value"),
        ("=3", "'=3': expected key=value"),
        ("seed=[1", "'seed=[1': the value is no YAML"),
    ],
)
def test_overrides_that_cannot_be_read(write, override: str, part: str) -> None:
    assert part in message(write(SMALL), override)


def test_all_wrong_overrides_are_told(write) -> None:
    text = message(write(SMALL), "one", "two")
    assert "'one'" in text
    assert "'two'" in text


def test_an_override_of_an_unknown_option(write) -> None:
    text = message(write(SMALL), "architecture.training.num_epoch=3")
    assert "architecture.training.num_epoch: unknown option. Did you mean 'num_epochs'?" in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a: [1, 2\nb: 3\n", ", line 2, column 2: is no YAML: "),
        ("3\nenergy=1.0\nO 0 0 0\nH 0 0 1\nH 0 1 0\n", ": these are structures (XYZ), not options"),
        ("a: 1\n\tb: 2\n", ", line 2, column 1: is no YAML: "),
        ("seed: 1\nseed: 2\n", ", line 2, column 1: is no YAML: found duplicate key seed."),
        ("", ": the file is empty. At least training_set must be given."),
        ("- a\n- b\n", ": expected options such as `training_set: ...`, got a list."),
        ("just text\n", "just text: unknown option."),
        ("seed: ${nothing}\n", ": seed: Interpolation key 'nothing' not found."),
        ("seed: ???\n", ": seed: Missing mandatory value: seed."),
        ("seed: ${a\n", ": an interpolation cannot be read: "),
    ],
)
def test_files_that_are_no_options(write, content: str, part: str) -> None:
    path = write(content)
    text = message(path)
    assert text.startswith(str(path))
    assert part in text


def test_a_tab_is_explained(write) -> None:
    assert "Indent with spaces, not tabs." in message(write("a:\n\tb: 2\n"))


def test_a_missing_file_shows_what_is_there(write, tmp_path: Path) -> None:
    write(SMALL, "option.yaml")
    text = message(tmp_path / "options.yaml")
    assert (
        text == f"{tmp_path / 'options.yaml'}: no such options file. In that folder: option.yaml."
    )
    assert "does not exist" in message(tmp_path / "nowhere" / "options.yaml")


def test_what_is_no_text_file(tmp_path: Path) -> None:
    binary = tmp_path / "model.ckpt"
    binary.write_bytes(b"PK\x03\x04\xff\xfe\x80")
    assert str(binary) in message(binary)
    assert f"{tmp_path}: " in message(tmp_path)


def test_errors_name_the_file(write) -> None:
    path = write(f"{SMALL}sede: 1\n")
    assert message(path).startswith(f"{path}: sede: unknown option.")


def test_reading_options_does_not_load_the_heavy_libraries() -> None:
    code = (
        "import sys, pet_finetune.config, pet_finetune.config.options_reference; "
        "heavy = {'torch', 'scipy', 'matplotlib', 'vesin', 'metatensor'} & set(sys.modules); "
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""What options are turned into: plain values, losses, notices, the reference page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

from pet_finetune.config.load import load_evaluation, parse_options
from pet_finetune.config.options_reference import option_entries, options_reference
from pet_finetune.config.problems import section_in
from pet_finetune.config.run_options import Options
from pet_finetune.errors import ConfigError

PLAIN: dict[str, Any] = {
    "training_set": {
        "systems": {"read_from": "a.xyz", "length_unit": "angstrom"},
        "targets": {"energy": {"unit": "eV"}},
    }
}


def load(training: Any = None, checkpoint: str | None = None, **raw: Any) -> Any:
    return parse_options({**PLAIN, "architecture": {"training": training}, **raw}, checkpoint)


@pytest.mark.parametrize(
    ("training", "checkpoint", "raw"),
    [
        (None, None, {}),
        ({"learning_rate": 1e-5, "grad_clip_norm": None}, None, {"seed": 4}),
        (None, "m.ckpt", {}),
        ({"finetune": {"method": "heads", "config": {"head_modules": ["h"]}}}, "m.ckpt", {}),
        ({"finetune": {"config": {"rank": 4, "modules_to_save": []}}}, "m.ckpt", {}),
        ({"finetune": {"method": "full"}}, "m.ckpt", {}),
        ({"MODEL_TO_START_WITH": "a", "ALL_SPECIES_PATH": "b", "SELF_CONTRIBUTIONS_PATH": "c"},)
        + (None, {}),
        ({"loss": {"energy": {"type": "mae", "forces": "huber", "weight": 2}}}, None, {}),
        ({"early_stopping": 5, "num_workers": 3}, None, {"wandb": {"project": "x"}}),
        ({"atomic_baseline": {"energy": {1: -1.0}}}, None, {"validation_set": {"indices": [1]}}),
        (None, None, {"training_set": ["a.xyz", "b.xyz"], "test_set": "c.xyz"}),
        (None, None, {"training_set": {"systems": "a", "targets": {"energy": {"virial": "on"}}}}),
        (
            None,
            None,
            {
                "training_set": {
                    "systems": "a",
                    "targets": {"d": {"type": {"cartesian": {"rank": 1}}}},
                    "extra_data": {"charge": {"key": "q"}},
                    "indices": [1, 2],
                }
            },
        ),
    ],
)
def test_resolved_options_describe_the_same_run(training: Any, checkpoint: Any, raw: Any) -> None:
    first = load(training, checkpoint, **raw).options
    plain = first.resolved()
    again = parse_options(OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(plain))))
    assert again.options.resolved() == plain
    assert again.options.training_set == first.training_set
    assert again.options.finetune == first.finetune
    assert again.options.training.loss == first.training.loss
    assert again.options.learning_rate() == first.learning_rate()


def test_resolved_options_hold_plain_values_only() -> None:
    def walk(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        for item in value.values() if isinstance(value, dict) else ():
            walk(item)
        for item in value if isinstance(value, list) else ():
            walk(item)

    walk(load(checkpoint="m.ckpt").options.resolved())


def test_one_loss_for_everything_is_for_the_gradients_too() -> None:
    loss = load({"loss": "huber"}).options.training.loss_for("energy")
    assert (loss.type, loss.forces_term().type, loss.stress_term().type) == ("huber",) * 3


def test_energies_weigh_more_only_where_no_weights_are_given() -> None:
    plain = load().options.training.loss_for("energy")
    assert (plain.weight, plain.forces_term().weight, plain.stress_term().weight) == (10, 1, 1)
    spelled = load({"loss": {"energy": {"type": "mse"}}}).options.training.loss_for("energy")
    assert (spelled.weight, spelled.forces_term().weight) == (1, 1)


def test_a_loss_of_one_target_is_not_for_its_gradients() -> None:
    loss = load({"loss": {"energy": "mae"}}).options.training.loss_for("energy")
    assert (loss.type, loss.forces_term().type, loss.stress_term().type) == ("mae", "mse", "mse")


@pytest.mark.parametrize(
    "given",
    [
        {"forces": {"type": "mae", "weight": 3}},
        {"gradients": {"positions": {"type": "mae", "weight": 3}}},
    ],
)
def test_both_places_of_the_force_loss(given: Any) -> None:
    training = load({"loss": {"energy": given}}).options.training
    term = training.loss_for("energy").forces_term()
    assert (term.type, term.weight) == ("mae", 3.0)
    assert training.loss_for("another").forces_term().type == "mse"


@pytest.mark.parametrize("key", ["stress", "virial"])
def test_stress_and_virial_are_one_loss(key: str) -> None:
    loss = load({"loss": {"energy": {key: "mae"}}}).options.training.loss_for("energy")
    assert loss.stress_term().type == "mae"


@pytest.mark.parametrize(
    ("training", "checkpoint", "raw", "notice"),
    [
        ({"batch_size": 4, "max_atoms_per_batch": 99}, None, {}, "batch_size has no effect"),
        ({"batch_size": 1, "finetune": {"method": "full"}}, "a.ckpt", {}, "soap did worse"),
        ({"min_atoms_per_batch": 9}, None, {}, "min_atoms_per_batch has no effect without"),
        ({"num_workers": 0}, None, {}, "without effect here: architecture.training.num_workers."),
        (None, None, {"print_stats": "on"}, "without effect here: print_stats."),
        (None, None, {"device": "multi-gpu"}, "one GPU is used (device: gpu)."),
        (
            None,
            None,
            {"validation_set": "a.xyz"},
            "validation_set reads a.xyz, which is also trained on",
        ),
        (
            {"finetune": {"inherit_heads": {"energy": "e"}}},
            None,
            {},
            "inherit_heads has no effect: training is from scratch.",
        ),
    ],
)
def test_remarks(training: Any, checkpoint: Any, raw: Any, notice: str) -> None:
    notices = load(training, checkpoint, **raw).notices
    assert any(notice in line for line in notices), notices


def test_a_model_section_beside_a_checkpoint_is_remarked_on() -> None:
    raw = {**PLAIN, "architecture": {"model": {"d_pet": 64}}}
    assert (
        "architecture.model has no effect: the model's shape comes from m.ckpt."
        in parse_options(raw, "m.ckpt").notices
    )
    assert parse_options(raw).notices == ()


def test_older_names_of_the_architecture() -> None:
    raw = {**PLAIN, "architecture": {"name": "nativepet"}}
    loaded = parse_options(raw)
    assert loaded.options.architecture.name == "pet"
    assert loaded.notices == ("architecture.name: nativepet is an older name; today: pet.",)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("llpr", "'llpr' wraps a trained model in metatrain. Here it is an option of"),
        ("soap_bpnn", "expected 'pet', got 'soap_bpnn'."),
    ],
)
def test_of_another_architecture_of_metatrain_its_name_alone_is_told(name: str, told: str) -> None:
    raw = {**PLAIN, "architecture": {"name": name, "training": {"model_checkpoint": "m.ckpt"}}}
    with pytest.raises(ConfigError) as caught:
        parse_options(raw)
    (problem,) = caught.value.problems
    assert problem.startswith(f"architecture.name: {told}")


def test_a_rate_for_adam_is_remarked_on_with_soap() -> None:
    def remarks(**training: Any) -> list[str]:
        training["finetune"] = {"method": "full", "read_from": "m.ckpt"}
        return [line for line in load(training).notices if "for Adam" in line]

    (line,) = remarks(learning_rate=1e-5)
    assert "learning_rate 1e-05 is low for soap (default: 0.0005)" in line
    assert not remarks(learning_rate=1e-5, optimizer="adamw")
    assert not remarks(learning_rate=2e-4)
    assert not remarks()


def test_whether_charges_of_an_evaluation_are_read_is_not_known_yet(tmp_path: Path) -> None:
    (tmp_path / "eval.yaml").write_text(
        "systems: {read_from: a.xyz, length_unit: angstrom}\n"
        "targets: {energy: {unit: eV}}\nextra_data: {charge: {key: q}}\n"
    )
    assert load_evaluation(tmp_path / "eval.yaml")[1] == []


def test_what_metatrain_writes_of_a_run_asks_for_no_label() -> None:
    """Its options_restart.yaml spells out labels that the user left to it, and older names."""
    label = {"read_from": "a.xyz", "reader": None, "key": "stress"}
    energy = {"unit": "eV", "forces": {"key": "F"}, "stress": label}
    other = {"quantity": "energy", "read_from": "a.xyz", "reader": None, "sample_kind": "system"}
    targets = {
        "energy": energy,
        "mtt::dipole": {**other, "unit": "Debye", "type": {"cartesian": {"rank": 1}}},
        "mtt::dos": {**other, "unit": "", "type": "scalar", "num_subtargets": 30},
        "mtt::pbe": {**other, "unit": "hartree", "type": "scalar", "forces": label},
    }
    raw = {
        "training_set": [{"systems": {"read_from": "a.xyz"}, "targets": targets}],
        "architecture": {"training": {"fixed_composition_weights": {"energy": {1: -0.5}}}},
    }
    loaded = parse_options(raw)
    read = loaded.options.training_set[0].targets
    assert (read["energy"].forces.mode, read["energy"].stress.mode) == ("on", "auto")
    assert {name: (one.quantity, one.unit) for name, one in read.items()} == {
        "energy": ("energy", "eV"),
        "mtt::dipole": ("", "Debye"),
        "mtt::dos": ("", ""),
        "mtt::pbe": ("energy", "hartree"),
    }
    assert read["mtt::pbe"].forces.mode == "auto"
    assert loaded.options.training.atomic_baseline == {"energy": {1: -0.5}}
    assert "today: architecture.training.atomic_baseline" in " ".join(loaded.notices)


def test_per_atom_and_sample_kind_that_disagree() -> None:
    target = {"quantity": "charge", "per_atom": True, "sample_kind": "system"}
    raw = {"training_set": [{"systems": "a", "targets": {"q": target}}]}
    with pytest.raises(ConfigError) as caught:
        parse_options(raw)
    assert "training_set[0].targets.q.per_atom: means sample_kind atom" in str(caught.value)
    del target["sample_kind"]
    assert parse_options(raw).options.target_specs()["q"].per_atom


def _sections(section: type[BaseModel]) -> set[type[BaseModel]]:
    found = {section}
    for field in section.model_fields.values():
        inner, _ = section_in(field.annotation)
        if inner is not None and inner not in found:
            found |= _sections(inner)
    return found


def test_every_option_says_what_it_means() -> None:
    for section in _sections(Options):
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.endswith("."), f"{section.__name__}.{name}"


def test_every_entry_of_the_reference_is_complete() -> None:
    entries = option_entries()
    assert len({entry.name for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.type, entry
        assert entry.meaning, entry


def test_the_reference_lists_options_with_type_and_default() -> None:
    page = options_reference()
    assert (
        "| `architecture.training.finetune.config.rank` | a positive integer | `32` | Rank" in page
    )
    assert "| `training_set` | section or list of sections | required |" in page
    assert '| `architecture.model.activation` | `SiLU`, `SwiGLU` | `"SwiGLU"` |' in page
    assert "| `print_stats` | " in page.split("## Accepted without effect")[1]
    assert page.count("\n## General\n") == 1
    for line in page.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (3, 5), line

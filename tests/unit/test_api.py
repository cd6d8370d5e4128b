"""The Python door: from structures in memory to a model, and the words for what is wrong."""

from __future__ import annotations

import inspect
import io
import os
import signal
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from ase.io import Trajectory

import pet_finetune as pf
from logs import logging_as_it_was
from models import random_potential
from pet_finetune import keywords
from pet_finetune.api import relax_structures, run_md
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.config.finetune import METHOD_KEYS, METHOD_SHORTHANDS, FinetuneConfig
from pet_finetune.errors import ConfigError, DataError, SpeciesError, TrainingError
from pet_finetune.log import get_logger, setup_logging, shown_names
from tiny_data import molecules, options, write_options

FAST = {"epochs": 2, "batch_size": 4, "seed": 1, "device": "cpu", "check": False}


@pytest.fixture(autouse=True, scope="module")
def _leave_logging_as_it_was():
    """A run sets logging up for the process, which tests that come later do not expect."""
    with logging_as_it_was():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.ckpt"
    return save_checkpoint(path, random_potential(dtype=torch.float32))


@pytest.fixture(scope="module")
def result(base):
    before, random = set(os.listdir()), torch.get_rng_state()
    shown, printed = warnings.showwarning, io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        made = pf.finetune(
            pf.load(base),
            molecules(8),
            validation=0.25,
            test=molecules(2, seed=3),
            method=pf.Lora(rank=2),
            features=[pf.Retention(mode="off")],
            **FAST,
        )
    assert "repulsion at short distances" in printed.getvalue()
    assert tempfile.gettempdir() not in printed.getvalue(), "files that are removed are not named"
    assert set(os.listdir()) == before, "no file need be written"
    assert torch.equal(torch.get_rng_state(), random), "the script's random numbers are its own"
    assert warnings.showwarning is shown
    return made


def column(history, name):
    return np.asarray(history[name])


def test_a_list_of_atoms_becomes_a_model(result):
    assert result.finished
    assert result.folder is None
    assert result.adapter is not None
    assert result.adapter.config.rank == 2
    assert result.adapter.config.alpha == 2  # follows the rank, as the schema says
    assert column(result.history, "epoch").tolist() == [1, 2]
    assert np.isfinite(column(result.history, "validation/energy/forces_mae")).all()
    after = result.errors["after"]["test"]["energy"]
    assert after["forces_mae"] > 0
    assert [c.header for c in result.table.columns][-1] == "fine-tuned"


def test_the_calculator_is_the_model(result):
    atoms = molecules(1, seed=9)[0]
    labelled = pf.evaluate(result.model, [atoms], device="cpu")
    atoms.calc = result.calculator(device="cpu")
    (predicted,) = labelled.predictions["structures"]
    assert atoms.get_potential_energy() == pytest.approx(float(predicted["energy"]), rel=1e-6)
    np.testing.assert_allclose(atoms.get_forces(), predicted["energy/forces"], atol=1e-4)


def test_a_notebook_shows_table_and_curves(result):
    pytest.importorskip("matplotlib")
    text = result._repr_html_()
    assert "energy MAE" in text
    assert "<svg" in text
    assert "--after: #" in text  # the curves' colours
    assert len(repr(result)) < 200
    titles = [axes.get_title() for axes in result.plot().axes]
    assert any("forces MAE" in title for title in titles)


@pytest.mark.slow
def test_a_folder_gets_what_the_command_line_writes(base, tmp_path):
    folder = tmp_path / "run"
    frames = molecules(8)
    memory = pf.finetune(pf.load(base), frames, 0.25, method="heads", folder=folder, **FAST)
    names = {path.name for path in folder.iterdir()}
    assert {"best_model.ckpt", "last.ckpt", "options.yaml", "train.csv", "results.json",
            "training_set.db"} <= names  # fmt: skip
    assert "foundation.ckpt" not in names  # an unchanged model is read from its own file
    assert memory.adapter is None
    again = pf.finetune(None, folder / "options.yaml", folder=tmp_path / "again", check=False)
    np.testing.assert_array_equal(
        column(memory.history, "train/energy/forces_mae"),
        column(again.history, "train/energy/forces_mae"),
    )
    with pytest.raises(TrainingError, match="holds a run already"):
        pf.finetune(base, frames[:2], folder=folder, **FAST)
    assert len(ase.io.read(folder / "training_set.db", ":")) == 8, "nothing was overwritten"


def test_options_that_are_wrong_leave_nothing_behind(base, tmp_path):
    with pytest.raises(ConfigError):
        pf.finetune(base, molecules(4), folder=tmp_path / "run", epochs=0)
    assert not [p for p in (tmp_path / "run").iterdir() if p.suffix in (".db", ".ckpt")]


def test_errors_are_those_of_the_options_with_the_caller_s_names(base):
    with pytest.raises(ConfigError) as caught:
        pf.finetune(
            base,
            molecules(4),
            epochs=0,
            metod=1,
            method=pf.Lora(rnk=1),
            features=[pf.Anchor(type="x")],
            targets={"energy": {"kye": "x"}},
        )
    lines = caught.value.problems
    starts = ("epochs: expected a positive integer or null, got 0.", "metod: unknown option.",
              "method.rnk: unknown option. Did you mean 'rank'?", "Anchor.type: expected one of",
              "train.targets.energy.kye: unknown option. Did you mean 'key'")  # fmt: skip
    for start in starts:
        assert any(line.startswith(start) for line in lines), (start, lines)
    assert any("(option architecture.training.num_epochs)" in line for line in lines)


def test_sections_of_the_same_kind_and_strangers_are_refused(base):
    for features in ([pf.Replay(), pf.Replay()], ["replay"], [pf.Lora()], pf.Lora()):
        with pytest.raises(ConfigError, match="features: "):
            pf.finetune(base, molecules(4), features=features)


def test_a_tree_of_options_and_keywords_over_it(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ase.io.write("train.xyz", molecules(8), format="extxyz")
    ase.io.write("test.xyz", molecules(2), format="extxyz")
    write_options(tmp_path / "options.yaml", options())
    for tree in (options(), "options.yaml"):
        made = pf.finetune(base, tree, epochs=1, method=pf.Heads(), check=False)
        assert column(made.history, "epoch").tolist() == [1]
        assert "test" in made.errors["after"]


def test_features_of_the_caller_s_own_take_part(base):
    class Counting(pf.Feature):
        name = "counting"
        steps = 0

        def step_ended(self, progress):
            self.steps += 1

    mine = Counting()
    pf.finetune(base, molecules(8), 0.25, features=[mine], **{**FAST, "batch_size": 3})
    assert mine.steps == 4


def test_an_interrupted_run_without_a_folder_gives_its_best_model(base, capsys):
    class Interrupt(pf.Feature):
        name = "interrupt"

        def epoch_ended(self, record):
            signal.raise_signal(signal.SIGINT)

    result = pf.finetune(base, molecules(6), validation=0.34, features=[Interrupt()], **FAST)
    assert not result.finished
    assert len(column(result.history, "epoch")) == 1
    told = capsys.readouterr().err
    assert "interrupted; the result is the best model so far" in told
    assert "--restart" not in told


def test_a_changed_model_is_what_training_starts_from(base, tmp_path):
    model = pf.load(base)
    with torch.no_grad():
        next(model.potential.network.parameters()).add_(0.5)
    pf.finetune(model, molecules(6), 0.25, folder=tmp_path / "run", final_eval=False, **FAST)
    start = pf.load(tmp_path / "run" / "foundation.ckpt")
    for ours, theirs in zip(
        model.potential.network.parameters(), start.potential.network.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_structures_can_be_inspected(base):
    frames = molecules(4)
    frames[2].calc.results["forces"] = frames[2].calc.results["forces"] * np.nan
    found = pf.inspect(frames, pf.load(base), validation=frames[:1], seconds=0.5)
    assert found.errors
    assert found.errors[0].code in found._repr_html_()
    assert {frames.file for one in found.findings for frames in one.where} == {
        "structures", "validation"
    }  # fmt: skip
    assert "pet-finetune-" not in repr(found)


def test_structures_without_labels_are_predicted(base):
    atoms = molecules(1)[0]
    atoms.calc = None
    made = pf.evaluate(base, atoms, device="cpu")
    assert made.predictions["structures"][0]["energy/forces"].shape == (len(atoms), 3)


def test_generators_and_trajectories_are_structures_too(base, tmp_path):
    frames = molecules(3)
    ase.io.write(tmp_path / "a.traj", frames)
    rows = ase.db.connect(tmp_path / "a.db")
    for atoms in frames:
        rows.write(atoms)
    errors = [
        pf.evaluate(base, given, device="cpu").errors["structures"]["energy"].mae("energy")
        for given in (frames, iter(frames), Trajectory(str(tmp_path / "a.traj")), rows.select())
    ]
    with pytest.raises(DataError, match="expected structures, or names of files, got float64"):
        pf.evaluate(base, np.zeros(3))
    assert errors == pytest.approx([errors[0]] * 4)
    arguments = keywords.Arguments(tmp_path)
    arguments.data(iter(frames), None)
    assert arguments.tree["training_set"]["systems"]["read_from"].endswith("training_set.db")


def test_errors_name_structures_in_memory_as_the_caller_did(base):
    frames = [atoms.copy() for atoms in molecules(4)]
    for atoms in frames:
        atoms.calc = EMT()
    for call, name in (
        (lambda: pf.finetune(base, frames, validation=0.25, **FAST), "train"),
        (lambda: pf.evaluate(base, frames, labels=pf.LabelNames(key="E")), "structures"),
    ):
        words = rf" in {name} \(whose calculators have computed nothing yet\), but frame 0"
        with pytest.raises(DataError, match=words):
            call()
    frames[1].numbers[0] = 79
    with pytest.raises(SpeciesError, match="frame 1 of structures"):
        pf.evaluate(base, frames)


def test_the_log_names_structures_in_memory_as_the_caller_did(tmp_path):
    told = io.StringIO()
    with logging_as_it_was(), keywords.as_files(molecules(1), "validation") as (files, _):
        setup_logging().handlers[0].targets[0].setStream(told)
        get_logger("x").info("frame 0 of %s", files[0])
    get_logger("x").info("frame 0 of %s", files[0])
    assert "frame 0 of validation\n" in told.getvalue()
    assert not shown_names


def test_no_structures(base):
    with pytest.raises(DataError, match="empty"):
        pf.finetune(base, [])
    with pytest.raises(DataError, match="none"):
        pf.evaluate(base, [])


def test_arguments_are_plain_options_whatever_holds_them(base, tmp_path):
    given = {"a": np.int64(3), "b": [np.float32(0.5)], "c": tmp_path, "d": torch.device("cpu"),
             "e": np.array([1, 2])}  # fmt: skip
    plain = {"a": 3, "b": [0.5], "c": str(tmp_path), "d": "cpu", "e": [1, 2]}
    assert keywords.as_written(given) == plain
    arguments = keywords.Arguments(tmp_path)
    arguments.data(molecules(4), None)
    arguments.method(pf.Heads)
    arguments.features([pf.Replay])
    arguments.options({"epochs": np.int32(7)})
    options = arguments.parse(str(base), "finetune").options
    assert options.training.num_epochs == 7
    assert options.finetune.method == "heads"
    assert options.finetune.replay is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 1, "num_epochs": 2}, "epochs and num_epochs set the same option"),
        ({"method": pf.Lora(), "finetune": {}}, "method and finetune set the same option"),
        ({"method": {"rank": 2}}, "method: expected one of"),
    ],
)
def test_what_is_said_twice_or_in_another_way_is_refused(base, given, message):
    with pytest.raises(pf.PetFinetuneError, match=message):
        pf.finetune(base, molecules(4), **given)


def test_models_and_structures_of_another_kind_are_refused(base):
    for wrong in (pf.evaluate, pf.finetune, pf.inspect):
        with pytest.raises(pf.PetFinetuneError, match=r"expected .*, got (list|int)"):
            wrong(*([5] if wrong is pf.inspect else [molecules(1), molecules(1)]))
    with pytest.raises(pf.PetFinetuneError, match="structures: expected structures"):
        pf.evaluate(base, pf.load(base))
    for call, message in (
        (lambda: pf.PETCalculator(None), "model: expected a checkpoint .* got NoneType"),
        (lambda: pf.PETCalculator(pf.load_checkpoint(base)), "got Checkpoint. Give its attribute"),
        (lambda: pf.evaluate(base, molecules(1), labels={}), r"labels: expected a pf.LabelNames"),
        (lambda: pf.evaluate(base, molecules(1), how=3), r"how: expected a pf.EvaluationSettings"),
        (lambda: run_md(base, molecules(1)[0], {"steps": 1}), r"settings: expected a MDSettings"),
        (lambda: relax_structures(base, molecules(1)[0], "o.xyz", None), "expected a RelaxSet"),
        (lambda: pf.finetune(base, molecules(4), targets="E"), "targets: expected a dictionary"),
        (lambda: pf.inspect([]), "structures: there are none"),
    ):
        with pytest.raises(pf.PetFinetuneError, match=message):
            call()


def test_methods_are_those_of_the_schema():
    own = {cls.name: cls for cls in vars(keywords).values()
           if isinstance(cls, type) and issubclass(cls, pf.Lora.__base__) and cls.name}  # fmt: skip
    assert set(own) == {*METHOD_KEYS, *METHOD_SHORTHANDS}
    for name, cls in own.items():
        of, given = METHOD_SHORTHANDS.get(name, (name, {}))
        found = inspect.signature(cls).parameters
        assert set(found) == set(METHOD_KEYS[of]) - set(given)
        for key, parameter in found.items():
            assert parameter.default == FinetuneConfig.model_fields[key].default
        assert cls.__name__ in pf.__all__


SIGNATURES = {
    "load": ["path"],
    "finetune": ["model", "train", "validation", "test", "targets", "method", "features", "folder",
                 "check", "options"],
    "evaluate": ["model", "structures", "adapter", "target", "device", "labels", "as_tensormaps",
                 "how"],
    "inspect": ["structures", "model", "validation", "test", "systems", "device", "seconds"],
    "export": ["model", "output", "settings"],
    "Anchor": ["type", "strength", "structures", "samples"],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert list(inspect.signature(getattr(pf, name)).parameters) == SIGNATURES[name]


def test_public_names_are_documented():
    page = Path(__file__).parents[2].joinpath("docs/api.md").read_text(encoding="utf-8")
    missing = [name for name in pf.__all__ if f"pet_finetune.{name}" not in page]
    assert missing == ["__version__"]


@pytest.mark.slow
def test_a_loaded_model_is_exported(base, tmp_path):
    outcome = pf.export(pf.load(base), tmp_path / "model.pt")
    assert outcome.path.exists()
    assert outcome.difference < 1e-4


def test_predictions_and_features_as_tensor_maps(base):
    frames = molecules(3)
    found = pf.evaluate(base, frames, device="cpu", as_tensormaps=True)
    block = found.tensormaps["structures"]["energy"].block()
    rows = found.predictions["structures"]
    assert block.values.shape == (3, 1)
    assert [float(row["energy"]) for row in rows] == pytest.approx(block.values[:, 0].tolist())
    forces = np.concatenate([row["energy/forces"] for row in rows])
    gradient = block.gradient("positions")
    np.testing.assert_allclose(-gradient.values[:, :, 0], forces, atol=1e-4)
    assert gradient.samples.values[:, 0].tolist() == [0] * 6 + [1] * 3 + [2] * 6
    wanted = {"energy": "atom", "mtt::feature::gnn_layers.0_node": "atom"}
    atoms = pf.evaluate(base, frames, device="cpu", as_tensormaps=wanted).tensormaps["structures"]
    assert list(atoms) == list(wanted)
    assert len(atoms["mtt::feature::gnn_layers.0_node"].block().samples) == 15
    sums = torch.zeros(3, dtype=torch.float64)
    samples = atoms["energy"].block().samples.values[:, 0].long()
    sums.index_add_(0, samples, atoms["energy"].block().values[:, 0])
    torch.testing.assert_close(sums, block.values[:, 0])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["mtt::feature::gnn_layers.0_nod"], "Did you mean 'mtt::feature::gnn_layers.0_node'?"),
        ({"energy": "atoms"}, "'energy' is asked for 'atoms', not 'system' or 'atom'"),
        ({"mtt::feature::node_backbone.0": "system"}, "has no values of structures"),
    ],
)
def test_tensor_maps_that_there_are_not(base, wanted, message):
    with pytest.raises(ConfigError) as caught:
        pf.evaluate(base, molecules(1), device="cpu", as_tensormaps=wanted)
    assert message in str(caught.value)

"""Bad input: one message that says what, where and what to do; never a traceback."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from models import random_potential
from pet_finetune.checkpoint.native import save_checkpoint
from tiny_data import label, molecules, options, write_frames, write_options

LORA = ("train", "options.yaml", "-c", "base.ckpt", "-o", "run")
TRAINING = "architecture.training"


@dataclass(frozen=True)
class Case:
    """Something wrong, the command that meets it, and the words its message must have."""

    name: str
    arguments: tuple[str, ...]
    words: tuple[str, ...]
    prepare: Callable[[], object] = lambda: None


def replace_data(change: Callable[[list[Atoms]], object], path: str = "train.xyz") -> None:
    frames = molecules(10)
    change(frames)
    write_frames(Path(path), frames)


def nan_forces(frames):
    for index in (3, 7):
        forces = frames[index].calc.results["forces"].copy()
        forces[0, 1] = np.nan
        frames[index].calc.results["forces"] = forces


def unknown_species(frames):
    frames[4] = label(Atoms("FH", [[0, 0, 0], [0, 0, 0.95]], info={}))


def charged(frames):
    for atoms in frames:
        atoms.info["charge"] = 3


def energy_under_another_name(frames):
    for atoms in frames:
        atoms.info["dft_energy"] = atoms.calc.results.pop("energy")


def options_file(training=None, **top):
    return lambda: write_options(Path("options.yaml"), options(training, **top))


#: The forces in the file as a property of another name.
VECTORS = {"key": "forces", "sample_kind": "atom", "type": {"cartesian": {"rank": 1}}}


def targets(**named):
    return {"training_set": {"systems": "train.xyz", "targets": named}, "test_set": 0.1}


def truncated():
    whole = Path("base.ckpt").read_bytes()
    Path("cut.ckpt").write_bytes(whole[: len(whole) // 2])


class _Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def hostile():
    """A checkpoint that would run a command when it is unpickled."""
    with zipfile.ZipFile("hostile.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Hostile(), protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def other_architecture():
    torch.save({"architecture_name": "soap_bpnn", "model_ckpt_version": 3}, "soap.ckpt")


def made_adapter():
    from pet_finetune.adapters.adapter_config import AdapterConfig
    from pet_finetune.adapters.inject import inject
    from pet_finetune.adapters.peft_files import save_adapter

    model = random_potential(seed=4)
    inject(model, AdapterConfig(rank=1))
    save_adapter(model, "adapter", "omat-s")


def conditioned():
    save_checkpoint("base.ckpt", random_potential(system_conditioning=True, max_charge=2))
    replace_data(charged)


def a_run_with_other_data():
    from pet_finetune.cli import main

    main(
        ["train", "options.yaml", "-c", "base.ckpt", "-o", "run", "-r", f"{TRAINING}.num_epochs=1"]
    )
    replace_data(lambda frames: frames.reverse())


CASES = [
    # files
    Case("options file missing", ("train", "optoins.yaml"),
         ("optoins.yaml", "no such options file", "options.yaml")),
    Case("data file missing", (*LORA, "-r", "training_set.systems.read_from=trian.xyz"),
         ("'trian.xyz' does not exist", "Did you mean 'train.xyz'?")),
    Case("checkpoint missing", ("train", "options.yaml", "-c", "bose.ckpt"),
         ("bose.ckpt: no such checkpoint file", "base.ckpt")),
    Case("file to evaluate missing", ("eval", "base.ckpt", "tast.xyz"),
         ("'tast.xyz' does not exist", "Did you mean 'test.xyz'?")),
    Case("data file empty", LORA, ("train.xyz is empty", "no structures"),
         lambda: Path("train.xyz").write_text("")),
    Case("data file cut off", LORA, ("train.xyz: the last frame, 0", "line 1", "cut off"),
         lambda: Path("train.xyz").write_text("3\nnothing like a structure\nO 1 2\n")),
    # data
    Case("wrong key", (*LORA, "-r", "training_set.targets.energy.key=energi"),
         ("'energi'", "train.xyz", "10 of 10", "Did you mean 'energy'?")),
    Case("key with another name in the file", LORA,
         ("'energy'", "frame 0 has no such value", "Did you mean 'dft_energy'?"),
         lambda: replace_data(energy_under_another_name)),
    Case("wrong unit of energy", (*LORA, "-r", "training_set.targets.energy.unit=eV/atom"),
         ("training_set.targets.energy.unit", "'eV/atom'", "Allowed", "kcal/mol")),
    Case("wrong unit of length", (*LORA, "-r", "training_set.systems.length_unit=amstrong"),
         ("length_unit", "'amstrong'", "Did you mean 'angstrom'?")),
    Case("nothing left to train on", (*LORA, "-r", "validation_set=0.95"),
         ("train.xyz: of 10 structures", "none is left to train on", "smaller fractions")),
    Case("fractions that add up to everything",
         (*LORA, "-r", "validation_set=0.5", "-r", "test_set=0.5"),
         ("validation_set (0.5) and test_set (0.5)", "nothing to train on")),
    Case("unknown species", LORA,
         ("F (Z=9): 1 atoms in 1 structures: frame 4 of train.xyz", "The model knows: H C O Si"),
         lambda: replace_data(unknown_species)),
    Case("NaN forces", LORA,
         ("forces of target 'energy'", "NaN or infinite in frames 3, 7 of train.xyz"),
         lambda: replace_data(nan_forces)),
    Case("forces that no frame has", (*LORA, "-r", "training_set.targets.energy.forces.key=f"),
         ("forces", "'f'", "train.xyz")),
    Case("charges the model does not know", LORA,
         ("frame 0 of train.xyz: the total charge is 3", "from -2 to 2", "10 of"), conditioned),
    Case("frame in two sets", LORA, ("test_set.indices: frames 1 are also in validation_set",),
         options_file(validation_set={"indices": [0, 1]}, test_set={"indices": [1, 2]})),
    # options
    Case("misspelt option", (*LORA, "-r", f"{TRAINING}.num_epoch=5"),
         (f"{TRAINING}.num_epoch: unknown option", "Did you mean 'num_epochs'?")),
    Case("option of the wrong kind", (*LORA, "-r", f"{TRAINING}.batch_size=many"),
         (f"{TRAINING}.batch_size", "expected a positive integer", "many")),
    Case("several problems are shown together",
         (*LORA, "-r", f"{TRAINING}.num_epoch=5", "-r", "device=gpuu", "-r", "validation_set=2"),
         ("num_epoch", "device", "validation_set")),
    Case("-c against finetune.read_from",
         (*LORA, "-r", f"{TRAINING}.finetune.read_from=other.ckpt"),
         ("is 'other.ckpt', but -c gives 'base.ckpt'", "Remove one")),
    Case("-c with --restart", ("train", "options.yaml", "-c", "base.ckpt", "--restart", "auto"),
         ("-c starts a new run", "give one of them")),
    Case("lora without a model", ("train", "options.yaml"),
         ("lora changes an existing model, but none is given", "-c"),
         options_file({"finetune": {"method": "lora"}})),
    Case("LORA_RANK against today's rank", LORA,
         ("LORA_RANK", "is 4, but today's spelling", "rank is 8"),
         options_file({"LORA_RANK": 4, "finetune": {"config": {"rank": 8}}})),
    Case("LoRA's settings with heads", LORA, ("belongs to method lora, but the method is heads",),
         options_file({"finetune": {"method": "heads", "config": {"rank": 8}}})),
    Case("pattern that matches no layer",
         (*LORA, "-r", f"{TRAINING}.finetune.config.target_modules=[attention.in_linear]"),
         ("'attention.in_linear' matches no linear layer", "attention.input_linear")),
    Case("module to save that does not exist",
         (*LORA, "-r", f"{TRAINING}.finetune.config.modules_to_save=[haeds]"),
         ("modules_to_save: the model has no module 'haeds'", "node_heads")),
    Case("inheriting heads that are not there", LORA,
         ("finetune.inherit_heads.new", "no target 'enegry'", "Did you mean 'energy'?"),
         options_file(
             {"finetune": {"inherit_heads": {"new": "enegry"}}},
             training_set={"systems": "train.xyz",
                           "targets": {"new": {"quantity": "energy", "key": "energy"}}},
             test_set=0.1)),
    Case("target with a name that torch cannot have", LORA,
         ("a target cannot be called 'energy.pbe'",),
         options_file(training_set={"systems": "train.xyz", "targets": {
             "energy.pbe": {"quantity": "energy", "key": "energy"}}}, test_set=0.1)),
    Case("inheriting the heads of another kind of target", LORA,
         ("finetune.inherit_heads.f: 'f' is a vector for each atom, but 'energy' is a scalar for "
          "each structure",),
         options_file({"finetune": {"inherit_heads": {"f": "energy"}}}, **targets(f=VECTORS))),
    Case("target that the model knows as something else", LORA,
         ("training_set.targets.energy: it is a vector for each atom here, but a scalar for each "
          "structure in the starting model",),
         options_file(**targets(energy=VECTORS))),
    Case("target that no frame has", LORA, ("under 'dipole'", "has no such value", "`key`"),
         options_file(**targets(dipole={"type": {"cartesian": {"rank": 1}}}))),
    Case("values of atoms for a target of structures", LORA,
         ("expected one number for each structure", "sample_kind: atom"),
         options_file(**targets(q={"key": "forces"}))),
    Case("unit of another quantity", LORA,
         ("non_conservative_forces.unit: Unknown force unit 'eV'", "for instance eV/A"),
         options_file(**targets(non_conservative_forces={"key": "forces", "unit": "eV"}))),
    Case("direct forces of another form", LORA,
         ("non_conservative_forces.type: a target named non_conservative_forces is a vector for "
          "each atom", "cartesian: {rank: 1}"),
         options_file(**targets(non_conservative_forces={"key": "forces", "type": "scalar"}))),
    Case("direct forces from a key of structures", LORA,
         ("have the shape ()", "expected 3 numbers for each atom"),
         options_file(**targets(non_conservative_forces={"key": "energy"}))),
    Case("direct stress of molecules", LORA,
         ("no frame of train.xyz is periodic in all three directions", "Leave the target out"),
         options_file(**targets(non_conservative_stress={"key": "energy"}))),
    Case("several targets for a committee", LORA,
         ("finetune.ensemble: a committee is of one energy", "energy, non_conservative_forces"),
         options_file({"finetune": {"ensemble": 2}}, **targets(
             energy={}, non_conservative_forces={"key": "forces"}))),
    Case("batches that are all left out",
         (*LORA, "-r", f"{TRAINING}.max_atoms_per_batch=7", "-r",
          f"{TRAINING}.min_atoms_per_batch=7"),
         ("min_atoms_per_batch (7) leaves out every batch",)),
    Case("metric without its labels", LORA,
         ("best_model_metric 'forces_mae'", "forces"),
         options_file({"best_model_metric": "forces_mae", "loss": {
             "energy": {"forces": {"weight": 0.0}}}})),
    Case("GPU that is not there", (*LORA, "-r", "device=cuda:7"), ("device: 'cuda:7'", "GPU")),
    Case("16 bits", (*LORA, "-r", "base_precision=16"), ("base_precision", "16 bits")),
    # output
    Case("output folder that cannot be written",
         ("train", "options.yaml", "-c", "base.ckpt", "-o", "options.yaml/run"),
         ("Cannot write to the output folder 'options.yaml/run'", "-o FOLDER")),
    Case("output folder before anything is read",
         ("train", "options.yaml", "-o", "options.yaml/run", "-r",
          "training_set.systems.read_from=trian.xyz"),
         ("Cannot write to the output folder",)),
    Case("output folder with the user's options file",
         ("train", "options.yaml", "-c", "base.ckpt", "-o", "."),
         ("would replace your options file 'options.yaml'", "-o FOLDER")),
    Case("nothing to restart", ("train", "options.yaml", "--restart", "outputs"),
         ("there is no file 'outputs'",)),
    Case("resuming with other data", ("train", "options.yaml", "--restart", "run"),
         ("train set is not the one that run/splits.json was written for", "Start a new run"),
         a_run_with_other_data),
    # checkpoints and adapters
    Case("truncated checkpoint", ("train", "options.yaml", "-c", "cut.ckpt", "-o", "run"),
         ("cut.ckpt", "damaged"), truncated),
    Case("hostile checkpoint", ("info", "hostile.ckpt"),
         ("hostile.ckpt", "system", "refused", "nothing in the file was executed"), hostile),
    Case("checkpoint of another architecture", ("info", "soap.ckpt"),
         ("soap.ckpt", "architecture 'soap_bpnn'"), other_architecture),
    Case("something else as a checkpoint", ("info", "train.xyz"),
         ("train.xyz: not a checkpoint",)),
    Case("adapter on another base",
         ("eval", "base.ckpt", "test.xyz", "--adapter", "adapter"),
         ("'adapter' belongs to the base 'omat-s'", "this model has the fingerprint"),
         made_adapter),
    Case("folder without adapter", ("eval", "base.ckpt", "test.xyz", "--adapter", "nowhere"),
         ("There is no adapter in 'nowhere'", "adapter_config.json")),
    # eval
    Case("eval without a model", ("eval", "options.yaml"), ("eval options.yaml -c MODEL",)),
    Case("eval without files", ("eval", "base.ckpt"), ("name the files", "eval MODEL FILE...")),
    Case("eval with options and files", ("eval", "options.yaml", "test.xyz", "-c", "base.ckpt"),
         ("'test.xyz' is one file too many",)),
    Case("eval with -c and no options", ("eval", "test.xyz", "-c", "base.ckpt"),
         ("the first argument is an options file",)),
    Case("eval with -r and no options", ("eval", "base.ckpt", "test.xyz", "-r", "seed=1"),
         ("-r changes an option, but no options file is given",)),
    Case("eval of a target that is not there",
         ("eval", "base.ckpt", "test.xyz", "--target", "enrgy"),
         ("no target 'enrgy'", "Did you mean 'energy'?")),
    Case("eval of a target the options lack",
         ("eval", "options.yaml", "-c", "base.ckpt", "--target", "enrgy"),
         ("training_set.targets has no 'enrgy'", "Did you mean 'energy'?")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_message_and_no_traceback(here, command, case):
    case.prepare()
    answer = command(*case.arguments)
    assert answer.code == 1, answer.err
    assert answer.out == ""
    messages = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert "Traceback" not in answer.err
    message = answer.err[answer.err.index("error: ") :]
    for word in case.words:
        assert word in message
    assert not Path("executed").exists()


def test_the_log_of_a_failed_run_has_the_message_too(here, command):
    answer = command(*LORA, "-r", "validation_set=0.95")
    message = answer.err.split("error: ")[1]
    assert message in Path("run/train.log").read_text()
    assert answer.err.count("none is left to train on") == 1

"""Compiled training steps have the gradients of plain ones, whatever trains and is asked for."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from dataclasses import replace

import ase.io
import numpy as np
import pytest
import torch

from models import PROPERTIES, crystal, ethanol, lone_atom, random_potential, slab, trained_adapter
from pet_finetune import PETCalculator, graph
from pet_finetune.adapters.inject import freeze
from pet_finetune.backends import graphs
from pet_finetune.config.target import TargetLoss
from pet_finetune.data.labelled_batch import LabelledBatch, batch_from_atoms, collate
from pet_finetune.data.neighbors import structure_neighbors
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.errors import ConfigError
from pet_finetune.model import compiled
from pet_finetune.model.compiled import CompiledPredictions
from pet_finetune.training.compiled_step import CompiledStep
from pet_finetune.training.evaluation import EvaluationSettings, evaluate_files
from pet_finetune.training.objectives import Objective, batch_loss
from trainers import curve, make_trainer, watch

HEADS = ["node_heads", "edge_heads", "node_last_layers", "edge_last_layers"]
SLOW = pytest.mark.slow
ONE = {"num_gnn_layers": 1}
#: Of each kind: how the model is made, what trains, and whether stress and other targets are
#: asked for.
KINDS = {
    "lora": ({}, {}, True, False),
    "targets": (ONE, {"use_dora": True}, True, True),
    "full": (ONE, None, True, False),
    "heads": (ONE, "heads", True, False),
    "adaptive": ({"num_neighbors_adaptive": 4.0, "zbl": True, **ONE}, {}, True, False),
    "first": (
        {"featurizer_type": "residual", "transformer_type": "PostLN", "activation": "SiLU",
         "normalization": "LayerNorm", "cutoff_function": "Cosine", "d_node": 8, **ONE},
        None, False, False,
    ),
    # Of the fewest operations, for the compiler itself.
    "smallest": (
        {"featurizer_type": "residual", "transformer_type": "PostLN", "activation": "SiLU",
         "normalization": "LayerNorm", "cutoff_function": "Cosine", "d_node": 8, **ONE},
        "heads", False, False,
    ),
    "conditioned": ({"system_conditioning": True, **ONE}, {}, False, False),
}  # fmt: skip
OF_KINDS = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k == "targets" else SLOW) for k in KINDS]
)
FIRST = [ethanol(), crystal()]
OTHERS = [[crystal(), ethanol(), slab(), lone_atom()], [slab(), ethanol()]]


def model_and_objectives(kind):
    hypers, method, stress, others = KINDS[kind]
    model = random_potential(**hypers)
    objectives = {"energy": Objective("energy", TargetLoss(weight=2.0), True, stress, 0.7)}
    if others:
        for spec in (PROPERTIES[0], PROPERTIES[2], PROPERTIES[4]):
            model.add_target(spec)
            objectives[spec.name] = Objective(
                spec.name, TargetLoss(type="huber", delta=0.3), False, False, 0.4, energy=False
            )
        model.double()
    if method == "heads":
        freeze(model, HEADS)
    elif method is not None:
        trained_adapter(model, **method)
        for name, parameter in model.network.named_parameters():
            if others and name.startswith(tuple(HEADS)):
                parameter.requires_grad_()
    return model.train(), objectives


def batch_of(model, frames) -> LabelledBatch:
    """With labels by chance, one of them unknown."""
    generator = torch.Generator().manual_seed(len(frames))
    structures = [atoms_to_structure(atoms, i) for i, atoms in enumerate(frames)]
    batch = collate([(s, structure_neighbors(s, model.cutoff)) for s in structures], torch.float64)
    graph, labels, kinds = batch.graph, {}, {}
    for name, spec in model.targets.items():
        rows = graph.num_atoms if spec.per_atom else graph.num_structures
        shapes = {name: (rows, *spec.shape)}
        if spec.is_energy:
            shapes[f"{name}/forces"] = (graph.num_atoms, 3)
            shapes[f"{name}/stress"] = (graph.num_structures, 3, 3)
        else:
            kinds[name] = spec.label_kind
        for label, shape in shapes.items():
            labels[label] = torch.randn(shape, generator=generator, dtype=torch.float64)
            labels[label][0] = torch.nan
            if label == "energy/forces":
                labels[f"{label}/weights"] = torch.rand(graph.num_atoms).double()
    return replace(batch, labels=labels, kinds=kinds)


def plain(model, batch, objectives, parameters):
    wanted = {name: (o.forces, o.stress) for name, o in objectives.items()}
    predictions = model.predict_targets(batch.graph, wanted, create_graph=True)
    loss = batch_loss(batch, predictions, objectives)
    return loss, predictions, torch.autograd.grad(loss, parameters, allow_unused=True)


def check(kind, step, model, objectives, frames):
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = batch_of(model, frames)
    found = step(batch, objectives, parameters)
    loss, predictions, gradients = plain(model, batch, objectives, parameters)
    assert found is not None
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(
        found.predictions["energy"].forces, predictions["energy"].forces.detach()
    )
    assert found.predictions.keys() == predictions.keys()
    used = 0
    for own, other in zip(found.gradients, gradients, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, other, rtol=1e-7, atol=1e-9)
            used += 1
    assert used > 3


def step_of(model, objectives):
    wanted = {name: (o.forces, o.stress) for name, o in objectives.items()}
    return CompiledStep(model, wanted, None)


@pytest.fixture
def followed_only(monkeypatch):
    """The graphs as Inductor is given them, computed operation by operation."""
    made = []

    def follow(what, key, device, function, inputs, free):
        made.append(key)
        return graphs.followed(function, inputs, free)[0]

    monkeypatch.setattr(compiled, "compiled_graph", follow)
    return made


@OF_KINDS
def test_one_graph_has_the_gradients_of_batches_of_all_sizes(kind, followed_only):
    model, objectives = model_and_objectives(kind)
    step = step_of(model, objectives)
    for frames in (FIRST, *OTHERS):
        check(kind, step, model, objectives, frames)
    assert len(followed_only) == 1


def halves(counts, num_tokens):
    half = len(counts) // 2
    return [(half, int(counts[half - 1]) + 1), (len(counts), int(counts[-1]) + 1)]


@SLOW
def test_atoms_in_two_rectangles_have_a_graph_of_their_own(followed_only, monkeypatch):
    model, objectives = model_and_objectives("heads")
    step = step_of(model, objectives)
    check("heads", step, model, objectives, FIRST)

    monkeypatch.setattr(graph, "_cuts", halves)  # as of batches with more empty slots than these
    for frames in (FIRST, OTHERS[1]):
        check("heads", step, model, objectives, frames)
    assert len(followed_only) == 2


@SLOW
def test_weights_and_scales_of_the_loss_need_no_other_graph(followed_only):
    model, objectives = model_and_objectives("heads")
    step = step_of(model, objectives)
    check("heads", step, model, objectives, FIRST)
    objectives = {"energy": Objective("energy", TargetLoss(weight=0.1), True, True, 3.0)}
    check("heads", step, model, objectives, FIRST)
    assert len(followed_only) == 1
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(1.1)
    check("heads", step, model, objectives, FIRST)
    assert len(followed_only) == 1


@SLOW
def test_one_structure_and_what_trains_later_have_graphs_of_their_own(followed_only):
    model, objectives = model_and_objectives("heads")
    step = step_of(model, objectives)
    for frames in ([ethanol()], [crystal()], FIRST):
        check("heads", step, model, objectives, frames)
    assert len(followed_only) == 2
    model.requires_grad_(True)
    check("full", step, model, objectives, FIRST)
    assert len(set(followed_only)) == 3


def test_structures_without_edges_are_left_to_others(followed_only):
    model, objectives = model_and_objectives("heads")
    step = step_of(model, objectives)
    assert step(batch_of(model, [lone_atom()]), objectives, list(model.parameters())) is None
    assert not followed_only


def records_of(trainer):
    records = []
    watch(trainer, epoch=records.append)
    trainer.fit()
    return records


@SLOW
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "rotational_consistency": 1.0}]
)
def test_a_compiled_run_is_the_run(options, followed_only, caplog):
    # Not SOAP, which makes the rounding errors between the kernels and plain torch larger.
    settings = {"optimizer": "adamw", "hypers": ONE, **options}
    own, other = (make_trainer("lora", compile=c, **settings) for c in ("on", "off"))
    with caplog.at_level(logging.INFO):
        one, two = records_of(own), records_of(other)
    assert len(followed_only) >= 1
    assert caplog.text.count("compile: on: training steps are compiled") == 1
    for mine, theirs in zip(curve(one), curve(two), strict=True):
        assert mine[2] == pytest.approx(theirs[2], rel=1e-4)
    for name, parameter in own.parameters.items():
        torch.testing.assert_close(parameter, other.parameters[name], rtol=1e-3, atol=1e-5)


@SLOW
def test_wrong_gradients_are_noticed(followed_only, monkeypatch, caplog):
    model, objectives = model_and_objectives("heads")

    def wrong(what, key, device, function, inputs, free):
        graph = graphs.followed(function, inputs, free)[0]
        return lambda *values: [1.001 * out for out in graph(*values)]

    monkeypatch.setattr(compiled, "compiled_graph", wrong)
    step = step_of(model, objectives)
    with caplog.at_level(logging.WARNING):
        assert step(batch_of(model, FIRST), objectives, list(model.parameters())) is None
    assert "compiled gradients differ by 1.0e-03" in caplog.text
    assert step(batch_of(model, FIRST), objectives, list(model.parameters())) is None


@pytest.mark.parametrize(
    ("setting", "method", "options", "said"),
    [
        ("on", "full", {"gradient_checkpointing": True}, "steps are not compiled: gradient_check"),
        ("on", "dropout", {}, "steps are not compiled: dropout"),
        ("auto", "lora", {}, None),
        ("off", "lora", {}, None),
    ],
)
def test_one_line_says_what_was_decided(setting, method, options, said, followed_only, caplog):
    dropping = method == "dropout"
    trainer = make_trainer(
        "lora" if dropping else method,
        {"dropout": 0.1} if dropping else None,
        compile=setting,
        **options,
    )
    with caplog.at_level(logging.INFO):
        trainer.fit()
    lines = [r.message for r in caplog.records if r.message.startswith("compile:")]
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]
    assert not followed_only


@pytest.mark.slow
def test_a_compiled_calculator_says_the_same(followed_only):
    model = random_potential(num_neighbors_adaptive=4.0, zbl=True, **ONE)
    own, other = (PETCalculator(model, device="cpu", compile=c) for c in ("on", "off"))
    for atoms in (ethanol(), crystal(), ethanol(), lone_atom(), slab()):
        names = ["energy", "forces", "stress"] if atoms.pbc.all() else ["energy", "forces"]
        for name in names:
            found, expected = (c.get_property(name, atoms) for c in (own, other))
            np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)
    assert len(followed_only) == 2  # with a stress, and without
    several = [ethanol(), slab()]
    made = [
        c.predict_together(several, [c.fresh_neighbors() for _ in several], stress=False)
        for c in (own, other)
    ]
    torch.testing.assert_close(*(found.forces for found in made))
    assert len(followed_only) == 3  # of several structures
    copy.deepcopy(own).get_property("energy", ethanol())
    assert len(followed_only) == 4  # of its own potential


def test_a_calculator_compiles_where_it_is_told_to(followed_only):
    PETCalculator(random_potential(**ONE), device="cpu").get_potential_energy(ethanol())
    assert not followed_only
    with pytest.raises(ConfigError, match="compile: 'yes' is not one of auto, on, off"):
        PETCalculator(random_potential(**ONE), compile="yes")


def test_a_compiled_evaluation_says_the_same(followed_only, tmp_path):
    """Of an energy and of a property; frames with all kinds of neighbourhoods in each batch."""
    model = random_potential(**ONE)
    model.add_target(PROPERTIES[0])
    model.double()
    frames = [ethanol(), crystal(), slab(), lone_atom()]
    ase.io.write(tmp_path / "frames.xyz", frames)
    files = [tmp_path / "frames.xyz"]
    for target in ("energy", PROPERTIES[0].name):
        own, other = (
            evaluate_files(
                model, files, target=target, device="cpu",
                how=EvaluationSettings(batch_size=3, keep=True, compile=word),
            ).predictions[str(files[0])]
            for word in ("on", "auto")
        )  # fmt: skip
        for found, expected in zip(own, other, strict=True):
            assert found.keys() == expected.keys()
            for name, values in expected.items():
                np.testing.assert_allclose(found[name], values, rtol=1e-8, atol=1e-9)
    assert len(followed_only) == 2  # the lone atom, a batch of its own, has no edges


@SLOW
def test_atoms_in_two_rectangles_are_predicted_by_a_graph_of_their_own(followed_only, monkeypatch):
    model = random_potential(**ONE)
    found = CompiledPredictions(model)
    batch, wanted = batch_from_atoms(crystal(), model.cutoff, model.dtype), {"energy": (True, True)}
    expected = model.predict(batch, stress=True)
    for _ in range(2):
        torch.testing.assert_close(found.predict(batch, wanted)["energy"].forces, expected.forces)
        monkeypatch.setattr(graph, "_cuts", halves)
    assert len(followed_only) == 2


def test_forces_that_vanish_are_no_obstacle(followed_only):
    """Of a crystal at rest they are rounding errors, whose relative difference says nothing."""
    expected = [torch.full((4, 3), 1e-9)]
    assert compiled.distance([2e-9 + expected[0]], expected) > 1
    assert compiled.distance([2e-9 + expected[0]], expected, 0.1) == pytest.approx(2e-8)


FAILING = """
import logging, sys
sys.path.insert(0, {tests!r})
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
from trainers import make_trainer
trainer = make_trainer("lora", compile="on")
print(trainer.fit().finished)
"""


def run(repository, monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PET_FINETUNE_KERNELS", "off")
    script = FAILING.format(tests=str(repository / "tests"))
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout


@SLOW
@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("no-such-compiler", "there is no C++ compiler 'no-such-compiler'"),
        ("false", "the C++ compiler 'false' does not"),
    ],
)
def test_a_run_goes_on_where_compiling_fails(compiler, said, repository, monkeypatch, tmp_path):
    out = run(repository, monkeypatch, tmp_path, compiler)
    assert f"training steps are computed without compiling: {said}" in out
    assert out.splitlines()[-1] == "True"
    assert not list(tmp_path.rglob("*.so"))


@SLOW
def test_inductor_gives_the_same_gradients_and_keeps_them(monkeypatch, tmp_path):
    kind = "smallest"  # torch's compiler takes a minute as it is
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(graphs, "_compile", count_calls(made := [], graphs._compile))
    for _ in range(2):  # the second time from the file
        model, objectives = model_and_objectives(kind)
        step = step_of(model, objectives)
        for frames in (FIRST, *OTHERS):
            check(kind, step, model, objectives, frames)
        assert len(made) == 1
    assert len(list(tmp_path.rglob("*.so"))) == 1


def count_calls(made, function):
    def counted(*arguments):
        made.append(arguments)
        return function(*arguments)

    return counted

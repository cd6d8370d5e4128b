r"""Which options make the lowest errors: recipes on sets that choose and sets that confirm.

    python -m benchmarks.recipe run --data DATA --work WORK --recipes lora lora-adamw \
        --sets ethanol carbon --seeds 0 1 2 --updates 600
    python -m benchmarks.recipe cost --data DATA --work WORK --updates 81 ...
    python -m benchmarks.recipe table --work WORK
    python -m benchmarks.recipe plot --work WORK --recipes full

``plot`` draws learning curves, ``curves.svg``: force errors against the structures trained on
(``--sizes`` of ``run``), of the sets that have been run with more than one number of them.

A recipe is a set of options; everything else is default. It runs at equal updates; with
``--like RECIPE``, as many updates as make the time of that recipe's (from the costs measured
before). Runs that WORK holds the result of are not done again, so an interrupted benchmark goes on.
A recipe of one's own: ``--recipe 'NAME={"optimizer": "soap", "finetune": {"method": "full"}}'``.

Errors are those of the best model on structures that no run saw. *Swing* is the highest validation
energy error after the first tenth of a run over the last one. Seconds are processor seconds of a
whole command; other work on the machine makes them longer, and the costs hardly.

DATA holds the files named in ``SETS``, with energies, forces, and stresses where periodic.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ase.io
import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

from pet_finetune.config.load import parse_options
from pet_finetune.report.figures import log_ticks
from pet_finetune.training.prepare import NO_ROOMS, prepare_run
from pet_finetune.training.run_files import RunFiles

ROOT = Path(__file__).resolve().parent.parent
FOUNDATION = ROOT / "checkpoints" / "pet-xtb-s.ckpt"


@dataclass(frozen=True)
class Source:
    """A set of structures.

    Attributes:
        train: file, below DATA or with ``/`` below the repository.
        test: a file of its own, or empty for what is left of ``train``.
        validation: the same.
        counts: structures for training (by default), validation and test.
        most: structures with more atoms are left out.
        chooses: whether it took part in choosing, or confirms.
    """

    train: str
    test: str = ""
    validation: str = ""
    counts: tuple[int, int, int] = (50, 20, 200)
    most: int = 1000
    batch: int = 5
    chooses: bool = True


SETS = {
    "ethanol": Source("ethanol_pbe_train1000.xyz"),
    "carbon": Source("carbon_reduced_100.xyz", counts=(50, 20, 30)),
    "demo": Source(
        "/datasets/molecules_pbe0_train.xyz", "/datasets/molecules_pbe0_test.xyz",
        "/datasets/molecules_pbe0_val.xyz", (10**6, 10**6, 10**6), batch=8,
    ),
    "3bpa": Source("3bpa_train_300K.xyz", "3bpa_test_300K.xyz", chooses=False),
    "silicon": Source("mlearn_Si_train.xyz", counts=(50, 15, 60), chooses=False),
    "NbMoTaW": Source("NbMoTaW_train.xyz", counts=(50, 15, 100), most=16, chooses=False),
    "water": Source("water_dpmd_train.xyz", "water_dpmd_val.xyz", counts=(10, 5, 10), batch=1,
                    chooses=False),
}  # fmt: skip

#: The defaults, and those until 2026-11-30.
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"finetune": {"method": "lora"}},
    "full": {"finetune": {"method": "full"}},
    "lora-adamw": {
        "finetune": {"method": "lora", "config": {"rank": 8}}, "optimizer": "adamw", "ema": None,
    },
    "full-adamw": {"finetune": {"method": "full"}, "optimizer": "adamw", "ema": None},
}  # fmt: skip


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Options of ``first`` changed by ``second``, section by section."""
    both = {**first, **second}
    for key in first.keys() & second.keys():
        if isinstance(first[key], dict) and isinstance(second[key], dict):
            both[key] = merged(first[key], second[key])
    return both


def write_set(name: str, size: int | None, data: Path, work: Path) -> tuple[dict[str, Path], int]:
    """Files of a set's three parts, and the number of structures to train on.

    Parts of one set are nested: 10 structures are among the 50.
    """
    source = SETS[name]

    def read(file: str) -> list[Any]:
        path = ROOT / file[1:] if file.startswith("/") else data / file
        frames = [a for a in ase.io.read(path, ":") if len(a) <= source.most]
        return [frames[i] for i in np.random.default_rng(0).permutation(len(frames))]

    own = read(source.train)
    count, validated, tested = source.counts
    parts = {}
    if source.test:
        parts["test"] = read(source.test)[:tested]
    else:
        parts["test"], own = own[:tested], own[tested:]
    if source.validation:
        parts["validation"] = read(source.validation)[:validated]
    else:
        parts["validation"], own = own[:validated], own[validated:]
    parts["train"] = own[: size or count]
    files = {part: work / "sets" / f"{name}-{part}.xyz" for part in parts}
    files["train"] = work / "sets" / f"{name}-{len(parts['train'])}.xyz"
    for part, file in files.items():
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            ase.io.write(file, parts[part], columns=["symbols", "positions", "forces"])
    return files, len(parts["train"])


def section(file: Path) -> dict[str, Any]:
    """A part of a set in the options file."""
    stress = "stress=" in file.open().readlines()[1]
    energy = {"quantity": "energy", "key": "energy", "unit": "eV", "forces": {"key": "forces"}}
    energy["stress"] = {"key": "stress"} if stress else "off"
    systems = {"read_from": str(file), "length_unit": "angstrom"}
    return {"systems": systems, "targets": {"energy": energy}}


def options_of(
    job: dict[str, Any], recipe: dict[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, Any], int]:
    """The options file of a run, and the number of structures it trains on."""
    name, updates = job["set"], job["asked"]
    files, count = write_set(name, job["size"], arguments.data, arguments.work)
    start = {"read_from": str(FOUNDATION), "retention": "off", "new_elements": "nearest"}
    batch = recipe.get("batch_size", SETS[name].batch)
    epochs = max(1, round(updates / -(-count // batch)))
    common = {"batch_size": batch, "num_epochs": epochs, "finetune": start}
    options = {
        "seed": job["seed"],
        "device": "cpu",
        "architecture": {"name": "pet", "training": merged(common, recipe)},
        "training_set": section(files["train"]),
        "validation_set": section(files["validation"]),
        "test_set": section(files["test"]),
    }
    return options, count


def cost_of(
    job: dict[str, Any], recipe: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Processor seconds of a step: the least mean of 20 steps in turn.

    Every 20th step with SOAP takes longer, and counts so.
    """
    torch.set_num_threads(1)
    options, count = options_of(job, recipe, arguments)
    updates = job["asked"]
    with TemporaryDirectory() as folder:
        files = RunFiles(Path(folder))
        settings = parse_options(options).options
        device = torch.device("cpu")
        trainer = prepare_run(settings, files, device, NO_ROOMS, to_finish=False).trainer
        metrics = trainer.progress.metrics(list(trainer.objectives))
        batches = itertools.chain.from_iterable(map(trainer.batches, range(updates)))
        taken = []
        for batch in itertools.islice(batches, updates):
            started = time.process_time()
            trainer.step([batch], 1, metrics)
            taken.append(time.process_time() - started)
    means = [statistics.mean(taken[i : i + 20]) for i in range(1, updates - 19, 20)]
    return {"step": min(means), "structures": count, "updates": updates}


def carry_out(
    job: dict[str, Any], recipe: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train in a process of its own; its errors, swing and processor seconds."""
    options, count = options_of(job, recipe, arguments)
    training = options["architecture"]["training"]
    folder = arguments.work / f"run-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "options.yaml").write_text(yaml.safe_dump(options))
    words = [sys.executable, "-m", "pet_finetune", "train", "options.yaml", "--no-check"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / "log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*words, "-o", "run"], cwd=folder, stdout=log, stderr=log, env=environment
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit((folder / "log").read_text()[-3000:])
    found = json.loads((folder / "run" / "results.json").read_text())["after"]
    rows = list(csv.DictReader((folder / "run" / "train.csv").open()))
    swinging = [float(row["validation/energy/energy_mae"]) for row in rows]
    shutil.rmtree(folder)
    return {
        "train": found["train"]["energy"],
        "test": found["test"]["energy"],
        "validated": found["validation"]["energy"],
        "swing": max(swinging[max(1, len(swinging) // 10) :]) / swinging[-1],
        "validation": swinging,
        "seconds": after.ru_utime - before.ru_utime,
        "updates": training["num_epochs"] * -(-count // training["batch_size"]),
        "structures": count,
    }


def stored(work: Path) -> list[dict[str, Any]]:
    """The results of runs that were made."""
    path = work / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(arguments: argparse.Namespace, cost: bool) -> None:
    """Make the runs that are missing, one after the other."""
    recipes = recipes_of(arguments)
    asked = (arguments.seeds, arguments.sets, arguments.recipes, arguments.updates, arguments.sizes)
    for seed, name, recipe, updates, size in itertools.product(*asked):
        if arguments.like:
            costs = costs_of(stored(arguments.work))
            updates = round(updates * costs[name, arguments.like] / costs[name, recipe])
        job = {
            "set": name, "recipe": recipe, "seed": seed, "size": size,
            "asked": updates, "like": arguments.like, "cost": cost,
        }  # fmt: skip
        if any(job.items() <= row.items() for row in stored(arguments.work)):
            continue
        row = job | (cost_of if cost else carry_out)(job, recipes[recipe], arguments)
        row["options"] = recipes[recipe]
        with (arguments.work / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{name} {recipe}: {row['step'] * 1e3:.1f} ms" if cost else line_of([row]), flush=True
        )


def costs_of(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Seconds of a step by set and recipe, as measured by ``cost``: the least of all."""
    costs: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["cost"]:
            key = row["set"], row["recipe"]
            costs[key] = min(costs.get(key, np.inf), row["step"])
    return costs


def recipes_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The recipes of this file and those of the command."""
    given = (text.split("=", 1) for text in arguments.recipe)
    return RECIPES | {name: json.loads(options) for name, options in given}


def line_of(rows: list[dict[str, Any]]) -> str:
    """A row of the table from runs that differ in their seeds: means, and spread of forces."""
    first = rows[0]

    def mean(part: str, key: str) -> float:
        return statistics.mean(row[part][key] for row in rows if key in row[part]) * 1e3

    forces = [row["test"]["forces_mae"] * 1e3 for row in rows]
    spread = f" ± {statistics.stdev(forces):.1f}" if len(forces) > 1 else ""
    stress = f"{mean('test', 'stress_mae'):.2f}" if "stress_mae" in first["test"] else ""
    cells = [
        first["set"] + ("" if SETS[first["set"]].chooses else " (confirms)"),
        first["recipe"],
        f"{first['structures']}",
        f"{first['updates']}" + (f" (as {first['like']})" if first["like"] else ""),
        f"{len(rows)}",
        f"{mean('test', 'energy_mae'):.2f}",
        f"{statistics.mean(forces):.1f}{spread}",
        f"{mean('test', 'forces_rmse'):.1f}",
        stress,
        f"{mean('train', 'forces_mae'):.1f}",
        f"{statistics.median(row['swing'] for row in rows):.1f}",
        f"{statistics.mean(row['seconds'] for row in rows):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(rows: list[dict[str, Any]]) -> str:
    """All results as Markdown."""
    head = (
        "set", "recipe", "structures", "updates", "seeds", "energy, meV/atom", "forces, meV/Å",
        "forces RMSE", "stress, meV/Å³", "training forces", "swing", "seconds",
    )  # fmt: skip
    groups = defaultdict(list)
    for row in rows:
        if not row["cost"]:
            key = row["set"], row["structures"], row["updates"], row["like"] or "", row["recipe"]
            groups[key].append(row)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    order = sorted(groups, key=lambda key: (list(SETS).index(key[0]), *key[1:]))
    return "\n".join([*lines, *(line_of(groups[key]) for key in order)])


def plot(rows: list[dict[str, Any]], recipes: list[str], path: Path) -> None:
    """Force errors against the number of structures, both logarithmic; the longest runs of each."""
    runs: dict[str, dict[str, dict[int, list[dict[str, Any]]]]] = {}
    for row in rows:
        if not row["cost"] and row["recipe"] in recipes:
            curve = runs.setdefault(row["set"], {}).setdefault(row["recipe"], {})
            curve.setdefault(row["structures"], []).append(row)
    shown = {name: curves for name, curves in runs.items() if max(map(len, curves.values())) > 1}
    figure = Figure(figsize=(max(4.8, 3.6 * len(shown)), 3.2), layout="constrained")
    for axes, (name, curves) in zip(
        np.atleast_1d(figure.subplots(1, len(shown))), shown.items(), strict=True
    ):
        sizes, drawn = set(), []
        for recipe, curve in curves.items():
            errors: dict[str, list[float]] = {"test": [], "train": []}
            for size in sorted(curve):
                longest = max(row["updates"] for row in curve[size])
                last = [row for row in curve[size] if row["updates"] == longest]
                for part, means in errors.items():
                    means.append(statistics.mean(row[part]["forces_mae"] * 1e3 for row in last))
            (line,) = axes.loglog(sorted(curve), errors["test"], "o-", label=f"{recipe}, test")
            axes.loglog(
                sorted(curve), errors["train"], "o:", color=line.get_color(), mfc="white",
                label=f"{recipe}, training",
            )  # fmt: skip
            sizes |= curve.keys()
            drawn += errors["test"] + errors["train"]
        axes.set(title=name, xlabel="training structures", ylabel="force MAE, meV/Å")
        log_ticks(axes.xaxis, sorted(sizes))
        log_ticks(axes.yaxis, drawn)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Run what is missing, or print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("action", choices=("run", "cost", "table", "plot"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/recipe"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--recipe", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--updates", nargs="+", type=int, default=[600])
    parser.add_argument("--like", default="", help="as many updates as take the time of RECIPE's")
    parser.add_argument("--sizes", nargs="+", type=int, default=[None], help="to train on")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.action == "table":
        print(table(stored(arguments.work)))
    elif arguments.action == "plot":
        plot(stored(arguments.work), arguments.recipes, arguments.work / "curves.svg")
    else:
        run(arguments, cost=arguments.action == "cost")


if __name__ == "__main__":
    main()

"""Seconds of training until metatrain's own final validation force error is reached.

    python -m benchmarks.time_to_target --data DATA --foundation FOUNDATION.ckpt --work WORK

Both tools fine-tune the same checkpoint on the same 50 frames with the same batches, epochs, seed
and 20 validation frames (as `accuracy.py` has them). metatrain trains by LoRA and in full, at its
own default learning rate and at the better one that `accuracy.py` gives it. The target is the
lowest validation force MAE of its best run. Ours runs with its defaults, and counts
until the end of the first epoch whose validation is as good. The clock is the parent's, which
reads the lines that the tools log; it starts with the first epoch. Runs that WORK holds the result
of are not done again.

DATA holds the file of each set. The set `ethanol` took no part in choosing our defaults.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import yaml
from benchmarks import accuracy

OURS, THEIRS = "pet-finetune", "metatrain"
TRAINING, VALIDATION = 50, 20  # frames
SIZE = "50"  # accuracy.py's name for so many
TARGET = "energy/ft"
ETHANOL = "ethanol_pbe_train1000.xyz"
#: Of metatrain's seconds: what is wanted at least, and the aim.
GOALS = (1 / 3, 1 / 5)

#: The line after which the first epoch begins, and the one that ends an epoch.
START_LINES = {OURS: re.compile(r"parameters train \("), THEIRS: re.compile("Starting training")}
EPOCH_LINES = {OURS: re.compile(r"epoch +\d+/\d+ \|"), THEIRS: re.compile(r"Epoch: +\d+ \|")}


@dataclass(frozen=True)
class Case:
    """One run: a tool, a method, and the learning rate (``default`` or ``better``)."""

    tool: str
    method: str
    rate: str

    @property
    def name(self) -> str:
        return f"{self.tool}-{self.method}-{self.rate}"


CASES = (
    *(Case(THEIRS, method, rate) for method in ("lora", "full") for rate in ("default", "better")),
    *(Case(OURS, method, "default") for method in ("lora", "full")),
)


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    data: Path
    foundation: Path
    epochs: int
    threads: int
    device: str


def write_3bpa(data: Path, folder: Path) -> None:
    accuracy.write_splits(data, folder)


def write_ethanol(data: Path, folder: Path) -> None:
    """As many frames as of 3BPA, under the names that ``accuracy.options`` expects."""
    frames = ase.io.read(data / ETHANOL, ":")
    order = np.random.default_rng(0).permutation(len(frames))
    ase.io.write(folder / f"train_{SIZE}.xyz", [frames[i] for i in order[:TRAINING]])
    validation = order[TRAINING : TRAINING + VALIDATION]
    ase.io.write(folder / "validation.xyz", [frames[i] for i in validation])


SETS = {"3bpa": write_3bpa, "ethanol": write_ethanol}


def options(case: Case, folder: Path, setting: Setting) -> dict[str, Any]:
    """As in ``accuracy.py``, but for epochs, device and metatrain's learning rate."""
    content = accuracy.options(
        accuracy.Run(case.tool, case.method, SIZE), folder, setting.foundation
    )
    content["device"] = setting.device
    training = content["architecture"]["training"]
    training["num_epochs"] = setting.epochs
    if case.rate == "default":
        training.pop("learning_rate", None)
    return content


def carry_out(case: Case, folder: Path, setting: Setting) -> dict[str, Any]:
    """Train in a process of its own and time its epochs by the lines that it logs.

    Returns:
        ``startup``: seconds from launch to the first epoch; ``ends``: of the epochs, from there;
        ``forces_mae``: of the validation after each epoch, meV/A.
    """
    run = folder / case.name
    shutil.rmtree(run, ignore_errors=True)  # of a benchmark that was interrupted
    run.mkdir(parents=True)
    (run / "options.yaml").write_text(yaml.safe_dump(options(case, folder, setting)))
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads)}
    if setting.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launched = time.perf_counter()
    started, ends = math.nan, []
    with (
        (run / "output.log").open("w") as log,
        subprocess.Popen(
            accuracy.command(case.tool), cwd=run, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            now = time.perf_counter()
            log.write(line)
            if EPOCH_LINES[case.tool].search(line):
                ends.append(now - started)
            elif not ends and START_LINES[case.tool].search(line):
                started = now
    if process.returncode != 0 or len(ends) != setting.epochs or math.isnan(started):
        raise SystemExit(
            f"{case.name} ended with {process.returncode} after {len(ends)} of {setting.epochs} "
            f"epochs: see {run / 'output.log'}."
        )
    forces = ours_errors(run) if case.tool == OURS else metatrain_errors(run)
    return {"startup": started - launched, "ends": ends, "forces_mae": forces}


def ours_errors(run: Path) -> list[float]:
    """Validation force MAE after each epoch, meV/A."""
    with (run / "run" / "train.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [float(row[f"validation/{TARGET}/forces_mae"]) * 1e3 for row in rows]


def metatrain_errors(run: Path) -> list[float]:
    """The same of metatrain."""
    (path,) = run.glob("outputs/*/*/train.csv")
    with path.open(newline="") as stream:
        units, *rows = list(csv.DictReader(stream))
    name = f"validation forces[{TARGET}] MAE"
    if units[name] != "meV/A":
        raise SystemExit(f"{path}: '{name}' is in {units[name]}, expected meV/A.")
    return [float(row[name]) for row in rows]


def reached(result: dict[str, Any], target: float) -> float | None:
    """Seconds until an epoch ends with this validation force MAE, or None."""
    pairs = zip(result["ends"], result["forces_mae"], strict=True)
    return next((end for end, forces in pairs if forces <= target), None)


def table(results: dict[str, Any]) -> str:
    """Markdown: the target by which runs of metatrain are allowed, and each of ours against it."""
    lines = [
        "| set | metatrain's learning rates | its best run | target, meV/A | its seconds "
        "| until it had reached that | pet-finetune | seconds to target | ratio "
        "| ratio with startup |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        for label, rates in (("its default", {"default"}), ("any", {"default", "better"})):
            theirs = [c for c in CASES if c.tool == THEIRS and c.rate in rates and c.name in runs]
            if not theirs:
                continue
            best = min(theirs, key=lambda c: final_error(runs[c.name]))
            for case in (c for c in CASES if c.tool == OURS and c.name in runs):
                cells = [name, label, f"{best.method}, {best.rate}"]
                cells += comparison(runs[best.name], runs[case.name], case.method)
                lines.append(f"| {' | '.join(cells)} |")
    least, aim = GOALS
    lines += ["", f"Wanted: a ratio of at most {least:.2f}, the aim is {aim:.2f}."]
    return "\n".join(lines)


def final_error(result: dict[str, Any]) -> float:
    """Lowest validation force MAE of a run, meV/A: metatrain's best model may have a higher one."""
    return float(min(result["forces_mae"]))


def comparison(theirs: dict[str, Any], ours: dict[str, Any], method: str) -> list[str]:
    """The cells from the target on; the ratio is our seconds over metatrain's whole training."""
    target, whole = final_error(theirs), theirs["ends"][-1]
    seconds = reached(ours, target)
    cells = [f"{target:.1f}", f"{whole:.0f}", f"{reached(theirs, target):.0f}", method]
    if seconds is None:
        return [*cells, f"not reached: {min(ours['forces_mae']):.1f} meV/A", "", ""]
    startup = (seconds + ours["startup"]) / (whole + theirs["startup"])
    return [*cells, f"{seconds:.0f}", f"**{seconds / whole:.2f}**", f"{startup:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--foundation", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS])
    parser.add_argument(
        "--only", nargs="+", choices=[c.name for c in CASES], default=[c.name for c in CASES]
    )
    parser.add_argument("--epochs", type=int, default=accuracy.SIZES[SIZE][1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    setting = Setting(
        arguments.data.resolve(), arguments.foundation.resolve(), arguments.epochs,
        arguments.threads, arguments.device,
    )  # fmt: skip
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    store = work / "results.json"
    common = {"epochs": setting.epochs, "threads": setting.threads, "device": setting.device}
    kept = json.loads(store.read_text()) if store.exists() else {"setting": common, "sets": {}}
    if kept["setting"] != common:
        raise SystemExit(
            f"{store} holds runs with {kept['setting']}, not {common}: choose another --work."
        )
    for name in arguments.sets:
        folder = work / name
        folder.mkdir(exist_ok=True)
        SETS[name](setting.data, folder)
        runs = kept["sets"].setdefault(name, {})
        for case in CASES:
            if case.name in runs or case.name not in arguments.only:
                continue
            print(f"{name} {case.name} ...", flush=True)
            runs[case.name] = carry_out(case, folder, setting)
            partial = store.with_suffix(".part")
            partial.write_text(json.dumps(kept, indent=1) + "\n")
            os.replace(partial, store)
    text = table(kept["sets"])
    (work / "results.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""``python -m benchmarks.methods``: every way to fine-tune on the same sets, in one table."""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import report
from benchmarks.methods.jobs import Job, carry_out, import_memory
from benchmarks.methods.rows import METHODS
from benchmarks.methods.sets import SETS, write_splits

_DESCRIPTION = """\
Fine-tune one foundation by each method on each set. Runs that WORK/results.json holds are not done
again, so an interrupted benchmark goes on. Stages: 'table' runs each method at its default,
'spread' repeats two with other seeds, 'cost' measures seconds an epoch and memory, for which
nothing else should run on the machine, and 'report' only prints. Rates, ranks, schedules and
averages are the business of benchmarks.recipe."""
STAGES = ("table", "spread", "cost", "report")
#: A short run tells the cost: the first epoch does not count.
COST_EPOCHS = 4


class Bench:
    """What has been run, and how to run more.

    Args:
        work: holds splits, runs and ``results.json``.
        foundation: the checkpoint that all runs start from.
        threads: of a run.
    """

    def __init__(self, work: Path, foundation: Path, threads: int) -> None:
        self._work, self._foundation, self._threads = work, foundation, threads
        self._store = work / "results.json"
        self.results: dict[str, Any] = {"runs": {}, "cost": {}}
        if self._store.exists():
            self.results = json.loads(self._store.read_text())
        self.rows: dict[str, Any] = self.results["runs"]

    def run(self, job: Job) -> None:
        """Do a run unless it is there, made with the same options."""
        kept = self.rows.get(job.name)
        if kept is not None and kept["training"] == job.training():
            return
        print(f"{job.name} ...", flush=True)
        row = carry_out(job, self._work, self._foundation, self._threads, cost_only=False)
        self.rows[job.name] = row | {"date": datetime.date.today().isoformat()}
        self._save()
        print(f"    {report.errors_text(report.errors_of(row))}", flush=True)

    def measure(self, data: str, name: str, rate: float) -> None:
        """Seconds an epoch and memory of a method, unless they are there."""
        if name in self.results["cost"]:
            return
        job = Job(data, name, rate, epochs=COST_EPOCHS)
        print(f"{job.name} ...", flush=True)
        row = carry_out(job, self._work, self._foundation, self._threads, cost_only=True)
        row["memory_mb"] = row["process_mb"] - import_memory(self._threads, self._work)
        self.results["cost"][name] = row
        self._save()

    def _save(self) -> None:
        partial = self._store.with_suffix(".part")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(partial, self._store)


def main() -> None:
    arguments = _parse()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets:
        write_splits(name, arguments.data.resolve(), work)
    bench = Bench(work, arguments.foundation.resolve(), arguments.threads)
    methods, sets = arguments.methods, arguments.sets
    rates = {name: METHODS[name].learning_rate for name in METHODS}
    if arguments.stage == "table":
        for name in methods:
            for data in sets:
                bench.run(Job(data, name, rates[name]))
    elif arguments.stage == "spread":
        for seed in range(1, arguments.seeds + 1):
            for name in methods:
                for data in sets:
                    bench.run(Job(data, name, rates[name], seed))
    elif arguments.stage == "cost":
        for name in methods:
            bench.measure(sets[0], name, rates[name])
    text = _report(bench, sets, arguments, rates)
    (work / "results.md").write_text(text)
    print(text)


def _report(
    bench: Bench, sets: Sequence[str], arguments: argparse.Namespace, rates: dict[str, float]
) -> str:
    rows = bench.rows
    names = [n for n in arguments.methods if any(Job(d, n, rates[n], 2).name in rows for d in sets)]
    parts = [
        "## Methods",
        report.method_table(sets, rows, rates, bench.results["cost"]),
        "## Seeds",
        report.spread_table(names, sets, arguments.seeds, rows, rates),
    ]
    return "\n\n".join(parts) + "\n"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=_DESCRIPTION,
        epilog=f"methods: {', '.join(METHODS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--foundation", type=Path, default=Path("checkpoints/pet-xtb-s.ckpt"))
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/methods"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["ethanol", "carbon"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="of the stage 'spread'")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""``python -m benchmarks.speed``: the speed and memory of both tools, side by side."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from benchmarks.speed import sizes
from benchmarks.speed.report import Store, machine, summary
from benchmarks.speed.rows import all_rows
from benchmarks.speed.settings import Settings
from benchmarks.speed.tools import Tools

_DESCRIPTION = """\
Measure pet-finetune and metatrain in turn, with the same weights, structures, threads and
precision. Rows that WORK/results.json holds are not measured again, so an interrupted benchmark
goes on. WORK/results.md has the tables, WORK/sizes-cpu.png (or -cuda) the cost against size."""
_QUICK_FOLDER = "quick"


def main() -> None:
    names = [*(row.name for row in all_rows()), sizes.NAME]
    arguments = _parse(names)
    wanted = _choose(names, arguments.rows)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    work = arguments.work.resolve()
    settings = Settings(
        data=arguments.data.resolve(),
        work=work / _QUICK_FOLDER if arguments.quick else work,
        device=device,
        pairs=1 if arguments.quick else arguments.pairs,
        threads=arguments.threads,
        max_memory=arguments.max_memory,
        quick=arguments.quick,
    )
    if not settings.data.is_dir():
        raise SystemExit(f"--data: there is no folder '{settings.data}'.")
    settings.work.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        (settings.work / "results.json").unlink(missing_ok=True)
        shutil.rmtree(settings.work / "model", ignore_errors=True)
    run(settings, wanted)
    print((settings.work / "results.md").read_text())


def run(settings: Settings, wanted: Sequence[str]) -> None:
    """Measure the wanted rows that are not there yet."""
    store = Store(settings.work)
    device = settings.device
    missing = [name for name in wanted if not store.has(device, name)]
    if not missing:
        return
    rows = {row.name: row for row in all_rows()}
    tools = Tools(settings)
    try:
        tools.make_model()
        about = {
            "machine": machine(),
            "threads": settings.threads,
            "quick": settings.quick,
            "tools": tools.about(),
            "agreement": tools.agreement(),
        }
        store.describe(device, about)
        for name in missing:
            print(f"{name} ...", flush=True)
            if name == sizes.NAME:
                store.add(device, name, sizes.measure(tools))
            else:
                store.add(device, name, summary(rows[name], rows[name].measure(tools)))
    finally:
        tools.close()


def _parse(names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=_DESCRIPTION,
        epilog=f"rows: {', '.join(names)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/speed"))
    parser.add_argument(
        "--rows", nargs="+", default=["*"], help="names or patterns: 'train-lora-*'"
    )
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each tool")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--max-memory",
        type=float,
        default=16.0,
        metavar="GB",
        help="of a worker of the row 'sizes'",
    )
    parser.add_argument("--quick", action="store_true", help="tiny, to see that every row runs")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results and weights")
    arguments = parser.parse_args()
    if arguments.pairs < 1:
        parser.error("--pairs: at least 1")
    return arguments


def _choose(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that the patterns match, in the table's order."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise SystemExit(f"--rows: no row matches '{pattern}'. Rows: {', '.join(names)}.")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


if __name__ == "__main__":
    main()

"""Results as they are kept (JSON) and shown (Markdown)."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed import sizes
from benchmarks.speed.rows import Pairs, Row
from benchmarks.speed.settings import OURS, THEIRS

_RATIO = """\
Medians. The ratio is metatrain's time over ours, so above 1 we are faster; of memory it is ours
over metatrain's, so below 1 we need less. It is the median of the ratios of the pairs."""
_QUICK = " **Tiny sizes (--quick), whatever the titles say: the numbers mean nothing.**"
_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def machine() -> dict[str, Any]:
    """What kind of machine this is."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def ratios(row: Row, values: Pairs) -> list[float]:
    """Of each pair; above 1 we are faster, below 1 we need less memory."""
    pairs = zip(values[OURS], values[THEIRS], strict=True)
    if row.kind == "time":
        return [theirs / ours for ours, theirs in pairs]
    return [ours / theirs for ours, theirs in pairs]


def summary(row: Row, values: Pairs) -> dict[str, Any]:
    """A finished row: its numbers, medians and spread."""
    found = ratios(row, values)
    return {
        "title": row.title,
        "kind": row.kind,
        "unit": row.unit,
        "goals": row.goals,
        "values": values,
        "medians": {tool: median(values[tool]) for tool in (OURS, THEIRS)},
        "ratios": found,
        "ratio": median(found),
        "spread": [min(found), max(found)],
    }


class Store:
    """``results.json``: by device and row, written anew after each row.

    Attributes:
        results: its content.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "results.json"
        self.results: dict[str, Any] = {}
        if self._path.exists():
            self.results = json.loads(self._path.read_text())

    def has(self, device: str, name: str) -> bool:
        return name in self.results.get(device, {}).get("rows", {})

    def describe(self, device: str, about: dict[str, Any]) -> None:
        """Keep what rows of this device have in common.

        Raises:
            SystemExit: rows are there that were measured differently.
        """
        kept = self.results.setdefault(device, {"about": about, "rows": {}})
        for name in ("threads", "machine", "tools", "quick"):
            if kept["rows"] and kept["about"][name] != about[name]:
                raise SystemExit(
                    f"{self._path} holds rows with other {name} ({kept['about'][name]}, now "
                    f"{about[name]}): begin anew with --fresh, or choose another --work."
                )
        kept["about"] = about

    def add(self, device: str, name: str, row: dict[str, Any]) -> None:
        """Add a row and write all files."""
        row["date"] = datetime.date.today().isoformat()
        self.results[device]["rows"][name] = row
        partial = self._path.with_suffix(".part")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(partial, self._path)
        (self._folder / "results.md").write_text(markdown(self.results))
        if name == sizes.NAME:
            title = f"PET of 2.9 M parameters, water, float32, {_setting(self.results, device)}"
            sizes.plot(row, self._folder / f"sizes-{device}.png", title)


def _setting(results: dict[str, Any], device: str) -> str:
    about = results[device]["about"]
    if device == "cuda":
        return str(about["tools"][OURS]["gpu"])
    return f"{about['threads']} threads of {about['machine']['processor']}"


def markdown(results: dict[str, Any]) -> str:
    """All tables."""
    parts = [_RATIO]
    for device, content in results.items():
        rows = content["rows"]
        versions = {
            k: v for t in content["about"]["tools"].values() for k, v in t["versions"].items()
        }
        dates = sorted({row["date"] for row in rows.values()})
        note = _QUICK if content["about"]["quick"] else ""
        known = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts += [
            f"### {_DEVICES[device]}: {_setting(results, device)}",
            f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))}; {known}.{note}",
            _table({n: r for n, r in rows.items() if n != sizes.NAME}, device),
        ]
        if sizes.NAME in rows:
            parts += [sizes.table(rows[sizes.NAME]), f"![cost against size](sizes-{device}.png)"]
    return "\n\n".join(parts) + "\n"


def _table(rows: dict[str, Any], device: str) -> str:
    lines = [
        "| | unit | metatrain | pet-finetune | ratio | lowest to highest (pairs) | at least "
        "| aim |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        low, high = row["spread"]
        goals = [f"{goal:g}" for goal in row["goals"].get(device, ())] or ["", ""]
        if goals[0]:
            sign = "<= " if row["kind"] == "memory" else ""
            goals = [sign + goal for goal in goals]
        cells = [
            row["title"],
            row["unit"],
            *(_number(row["medians"][tool]) for tool in (THEIRS, OURS)),
            f"**{row['ratio']:.2f}**",
            f"{low:.2f} to {high:.2f} ({len(row['ratios'])})",
            *goals,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Three digits, and no fewer before the point than there are."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"

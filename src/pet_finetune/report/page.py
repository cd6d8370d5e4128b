"""The page ``report.html``: one self-contained file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from pet_finetune.data.predicted import Predicted

from . import figures
from .curves import forgetting_curves, learning_curves, parity_plots
from .facts import headline, provenance, recipes, trained
from .figures import (
    MOST_PAIRS,
    coverage_panels,
    dimer_panels,
    magnitude_plot,
    sorted_plot,
    spread_panel,
)
from .frame_errors import (
    MOST_ATOMS,
    MOST_FRAMES,
    AtomGroup,
    by_element,
    by_magnitude,
    by_structure,
    elements_of,
    frames_of,
    residuals,
    still,
)
from .run_record import Quantity, RunRecord
from .verdict import judge, number, signed

#: Rows of the list of structures that are seen at once, and in the file at all.
_ROWS, _MOST_ROWS = MOST_FRAMES, 200
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def render(run: RunRecord, version: str) -> str:
    """The whole page."""
    drawn = figures.available()
    return _template().render(
        css=Markup(_file("page.css")),
        viewer_js=Markup(_file("viewer.js")),
        copy_js=Markup(_file("copy.js")),
        version=version,
        run=run,
        title=_title(run.folder),
        headline=headline(run),
        verdict=judge(run),
        drawn=drawn,
        curves=_marked(learning_curves(run)) if drawn else [],
        last=_last_epoch(run),
        parity=parity_plots(run) if drawn else [],
        mark=Markup,
        where=[_places(run, quantity, drawn) for quantity in _forces(run)],
        structures=_structures(run, drawn),
        kept=_kept(run, drawn),
        dimers=_dimers(run, drawn),
        committee=_committee(run, drawn),
        last_layer=_last_layer(run, drawn),
        baselines=[table for table in run.start.get("baselines", ()) if table["rows"]],
        trained=trained(run),
        provenance=provenance(run),
        recipes=recipes(run),
    )


def _title(folder: str) -> str:
    """The name of the folder; with the one above where it is a time, as of outputs/DATE/TIME."""
    path = Path(folder).resolve()
    named = any(letter.isalpha() for letter in path.name)
    return path.name if named else f"{path.parent.name}/{path.name}"


@cache
def _template() -> Template:
    """The page's template; values are escaped unless marked as markup."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    environment.filters["signed"] = signed
    return environment.from_string(_file("page.html.j2"))


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _marked(panels: list[str]) -> list[Markup]:
    """Drawings of our own, whose texts are escaped already."""
    return [Markup(panel) for panel in panels]


def _forces(run: RunRecord) -> list[Quantity]:
    """The force quantities that there are predictions for."""
    predicted = run.predicted
    if predicted is None:
        return []
    return [q for q in run.quantities() if q.kind == "forces" and q.label in predicted.labels]


def _last_epoch(run: RunRecord) -> list[tuple[str, float]]:
    """The errors after the last epoch, for a page without plots."""
    rows = run.epochs[0] if run.epochs else ()
    if not rows:
        return []
    return [
        (f"{group} {q.name} ({q.unit})", rows[-1][name] * q.factor)
        for q in run.quantities()
        for group in ("train", "validation")
        if (name := f"{group}/{q.target}/{q.mae}") in rows[-1]
    ]


def _places(run: RunRecord, quantity: Quantity, drawn: bool) -> dict[str, Any]:
    """Force errors by element and by the size of the force."""
    assert run.predicted is not None, "there are predictions"
    elements, sizes = by_element(run.predicted, quantity), by_magnitude(run.predicted, quantity)
    worst = max((e for part in elements for e in part.errors.values()), default=1.0) or 1.0
    return {
        "name": quantity.name,
        "unit": quantity.unit,
        "elements": [_part(part, worst) for part in elements],
        "sizes": [_part(part, worst) for part in sizes],
        "plot": Markup(magnitude_plot(sizes, "sizes")) if drawn and sizes else "",
    }


def _part(part: AtomGroup, worst: float) -> dict[str, Any]:
    """A row of a table; bars are in percent of the worst."""
    return {
        "name": part.name,
        "count": part.count,
        "size": part.size,
        "before": 1000 * part.errors.get("before", np.nan),
        "after": 1000 * part.errors.get("after", np.nan),
        "relative": 100 * part.errors.get("after", np.nan) / part.size if part.size else np.nan,
        "bars": {model: 100 * error / worst for model, error in part.errors.items()},
    }


def _structures(run: RunRecord, drawn: bool) -> dict[str, Any] | None:
    """Structures from the worst to the best, and the worst of them for the 3D view."""
    predicted = run.predicted
    if predicted is None or not predicted.models:
        return None
    model = "after" if "after" in predicted.models else "before"
    columns = [
        (quantity, of_model)
        for quantity in run.quantities()
        if (of_model := _errors_of(run, quantity)) and model in of_model
    ]
    if not columns:
        return None
    leading = next((c for c in columns if c[0].kind == "forces"), columns[0])
    errors = leading[1][model]
    order = np.argsort(-np.nan_to_num(errors, nan=-1.0), kind="stable")[:_MOST_ROWS].tolist()
    shown = [i for i in order if predicted.sizes[i] <= MOST_ATOMS][:MOST_FRAMES]
    forces = leading[0] if leading[0].kind == "forces" else None
    captions = [f"{leading[0].name} MAE {_told(leading, i)}" for i in shown]
    frames = frames_of(predicted, shown, forces, captions)
    elements = elements_of(frames)
    rows = [
        {
            "name": f"frame {int(predicted.frames[i])}",
            "source": _source(predicted, i),
            "formula": _formula(run, i),
            "atoms": int(predicted.sizes[i]),
            "cells": [
                {m: float(v[i]) * q.factor for m, v in of_model.items()} for q, of_model in columns
            ],
            "largest": _largest(run, forces, i, model),
            "frame": shown.index(i) if i in shown else None,
        }
        for i in order
    ]
    return {
        "leading": leading[0],
        "model": run.names[model == "after"],
        "columns": [q for q, _ in columns],
        "rows": rows,
        "seen": _ROWS,
        "total": len(errors),
        "source": predicted.sources[0] if len(predicted.sources) == 1 else "",
        "plot": Markup(sorted_plot(*leading, "sorted")) if drawn else "",
        "frames": frames,
        "has": [m for m in ("before", "after") if any(m in f["e"] for f in frames)],
        "names": dict(zip(("before", "after"), run.names, strict=True)),
        "data": Markup(_script_data({"frames": frames, "elements": elements})),
        "elements": list(elements.values()),
        "stills": _marked([still(frame, elements) for frame in frames[:3]]),
        "scaled": forces is not None,
    }


def _source(predicted: Predicted, index: int) -> str:
    """The file of a structure, without its folder, where there are several."""
    source = predicted.sources[int(predicted.source_index[index])]
    return source.rpartition("/")[2] if len(predicted.sources) > 1 else ""


def _errors_of(run: RunRecord, quantity: Quantity) -> dict[str, np.ndarray]:
    """Errors of each structure by model."""
    assert run.predicted is not None, "there are predictions"
    found = {m: by_structure(run.predicted, quantity, m) for m in ("before", "after")}
    return {model: values for model, values in found.items() if values is not None}


def _told(column: tuple[Quantity, dict[str, np.ndarray]], index: int) -> str:
    """Text on one structure before and after."""
    quantity, errors = column
    values = " → ".join(number(quantity.factor * float(v[index])) for v in errors.values())
    return f"{values} {quantity.unit}"


def _formula(run: RunRecord, index: int) -> str:
    assert run.predicted is not None, "there are predictions"
    starts = run.predicted.starts
    numbers = run.predicted.numbers[int(starts[index]) : int(starts[index + 1])]
    return str(Atoms(numbers).get_chemical_formula("hill")).translate(_SUBSCRIPTS)


def _largest(run: RunRecord, forces: Quantity | None, index: int, model: str) -> float:
    """The largest error of a force, as a length, in meV/Å; NaN without forces."""
    if forces is None or run.predicted is None:
        return float("nan")
    errors = residuals(run.predicted, forces, model)
    assert errors is not None, "the leading quantity was predicted"
    starts = run.predicted.starts
    of_frame = errors[int(starts[index]) : int(starts[index + 1])]
    return 1000 * float(np.linalg.norm(of_frame, axis=1).max())


def _script_data(content: Mapping[str, Any]) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _kept(run: RunRecord, drawn: bool) -> dict[str, Any] | None:
    """The forgetting report."""
    after, before = _retention(run), run.before.get("retention", {})
    panels = _marked(forgetting_curves(run)) if drawn else []
    if not after and not panels:
        return None
    rows = []
    for target, values in after.items():
        for kind, unit in (("energy", "meV/atom"), ("forces", "meV/Å")):
            key = f"{kind}_mae"
            if key in values:
                old = 1000 * before.get(target, {}).get(key, float("nan"))
                name = f"{target}: {kind}" if len(after) > 1 and target != kind else kind
                rows.append((name, unit, old, 1000 * values[key]))
    own = any(row[2] for row in rows)  # labels of their own leave an error from the start
    return {"rows": rows, "panels": panels, "labelled": own}


def _retention(run: RunRecord) -> Mapping[str, Mapping[str, float]]:
    """Errors on the retention set; of a committee, which is not evaluated there, its members'."""
    if "retention" in run.after or run.committee is None:
        return run.after.get("retention", {})
    each = [errors.get("retention", {}) for errors in run.committee.errors]
    return {
        target: {name: float(np.mean([one[target][name] for one in each])) for name in values}
        for target, values in each[0].items()
    }


def _dimers(run: RunRecord, drawn: bool) -> dict[str, Any] | None:
    if run.dimers is None:
        return None
    words = {
        "kept": "kept", "lost": "lost", "gained": "gained", "absent": "absent before and after",
    }  # fmt: skip
    groups = [
        (text, [row.name for row in run.dimers.rows if row.verdict == kind], kind == "lost")
        for kind, text in words.items()
    ]
    return {
        "groups": [group for group in groups if group[1]],
        "panels": _marked(dimer_panels(run.dimers)) if drawn else [],
        "left": max(0, len(run.dimers.rows) - MOST_PAIRS),
    }


def _committee(run: RunRecord, drawn: bool) -> dict[str, Any] | None:
    """Errors of the members and the committee, and the calibration."""
    committee = run.committee
    if committee is None:
        return None
    name = run.primary_set
    quantities = run.quantities()
    rows = [
        (f"member {n}", [q.error_in(errors, name) for q in quantities])
        for n, errors in enumerate(committee.errors)
    ]
    rows.append(("committee", [q.error_in(run.after, name) for q in quantities]))
    spreads = []
    for q in quantities:
        curve = committee.calibration.get(q.kind)
        if drawn and run.predicted is not None and curve is not None:
            spreads.append(spread_panel(run.predicted, q, curve.factor))
    return {
        "quantities": quantities,
        "rows": rows,
        "curves": committee.calibration,
        "reports": committee.reports,
        "panels": _marked(coverage_panels(committee.calibration)) if drawn else [],
        "spreads": _marked([panel for panel in spreads if panel]),
    }


def _last_layer(run: RunRecord, drawn: bool) -> dict[str, Any] | None:
    """Calibration of the last-layer uncertainty."""
    if not run.last_layer:
        return None
    spreads = [
        spread_panel(run.predicted, q, 1.0)
        for q in run.quantities()
        if drawn and run.predicted is not None and q.kind == "energy" and q.target in run.last_layer
    ]
    return {
        "curves": run.last_layer,
        "panels": _marked(coverage_panels(run.last_layer)) if drawn else [],
        "spreads": _marked([panel for panel in spreads if panel]),
    }

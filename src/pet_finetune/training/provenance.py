"""What a run says of where it comes from: in its checkpoints, and in ``run.json``."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pet_finetune.adapters.trainable import TrainableReport
from pet_finetune.config import Options
from pet_finetune.data.fingerprint import structures_fingerprint
from pet_finetune.data.loader import Loader
from pet_finetune.data.species import find_species
from pet_finetune.data.splits import Splits
from pet_finetune.device import versions
from pet_finetune.elements import symbol_of
from pet_finetune.model import Potential

from .baselines import BaselineTable
from .measure import shown_unit
from .start import Start


def provenance_of(
    options: Options, start: Start, sets: Mapping[str, Loader], seed: int
) -> dict[str, Any]:
    """What goes into every checkpoint of a run."""
    return {
        "parent": start.name,
        "parent_fingerprint": start.fingerprint,
        "new_elements": {
            symbol_of(new): "random" if old is None else symbol_of(old)
            for new, old in start.new_species.items()
        },
        "parent_provenance": start.provenance,
        "options": {**options.resolved(), "seed": seed},
        "data": {
            name: {
                "structures": len(loader.structures),
                "fingerprint": structures_fingerprint(loader.structures),
            }
            for name, loader in sets.items()
        },
        "versions": versions(),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def about_run(
    options: Options,
    provenance: Mapping[str, Any],
    splits: Splits,
    model: Potential,
    baselines: Sequence[BaselineTable],
    trainable: TrainableReport,
) -> dict[str, Any]:
    """What a run knows before its first step and its report tells, for ``run.json``.

    Args:
        options: of the run.
        provenance: as :func:`provenance_of` gives it; the options have a file of their own.
        splits: the data.
        model: about to be trained.
        baselines: before and after the fit.
        trainable: what trains.
    """
    left_out = ("options", "parent_provenance")
    return {
        **{key: value for key, value in provenance.items() if key not in left_out},
        "data": {
            name: {**of_set, "files": [part.file for part in splits.parts[name]]}
            for name, of_set in provenance["data"].items()
        },
        "data_species": [symbol_of(number) for number in find_species(splits.train)],
        "targets": {
            name: {"is_energy": spec.is_energy, "unit": spec.unit, "shown": shown_unit(spec)}
            for name, spec in model.targets.items()
            if name in options.target_specs()
        },
        "baseline_mode": options.baseline_mode(),
        "baselines": [
            {
                "target": table.target,
                "mode": table.mode,
                "unit": table.unit,
                "scale": table.scale,
                # JSON has no NaN: an element that is new to the model had no baseline.
                "rows": [
                    [symbol, atoms, None if math.isnan(before) else before, after]
                    for symbol, atoms, before, after in table.rows
                ],
            }
            for table in baselines
        ],
        "trainable": vars(trainable),
        "machine": {
            "device": _device_name(model.device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "system": platform.system(),
        },
    }


def _device_name(device: torch.device) -> str:
    """The kind of device, and what a GPU is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()

"""Damaged files: no changed bit is taken for a number, and what is raised is always ours.

``DAMAGED_FILES=1500 pytest tests/unit/test_damage.py`` tries as many of each kind.
"""

from __future__ import annotations

import json
import os
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import ethanol, random_potential, trained_adapter, with_last_layer
from pet_finetune.adapters.peft_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    read_metadata,
    save_adapter,
)
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.committee.committee import Calibration
from pet_finetune.committee.committee_files import COMMITTEE_FILE, read_committee, write_committee
from pet_finetune.data.predicted import Predicted
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.dynamics.md_files import STATE, MDFiles
from pet_finetune.errors import PetFinetuneError
from pet_finetune.training.run_files import KEPT, RunFiles
from unit.checkpoint.checkpoint_files import metatrain_content, small_model, write_metatrain

COUNT = int(os.environ.get("DAMAGED_FILES", "60"))


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All numbers of a nested value, as tensors."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors_of(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, torch.Tensor | np.ndarray) and np.asarray(value).dtype.kind in "biuf":
        yield torch.as_tensor(np.asarray(value)).double().reshape(-1)
    elif isinstance(value, int | float):
        yield torch.tensor([float(value)])


def numbers(value: Any) -> torch.Tensor:
    return torch.cat([torch.zeros(0), *tensors_of(value)])


def of_checkpoint(path: Path) -> torch.Tensor:
    opened = load_checkpoint(path, keep_adapter=True)
    model = opened.model
    beside = {name: model.composition.get(name) for name in model.targets}
    scales = {name: model.scale.get(name) for name in model.targets}
    sure = dict(model.uncertainties.named_buffers())
    return numbers([dict(model.network.state_dict()), beside, scales, sure, opened.training or {}])


def of_adapter(folder: Path) -> torch.Tensor:
    model = random_potential()
    load_adapter(model, folder)
    scale = [float(model.scale.get(name)) for name in model.targets]
    composition = [model.composition.get(name) for name in model.targets]
    alphas = [m.scaling for m in model.network.modules() if hasattr(m, "scaling")]
    return numbers([dict(model.network.state_dict()), scale, composition, alphas])


class Kind:
    """One kind of file: how to make and to read it, and which of its files is damaged."""

    def __init__(
        self,
        make: Callable[[Path], Path],
        read: Callable[[Path], torch.Tensor],
        damaged: str | None = None,
    ) -> None:
        self.make, self.read, self.damaged = make, read, damaged


def ours(folder: Path) -> Path:
    return save_checkpoint(folder / "model.ckpt", random_potential(), provenance={"parent": "x"})


def uncertain(folder: Path) -> Path:
    return save_checkpoint(folder / "sure.ckpt", with_last_layer(random_potential()))


def resumable(folder: Path) -> Path:
    training = {"step": 7, "moments": {"a": torch.randn(5)}, "order": [1, 2], "best": 0.5}
    return save_checkpoint(
        folder / "last.ckpt", trained_adapter(random_potential()), training=training
    )


def of_metatrain(folder: Path) -> Path:
    return write_metatrain(folder / "mtt.ckpt", metatrain_content(small_model()))


def adapter(folder: Path) -> Path:
    return save_adapter(trained_adapter(random_potential()), folder / "adapter", "base")


def kept(folder: Path) -> Path:
    RunFiles(folder).write_kept({"anchor": {"reference": {"w": torch.randn(4, 3)}}, "dimers": None})
    return folder


def predictions(folder: Path) -> Path:
    labels = {"energy": torch.tensor([-3.0], dtype=torch.float64)}
    structure = atoms_to_structure(ethanol(), labels=labels)
    path = folder / "predictions.npz"
    path.write_bytes(Predicted.of([structure], "test").to_bytes())
    return path


def state(folder: Path) -> Path:
    MDFiles(folder).save_state({"positions": np.random.default_rng(0).random((9, 3))})
    return folder


def committee(folder: Path) -> Path:
    write_committee(folder, ["a0", "a1"], Calibration())
    return folder


KINDS = {
    "ours": Kind(ours, of_checkpoint),
    "uncertainty": Kind(uncertain, of_checkpoint),
    "last.ckpt": Kind(resumable, of_checkpoint),
    "metatrain": Kind(of_metatrain, of_checkpoint),
    "adapter weights": Kind(adapter, of_adapter, WEIGHTS_FILE),
    "adapter config": Kind(adapter, of_adapter, CONFIG_FILE),
    "kept.pt": Kind(kept, lambda folder: numbers(RunFiles(folder).read_kept()), KEPT),
    "predictions": Kind(
        predictions, lambda path: numbers([vars(Predicted.read(path)), Predicted.read(path).labels])
    ),
    "md state": Kind(state, lambda folder: numbers(MDFiles(folder).load_state()), STATE),
    "committee": Kind(
        committee, lambda folder: numbers(vars(read_committee(folder)[1])), COMMITTEE_FILE
    ),
}


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Kind, Path, Path, bytes]:
    """A kind, what to read, the file of it to damage, and its bytes."""
    kind = KINDS[request.param]
    whole = kind.make(tmp_path)
    file = whole if kind.damaged is None else whole / kind.damaged
    return kind, whole, file, file.read_bytes()


def flipped(data: bytes, generator: random.Random) -> bytes:
    broken = bytearray(data)
    broken[generator.randrange(len(broken))] ^= 1 << generator.randrange(8)
    return bytes(broken)


@pytest.mark.few(4)
def test_one_changed_bit_is_refused_or_changes_nothing(case, capsys) -> None:
    kind, whole, file, data = case
    expected = kind.read(whole)
    assert len(expected) > 0
    generator, refused = random.Random(1), 0
    silent: list[int] = []
    unnamed: list[str] = []
    for _ in range(COUNT):
        file.write_bytes(flipped(data, generator))
        try:
            found = kind.read(whole)
        except PetFinetuneError as error:
            refused += 1
            unnamed += [] if str(whole) in str(error) else [str(error)]
        else:
            same = found.shape == expected.shape and torch.equal(found, expected)
            silent += [] if same else [len(found)]
    with capsys.disabled():
        if COUNT > 60:
            print(f"\n{file.name}: {refused} refused of {COUNT}, {len(silent)} silently changed")
    assert silent == []
    assert unnamed == []
    assert refused > COUNT / 8


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Bytes changed, cut out, repeated, moved or set to extremes; the end cut off."""
    broken = bytearray(data)
    for _ in range(generator.randint(1, 6)):
        start = generator.randrange(len(broken))
        length = min(generator.choice([1, 2, 4, 8, 64, 1000]), len(broken) - start)
        how = generator.randrange(6)
        if how == 0:
            broken[start : start + length] = generator.randbytes(length)
        elif how == 1 and length < len(broken):
            del broken[start : start + length]
        elif how == 2:
            broken[start:start] = broken[start : start + length]
        elif how == 3:
            broken[start : start + length] = bytes([generator.choice([0, 255])]) * length
        elif how == 4:
            broken[start : start + length] = reversed(broken[start : start + length])
        elif generator.random() < 0.3 and start > 0:
            del broken[start:]
    return bytes(broken)


def rezipped(data: bytes, generator: random.Random, scratch: Path) -> bytes:
    """An archive whose checksums are right and one of whose parts is damaged."""
    scratch.write_bytes(data)
    with zipfile.ZipFile(scratch) as old:
        parts = [(info, old.read(info)) for info in old.infolist()]
    small = [i for i, (_, content) in enumerate(parts) if content]
    pickles = [i for i in small if parts[i][0].filename.endswith("data.pkl")]
    chosen = generator.choice(pickles if pickles and generator.random() < 0.7 else small)
    with zipfile.ZipFile(scratch, "w") as new:
        for index, (info, content) in enumerate(parts):
            changed = mutated(content, generator) if index == chosen else content
            new.writestr(info.filename, changed)
    return scratch.read_bytes()


@pytest.mark.few(4)
def test_no_damage_escapes_as_the_error_of_a_library(case, tmp_path: Path, capsys) -> None:
    kind, whole, file, data = case
    generator, refused = random.Random(2), 0
    escaped: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(COUNT):
            if zipfile.is_zipfile(file) and number % 2:
                broken = rezipped(data, generator, tmp_path / "scratch.zip")
            else:
                broken = mutated(data, generator)
            file.write_bytes(broken)
            try:
                kind.read(whole)
            except PetFinetuneError:
                refused += 1
            except Exception as error:  # noqa: BLE001 - what this test looks for
                escaped.append(repr(error)[:100])
            file.write_bytes(data)
    with capsys.disabled():
        if COUNT > 60:
            print(f"\n{file.name}: {refused} of {COUNT} refused, {len(escaped)} escaped")
    assert escaped == []
    assert refused > COUNT / 2


def test_adapters_of_earlier_releases_open_with_a_note(tmp_path: Path, caplog) -> None:
    folder = adapter(tmp_path)
    metadata = read_metadata(folder)
    del metadata["digest"]
    weights = folder / WEIGHTS_FILE
    save_file(load_file(weights), weights, {"pet_finetune": json.dumps(metadata)})
    with pytest.raises(PetFinetuneError, match="is damaged"):
        of_adapter(folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config["auto_mapping"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with caplog.at_level("INFO"):
        of_adapter(folder)
    assert "has no checksum" in caplog.text

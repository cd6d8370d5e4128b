"""Files: whether they are there, and sizes as people read them."""

from __future__ import annotations

from pathlib import Path

from pet_finetune.errors import CheckpointError, DataError, did_you_mean

__all__ = ["check_checkpoint", "check_file", "size_text"]


def size_text(size: int) -> str:
    """A number of bytes as people read it."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def check_file(file: Path, what: str) -> None:
    """Refuse a path that is no file, with the nearest name beside it.

    Args:
        file: the path.
        what: what the file is, for the message.

    Raises:
        DataError: nothing is there, or a folder.
    """
    if file.is_dir():
        raise DataError(f"The {what} {str(file)!r} is a folder; give a file that ASE reads.")
    if file.is_file():
        return
    folder = file.parent
    near = ""
    if folder.is_dir():
        near = did_you_mean(file.name, (entry.name for entry in folder.iterdir()))
    absolute = "" if file.is_absolute() else f" (looked in {folder.resolve()})"
    missing = "" if folder.is_dir() else " The folder does not exist either."
    raise DataError(f"The {what} {str(file)!r} does not exist{absolute}.{missing}{near}")


def check_checkpoint(path: Path) -> None:
    """Refuse a path that is no file of a model, with the checkpoints beside it.

    Args:
        path: the path.

    Raises:
        CheckpointError: nothing is there, or a folder.
    """
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path}: this is an adapter folder, and a checkpoint file is needed here. Give "
                "the base checkpoint, and this folder as the adapter."
            )
        raise CheckpointError(
            f"{path}: this is a folder, and a checkpoint file is needed here, e.g. "
            f"{path / 'best_model.ckpt'}."
        )
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*.ckpt"))[:5]
        there = f" Checkpoints in that folder: {', '.join(near)}." if near else ""
        raise CheckpointError(f"{path}: no such checkpoint file.{there}")

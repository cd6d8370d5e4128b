"""Files: sizes as people read them."""

from __future__ import annotations

__all__ = ["size_text"]


def size_text(size: int) -> str:
    """A number of bytes as people read it."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"

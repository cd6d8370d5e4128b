"""Matplotlib, where a plot cannot be done without."""

from __future__ import annotations

from typing import Any

from pet_finetune.errors import PetFinetuneError

__all__ = ["plotting"]


def plotting() -> tuple[Any, Any]:
    """``matplotlib.rc_context`` and ``matplotlib.figure.Figure``.

    Raises:
        PetFinetuneError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PetFinetuneError(
            "Plots need matplotlib: pip install 'pet-finetune[plots]'."
        ) from error
    return rc_context, Figure

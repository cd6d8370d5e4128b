"""Libraries that only some options need (matplotlib among them), and how to get them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from pet_finetune.errors import PetFinetuneError

_logger = logging.getLogger(__name__)

#: The library behind ``quant_bits`` and the extra of the package that installs it.
QUANTIZATION = ("bitsandbytes", "quant")
#: The library behind long-range features and the extra that installs it.
LONG_RANGE = ("torchpme", "long-range")


def missing_extra(library: str, extra: str) -> str | None:
    """What to do where a library is not installed; None where it is."""
    if find_spec(library) is not None:
        return None
    return (
        f"needs the library {library}, which is not installed. "
        f"Install it with: pip install 'pet-finetune[{extra}]'."
    )


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


def drawn(what: str, draw: Callable[[], object]) -> bool:
    """Draw a picture that its run can do without; whatever prevents it is a line in the log.

    Returns:
        Whether it is there.
    """
    try:
        draw()
    except PetFinetuneError as error:
        _logger.info("%s: not drawn. %s", what, error)
        return False
    except Exception as error:  # noqa: BLE001 - hours of work must not end in a picture's error
        _logger.warning("%s: not drawn (%s: %s)", what, type(error).__name__, error)
        return False
    return True

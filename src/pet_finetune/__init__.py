"""Fine-tune pre-trained PET interatomic potentials on your own data.

>>> from pet_finetune import PETCalculator  # doctest: +SKIP
>>> atoms.calc = PETCalculator("best_model.ckpt")  # doctest: +SKIP

The public names are imported on first use, so that ``import pet_finetune`` (and with it
``pet-finetune --help``) does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pet_finetune.caches import provide_home
from pet_finetune.version import __version__

provide_home()  # before libraries are imported that need one

if TYPE_CHECKING:
    from pet_finetune.calculator import PETCalculator
    from pet_finetune.checkpoint import load, load_checkpoint

__all__ = ["PETCalculator", "__version__", "load", "load_checkpoint"]

_HOMES = {
    "PETCalculator": "pet_finetune.calculator",
    "load": "pet_finetune.checkpoint",
    "load_checkpoint": "pet_finetune.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import the public ``name`` from its home module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names shown by ``dir()``: those already imported and those that can be."""
    return sorted({*globals(), *__all__})

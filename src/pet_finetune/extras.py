"""Libraries that only some options need, and how to get them."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["EXPORT", "QUANTIZATION", "missing_extra"]

#: The library behind ``quant_bits`` and the extra of the package that installs it.
QUANTIZATION = ("bitsandbytes", "quant")
#: The libraries behind ``pet-finetune export``; both are parts of namespace packages.
EXPORT = ("metatensor", "metatomic")


def missing_extra(library: str, extra: str) -> str | None:
    """What to do where a library is not installed; None where it is."""
    if find_spec(library) is not None:
        return None
    return (
        f"needs the library {library}, which is not installed. "
        f"Install it with: pip install 'pet-finetune[{extra}]'."
    )

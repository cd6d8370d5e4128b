"""A foundation with its adapters: loaded once each, switched, blended, merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.device import plain_torch
from pet_finetune.errors import AdapterError, did_you_mean
from pet_finetune.graph import Batch
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction

from .at_rest import Adapter, capture, check_base, install
from .base_weights import restore_base, round_base
from .combine import combine
from .inject import active_adapter, eject, merge, merged_copy, unmerge
from .peft_files import read_adapter, write_adapter


class AdaptedPotential:
    """A base and named adapters of it, one of which is active at a time.

    Methods have the names and meanings of Hugging Face PEFT's models. Switching replaces the
    adapted layers and leaves the base's tensors where they are.

    Args:
        base: a potential; what it carries already becomes the adapter ``default``, but for one
            over a quantised base, which is merged for good. It is used, not copied.

    Attributes:
        potential: the model as it is now, for everything that takes a
            :class:`~pet_finetune.model.potential.Potential`.
        source: the file that the base was read from; None where it was made otherwise.
    """

    @plain_torch()
    def __init__(self, base: Potential) -> None:
        self.potential = base
        self.source: Path | None = None
        self._adapters: dict[str, Adapter] = {}
        self._active: str | None = None
        self._enabled, self._merged = True, False
        self._known_fingerprint: str | None = None
        # Weights that the active adapter wants rounded, as the base has them.
        self._rounded: dict[str, Tensor] = {}
        carried = active_adapter(base)
        if carried is not None and carried.quant_bits is not None:
            self.potential = merged_copy(base)
        elif carried is not None:
            unmerge(base)
            self._adapters["default"] = capture(base)
            self._active = "default"
            eject(base)
        self._apply()

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """All adapters by name."""
        return dict(self._adapters)

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter in use; None where there is none or it is disabled."""
        return self._active if self._enabled else None

    @property
    def merged(self) -> bool:
        """Whether the active adapter is part of the weights at the moment."""
        return self._merged

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets of the active adapter; empty without one."""
        config = active_adapter(self.potential)
        return () if config is None else tuple(config.targets)

    @plain_torch()
    def load_adapter(self, directory: str | Path, name: str = "default") -> None:
        """Read an adapter folder; the first one becomes active.

        Raises:
            AdapterError: it cannot be read, belongs to another base, does not fit, or the name is
                taken; then everything is as it was.
        """
        self.add_adapter(read_adapter(directory), name)

    @plain_torch()
    def add_adapter(self, adapter: Adapter, name: str = "default") -> None:
        """Take an adapter in; the first one becomes active."""
        if name in self._adapters:
            raise AdapterError(
                f"There is an adapter '{name}' already. Choose another name, or delete it first."
            )
        check_base(adapter, self._fingerprint)
        previous, first = self._active, not self._adapters
        self._adapters[name] = adapter
        try:  # put on once, which checks every tensor
            self._active = name
            self._apply()
        except AdapterError:
            del self._adapters[name]
            self._active = previous
            self._apply()
            raise
        if not first:
            self._active = previous
            self._apply()

    @plain_torch()
    def set_adapter(self, name: str) -> None:
        """Use this adapter from now on; a merged model merges it too."""
        self._named(name)
        self._active, self._enabled = name, True
        self._apply()

    @plain_torch()
    def disable_adapters(self) -> None:
        """Be the base again, bit for bit."""
        self._enabled = False
        self._apply()

    @plain_torch()
    def enable_adapters(self) -> None:
        """Undo :meth:`disable_adapters`."""
        self._enabled = True
        self._apply()

    @plain_torch()
    def merge(self) -> None:
        """Put the active adapter into the weights; what is predicted stays the same."""
        self._merged = True
        merge(self.potential)

    @plain_torch()
    def unmerge(self) -> None:
        """Undo :meth:`merge`."""
        self._merged = False
        unmerge(self.potential)

    @plain_torch()
    def add_weighted_adapter(
        self,
        weights: Mapping[str, float],
        name: str,
        combination: str = "cat",
        rank: int | None = None,
    ) -> None:
        """Blend adapters into a new one, see :func:`~.combine.combine`; it is not yet active."""
        if not isinstance(weights, Mapping):
            raise AdapterError(
                'weights: expected a dictionary, such as {"water": 0.5, "ice": 0.5}.'
            )
        parts = [
            (replace(self._named(adapter), name=adapter), weight)
            for adapter, weight in weights.items()
        ]
        self._take_off()
        try:
            blended = combine(parts, combination, rank=rank, base=self.potential, name=name)
        finally:
            self._apply()
        self.add_adapter(blended, name)

    @plain_torch()
    def delete_adapter(self, name: str) -> None:
        """Forget an adapter; the active one leaves the base behind."""
        self._named(name)
        del self._adapters[name]
        if self._active == name:
            self._active = None
        self._apply()

    def save_adapter(self, name: str, directory: str | Path) -> Path:
        """Write an adapter, a blended one say, into a folder.

        Raises:
            AdapterError: there is none of this name, or the folder cannot be written.
        """
        return write_adapter(self._named(name), directory)

    def predict(
        self, batch: Batch, target: str | None = None, *, forces: bool = True, stress: bool = False
    ) -> Prediction:
        """Predictions of the current model, by default of the active adapter's energy.

        Args:
            batch: as for :meth:`pet_finetune.model.potential.Potential.predict`.
            target: which energy; of several that the adapter has, ``energy`` without it.
            forces: whether forces are derived.
            stress: whether the stress is derived.
        """
        chosen = self.potential.energy_target(target, self.targets)
        return self.potential.predict(batch, chosen, forces=forces, stress=stress)

    @property
    def _fingerprint(self) -> str:
        """Fingerprint of the base, computed once, before the first adapter is added."""
        if self._known_fingerprint is None:
            self._known_fingerprint = weights_fingerprint(self.potential)
        return self._known_fingerprint

    def _named(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise AdapterError(
                f"There is no adapter '{name}'.{did_you_mean(name, self._adapters)} "
                f"Loaded: {', '.join(self._adapters) or 'none'}."
            )
        return self._adapters[name]

    def _take_off(self) -> None:
        if active_adapter(self.potential) is not None:
            eject(self.potential)
        restore_base(self.potential, self._rounded)
        self._rounded = {}

    def _apply(self) -> None:
        """Apply the active adapters and switches to the potential."""
        self._take_off()
        name = self.active_adapter
        if name is None:
            return
        device = self.potential.device
        fingerprint, adapter = self._fingerprint, self._adapters[name]
        if adapter.config.quant_bits is not None:
            self._rounded = round_base(self.potential, adapter.config)
            adapter = replace(adapter, config=replace(adapter.config, quant_bits=None))
        install(self.potential, adapter, fingerprint)
        self.potential.to(device)
        self.potential.eval().requires_grad_(False)
        if self._merged:
            merge(self.potential)

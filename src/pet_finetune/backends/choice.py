"""Back ends: who computes the operators of a network. Chosen once for a model, and kept with it.

A model that is built where the compiled operators are loaded uses them; :func:`use_backend` chooses
another one, and :func:`choose_backend` says which is best on a device. Its modules hold the choice,
so it goes where they go: into copies, under adapters, to other devices (where what cannot compute
there gives way to plain torch). TorchScript, and with it every exported model, reads the plain form
of each module whatever is chosen.

The library of compiled operators is made on the machine that runs it, once, because it is tied to
torch's binary interface and to the processor's instructions, neither of which an installer knows.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pet_finetune.errors import ConfigError
from pet_finetune.files import is_sound, note_digest, replacing
from pet_finetune.installation import cache_folders, notice
from pet_finetune.locks import only_one
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch

from .operators import register_fakes

_LOG = get_logger(__name__)
_SOURCES = Path(__file__).with_name("csrc")
_NAME = "pet_finetune_kernels"
_FLAGS = ("-fopenmp", "-fno-math-errno", "-fno-trapping-math")
#: ``off`` computes with plain torch; ``auto``, the default, uses the kernels where it can;
#: ``require`` is an error where it cannot.
VARIABLE = "PET_FINETUNE_KERNELS"
_SETTINGS = ("auto", "off", "require")
#: The processor to compile for, as the compiler's ``-march`` has it; ``native`` is the default.
PROCESSOR = "PET_FINETUNE_KERNELS_MARCH"


class _State:
    """State of loading the library in this process: whether it was tried, and the result."""

    tried = False
    loaded = False


def loaded() -> bool:
    """Whether the library is loaded and models may use it."""
    return _State.loaded


def prepare(device: torch.device | str = "cpu") -> bool:
    """Load the kernels if work on ``device`` can use them, compiling them where there are none.

    The choice is made and logged once in a process; a failure to compile is a notice, no error,
    unless the kernels are required.

    Returns:
        Whether they are there for work on ``device``.

    Raises:
        ConfigError: the environment variable has another value than those it can have, or requires
            kernels that cannot be had.
    """
    homeless = notice()
    if homeless is not None:
        _LOG.warning("%s", homeless)
    if torch.device(device).type != "cpu":
        return False
    if _State.tried:
        return _State.loaded
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in _SETTINGS:
        raise ConfigError(f"{VARIABLE}: '{setting}' is not one of {', '.join(_SETTINGS)}.")
    if setting == "off":
        _State.tried = True
        _LOG.info("Computing with plain torch operations (%s=off).", VARIABLE)
        return False
    failure = _load()
    if failure is not None and setting == "require":
        raise ConfigError(
            f"{VARIABLE}=require, but {failure[1]}. Fix this, or set {VARIABLE}=auto to compute "
            "with plain torch operations, more slowly."
        )
    _State.tried = True
    if failure is not None:
        _LOG.log(failure[0], "Computing with plain torch operations, more slowly: %s.", failure[1])
        return False
    _State.loaded = True
    register_fakes()
    _LOG.info("Computing with the fused CPU kernels.")
    return True


def _load() -> tuple[int, str] | None:
    """Compile if needed and load; a log level and a reason on failure."""
    try:
        path = _library_path()
        reason = _missing(path)
        if reason is not None:
            return logging.INFO, reason
        torch.ops.load_library(str(_library(path)))
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        _LOG.debug("%s", error)
        return logging.WARNING, _first_line(error)
    return None


def ready(device: torch.device | str = "cpu") -> bool:
    """Whether :func:`prepare` would not have to compile anything."""
    return torch.device(device).type != "cpu" or _State.tried or _library_path().exists()


def _missing(path: Path) -> str | None:
    """Reason why this machine cannot use the kernels, or None."""
    if platform.system() != "Linux":
        return f"the fused kernels are made for Linux, not {platform.system()}"
    if not path.exists() and shutil.which(os.environ.get("CXX", "c++")) is None:
        return "the fused kernels need a C++ compiler (the package g++, or set CXX)"
    return None


def _first_line(error: Exception) -> str:
    return f"the fused kernels could not be built or loaded ({str(error).splitlines()[0]})"


def _library_path() -> Path:
    """Path of the library; it depends on sources, torch version, processor and compiler flags."""
    parts = [torch.__version__, platform.machine(), processor(), *_flags()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    name = f"{_NAME}-{digest.hexdigest()[:16]}.so"
    paths = [folder / "kernels" / name for folder in cache_folders()]
    return next((path for path in paths if path.exists()), paths[-1])


def _flags() -> list[str]:
    return ["-O3", f"-march={os.environ.get(PROCESSOR, 'native')}", *_FLAGS]


def processor() -> str:
    """The instructions this processor has: home directories travel between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@contextmanager
def _on_path(folder: str) -> Iterator[None]:
    """Let programs be found in a folder, which an environment that is not activated needs."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([folder, before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _library(path: Path) -> Path:
    """The library's path, compiled first if need be."""
    if is_sound(path):  # perhaps in a folder that cannot be written
        return path
    with only_one(path):
        return path if is_sound(path) else _compiled(path)


def _compiled(path: Path) -> Path:
    """The library, compiled and put in its place in one step."""
    # Slow to import, and needed by nobody who has the library.
    import ninja
    from torch.utils import cpp_extension

    # A warning, because that is shown also where nobody set up logging, and the wait needs a word.
    _LOG.warning("Compiling the CPU kernels, once on this machine: a minute or two.")
    started = time.perf_counter()
    watch = Watch("compiling the CPU kernels")
    with watch, replacing(path) as library, _on_path(ninja.BIN_DIR):
        cpp_extension.load(
            name=_NAME,
            sources=[str(source) for source in sorted(_SOURCES.glob("*.cpp"))],
            extra_cflags=_flags(),
            build_directory=str(library.parent),
            is_python_module=False,
            is_standalone=False,
        )
        (library.parent / f"{_NAME}.so").rename(library)
    note_digest(path)
    _LOG.info("Compiled in %.0f s: %s", time.perf_counter() - started, path)
    return path


class Arena:
    """The memory of one owner's work: predictions one after another, or the steps of a training.

    Each tensor lies as low in it as there is room. What lies above all that a piece of work used is
    returned to the system when it ends, the rest with the last reference to this object. Without
    the kernels' library nothing is kept. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._arena: Any = None

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Tensors of 16 KiB and more that this thread makes here lie in the kept memory.

        They may outlive the context.
        """
        if not loaded():
            yield
            return
        if self._arena is None:
            self._arena = torch.classes.pet_finetune.Arena()
        self._arena.enter()
        try:
            yield
        finally:
            self._arena.leave()

    @property
    def bytes(self) -> int:
        """Limit of the memory that is kept and free."""
        return 0 if self._arena is None else int(self._arena.bytes())

    def __getstate__(self) -> dict[str, Any]:
        return {"_arena": None}


__all__ = [
    "EAGER",
    "FUSED",
    "FUSED_BFLOAT16",
    "Accelerated",
    "Backend",
    "choose_backend",
    "default_backend",
    "use_backend",
    "using",
]

_FLOATS = (torch.float32, torch.float64)


class Backend:
    """A back end. Its instances are the constants of this module, compared by identity.

    Args:
        name: unique.
        fused: whether the operators are the compiled ones, see :mod:`.fused`.
        rounds: whether these round the factors of float32 products to bfloat16.
    """

    def __init__(self, name: str, *, fused: bool = False, rounds: bool = False) -> None:
        self.name, self.fused, self.rounds = name, fused, rounds

    def computes_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it can compute with numbers of a type on a device."""
        return not self.fused or (device.type == "cpu" and dtype in _FLOATS)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a model keep the one object, or take what there is instead."""
        return _by_name, (self.name,)

    def __repr__(self) -> str:
        return f"Backend({self.name!r})"


#: Plain torch: the reference, on every device and in every precision.
EAGER = Backend("eager")
#: The compiled operators, for CPUs.
FUSED = Backend("fused", fused=True)
#: The same with products rounded to bfloat16, for processors that have instructions for them.
FUSED_BFLOAT16 = Backend("fused-bfloat16", fused=True, rounds=True)

_ALL = {backend.name: backend for backend in (EAGER, FUSED, FUSED_BFLOAT16)}


def _by_name(name: str) -> Backend:
    backend = _ALL[name]
    return EAGER if backend.fused and not loaded() else backend


def default_backend() -> Backend:
    """Back end of a model without a choice."""
    return FUSED if loaded() else EAGER


def choose_backend(device: torch.device | str = "cpu") -> Backend:
    """The best back end for a device; compiles the operators if needed.

    Raises:
        ConfigError: ``PET_FINETUNE_KERNELS`` is not one of its values, or requires what cannot be
            had.
    """
    return FUSED if prepare(device) else EAGER


class Accelerated:
    """Base class of modules that a back end can compute; plain torch by default."""

    # Not annotated: TorchScript would try to compile the type.
    #: Who computes.
    backend = EAGER
    #: Who was asked to; another one where that cannot compute on the model's device.
    chosen = EAGER


def use_backend(model: nn.Module, backend: Backend) -> None:
    """Have a model computed by a back end; by plain torch while that cannot compute there."""
    weight = next(model.parameters(), None)
    fits = weight is None or backend.computes_on(weight.device, weight.dtype)
    for module in model.modules():
        if isinstance(module, Accelerated):
            module.chosen, module.backend = backend, backend if fits else EAGER


@contextmanager
def using(backend: Backend, *models: nn.Module) -> Iterator[None]:
    """Have models computed by another back end meanwhile."""
    parts = [part for model in models for part in model.modules() if isinstance(part, Accelerated)]
    before = [(part.chosen, part.backend) for part in parts]
    for model in models:
        use_backend(model, backend)
    try:
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            part.chosen, part.backend = own

"""A function of tensors as one compiled graph, for inputs of any sizes, kept on disk.

The function is followed once, with sizes left open, down to torch's plain operations, whatever
derivatives it takes among them (``make_fx``); AOTInductor makes that into a library, with kernels
for a GPU in it. This one file in our cache is all that the next process needs: it loads it in
milliseconds, without the compiler and without following anything.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pet_finetune.errors import PetFinetuneError
from pet_finetune.files import check_room, is_sound, note_digest, replacing
from pet_finetune.installation import cache_folders
from pet_finetune.locks import only_one
from pet_finetune.log import get_logger

from .choice import processor

#: Tensors to tensors.
Graph = Callable[..., Sequence[Tensor]]

_LOG = get_logger(__name__)
_PACKAGE = Path(__file__).parents[1]
#: For a compiled graph and what the compiler writes on its way, in bytes.
_ROOM = 100_000_000
#: What decides which operations a function of the network consists of.
_SOURCES = ("adapters", "backends", "graph", "model", "nn", "training")


class CannotCompile(PetFinetuneError):
    """A graph cannot be compiled; the message gives the reason after a colon."""


def is_compiled(key: str, device: torch.device) -> bool:
    """Whether :func:`compiled_graph` would find a file."""
    return is_sound(_path(key, device))


def compiled_graph(
    what: str,
    key: str,
    device: torch.device,
    function: Graph,
    inputs: Sequence[Tensor],
    free: Sequence[Sequence[int]],
) -> Graph:
    """The function, compiled: from the cache, or for the cache.

    Args:
        what: what the function computes, for the log.
        key: what the function is made of, other than the code of this package.
        device: of the inputs.
        function: as for :func:`followed`.
        inputs: as for :func:`followed`.
        free: as for :func:`followed`.

    Returns:
        The graph, to be called without gradients.

    Raises:
        CannotCompile: there is no compiler, or it or something before it failed.
    """
    path = _path(key, device)
    sound = is_sound(path)
    if not sound:
        _check_compiler(device)
        # A warning, because that is shown also where nobody set up logging.
        _LOG.warning("Compiling %s, once for this kind of model: a minute or more.", what)
    try:
        if not sound:
            with only_one(path):
                if not is_sound(path):
                    _compile(path, function, inputs, free)
        return _loaded(path, device)
    except Exception as error:  # a compiler has more ways to fail than can be listed
        _LOG.debug("compiling failed", exc_info=True)
        # Remove a damaged file, or one of another build of torch.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise CannotCompile(_first_line(str(error)) or type(error).__name__) from error


def followed(
    function: Graph, inputs: Sequence[Tensor], free: Sequence[Sequence[int]]
) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """The function as a graph of torch's operations, with stand-ins for its inputs.

    Args:
        function: of tensors, to a list of tensors; what it reads beside them stays as it is now.
        inputs: examples, of which sizes alone count: those of free axes are 2 at least, and equal
            where the function may rely on that.
        free: of each input, the axes that may have other sizes.
    """
    # Slow to import, and needed by nobody else.
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())

    def stand_in(tensor: Tensor, axes: Sequence[int]) -> Tensor:
        kinds = [DimDynamic.DUCK if a in axes else DimDynamic.STATIC for a in range(tensor.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
        return mode.from_tensor(tensor.detach(), symbolic_context=context)

    fakes = [stand_in(tensor, axes) for tensor, axes in zip(inputs, free, strict=True)]
    with enable_python_dispatcher(), mode:
        return make_fx(function)(*fakes), fakes


def _compile(
    path: Path, function: Graph, inputs: Sequence[Tensor], free: Sequence[Sequence[int]]
) -> None:
    from torch._inductor.async_compile import shutdown_compile_workers
    from torch._inductor.compile_fx import compile_fx_aot

    started = time.perf_counter()
    for folder in (path.parent, Path(tempfile.gettempdir())):
        check_room(folder, _ROOM)
    graph, fakes = followed(function, inputs, free)
    try:
        with replacing(path) as new, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
            compile_fx_aot(
                graph,
                [*fakes],
                config_patches={
                    "aot_inductor.output_path": str(new),
                    "aot_inductor.embed_kernel_binary": True,  # those of a GPU in the same file
                },
            )
    finally:
        shutdown_compile_workers()  # of a pool that would wait for more until this process ends
    note_digest(path)
    _LOG.info("compiled in %.0f s", time.perf_counter() - started)


def _loaded(path: Path, device: torch.device) -> Graph:
    # Torch's own function for this imports the compiler, which takes seconds.
    made: Any = torch._C._aoti
    if device.type == "cpu":
        runner = made.AOTIModelContainerRunnerCpu(str(path), 1)
    else:
        runner = made.AOTIModelContainerRunnerCuda(str(path), 1, str(device))
    return lambda *values: runner.run([*values])


def _check_compiler(device: torch.device) -> None:
    """Refuse at once what torch would notice only after its work on the whole graph."""
    if device.type != "cpu":
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise CannotCompile(f"there is no C++ compiler '{compiler}' (the package g++, or set CXX)")
    command = [compiler, "-x", "c++", "-fsyntax-only", "-"]
    tried = subprocess.run(command, input="#include <cmath>\n", capture_output=True, text=True)
    if tried.returncode != 0:
        told = _first_line(tried.stderr) or f"exit status {tried.returncode}"
        raise CannotCompile(f"the C++ compiler '{compiler}' does not work: {told}")


def _first_line(text: str) -> str:
    return next(filter(None, (line.strip() for line in text.splitlines())), "")


def _path(key: str, device: torch.device) -> Path:
    """Path of a compiled graph, which depends on function, package, torch and hardware."""
    digest = hashlib.sha256("\n".join([key, _surroundings(device)]).encode()).hexdigest()[:24]
    paths = [folder / "graphs" / f"{digest}.so" for folder in cache_folders()]
    return next((path for path in paths if path.exists()), paths[-1])


@cache
def _surroundings(device: torch.device) -> str:
    """Versions and hardware that a compiled graph depends on."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        where = f"{platform.machine()} {capability} {processor()}"
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for source in sorted((_PACKAGE / folder).rglob("*.py")):
            digest.update(source.read_bytes())
    return f"{torch.__version__} {device.type} {where} {digest.hexdigest()}"

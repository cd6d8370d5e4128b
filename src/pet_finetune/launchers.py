"""Environment of launchers of several processes: torchrun and SLURM's srun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

#: metatrain's default of ``distributed_port``.
PORT = 39591


@dataclass(frozen=True)
class Launch:
    """Rank, size and address from a launcher.

    Attributes:
        rank, size: which process of how many.
        local_rank: which one on its host.
        address, port: where they meet.
        by: the launcher.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    by: str


def quiet() -> None:
    """Keep torch from writing its own notes about processes that are gone; before it is imported.

    The process that knows the cause reports it in one line.
    """
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def find_launch(
    wanted: bool | None = None,
    port: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Launch | None:
    """Launch of this process; None without a launcher.

    Args:
        wanted: ``distributed`` of the options: False for one process whatever the environment says.
        port: ``distributed_port``, for SLURM, which has none of its own.
        environment: of the process.

    Raises:
        ConfigError: several processes are wanted and nothing has started them.
    """
    if wanted is False:
        return None
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK", rank))
        address, own_port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        return Launch(rank, size, local, address, own_port, "torchrun") if size > 1 else None
    # A step: in the script of a job itself, one process runs, whatever SLURM_NTASKS says.
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size > 1 and "SLURM_PROCID" in environment:
        hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        address = environment.get("MASTER_ADDR") or _first_host(hosts)
        rank, local = int(environment["SLURM_PROCID"]), int(environment.get("SLURM_LOCALID", "0"))
        own_port = int(environment.get("MASTER_PORT") or port or PORT)
        return Launch(rank, size, local, address, own_port, "srun")
    if wanted:
        raise ConfigError(
            "architecture.training.distributed: true, but neither torchrun nor srun started this "
            "process. Start it with one of them, or set `device` to the number of processes."
        )
    return None


def _first_host(hosts: str) -> str:
    """The first of SLURM's list of hosts: ``r[1-2]n[03-05],x`` is ``r1n03``."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)

"""``python -m pet_finetune``: the same as the ``pet-finetune`` command.

With ``--job FILE`` it is one of the processes that ``device: 4`` starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pet_finetune import launchers, processes
from pet_finetune.cli import main
from pet_finetune.errors import PetFinetuneError


def work(job: Path) -> int:
    """Train as a job says; the parent process shows errors."""
    from pet_finetune.api import train_as_told

    try:
        train_as_told(job)
    except (PetFinetuneError, OSError, KeyboardInterrupt) as error:
        processes.leave_error(str(error) or "interrupted")
        return 1
    return 0


if __name__ == "__main__":
    launchers.quiet()
    sys.exit(work(Path(sys.argv[2])) if sys.argv[1:2] == ["--job"] else main())

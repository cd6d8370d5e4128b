"""``python -m pet_finetune.cli.worker JOB``: one of the processes that ``device: 4`` starts."""

from __future__ import annotations

import sys
from pathlib import Path

from pet_finetune import launchers, processes
from pet_finetune.errors import PetFinetuneError


def main() -> int:
    """Train as the job says; the parent process shows errors."""
    launchers.quiet()
    from pet_finetune.api import train_as_told

    try:
        train_as_told(Path(sys.argv[1]))
    except (PetFinetuneError, OSError, KeyboardInterrupt) as error:
        processes.leave_error(str(error) or "interrupted")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

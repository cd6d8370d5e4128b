"""The ``pet-finetune`` command, which is also ``python -m pet_finetune``.

With ``job FILE`` it is one of the processes that ``device: 4`` starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pet_finetune.installation import end_while_importing


def work(job: Path) -> int:
    """Train as a job says; the parent process shows errors."""
    from pet_finetune import processes
    from pet_finetune.errors import PetFinetuneError

    try:
        from pet_finetune.api import train_as_told

        train_as_told(job)
    except (PetFinetuneError, OSError, KeyboardInterrupt) as error:
        processes.leave_error(str(error) or "interrupted")
        return 1
    return 0


def main() -> int:
    """Run a command; returns the exit status."""
    try:
        end_while_importing()
        from pet_finetune import launchers
        from pet_finetune.cli import main as run

        launchers.quiet()
        return work(Path(sys.argv[2])) if sys.argv[1:2] == ["job"] else run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

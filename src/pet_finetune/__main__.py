"""``python -m pet_finetune``: the same as the ``pet-finetune`` command."""

from __future__ import annotations

import sys

from pet_finetune import launchers
from pet_finetune.cli import main

if __name__ == "__main__":
    launchers.quiet()
    sys.exit(main())

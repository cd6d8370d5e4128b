"""metatrain's command line in processes of its own, for all of which it is imported once."""

from __future__ import annotations

import multiprocessing
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any


def mtt(*arguments: Any) -> None:
    """Run metatrain's command in this folder; it must succeed."""
    # Not a fork of this process, whose libraries metatrain would collect for its exported models.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metatrain.__main__"])
    child = context.Process(target=_run, args=[str(Path.cwd()), *map(str, arguments)])
    child.start()
    child.join()
    assert child.exitcode == 0, Path("mtt.log").read_text()[-3000:]


def _run(folder: str, *arguments: str) -> None:
    from metatrain.__main__ import main

    with Path(folder, "mtt.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        sys.argv = ["mtt", *arguments]
        main()

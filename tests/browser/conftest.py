"""A headless Chromium, where one is installed, and pages of reports to open in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pet_finetune.report.page import render
from reports import committee, epochs, predicted, record, stressed
from tiny_data import crystals

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Chromium would look for updates, and as root it starts without its sandbox only.
_FLAGS = (
    "--disable-background-networking", "--disable-component-update", "--disable-gpu",
    "--disable-quic", "--disable-sync", "--no-first-run",
)  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The browser, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("CHROMIUM")
    program = named or next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is installed (CHROMIUM=/path/to/it names one elsewhere)")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    flags = [*_FLAGS, *(["--no-sandbox"] if root else [])]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of several kinds of run."""
    pytest.importorskip("matplotlib")
    runs = {
        "molecules": record(),
        "stress": record(stressed()),
        "committee": record(
            predicted(crystals(12), spread=True), committee=committee(), epochs=[epochs()] * 2,
        ),
        "stopped": record(status="interrupted", after={}, predicted=None, dimers=None, files={}),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("pages")
    made = {}
    for name, run in runs.items():
        made[name] = folder / f"{name}.html"
        made[name].write_text(render(run, "1.2.3"), encoding="utf-8")
    return made

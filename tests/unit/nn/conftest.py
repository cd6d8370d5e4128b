"""The building blocks hold their promises whichever way they compute."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _both(both_ways: str) -> None:
    """Run every test of this folder twice."""

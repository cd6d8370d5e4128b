"""What the tests of reading share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def package_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs, which does not reach the root logger."""
    logger = logging.getLogger("pet_finetune")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger="pet_finetune"):
        yield caplog
    logger.removeHandler(caplog.handler)

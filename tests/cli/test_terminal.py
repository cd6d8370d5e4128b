"""Commands on a terminal: nothing is silent for long."""

from __future__ import annotations

import sys

import pytest

from terminal import listen

pytestmark = pytest.mark.slow
#: Processor time of the command itself, which other work on the machine does not lengthen.
LONGEST = 2.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("info base.ckpt", "cutoff"),
        ("inspect train.xyz -c base.ckpt", "suggestion"),
        ("eval base.ckpt test.xyz", "forces"),
        ("train options.yaml -c base.ckpt -o run", "errors on the test set"),
    ],
)
def test_no_command_is_silent_for_long(here, arguments, said):
    heard = listen([sys.executable, "-m", "pet_finetune", *arguments.split()], here)
    assert heard.status in (0, 1), heard.text
    assert said in heard.text
    assert heard.longest.processor < LONGEST, heard.longest
    assert "Traceback" not in heard.text

"""The streams of random numbers: their numbers stay, and only rng.py gives them."""

import re
from pathlib import Path

import pet_finetune
from pet_finetune.rng import MemberStream, Stream, seed_everything

_DEFINITION = re.compile(r"^\s*\w*_STREAM\b.*=\s*\d", re.MULTILINE)


def test_numbers_of_streams_stay() -> None:
    """A changed number would change what a seed gives and how a run resumes."""
    expected = {"ORDER": 0, "ROTATIONS": 1, "REPLAY": 2, "NOISE": 3, "CONSISTENCY": 4}
    expected |= {"PERTURBED_COPIES": 7, "ANCHOR": 8, "SAMPLE": 9}
    for name, number in expected.items():
        assert Stream[name] == number
    assert [int(stream) for stream in MemberStream] == [0, 1]


def test_no_other_module_numbers_a_stream() -> None:
    assert _DEFINITION.search("_STREAM = 4\n")
    assert _DEFINITION.search("_ORDER_STREAM, _ROTATION_STREAM = 0, 1\n")
    root = Path(pet_finetune.__file__).parent
    found = [str(f) for f in root.rglob("*.py") if _DEFINITION.search(f.read_text())]
    assert not found


def test_a_seed_may_be_any_whole_number():
    assert seed_everything(2**64) == 2**64

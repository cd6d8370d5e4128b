"""What every test shares: thread counts and the data beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pet_finetune.backends import choice

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Keep torch to two threads: the tests' tensors are small, more threads only wait."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.hookimpl(tryfirst=True)  # before those that are marked are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they are: parity by folder, shared by the fixture they ask for.

    Of the cases of a test that is marked ``few(n)``, all but ``n`` are marked ``slow``.
    """
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") is not None:
            cases.setdefault((item.path, item.name.partition("[")[0]), []).append(item)
        if "parity" in item.path.relative_to(REPOSITORY).parts:
            item.add_marker(pytest.mark.parity)
        if "shared_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)
    for own in cases.values():
        (count,) = own[0].get_closest_marker("few").args
        kept = {len(own) * (2 * k + 1) // (2 * count) for k in range(count)}  # evenly spread
        for number, item in enumerate(own):
            if number not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> None:
    """Every test computes as a user's run does: with the fused kernels where they can be built."""
    choice.prepare()


@pytest.fixture
def with_kernels() -> None:
    """Skip a test of the fused kernels where they are not in use; fail where they are required."""
    if not choice.loaded():
        missing = "the fused kernels are not in use here"
        required = os.environ.get(choice.VARIABLE) == "require"
        pytest.fail(missing) if required else pytest.skip(missing)


@pytest.fixture(params=["fused", "plain"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the fused kernels and again with plain torch operations."""
    if request.param == "fused":
        request.getfixturevalue("with_kernels")
    else:
        monkeypatch.setattr(choice._State, "loaded", False)  # as where they cannot be
    return str(request.param)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository, for tests that read its files."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder ``shared`` beside the repository, or a skip that says it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared beside the repository (reference data and checkpoints)")
    return folder

"""Settings that cannot be are refused with what to do; a summary says what the log says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pet_finetune.dynamics.integrators import MDSettings
from pet_finetune.dynamics.measure import simulation_svg, summarize


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ensemble": "ntv"}, "Did you mean 'nvt'?"),
        ({"thermostat": "langevine"}, "--thermostat: expected one of langevin, bussi"),
        ({"temperature": -1.0}, "--temperature: expected 0 K or more, got -1."),
        ({"temperature": math.nan}, "--temperature: expected 0 K or more"),
        ({"temperature": 0.0}, "--temperature: nvt needs one above 0 K."),
        ({"timestep": 0.0}, "--timestep: expected a number above 0"),
        ({"timestep": 6.0}, "--timestep: 6 fs is too long"),
        ({"steps": 0}, "--steps: expected 1 or more"),
        ({"steps": 3.5}, "--steps: expected 1 or more, a whole number, got 3.5."),
        ({"every": 0}, "--every: expected 1 or more"),
        ({"minimize": -1}, "--minimize: expected 0 or more"),
        ({"seed": -1}, "--seed: expected 0 or more"),
        ({"friction": -1.0}, "--friction: expected a number above 0"),
        ({"ensemble": "npt", "pressure": math.inf}, "--pressure: expected a number in GPa"),
        ({"ensemble": "nve", "friction": 1.0}, "--friction: --ensemble nve does not use it"),
        ({"thermostat": "bussi", "friction": 1.0}, "--friction: --ensemble nvt --thermostat bussi"),
        ({"thermostat_time": 50.0}, "--thermostat-time: --ensemble nvt --thermostat langevin"),
        ({"pressure": 1.0}, "--pressure: --ensemble nvt"),
        ({"ensemble": "npt", "thermostat": "bussi"}, "whose thermostat is a Nose-Hoover chain"),
    ],
)
def test_what_cannot_be_is_refused(given, said: str) -> None:
    (only,) = MDSettings(**given).problems()
    assert said in only


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"ensemble": "nve", "temperature": 0.0},
        {"thermostat": "bussi", "thermostat_time": 50.0},
        {"ensemble": "npt", "pressure": -1.0, "barostat": "full", "thermostat": "nose-hoover"},
    ],
)
def test_what_can_be_is_not(given) -> None:
    assert MDSettings(**given).problems() == []
    assert MDSettings(**given).filled(1).problems() == []


def test_numbers_of_numpy_are_plain() -> None:
    settings = MDSettings(steps=np.int64(3), temperature=np.float32(300))
    assert [type(settings.steps), type(settings.temperature)] == [int, float]
    assert not settings.problems()


def test_a_long_step_with_hydrogen_is_warned_of() -> None:
    (warning,) = MDSettings(timestep=3.0).warnings(with_hydrogen=True)
    assert "long for hydrogen" in warning
    assert MDSettings(timestep=3.0).warnings(with_hydrogen=False) == []
    assert MDSettings(timestep=1.0).warnings(with_hydrogen=True) == []


def log(slope: float = 0.0, noise: float = 0.0, steps: int = 1000) -> dict[str, np.ndarray]:
    """Rows of 8 atoms, a slope in meV/atom/ps in the conserved energy, 1 fs each."""
    time = np.arange(steps, dtype=float)
    drift = 8 * slope * time / 1e6
    return {
        "step": np.arange(steps),
        "time_fs": time,
        "total_eV": drift,
        "potential_eV": drift,
        "conserved_eV": drift + noise * np.random.default_rng(0).normal(size=steps) * 8e-3,
        "temperature_K": np.where(time < steps / 2, 100.0, 300.0),
    }


def test_the_drift_is_that_of_the_log() -> None:
    summary = summarize(log(slope=2.0, noise=0.1), 8)
    assert summary.drift == pytest.approx(2.0, abs=4 * summary.drift_error)
    assert summary.fluctuation == pytest.approx(0.1, rel=0.1)
    assert summary.temperature == 300.0  # of the second half
    assert summary.drifts
    assert not summarize(log(slope=0.5, noise=0.1), 8).drifts
    assert not summarize(log(slope=2.0, noise=100.0), 8).drifts
    assert summarize(log(slope=2.0, steps=50), 8).drift is None  # of a vibration, maybe


def test_volume_and_uncertainty_are_shown_where_they_are() -> None:
    rows = log()
    still = summarize({**rows, "volume_A3": np.full(1000, 50.0), "pressure_GPa": rows["step"]}, 8)
    assert still.volume is None
    assert still.pressure == pytest.approx(749.5)
    spread = np.zeros(1000)
    spread[123] = 0.7
    rows |= {"volume_A3": 50.0 + rows["step"], "max_forces_uncertainty_eV_A": spread}
    summary = summarize(rows, 8)
    assert summary.volume == pytest.approx(799.5)
    assert (summary.uncertainty, summary.uncertain_at) == (0.7, 123)
    plot = simulation_svg(rows, 8, 300.0, limit=0.5)
    for words in ("conserved energy", "asked for", "volume", "largest force", "time (fs)"):
        assert words in plot
    assert plot == simulation_svg(rows, 8, 300.0, limit=0.5)
    assert "volume" not in simulation_svg(log(), 8, 300.0)

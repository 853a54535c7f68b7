"""Observed stars that are spoilt as another instrument would spoil them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[3] / "scripts/paper/evaluate_observed.py"
    spec = importlib.util.spec_from_file_location("evaluate_observed_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_spoilt_stars_have_wider_lines_the_air_and_a_resolving_power_that_is_wrong(script):
    wavelength = np.arange(4_000.0, 7_400.0, 0.9)
    sigma = 5_500.0 / script.MILES_POWER / 2.3548
    flux = 1.0 - 0.5 * np.exp(-0.5 * ((wavelength - 5_500.0) / sigma) ** 2)
    row = {"object_id": "a", "wavelength": wavelength, "flux": flux, "mask": np.zeros(len(wavelength), bool)}
    rows = script.spoilt([row] * 200)
    assert {found["resolving_power"] for found in rows} == {script.LAMOST_POWER}
    grid = rows[0]["wavelength"]
    mean = np.mean([found["flux"] / np.median(found["flux"]) for found in rows], axis=0)

    def around(low, high):
        return (grid > low) & (grid < high)

    near = around(5_485.0, 5_515.0)
    depth = 1.0 - mean[near] / np.median(mean[around(5_440.0, 5_560.0) & ~around(5_490.0, 5_510.0)])
    width = 0.94 * np.sum(depth * np.gradient(grid[near])) / depth.max()  # of a Gaussian
    assert 5_500.0 / width == pytest.approx(script.POWER_SEEN, rel=0.12)
    level = np.median(mean[around(6_750.0, 6_860.0)])
    assert mean[around(6_870.0, 6_958.0)].mean() < 0.9 * level
    scatter = np.std([np.diff(found["flux"][around(5_600.0, 5_900.0)]) for found in rows])
    assert 0.005 < scatter < 0.1

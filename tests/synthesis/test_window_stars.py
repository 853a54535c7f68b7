# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Synthetic stars at high resolution in a window, and the rung that they are for."""

import numpy as np
import pytest

from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.synthesis.bases import window_grid, window_rung
from spectrafm_hf.synthesis.survey_grid import as_seen
from spectrafm_hf.synthesis.window_stars import CORES, WindowStars


@pytest.fixture(scope="module")
def grid():
    grid = window_grid()
    grid.resolving_power = np.inf
    return grid


@pytest.fixture(scope="module")
def labels(grid):
    return grid.labels(30, np.random.default_rng(0))


@pytest.fixture(scope="module")
def rung():
    return window_rung(5, n_stars=40, n_directions=8)


@pytest.fixture
def stars(rung, grid, labels):
    return WindowStars(rung, grid, grid.spectra(labels), grid.known(labels))


def test_the_rung_covers_the_window_and_reads_what_is_nearly_all_in_it(rung):
    low, high = rung.range
    assert low < 8_400 and high > 8_800 and rung.first_interval == 5 and rung.n_intervals == 9
    basis = SpectrumBasis([rung])
    assert basis.interval_edges[5][0] == pytest.approx(8_402.0) and basis.interval_edges[-1][1] > 8_795
    assert rung.covers(np.arange(8_460.0, 8_700.0, 0.1)) and not rung.covers(np.arange(8_460.0, 9_700.0, 0.1))
    assert SpectrumBasis.from_arrays(basis.arrays()).rungs[0].least_inside == rung.least_inside == 0.9


def test_spectra_without_errors_are_those_of_a_spectrograph(stars, grid, labels, monkeypatch):
    module = "spectrafm_hf.synthesis.window_stars."
    for name in ("POWER_ERROR", "SCATTERED", "VELOCITY", "FAR", "ROTATION", "SLOW", "CORE_ERROR", "ACTIVE"):
        monkeypatch.setattr(module + name, 0.0)
    monkeypatch.setattr(module + "STRENGTHS", ())
    monkeypatch.setattr(module + "smooth_factors", lambda wavelength, amplitude, *others: np.ones(1, np.float32))
    drawn = stars.draw(40, np.random.default_rng(1), snr=1e6, number=1)
    chosen = [int(np.argmin(np.abs(labels["teff"] - teff))) for teff in drawn["teff"]]
    seen = as_seen(window_grid(), labels, drawn["wavelength"], np.full(len(drawn["wavelength"]), 11_499.0))
    assert drawn["resolving_power"] == 11_500.0 and not drawn["mask"].any()
    np.testing.assert_allclose(drawn["flux"], seen[chosen], atol=4e-3)


def test_lines_have_errors_of_their_own_and_the_cores_of_calcium_larger_ones(stars, grid, labels):
    drawn = stars.strengths(np.repeat(np.argmax(labels["teff"]), 4_000), np.random.default_rng(0))
    core = np.min(np.abs(grid.wavelength[:, None] - CORES), axis=1)
    assert np.abs(np.median(drawn[:, core > 8.0]) - 1.0) < 0.02
    spread = [np.std(drawn[:, own]) for own in (core < 0.3, core > 8.0)]
    assert 0.2 < spread[1] < 0.4 and spread[0] > 1.1 * spread[1]
    cool = stars.strengths(np.repeat(np.argmin(labels["teff"]), 4_000), np.random.default_rng(0))
    assert labels["teff"].min() < 4_000 and np.std(cool[:, core > 8.0]) > 1.3 * spread[1]
    together = np.corrcoef(drawn[:, 200], drawn[:, 400])[0, 1]
    assert abs(together) < 0.1 and drawn.min() >= 0.1


def test_grids_at_random_are_read_by_the_rung(stars, rung):
    basis = SpectrumBasis([rung])
    for number, (wavelength, power) in enumerate(stars.grids):
        assert rung.lowest_resolving_power <= power <= rung.resolving_power
        assert basis.rung_for(wavelength, power) is rung, number
        assert len(basis.design(wavelength, power).intervals) >= 2
    one, other = (stars.draw(5, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one["flux"], other["flux"])
    assert np.isfinite(one["flux"]).all() and (one["flux_error"] > 0).all()

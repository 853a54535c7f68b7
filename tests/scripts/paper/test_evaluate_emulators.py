"""Emulators against a grid: means over its pixels, and the table of known differences."""

import numpy as np
import pytest
from script_loader import load_script

from spectrafm_hf.synthesis.emulation import Grid


@pytest.fixture(scope="module")
def script():
    return load_script("paper/evaluate_emulators")


def test_means_over_wide_pixels_are_those_of_the_fine_ones(script):
    fine = np.arange(5_000.0, 5_100.0, 0.1)
    flux = 1.0 + 0.5 * np.sin(fine / 2.0) + 0.01 * (fine - 5_050.0)
    grid = np.arange(4_995.0, 5_090.0, 2.5)
    found = script.on_pixels(fine, flux[None], grid)[0]
    assert np.isnan(found[:2]).all() and np.isfinite(found[4:]).all()
    for at, value in list(zip(grid, found, strict=True))[4:]:
        inside = (fine > at - 1.25) & (fine < at + 1.25)
        assert value == pytest.approx(flux[inside].mean(), abs=0.03)
    np.testing.assert_array_equal(script.on_pixels(fine, flux[None], fine), flux[None])


def test_a_difference_is_in_the_line_of_its_range_and_temperature(script):
    wavelength = np.arange(3_400.0, 10_200.0, 10.0)
    flux = np.ones((4, len(wavelength)))
    grid = Grid(["teff"], np.array([[3_700.0], [4_700.0], [5_500.0], [5_600.0]]), wavelength, flux)
    found = flux.copy()
    found[1, (wavelength > 5_000) & (wavelength < 6_000)] += 0.02
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in script.table_of("one", found, grid)]
    assert [line[1] for line in lines][2] == "5000-6000"
    assert lines[2][2:] == ["", "0.00 (1)", "", "2.00 (1)", "0.00 (2)", "", "0.00 (3)"]
    assert lines[0][5] == "0.00 (1)"


def test_an_emulator_has_spectra_for_the_stars_of_a_grid_that_it_covers(script):
    wavelength = np.arange(4_000.0, 9_000.0, 2.5)
    names = ["teff", "logg", "fe_h", "c_fe", "n_fe", "o_fe", "mg_fe", "si_fe", "al_fe", "ca_fe", "ti_fe", "mn_fe"]
    names += ["ni_fe", "vmicro"]
    labels = np.zeros((2, len(names)))
    labels[:, :3], labels[:, -1] = [[5_000.0, 3.0, -0.3], [50_000.0, 3.0, -0.3]], 1.4
    grid = Grid(names, labels, wavelength, np.ones((2, len(wavelength))))
    found, covered = script.emulated("emulator-optical", grid)
    assert covered.tolist() == [True, False] and found.shape == (1, len(wavelength))
    assert 0.2 < found.min() < 0.9 < found.max() < 1.1

"""One star through two instruments: the table of agreeing and disagreeing predictions."""

from pathlib import Path

import numpy as np
import pytest
from script_loader import load_script


SCRIPTS = Path(__file__).parents[3] / "scripts" / "paper"


@pytest.fixture(scope="module")
def script():
    return load_script("paper/compare_instruments")


def test_when_errors_are_right_then_z_is_one_and_a_shift_is_reported(script):
    generator = np.random.default_rng(0)
    true, sigma = generator.uniform((4500, 2, -1), (6000, 4, 0), (4000, 3)), np.array([60.0, 0.1, 0.05])
    one, other = ((true + sigma * generator.standard_normal(true.shape), sigma * np.ones(true.shape)) for _ in range(2))
    other[0][:, 0] += 150.0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in script.comparison("a - b", one, other)]
    assert [line[2] for line in lines] == ["teff", "logg", "fe_h"]
    assert float(lines[0][4]) == pytest.approx(-150.0, abs=5.0) and float(lines[0][5]) > 1.5
    assert float(lines[1][5]) == pytest.approx(1.0, abs=0.06) and float(lines[2][5]) == pytest.approx(1.0, abs=0.06)
    assert float(lines[2][3]) == pytest.approx(0.05 * 2**0.5, abs=0.005)


def test_halves_of_a_spectrum_share_no_pixel(script, tmp_path):
    wavelength = np.arange(4000.0, 6000.0, 0.5)
    columns = [wavelength, np.ones(len(wavelength)), np.full(len(wavelength), 0.01)]
    np.savetxt(tmp_path / "one.txt", np.stack(columns, axis=1))
    (blue,), (red,) = script.halves(tmp_path / "one.txt")
    assert not (~blue["mask"] & ~red["mask"]).any() and (~blue["mask"] | ~red["mask"]).all()
    assert blue["wavelength"][~blue["mask"]].max() == pytest.approx(4899.0, abs=3.0)

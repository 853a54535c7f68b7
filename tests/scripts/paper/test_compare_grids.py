from pathlib import Path

import numpy as np
import pytest
from script_loader import load_script

from spectrafm_hf.synthesis import LABEL_NAMES, Spectrum, draw_labels
from spectrafm_hf.synthesis.grid import GridSettings, write_grid
from spectrafm_hf.synthesis.sampling import APSTAR_WAVELENGTH


SCRIPT = Path(__file__).parents[3] / "scripts" / "paper" / "compare_grids.py"


@pytest.fixture(scope="module")
def script():
    return load_script("paper/compare_grids")


class Lines:
    def __init__(self, depth: float):
        self.depth = depth

    def synthesize(self, labels):
        lines = np.sin(APSTAR_WAVELENGTH * labels["logg"]) ** 2
        return Spectrum(APSTAR_WAVELENGTH, 1 - self.depth * lines, np.full(8575, labels["teff"]))


@pytest.fixture
def grids(tmp_path):
    """Two folders: lines of depth 0.40 and 0.41; the second has two of the three stars, and others."""
    labels = draw_labels(3, np.random.default_rng(0))
    others = draw_labels(4, np.random.default_rng(1))
    mixed = {name: np.append(others[name], labels[name][:2]) for name in LABEL_NAMES}
    settings = GridSettings("synthetic-test", 15100, 17000, 0.2, "native", True, 1.0, 100)
    list(write_grid(tmp_path / "a", labels, ["a", "b", "c"], Lines(0.40), settings))
    list(write_grid(tmp_path / "b", mixed, list("uvwxyz"), Lines(0.41), settings))
    return tmp_path, labels


def test_stars_of_equal_labels_are_compared(script, grids, capsys):
    folder, labels = grids
    assert script.main([str(folder / "a"), str(folder / "b")]) == 0
    header, *stars = capsys.readouterr().out.splitlines()
    stars = [line.split() for line in stars if "stars" not in line]
    assert header.split()[:4] == ["teff", "logg", "fe_h", "rms"]
    assert [round(value) for value in labels["teff"][:2]] == [int(star[0]) for star in stars]
    # A hundredth of sin^2 has a standard deviation of 0.01 / sqrt(8) and a median of 0.005.
    assert [float(star[3]) for star in stars] == pytest.approx([0.354, 0.354], abs=0.01)
    assert [float(star[4]) for star in stars] == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_ready_grid_in_an_npz_is_read(script, grids, capsys):
    folder, labels = grids
    flux = np.stack(
        [Lines(0.40).synthesize({name: labels[name][star] for name in LABEL_NAMES}).flux for star in (0, 1)]
    )
    flux[:, :50] = flux[:, 50:51]  # as where a synthesis ended before the pixels
    table = np.stack([labels[name][:2] for name in LABEL_NAMES], axis=1).astype(np.float32)
    np.savez(folder / "ready.npz", labels=table, norm_u16=np.round(flux * 65535 / 1.2).astype(np.uint16))
    assert script.main([str(folder / "a"), str(folder / "ready.npz")]) == 0
    stars = [line.split() for line in capsys.readouterr().out.splitlines()[1:3]]
    assert [float(star[3]) for star in stars] == pytest.approx([0, 0], abs=0.001)


@pytest.mark.parametrize("reference", ["nothing", "other.npz", "disjoint"])
def test_grids_that_cannot_be_compared_are_one_line(script, grids, capsys, reference):
    folder, labels = grids
    table = np.stack([labels[name] for name in LABEL_NAMES], axis=1)
    np.savez(folder / "other.npz", labels=table, norm_u16=np.ones((3, 9), np.uint16), wavelength=np.arange(9.0))
    settings = GridSettings("synthetic-test", 15100, 17000, 0.2, "native", True, 1.0, 100)
    apart = draw_labels(2, np.random.default_rng(5))
    list(write_grid(folder / "disjoint", apart, ["a", "b"], Lines(0.4), settings))
    expected = {
        "nothing": "expected a folder with data/*.parquet, found none there",
        "other.npz": "wavelength: expected the 9 pixels of the reference, got 8575 others",
        "disjoint": "labels: expected at least one star in both grids, got none",
    }
    assert script.main([str(folder / "a"), str(folder / reference)]) == 2
    error = capsys.readouterr().err
    assert expected[reference] in error and error.count("\n") == 1

"""From a grid of spectra to an emulator."""

import json

import numpy as np
import pytest

from spectrafm_hf import SpectrumEmulator
from spectrafm_hf.emulation import Grid, emulator_errors, fit_emulator, read_grid


NAMES = ["teff", "logg", "fe_h", "mg_fe"]


def make_grid(n_stars: int, seed: int = 0, continuum: bool = False) -> Grid:
    """Two lines whose depths saturate with abundance and depend on temperature."""
    generator = np.random.default_rng(seed)
    low, high = np.array([4000, 1, -1, -0.3]), np.array([6000, 5, 0.5, 0.5])
    labels = low + (high - low) * generator.random((n_stars, 4))
    wavelength = np.linspace(5000.0, 5100.0, 60)
    theta = 5040 / labels[:, :1]
    strengths = [np.exp(2 * labels[:, 2:3] + 3 * (theta - 1)), np.exp(2 * labels[:, 2:3] + 2 * labels[:, 3:] + theta)]
    depth = sum(
        0.5 * s / (1 + s) * np.exp(-0.5 * ((wavelength - x) / 4) ** 2)
        for s, x in zip(strengths, (5030.0, 5070.0), strict=True)
    )
    level = (labels[:, :1] / 5000) ** 4 * (wavelength / 5000) ** (-theta) if continuum else None
    return Grid(NAMES, labels, wavelength, (1 - depth).astype(np.float32), level)


@pytest.mark.parametrize("continuum", [False, True])
def test_an_emulator_reproduces_stars_that_it_was_not_fitted_to(continuum):
    emulator = fit_emulator(make_grid(150, continuum=continuum), (3, 5), steps=80)
    held_out = make_grid(60, seed=1, continuum=continuum)
    held_out = held_out[emulator.covers(held_out.labels)]
    assert len(held_out) > 40
    assert np.median(emulator_errors(emulator, held_out)) < 2e-3
    assert held_out.flux.std(axis=0).max() > 0.05


def test_the_script_measures_what_it_saves(tmp_path, run_script):
    grid = make_grid(260)
    np.savez(
        tmp_path / "grid.npz",
        labels=grid.labels.astype(np.float32),
        label_names=["teff", "logg", "feh", "mg"],
        norm_u16=np.round(grid.flux * 65535 / 1.2).astype(np.uint16),
        wavelength=grid.wavelength,
    )
    output = tmp_path / "emulator"
    command = ["train_emulator.py", tmp_path / "grid.npz", "--steps", 40, "--components", 3, 5, "--output", output]
    assert run_script(*command, "--held-out", 40)[0] == 0
    emulator = SpectrumEmulator.from_pretrained(output)
    held_out = read_grid(tmp_path / "grid.npz")[-40:]
    held_out = held_out[emulator.covers(held_out.labels)]
    (row, *_) = json.loads((output / "accuracy.json").read_text())["table"]
    assert row["n"] == len(held_out)
    assert row["median"] == pytest.approx(100 * np.median(emulator_errors(emulator, held_out)), rel=1e-3, abs=1e-4)
    assert f"{row['median']:.3f}" in (output / "README.md").read_text()

    code, _, errors = run_script(*command, "--held-out", 400)
    assert code == 2
    assert errors == "train_emulator: --held-out: expected 1 to 59 of 260, got 400\n"


def test_a_grid_without_its_parts_is_an_error(tmp_path):
    np.savez(tmp_path / "grid.npz", labels=np.zeros((3, 4)))
    with pytest.raises(ValueError, match="expected arrays labels, label_names and norm_u16, got none for"):
        read_grid(tmp_path / "grid.npz")

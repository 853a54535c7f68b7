"""From a grid of spectra to an emulator."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spectrafm_hf import SpectrumEmulator
from spectrafm_hf.data.schema import pixel_column
from spectrafm_hf.synthesis.emulation import (
    Grid,
    emulator_errors,
    fit_emulator,
    fit_interval_emulator,
    read_grid,
    resolution_errors,
)


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


INTERVALS = {"interval_pixels": 25, "directions": 6, "continuum_directions": 2, "continuum_components": 3}
REGIMES = {"regime_teff": [5000.0], "regime_overlap": 100.0}


@pytest.fixture(scope="module")
def by_intervals() -> SpectrumEmulator:
    return fit_interval_emulator(make_grid(260, continuum=True), (3, 5), steps=80, **INTERVALS, **REGIMES)


def test_an_emulator_of_intervals_reproduces_stars_that_it_was_not_fitted_to(by_intervals):
    held_out = make_grid(60, seed=1, continuum=True)
    held_out = held_out[by_intervals.covers(held_out.labels)]
    assert len(held_out) > 40
    assert np.median(emulator_errors(by_intervals, held_out)) < 3e-3
    # 60 pixels are two intervals and a part of a third.
    assert by_intervals.basis.shape == (3, 6, 25) and by_intervals.basis.dtype == torch.int8


def test_a_part_of_the_range_is_that_part_of_the_spectrum(by_intervals):
    labels = {"teff": [4500, 5010, 5600], "logg": 3.0, "fe_h": -0.2}
    wavelength, flux = by_intervals.synthesize(**labels)
    for low, high in ((5000.0, 5020.0), (5035.0, 5052.0), (5090.0, 6000.0)):
        part, some = by_intervals.synthesize(wavelength_range=(low, high), **labels)
        inside = (wavelength >= low) & (wavelength <= high)
        np.testing.assert_array_equal(part, wavelength[inside])
        np.testing.assert_allclose(some, flux[:, inside], rtol=2e-6)
    with pytest.raises(ValueError, match="wavelength_range: expected .* within 5000 to 5100 Angstrom, got 1 to 2"):
        by_intervals.synthesize(wavelength_range=(1, 2), **labels)


def test_spectra_change_smoothly_where_regimes_meet(by_intervals):
    teff = torch.linspace(4850, 5150, 61, dtype=torch.float64)
    shares = by_intervals.shares(teff)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(61, dtype=torch.float64))
    assert shares[0].tolist() == [1.0, 0.0] and shares[30].tolist() == [0.5, 0.5] and shares[-1].tolist() == [0.0, 1.0]
    _, flux = by_intervals.synthesize(teff=teff.numpy(), logg=3.0, fe_h=0.0, normalized=True)
    assert np.abs(np.diff(flux, 2, axis=0)).max() < 2e-4


def test_the_derivatives_of_an_emulator_of_intervals_are_those_of_finite_differences(by_intervals):
    labels = torch.tensor([[5040.0, 3.0, -0.2, 0.1], [4400.0, 3.0, -0.2, 0.1]], dtype=torch.float64)
    for label, step in enumerate((5.0, 0.05, 0.02, 0.02)):
        direction = torch.zeros_like(labels)
        direction[:, label] = 1.0
        _, slope = torch.autograd.functional.jvp(lambda at: by_intervals(at)[0], labels, direction)
        with torch.no_grad():
            finite = (
                (by_intervals(labels + step * direction)[0] - by_intervals(labels - step * direction)[0]) / step / 2
            )
        assert (slope - finite).norm() < 0.02 * finite.norm(), label


def test_an_emulator_of_intervals_loads_as_it_was_saved_and_stays_in_single_precision(tmp_path, by_intervals):
    by_intervals.save_pretrained(tmp_path)
    labels = {"teff": [4500, 5010, 5600], "logg": 3.0, "fe_h": -0.2}
    wavelength, flux = by_intervals.synthesize(**labels)
    for settings in ({}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}):
        loaded = SpectrumEmulator.from_pretrained(tmp_path, **settings)
        for emulator in (loaded, loaded.half()):
            again, same = emulator.synthesize(**labels)
            np.testing.assert_array_equal(again, wavelength)
            np.testing.assert_array_equal(same, flux)


def test_too_few_stars_in_a_regime_are_an_error():
    with pytest.raises(ValueError, match="component_groups: expected at most .* the stars of a regime, got 150"):
        fit_interval_emulator(make_grid(200), **REGIMES)


def test_errors_at_a_resolving_power_are_those_of_a_gaussian():
    """A deviation in one pixel becomes a Gaussian, whose squares have a mean of 1 / (2 sqrt(pi) sigma pixels)."""

    class Constant:
        def synthesize(self, **_):
            return wavelength, np.ones((1, 400))

    wavelength = 5000 * np.exp(2e-5 * np.arange(400))
    flux = np.ones((1, 400))
    flux[0, 100] = 0.9
    grid = Grid(NAMES, np.array([[5000, 4, 0, 0]]), wavelength, flux)
    sigma = 1 / (2000 * 2.35482 * 2e-5)
    errors = resolution_errors(Constant(), grid, 2000, [(wavelength[200], wavelength[399])])
    assert errors.shape == (1, 2) and errors[0, 0] < 1e-12
    assert errors[0, 1] == pytest.approx(0.1 / np.sqrt(2 * np.sqrt(np.pi) * sigma * 400), rel=1e-4)


def test_the_script_measures_the_saved_one(tmp_path, run_script):
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


def test_the_script_fits_intervals_to_the_shards_that_are_there(tmp_path, run_script):
    grid = make_grid(240, continuum=True)
    grid = Grid(NAMES, grid.labels, 3400 * np.exp(1.8e-2 * np.arange(60)), grid.flux, grid.continuum)
    (tmp_path / "grid" / "data").mkdir(parents=True)
    for shard in range(2):
        stars = slice(120 * shard, 120 * shard + 120)
        columns = {name: grid.labels[stars, i].astype(np.float32) for i, name in enumerate(NAMES)}
        columns |= {f"{name}_err": np.zeros(120, np.float32) for name in NAMES}
        columns["wavelength"] = pixel_column(np.tile(grid.wavelength, 120).astype(np.float32), [60] * 120)
        for name in ("flux", "continuum"):
            columns[name] = pixel_column(getattr(grid, name)[stars].ravel().astype(np.float32), [60] * 120)
        pq.write_table(pa.table(columns), tmp_path / "grid" / "data" / f"train-{shard:05d}-of-00090.parquet")
    output = tmp_path / "emulator"
    command = ["train_emulator.py", tmp_path / "grid", "--intervals", "--output", output, "--hold-out-every"]
    options = ["--steps", 20, "--components", 3, 5, "--directions", 6, "--learning-curve", 150]
    code, _, errors = run_script(*command, 6, *options)
    assert code == 0, errors
    accuracy = json.loads((output / "accuracy.json").read_text())
    assert (accuracy["n_fitted"], accuracy["n_held_out"]) == (200, 40)
    assert [row["stars"] for row in accuracy["learning_curve"]] == [150, 200]
    assert len(accuracy["by_resolution"]) == 14
    assert "## By resolving power and range" in (output / "README.md").read_text()
    emulator = SpectrumEmulator.from_pretrained(output)
    assert emulator.config.regime_stars[0][0] == 0 and emulator.config.interval_pixels == 480
    code, _, errors = run_script(*command, 1)
    assert (code, errors) == (2, "train_emulator: --hold-out-every: expected 2 to 240, got 1\n")


def test_a_grid_without_its_parts_is_an_error(tmp_path):
    np.savez(tmp_path / "grid.npz", labels=np.zeros((3, 4)))
    with pytest.raises(ValueError, match="expected arrays labels, label_names and norm_u16, got none for"):
        read_grid(tmp_path / "grid.npz")

"""Of several sets of labels, the true one fits a spectrum best."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from spectrafm_hf import load_checkpoint


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[3] / "scripts/checks/compare_labels.py"
    spec = importlib.util.spec_from_file_location("compare_labels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def as_models():
    """In place of what observed stars differ by: nothing."""
    rung = load_checkpoint("spectrafm-base")[1].basis.rungs[2]
    shape = rung.n_intervals, 2 + rung.directions.shape[1]
    return SimpleNamespace(
        rung=rung, mismatch=SimpleNamespace(mean=lambda labels: np.zeros((len(labels["teff"]), *shape)))
    )


def test_the_labels_of_a_spectrum_fit_it_to_its_noise_and_others_do_not(script, as_models):
    wavelength = 10.0 ** np.arange(np.log10(3_800.0), np.log10(6_900.0), 1e-4)
    labels = np.array([[5_700.0, 4.0, -0.6], [5_100.0, 2.9, -1.4]])
    models = script.models_of(labels, wavelength, 1_900.0, as_models)
    generator = np.random.default_rng(0)
    slope = 3.0 * (wavelength / 5_000.0) ** -1.5
    error = 0.02 * slope
    flux = models[1] * slope + error * generator.standard_normal(len(wavelength))
    other, own = (script.chi2(wavelength, flux, error, model) for model in models)
    assert np.isfinite(own).all() and np.mean(own) == pytest.approx(0.8, abs=0.05)  # with another 1 % of the flux
    assert (other > own).mean() > 0.8 and np.mean(other) > 1.3 * np.mean(own)
    part = wavelength > 5_000.0
    assert np.isnan(script.chi2(wavelength[part], flux[part], error[part], models[1][part])[:4]).all()


def test_labels_that_the_emulator_does_not_cover_are_refused(script, as_models):
    with pytest.raises(ValueError, match=r"--labels: expected stars that the emulator covers, got \[20000"):
        script.models_of(np.array([[20_000.0, 4.0, 0.0]]), np.arange(4_000.0, 4_100.0), 1_900.0, as_models)

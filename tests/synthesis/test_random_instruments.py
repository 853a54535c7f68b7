"""Stars on random instruments: columns agree, and tokens drawn without pixels agree with those of pixels."""

import numpy as np
import pytest

from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.models.configuration_spectrafm import FIRST_LABEL_ID
from spectrafm_hf.synthesis.bad_pixels import add_noise, add_wild_pixels, missing_pixels
from spectrafm_hf.synthesis.bases import hband_rung, on_even_grid
from spectrafm_hf.synthesis.random_instruments import (
    EvenNoiseStars,
    HighResolutionStars,
    MixedStars,
    SpoiltStars,
    evidence_inputs,
)


LABELS = ["teff", "logg", "fe_h", "alpha_m", "mg_fe"]
LABEL_IDS = [FIRST_LABEL_ID + i for i in range(len(LABELS))]


@pytest.fixture(scope="module")
def basis():
    return SpectrumBasis([hband_rung(0, n_stars=24)])


@pytest.fixture(scope="module")
def high(basis):
    return HighResolutionStars(basis, seed=1, n_grids=2)


def residuals(coefficients, reliability, true):
    """In units of the errors, of coefficients that mean something."""
    z = (coefficients - reliability * true) / np.sqrt(reliability * (1.0 - reliability) + 1e-6)
    return z[(reliability > 0.3) & np.isfinite(z)]


def test_when_tokens_are_drawn_without_pixels_then_they_scatter_as_those_of_pixels_do(basis, high):
    drawn = EvenNoiseStars(high, basis).draw(60, np.random.default_rng(0))
    _, weights = high.draw_weights(60, np.random.default_rng(0))  # what it draws first
    true = high.targets(weights)[:, drawn["interval_ids"][0]]
    z = residuals(drawn["coefficients"], drawn["reliability"], true)
    assert np.std(z) == pytest.approx(1.0, abs=0.1)
    known, weights = high.draw_weights(60, np.random.default_rng(1))
    wavelength, components, _ = high._grid(0)
    flux = (weights @ components).astype(np.float32)
    error = np.full_like(flux, 0.01)
    noisy = flux + error * np.random.default_rng(2).standard_normal(flux.shape, dtype=np.float32)
    found = basis.evidence(wavelength, noisy, error**-2.0, normalised=True)
    z = residuals(found.coefficients, found.reliability, high.targets(weights)[:, found.intervals])
    assert 1.4826 * np.median(np.abs(z)) == pytest.approx(1.0, abs=0.1)


def test_when_stars_are_drawn_again_from_the_same_state_then_they_are_the_same(high):
    first, second = (high.draw(4, np.random.default_rng(7)) for _ in range(2))
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])


def test_when_stars_are_drawn_then_the_columns_fit_together(basis, high):
    for seed in range(6):
        stars = high.draw(5, np.random.default_rng(seed))
        n_pixels = len(stars["wavelength"])
        assert np.all(np.diff(stars["wavelength"]) > 0)
        for name in ("flux", "flux_error", "mask"):
            assert stars[name].shape == (5, n_pixels)
        assert np.all(np.isfinite(stars["flux"])) and np.all(stars["flux_error"] > 0)
        assert not stars["mask"].all(axis=1).any()
        inputs = evidence_inputs(basis, stars, LABELS, LABEL_IDS, ["teff", "ni_fe"])
        assert inputs["coefficients"].shape[::2] == (5, basis.n_coefficients)
        np.testing.assert_array_equal(inputs["star_targets"], np.stack([stars["teff"], stars["ni_fe"]], axis=1))
        assert inputs["labels"].shape == (5, len(LABELS)) and inputs["labels"].isfinite().all()
        assert inputs["attention_mask"].any(dim=1).all()
        alpha = np.mean([stars[name] for name in ("o_fe", "mg_fe", "si_fe", "ca_fe", "ti_fe")], axis=0)
        np.testing.assert_allclose(inputs["labels"][:, 3], alpha, rtol=1e-5)


def test_when_noise_is_added_then_its_size_is_the_error_and_the_snr_is_as_requested():
    flux = np.ones((200, 500), np.float32)
    noisy, error = add_noise(flux, np.full(200, 50.0, np.float32), np.random.default_rng(0))
    assert np.std((noisy - flux) / error) == pytest.approx(1.0, abs=0.02)
    assert np.median(flux / error) == pytest.approx(50.0, rel=0.05)


def test_when_pixels_go_missing_then_some_stars_stay_whole_and_none_loses_all():
    mask = missing_pixels(np.linspace(15_150, 16_950, 2000), 1000, np.random.default_rng(0))
    share = mask.mean(axis=1)
    assert np.mean(share == 0) == pytest.approx(0.35, abs=0.06)
    assert 0.5 < share.max() <= 0.95


def test_when_spectra_are_spoilt_then_few_pixels_are_wild_and_some_errors_wrong():
    flux, error = np.zeros((1000, 300), np.float32), np.ones((1000, 300), np.float32)
    add_wild_pixels(flux, error, np.random.default_rng(0))
    assert np.mean((flux != 0).any(axis=1)) == pytest.approx(0.15, abs=0.04)
    assert np.mean(error[:, 0] != 1) == pytest.approx(0.3, abs=0.05)


class Smooth:
    """Stars whose spectra are smooth, on the grid of Gaia XP."""

    def draw(self, n, generator):
        wavelength = 15_200.0 + 20.0 * np.arange(80)
        tilt = generator.normal(0, 0.3, (n, 1))
        flux = (1.0 + tilt * np.linspace(-1, 1, 80)).astype(np.float32)
        return {
            "wavelength": np.tile(wavelength, (n, 1)),
            "flux": flux,
            "flux_error": np.full_like(flux, 0.01),
            "mask": np.zeros(flux.shape, bool),
            "teff": np.full(n, 5000.0),
        }


def test_when_observed_stars_are_spoilt_then_labels_stay(basis):
    for seed in range(8):
        stars = SpoiltStars(Smooth(), basis, clean=0.0).draw(6, np.random.default_rng(seed))
        assert np.all(stars["teff"] == 5000.0)
        assert stars["flux"].shape == (6, len(stars["wavelength"])) == stars["mask"].shape
        inputs = evidence_inputs(basis, stars, LABELS, LABEL_IDS)
        assert inputs["labels"][:, 1:].isnan().all()


def test_when_smooth_spectra_go_to_an_even_grid_then_they_stay_what_they_are():
    wavelength = np.linspace(4000.0, 5000.0, 60)
    start, step = np.log(4100.0), 1e-3
    found = on_even_grid(wavelength, np.sin(wavelength / 100.0)[None], start, step, 150)
    np.testing.assert_allclose(found[0], np.sin(np.exp(start + step * np.arange(150)) / 100.0), atol=1e-4)


def test_mixed_stars_lie_between_two_with_nearly_the_same_labels():
    random = np.random.default_rng(0)
    teff = np.repeat(np.linspace(4000.0, 6000.0, 50), 4) + random.normal(0.0, 1.0, 200)
    grid = np.arange(4000.0, 5000.0, 25.0)
    bright = 10.0 ** random.uniform(-2, 2, 200)[:, None]
    columns = {
        "wavelength": np.tile(grid, (200, 1)),
        "flux": bright * (1.0 + (teff[:, None] - 5000.0) / 1e4 * (grid - 4500.0) / 500.0),
        "flux_error": bright * np.full((200, len(grid)), 0.01),
        "mask": random.random((200, len(grid))) < 0.02,
        "teff": teff,
        "teff_err": np.full(200, 20.0),
    }
    for share in (0.0, 1.0):
        drawn = MixedStars(columns, ["teff"], share).draw(1000, random)
        slope = np.where(drawn["mask"], np.nan, drawn["flux"])
        slope = (slope[:, -8:].mean(axis=1) - slope[:, :8].mean(axis=1)) / np.nanmean(slope, axis=1)
        known = np.isfinite(slope)
        expected = (drawn["teff"] - 5000.0) / 1e4 * (grid[-8:].mean() - grid[:8].mean()) / 500.0
        np.testing.assert_allclose(slope[known], expected[known], atol=5e-3)
        own = np.isin(drawn["teff"], teff)
        assert own.all() if share == 0.0 else own.mean() < 0.05
        assert drawn["flux_error"].mean() == pytest.approx(0.01, rel=0.02) if share == 0.0 else True
        assert (drawn["flux_error"] <= 0.0102).all()

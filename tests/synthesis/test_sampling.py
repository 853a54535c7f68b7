import numpy as np
import pytest

from spectrafm_hf.synthesis.sampling import (
    APSTAR_WAVELENGTH,
    OPTICAL_EDGES,
    R20000_EDGES,
    apstar,
    bin_means,
    bins,
    native,
    r20000,
    smooth,
)
from spectrafm_hf.synthesis.synthesizer import Spectrum


def test_smoothing_makes_a_narrow_line_a_gaussian_of_the_resolution_and_keeps_its_area():
    wavelength = np.arange(15900, 16100, 0.02)
    flux = 1 - 0.5 * np.exp(-0.5 * ((wavelength - 16000) / 0.1) ** 2)
    pixels = np.arange(15990, 16010, 0.05)
    depth = 1 - smooth(wavelength, flux, pixels, 20_000.0)
    sigma = np.hypot(16000 / 20_000 / 2.3548, 0.1)
    expected = 0.5 * 0.1 / sigma * np.exp(-0.5 * ((pixels - 16000) / sigma) ** 2)
    assert depth == pytest.approx(expected, abs=3e-4)
    assert depth.sum() * 0.05 == pytest.approx(0.5 * 0.1 * np.sqrt(2 * np.pi), rel=1e-3)


def test_means_over_bins_conserve_the_flux():
    wavelength = np.linspace(5000, 5010, 401)
    assert bin_means(wavelength, 2 * wavelength, np.array([5000.0, 5002.5, 5010.0])) == pytest.approx(
        [10002.5, 10012.5]
    )


def test_a_flat_continuum_stays_flat_in_every_sampling():
    for sampling, low, high in ((apstar, 15090, 17010), (bins, 3300, 10310), (native, 5000, 5010)):
        wavelength = np.arange(low, high, 0.1)
        sampled = sampling(Spectrum(wavelength, np.ones_like(wavelength), wavelength * 100))
        assert sampled.flux == pytest.approx(1.0, abs=1e-12)
        assert sampled.continuum == pytest.approx(sampled.wavelength * 100, rel=1e-6)


def test_the_pixels_are_those_of_apogee_and_of_the_optical_grid():
    assert APSTAR_WAVELENGTH[[0, -1]] == pytest.approx([15100.802, 16999.808], abs=1e-3)
    assert OPTICAL_EDGES[[0, -1]].tolist() == [3305.0, 10305.0]


def test_the_flux_of_a_bin_is_mean_flux_over_mean_continuum():
    wavelength = np.arange(3300, 10310, 0.05)
    continuum = wavelength.copy()
    line = Spectrum(wavelength, np.where((wavelength > 5001.3) & (wavelength < 5002.4), 0.2, 1.0), continuum)
    sampled = bins(line)
    middle = np.argmin(np.abs(sampled.wavelength - 5001.25))
    assert sampled.flux[middle] == pytest.approx(1 - 0.8 * 1.1 / 2.5, abs=0.01)
    assert sampled.flux[middle + 2] == pytest.approx(1)


def test_the_bins_of_the_library_are_equally_wide_in_ln_wavelength():
    assert np.diff(np.log(R20000_EDGES)) == pytest.approx(2e-5, rel=1e-6)
    assert R20000_EDGES[0] == 3301 and 10299.7 < R20000_EDGES[-1] <= 10300


def test_a_line_narrower_than_a_bin_keeps_its_area():
    wavelength = 3300 * np.exp(4e-6 * np.arange(int(np.log(10302 / 3300) / 4e-6)))
    depth = 0.4 * np.exp(-0.5 * ((np.log(wavelength) - np.log(5000)) / 4e-6) ** 2)
    sampled = r20000(Spectrum(wavelength, 1 - depth, np.full_like(wavelength, 2.0**21)))
    area = (1 - sampled.flux).sum() * 2e-5
    assert area == pytest.approx(0.4 * 4e-6 * np.sqrt(2 * np.pi), rel=1e-3)
    assert (1 - sampled.flux).argmax() == np.abs(sampled.wavelength - 5000).argmin()


def test_the_rounded_continuum_is_within_a_few_ten_thousandths_and_the_surface_flux_exact():
    wavelength = np.arange(3300, 10302, 0.02)
    continuum = 1e6 * (wavelength / 5000) ** -1.7
    sampled = r20000(Spectrum(wavelength, np.full_like(wavelength, 0.7), continuum))
    truth = 1e6 * (sampled.wavelength / 5000) ** -1.7
    assert sampled.continuum == pytest.approx(truth, rel=1.23e-4)
    assert sampled.flux * sampled.continuum == pytest.approx(0.7 * truth, rel=1e-7)
    assert len(np.unique(sampled.continuum)) < 30_000  # it repeats, so it compresses

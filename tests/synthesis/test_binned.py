"""Emulators with wider pixels give the same spectra through their instruments."""

import numpy as np
import pytest

from spectrafm_hf.synthesis.binned import binned, emulator_for, fwhm_of
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.synthetic import load_emulator


STARS = {"teff": [4300.0, 5000.0, 5800.0, 7500.0], "logg": [1.5, 4.6, 4.4, 4.0], "fe_h": [-0.5, 0.2, 0.0, -1.0]}


@pytest.fixture(scope="module")
def optical():
    return load_emulator("emulator-optical").eval()


def test_a_wide_pixel_is_the_mean_of_narrow_ones(optical):
    wide = binned(optical, 20)
    wavelength, flux = optical.synthesize(normalized=True, **STARS)
    n = len(wavelength) // 20
    found = wide.synthesize(normalized=True, **STARS)
    assert found[1].shape == (4, n) and wide.config.label_names == optical.config.label_names
    np.testing.assert_allclose(found[0], wavelength[: 20 * n].reshape(n, 20).mean(axis=1), rtol=1e-7)
    narrow = flux[:, : 20 * n].reshape(4, n, 20)
    positive = (narrow > 0).all(axis=2)  # negative fluxes are set to 0 in pixels of either width
    assert positive.mean() > 0.999
    np.testing.assert_allclose(found[1][positive], narrow.mean(axis=2)[positive], atol=1e-5)
    full, own = (one.synthesize(**STARS)[1] for one in (optical, wide))
    ratio = own / full[:, : 20 * n].reshape(4, n, 20).mean(axis=2)
    # The continuum changes within a wide pixel.
    assert np.abs(ratio - 1).max() < 4e-3 and ratio.std() < 1e-3
    assert binned(optical, 1) is optical


@pytest.mark.parametrize(("name", "fewer"), [("gaia-xp", 48), ("miles", 2), ("gaia-rvs", 1)])
def test_an_instrument_sees_the_same_with_wider_pixels(optical, name, fewer):
    instrument = Instrument.load(name)
    emulator, wavelength_range = emulator_for(optical, instrument)
    assert optical.config.num_pixels // emulator.config.num_pixels == fewer
    seen = []
    for one, limits in ((optical, None), (emulator, wavelength_range)):
        wavelength, flux = one.synthesize(normalized=True, wavelength_range=limits, **STARS)
        seen.append((instrument.response(wavelength) @ flux.T).T)
    # The emulator itself is off by 2e-3 (its card).
    assert np.abs(seen[1] - seen[0]).max() < 3e-3 and np.abs(seen[1] - seen[0]).std() < 5e-4


def test_the_narrower_line_spread_function_counts_where_two_overlap():
    xp = Instrument.load("gaia-xp")
    at = int(np.argmin(np.abs(xp.wavelength - 6400.0)))
    np.testing.assert_allclose(fwhm_of(xp)[at], 106 * (6400 / 8000) ** 2.3, rtol=1e-6)


def test_models_without_intervals_are_kept_and_wrong_sizes_refused(optical):
    hband = load_emulator("emulator-hband")
    assert emulator_for(hband, Instrument.load("apogee")) == (hband, None)
    for emulator, pixels in ((optical, 7), (optical, 0), (hband, 2)):
        with pytest.raises(ValueError, match=rf"pixels: expected a divisor of interval_pixels=\d+, got {pixels}"):
            binned(emulator, pixels)

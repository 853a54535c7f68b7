"""Augmentation of single spectra has the stated size."""

import numpy as np
import pytest

from spectrafm_hf.training.augmentation import degrade, rebin, shift, smooth


def line(width: float = 3.0, step: float = 0.2, gap: bool = False):
    """A Gaussian line at 16,000 A, of `width` pixels (one sigma), in the middle of 400; or of two detectors."""
    offset = np.arange(-200, 200) + 0.0
    wavelength = 16_000 + step * offset
    if gap:
        wavelength[200:] += 50
    flux = 1 - 0.5 * np.exp(-0.5 * (offset / width) ** 2)
    return wavelength, flux.astype(np.float32), np.full(400, 0.01, np.float32), np.zeros(400, bool)


def moments(spectrum) -> tuple[float, float]:
    """Centre, and width (one sigma) of the line, in Angstrom."""
    depth = 1 - spectrum[1]
    center = np.sum(depth * spectrum[0]) / depth.sum()
    return center, np.sqrt(np.sum(depth * (spectrum[0] - center) ** 2) / depth.sum())


@pytest.mark.parametrize("velocity", [-12.0, 0.0, 1.7, 30.0])
def test_a_shift_moves_lines_by_the_velocity_and_keeps_their_depth(velocity):
    spectrum = line()
    wavelength, flux, error, mask = shift(spectrum, velocity)
    np.testing.assert_array_equal(wavelength, spectrum[0])
    center, width = moments((wavelength, flux))
    assert center / 16_000 - 1 == pytest.approx(velocity / 299_792.458, abs=1e-7)  # 0.03 km/s
    assert width == pytest.approx(0.6, rel=3e-3)
    truth = 1 - 0.5 * np.exp(-0.5 * ((wavelength - center) / 0.6) ** 2)
    assert np.abs(flux - truth).max() < 1e-3
    np.testing.assert_allclose(error, 0.01)
    pixels = abs(velocity) / 299_792.458 * 16_000 / 0.2
    assert abs(mask.sum() - pixels) <= 1 and (not mask.any() or mask[0 if velocity > 0 else -1])


def test_a_shift_of_a_line_as_narrow_as_those_of_apogee_is_off_by_a_fortieth_of_its_depth_at_most():
    spectrum = line(width=1.1)
    for velocity in np.linspace(0, 3.8, 7):
        flux = shift(spectrum, velocity)[1]
        offset = np.arange(-200, 200) - velocity / 299_792.458 * 16_000 / 0.2
        expected = 1 - 0.5 * np.exp(-0.5 * (offset / 1.1) ** 2)
        assert np.abs(flux - expected).max() < 0.025 * 0.5


def test_smoothing_adds_its_width_in_quadrature_keeps_the_equivalent_width_and_lowers_the_noise():
    spectrum = line()
    generator = np.random.default_rng(0)
    for width in (0.0, 0.8, 2.0):
        smoothed = smooth(spectrum, width)
        assert moments(smoothed)[1] == pytest.approx(0.2 * np.hypot(3.0, width), rel=3e-3)
        assert np.sum(1 - smoothed[1]) == pytest.approx(np.sum(1 - spectrum[1]), rel=1e-5)
        noisy = (spectrum[0], generator.normal(1, 0.01, 400).astype(np.float32), *spectrum[2:])
        scatter = np.std([smooth((noisy[0], generator.normal(1, 0.01, 400), *noisy[2:]), width)[1] for _ in range(50)])
        assert smoothed[2].mean() == pytest.approx(scatter, rel=0.05)


def test_rebinning_averages_what_is_good_and_its_errors_fall_with_the_root_of_the_number():
    wavelength, flux, error, mask = line()
    mask[[0, 4, 5]] = True
    flux[[0, 4, 5]] = np.nan
    spectrum = rebin((wavelength, flux, error, mask), 2)
    assert len(spectrum[0]) == 200 and np.allclose(np.diff(spectrum[0]), 0.4)
    assert spectrum[3].tolist() == [False, False, True] + 197 * [False], "masked where no pixel is good"
    np.testing.assert_allclose(spectrum[1][3:], (flux[6::2] + flux[7::2]) / 2, rtol=1e-6)
    assert spectrum[1][0] == flux[1], "the good one alone"
    np.testing.assert_allclose(spectrum[2][[0, 1, 50]], [0.01, 0.01 / np.sqrt(2), 0.01 / np.sqrt(2)], rtol=1e-5)
    assert len(rebin(line(gap=True), 3)[0]) == 2 * 66


def test_detectors_are_not_mixed_and_what_is_masked_does_not_spread():
    wavelength, flux, error, mask = line(gap=True)
    flux[:200], flux[200:] = 1.0, 3.0
    for changed in (shift((wavelength, flux, error, mask), 25.0), smooth((wavelength, flux, error, mask), 2.0)):
        assert set(np.unique(changed[1])) == {1.0, 3.0}
    assert shift((wavelength, flux, error, mask), 3.7)[3].sum() == 2, "the first pixel of each detector"
    flux[100], mask[100] = 1e6, True
    flux[120], error[130] = np.nan, np.nan
    for changed in (shift((wavelength, flux, error, mask), 1.0), smooth((wavelength, flux, error, mask), 2.0)):
        assert np.abs(changed[1][50:199] - 1).max() < 1e-6
        assert changed[3][[100, 120, 130]].all() and changed[3].sum() <= 8
        assert np.isfinite(changed[2]).all()


@pytest.mark.parametrize("function, argument", [(shift, 5.0), (smooth, 1.5), (rebin, 2)])
def test_unknown_errors_stay_unknown_and_masked_spectra_stay_masked(function, argument):
    wavelength, flux, error, mask = line()
    assert np.isnan(function((wavelength, flux, np.full_like(error, np.nan), mask), argument)[2]).all()
    nothing = function((wavelength, np.full_like(flux, np.nan), error, ~mask), argument)
    assert nothing[3].all() and np.isfinite(nothing[1]).all()


def test_a_degraded_spectrum_has_and_states_the_requested_signal_to_noise():
    generator = np.random.default_rng(1)
    truth = np.linspace(0.5, 1.5, 4000).astype(np.float32)
    error = (0.01 * np.sqrt(truth)).astype(np.float32)
    flux = (truth + error * generator.standard_normal(4000)).astype(np.float32)
    mask = np.zeros(4000, bool)
    _, worse, errors, _ = degrade((truth, flux, error, mask), 20.0, generator.standard_normal(4000))
    assert np.median(worse / errors) == pytest.approx(20, rel=0.02)
    assert np.std((worse - truth) / errors) == pytest.approx(1, abs=0.04)
    np.testing.assert_allclose(errors / error, errors[0] / error[0], rtol=1e-5)
    _, same, errors, _ = degrade((truth, flux, error, mask), 500.0, generator.standard_normal(4000))
    np.testing.assert_array_equal(same, flux)
    np.testing.assert_array_equal(errors, error)
    _, worse, errors, _ = degrade(
        (truth, truth, np.full_like(error, np.nan), mask), 50, generator.standard_normal(4000)
    )
    np.testing.assert_allclose(errors, np.median(truth) / 50, rtol=1e-5)
    assert np.std((worse - truth) / errors) == pytest.approx(1, abs=0.04)

"""Coefficients of fixed intervals: independent of the grid, with right errors."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import ndtr

from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.models.rungs_spectrafm import FWHM, half_widths, means_over_pixels
from spectrafm_hf.synthesis.bases import make_rung


START, STEP, N = np.log(15_000.0), 1.5e-5, 4000
POWER = 20_000.0
KNOBS = 6
GRID = np.exp(START + STEP * np.arange(N))


def stars(n, seed=0, wavelength=None, power=POWER):
    """Means over the pixels of a grid of spectra with Gaussian lines whose depths go along with six knobs."""
    lines = np.random.default_rng(99)
    centres, depths = START + STEP * lines.uniform(0, N, 300), lines.uniform(0.02, 0.3, 300)
    gains = lines.normal(0, 0.3, (300, KNOBS)) * (lines.random((300, KNOBS)) < 0.3)
    knobs = np.random.default_rng(seed).normal(size=(n, KNOBS))
    wavelength = GRID if wavelength is None else wavelength
    half = half_widths(wavelength)
    low, high = np.log(wavelength - half)[:, None], np.log(wavelength + half)[:, None]
    width, total = 1.0 / power / FWHM, 2.5 / POWER / FWHM
    profiles = (ndtr((high - centres) / width) - ndtr((low - centres) / width)) / (high - low) * total
    return 1.0 - (depths * (1.0 + knobs @ gains.T)) @ profiles.T


def rung(first_interval=0, **settings):
    spectra = stars(200, seed=1)
    values = dict(
        first_interval=first_interval,
        edge=START - STEP / 2,
        width=0.006,
        n_intervals=10,
        start=START,
        step=STEP,
        resolving_power=POWER,
        lowest_resolving_power=3_000.0,
        over_continuum=True,
        n_directions=8,
    )
    return make_rung(spectra, [], **{**values, **settings})


@pytest.fixture(scope="module")
def basis():
    return SpectrumBasis([rung()])


SNR = 200.0


def observed(flux, seed=0, snr=SNR):
    error = np.full(flux.shape, 1.0 / snr)
    return flux + error * np.random.default_rng(seed).standard_normal(flux.shape), error**-2.0


def truth(basis, flux):
    return basis.evidence(GRID, flux, np.full(flux.shape, 1e8), normalised=True, clip=False).coefficients


def deviations(found, true):
    """Of coefficients that mean something, in units of their errors."""
    known = found.reliability
    deviation = (found.coefficients - known * true) / np.sqrt(known * (1.0 - known) + 1e-8)
    return deviation[:, :, 2:][known[:, :, 2:] > 0.5]


def test_when_the_noise_is_known_then_deviations_of_coefficients_have_unit_variance(basis):
    flux = stars(300, seed=2)
    noisy, weight = observed(flux)
    z = deviations(basis.evidence(GRID, noisy, weight, normalised=True), truth(basis, flux))
    assert np.std(z) == pytest.approx(1.0, abs=0.05)
    assert abs(np.mean(z)) < 0.05


@pytest.mark.parametrize(
    "wavelength",
    [
        GRID[300:],
        np.exp(START + STEP * (0.5 + np.arange(10, N - 10))),
        np.arange(15_005.0, 15_920.0, 0.2),
        np.arange(15_005.0, 15_920.0, 0.6),
        np.delete(GRID, np.random.default_rng(0).choice(N, 900, replace=False)),
    ],
    ids=["begins later", "shifted by half a pixel", "linear", "coarser", "pixels absent from the table"],
)
def test_when_the_grid_is_another_then_the_coefficients_are_the_same_within_their_errors(basis, wavelength):
    flux = stars(100, seed=3)
    noisy, weight = observed(stars(100, seed=3, wavelength=wavelength))
    found = basis.evidence(wavelength, noisy, weight, normalised=True)
    z = deviations(found, truth(basis, flux)[:, found.intervals])
    assert np.std(z) == pytest.approx(1.0, abs=0.12)


def test_when_pixels_are_masked_or_absent_then_it_is_the_same(basis):
    flux, weight = observed(stars(20, seed=4))
    missing = np.random.default_rng(1).random(N) < 0.3
    masked = basis.evidence(GRID, np.where(missing, 7.0, flux), np.where(missing, 0.0, weight), normalised=True)
    absent = basis.evidence(GRID[~missing], flux[:, ~missing], weight[:, ~missing], normalised=True)
    np.testing.assert_allclose(masked.coefficients, absent.coefficients, atol=2e-3)
    np.testing.assert_allclose(masked.reliability, absent.reliability, atol=1e-4)


def test_when_an_interval_has_no_pixels_then_it_is_no_token(basis):
    flux, weight = observed(stars(3, seed=5))
    number = ((np.log(GRID) - START + STEP / 2) / 0.006).astype(int)
    whole = basis.evidence(GRID, flux, weight, normalised=True)
    some = basis.evidence(GRID[number != 4], flux[:, number != 4], weight[:, number != 4], normalised=True)
    assert some.intervals.tolist() == [i for i in whole.intervals if i != 4]
    weight[0, number == 4] = 0.0
    found = basis.evidence(GRID, flux, weight, normalised=True)
    assert not found.seen[0, 4] and found.seen[1, 4]
    assert np.all(found.coefficients[0, 4] == 0) and np.all(found.reliability[0, 4] == 0)
    others = np.delete(np.arange(10), 4)
    np.testing.assert_allclose(found.coefficients[0, others], whole.coefficients[0, others], atol=1e-3)


def test_when_a_spectrum_is_less_resolved_then_it_is_compared_with_what_is_smoothed_as_much(basis):
    flux = stars(100, seed=6)
    smoothed, weight = observed(stars(100, seed=6, power=8_000.0))
    inner = slice(1, 9)  # at the ends the smoothing knows no more than the spectrum
    right = basis.evidence(GRID, smoothed, weight, resolving_power=8_000.0, normalised=True)
    wrong = basis.evidence(GRID, smoothed, weight, normalised=True)
    true = truth(basis, flux)

    def spread(found):
        known = found.reliability[:, inner]
        z = (found.coefficients[:, inner] - known * true[:, inner]) / np.sqrt(known * (1.0 - known) + 1e-8)
        return np.std(z[..., 2:][known[..., 2:] > 0.5])

    assert spread(right) < 1.3 < 3.0 < spread(wrong)


def test_when_pixels_are_wild_then_they_are_left_out_and_counted(basis):
    flux = stars(50, seed=7)
    noisy, weight = observed(flux)
    wild = noisy.copy()
    where = np.random.default_rng(2).integers(N, size=(50, 5))
    np.put_along_axis(wild, where, 30.0, axis=1)
    found = basis.evidence(GRID, wild, weight, normalised=True)
    assert np.all(np.take_along_axis(found.clipped, where, axis=1))
    assert found.clipped.mean() < 0.003  # of which 0.00125 are wild
    whole = basis.evidence(GRID, noisy, weight, normalised=True)
    change = (found.coefficients - whole.coefficients) / np.sqrt(1.0 - whole.reliability + 1e-6)
    assert np.median(np.abs(change)) < 0.1
    assert whole.clipped.mean() < 1e-5


def test_when_errors_are_right_then_the_misfit_is_one(basis):
    noisy, weight = observed(stars(50, seed=8), snr=50.0)
    assert np.median(basis.evidence(GRID, noisy, weight, normalised=True).misfit) == pytest.approx(1.0, abs=0.05)
    assert np.median(basis.evidence(GRID, noisy, weight / 4, normalised=True).misfit) == pytest.approx(0.25, abs=0.02)


def test_when_the_flux_is_in_another_unit_then_only_the_scale_changes(basis):
    noisy, weight = observed(stars(5, seed=9))
    first = basis.evidence(GRID, noisy, weight, normalised=False)
    second = basis.evidence(GRID, noisy * 3e-17, weight / 3e-17**2, normalised=False)
    np.testing.assert_allclose(first.coefficients, second.coefficients, atol=1e-3)
    np.testing.assert_allclose(second.scale, first.scale * 3e-17, rtol=1e-5)
    assert np.all(first.coefficients[..., :2] == 0) and np.all(first.reliability[..., :2] == 0)


def test_when_the_level_is_near_one_then_spectra_count_as_over_the_continuum(basis):
    noisy, weight = observed(stars(4, seed=10))
    noisy[2:] *= 40.0
    weight[2:] /= 40.0**2
    found = basis.evidence(GRID, noisy, weight)
    np.testing.assert_allclose(found.scale[:2], 1.0, rtol=1e-6)
    assert np.all(found.scale[2:] > 30)


def test_when_it_is_written_and_read_then_it_is_the_same(basis):
    again = SpectrumBasis.from_arrays(basis.arrays())
    noisy, weight = observed(stars(3, seed=11))
    np.testing.assert_allclose(
        again.evidence(GRID, noisy, weight).coefficients, basis.evidence(GRID, noisy, weight).coefficients, atol=0.02
    )
    assert again.rungs[0].over_continuum and again.n_intervals == 10
    with pytest.raises(ValueError, match=r"basis: expected the array '0.prior'"):
        SpectrumBasis.from_arrays({name: value for name, value in basis.arrays().items() if "prior" not in name})


def test_when_a_spectrum_lies_elsewhere_then_the_error_names_the_ranges(basis):
    with pytest.raises(ValueError, match=r"wavelength: expected some of 15000-1\d+ Angstrom, got 4000.0-5000.0"):
        basis.design(np.linspace(4000.0, 5000.0, 100))


def test_when_rungs_overlap_then_the_resolving_power_chooses():
    fine, coarse = rung(), rung(first_interval=10, lowest_resolving_power=0.0)
    both = SpectrumBasis([fine, coarse])
    assert both.rung_for(GRID, 10_000.0) is fine
    assert both.rung_for(GRID, 1_000.0) is coarse
    assert both.rung_for(GRID) is fine
    assert both.rung_for(np.arange(15_010.0, 15_900.0, 5.0)) is coarse
    assert both.rung_for(np.linspace(4000.0, 5000.0, 100)) is None
    assert both.n_intervals == 20


def test_when_means_are_taken_over_own_pixels_then_nothing_changes():
    values = np.random.default_rng(0).normal(size=(3, 50))
    pixel = np.arange(50.0)
    np.testing.assert_allclose(means_over_pixels(values, 0.0, pixel - 0.5, pixel + 0.5), values, atol=1e-9)
    wide = means_over_pixels(values, 0.0, np.array([9.5]), np.array([13.5]))
    np.testing.assert_allclose(wide[:, 0], values[:, 10:14].mean(axis=1), atol=1e-9)


def test_when_pixels_are_absent_then_the_widths_of_the_others_stay():
    wavelength = np.delete(np.arange(5000.0, 5100.0), [10, 40, 41, 70])
    np.testing.assert_allclose(half_widths(wavelength), 0.5)


def test_when_pixels_are_wide_and_few_and_their_errors_tiny_then_the_coefficients_are_finite(basis):
    wavelength = np.exp(START + STEP * np.arange(20, N - 20, 60))
    flux = stars(30, seed=12, wavelength=wavelength)
    found = basis.evidence(wavelength, flux, np.full(flux.shape, 1e12), normalised=True)
    assert np.all(np.isfinite(found.coefficients)) and np.abs(found.coefficients).max() < 100
    assert np.all((found.reliability >= 0) & (found.reliability <= 1))


def test_pixels_at_one_wavelength_are_as_wide_as_their_neighbours():
    wavelength = np.array([5000.0, 5001.0, 5001.0, 5002.0, 5003.0, 5004.0, 5005.0, 5006.0, 5007.0, 5008.0])
    np.testing.assert_allclose(half_widths(wavelength), 0.5)
    np.testing.assert_allclose(half_widths(np.full(3, 5000.0)), 0.25)


# ----------------------------------------------------------------------- spectra of other resolving powers than a rung


def survey():
    return SpectrumBasis([rung(over_continuum=False, counts_level=False, guesses_power=True)])


def test_levels_and_slopes_have_no_information_where_they_are_not_used():
    flux, weight = observed(stars(20, seed=3))
    tilted = np.exp(np.random.default_rng(0).normal(0, 0.2, (20, 1)) * np.linspace(-1, 1, N))
    basis = survey()
    one = basis.evidence(GRID, flux, weight, POWER)
    other = basis.evidence(GRID, flux * tilted, weight / tilted**2, POWER)
    assert not one.coefficients[..., :2].any() and not one.reliability[..., :2].any()
    assert one.reliability[..., 2:].max() > 0.9
    np.testing.assert_allclose(other.coefficients, one.coefficients, atol=0.05)


def test_nothing_is_taken_from_bands_that_a_rung_is_blind_to():
    low, high = GRID[450], GRID[1250]  # all of one interval and parts of its neighbours
    seeing, blind = SpectrumBasis([rung()]), SpectrumBasis([rung(blind=[(low, high)])])
    flux, weight = observed(stars(20, seed=3))
    within = (low < GRID) & (high > GRID)
    spoilt = np.where(within, 0.3, flux)
    found = blind.evidence(GRID, spoilt, weight, normalised=True)
    masked = seeing.evidence(GRID, flux, np.where(within, 0.0, weight), normalised=True)
    np.testing.assert_allclose(found.coefficients, masked.coefficients, atol=1e-4)
    np.testing.assert_allclose(found.reliability, masked.reliability, atol=1e-4)
    assert not found.clipped[:, within].any() and not found.seen[:, 2].any() and found.seen[:, 4].all()
    again = SpectrumBasis.from_arrays(blind.arrays()).rungs[0].blind
    np.testing.assert_array_equal(again, [(low, high)])
    assert "0.blind" not in seeing.arrays()


def test_the_resolving_power_of_each_pixel():
    """A line spread function of the same width in wavelength at all wavelengths."""
    low, high = 6_000.0, 12_000.0
    powers = np.linspace(low, high, N)
    blurred = np.where(np.arange(N) < N / 2, stars(20, seed=4, power=low), stars(20, seed=4, power=high))
    steps = np.where(np.arange(N) < N / 2, low, high)
    weight = np.full(blurred.shape, SNR**2)
    right = survey().evidence(GRID, blurred, weight, steps)
    wrong = survey().evidence(GRID, blurred, weight, POWER)
    native = survey().evidence(GRID, stars(20, seed=4), weight, POWER)
    own = np.arange(10) != 10 * N // 2 // N  # not where the width changes
    miss = np.abs(right.coefficients - native.coefficients)[:, own]
    assert np.median(miss) < 0.3 * np.median(np.abs(wrong.coefficients - native.coefficients)[:, own])
    assert powers.shape == steps.shape


def test_an_unknown_resolving_power_follows_from_the_pixels():
    wavelength = np.exp(np.arange(START + 20 * STEP, START + (N - 20) * STEP, 1.0 / 5_000.0 / 2.5))
    flux, weight = observed(stars(20, seed=5, wavelength=wavelength, power=5_000.0))
    guessed = survey().evidence(wavelength, flux, weight)
    stated = survey().evidence(wavelength, flux, weight, 5_000.0)
    np.testing.assert_allclose(guessed.coefficients, stated.coefficients, atol=0.02)


def test_spectra_of_a_higher_resolving_power_are_brought_down():
    fine = np.exp(START + STEP / 4 * np.arange(100, 4 * N - 100))
    power = 4 * POWER
    flux, weight = observed(stars(20, seed=6, wavelength=fine, power=power), snr=SNR)
    weight[:, 3000:3100] = 0.0
    flux[:, 3000:3100] = 50.0  # of pixels that do not count
    *spectra, brought = survey().brought_down(fine, flux, weight, power)
    assert brought == POWER
    found = survey().evidence(*spectra, brought)
    native = survey().evidence(GRID, *observed(stars(20, seed=6), snr=SNR * 2), POWER)
    wide = np.isin(native.intervals, found.intervals)
    miss = found.coefficients[:, 1:-1] - native.coefficients[:, wide][:, 1:-1]
    spread = np.sqrt(np.mean(native.coefficients[:, wide, 2:] ** 2))
    assert np.sqrt(np.mean(miss[..., 2:] ** 2)) < 0.25 * spread
    # What they tell is no more than what is in them.
    assert abs(np.median(found.reliability[:, 1:-1, 2]) - np.median(native.reliability[:, wide][:, 1:-1, 2])) < 0.03


def test_a_rung_for_a_window_reads_nearly_all_of_its_spectra_in_it_and_no_others():
    wide = rung(guesses_power=True, over_continuum=False)
    window = rung(10, guesses_power=True, over_continuum=False)
    window.least_inside = 0.9
    window.lowest_resolving_power = 1.1 * wide.lowest_resolving_power
    basis = SpectrumBasis([wide, window])
    low, high = window.range
    step = 1.0 / (2 * POWER) / 2.5
    inside = np.exp(np.arange(np.log(low) + 1e-4, np.log(high) - 1e-4, step))
    half = np.exp(np.arange(np.log(low), np.log(high) + np.log(high / low), step))
    a_little = np.exp(np.arange(np.log(low), np.log(high) + 0.05 * np.log(high / low), step))
    powers = 2 * POWER, 0.99 * window.lowest_resolving_power
    assert basis.rung_for(inside, powers[0]) is basis.rung_for(a_little, powers[0]) is window
    assert basis.rung_for(inside, powers[1]) is basis.rung_for(half, powers[0]) is wide
    # Brought down, a spectrum has pixels in the window alone, and belongs to the same rung.
    flux = np.ones((1, len(a_little)))
    down = basis.brought_down(a_little, flux, flux, powers[0])
    assert down[0][-1] < high * 1.001 and basis.rung_for(down[0], down[3]) is window


def test_a_file_of_an_earlier_version_has_no_fields_that_came_later():
    arrays = survey().arrays()
    earlier = {name: array for name, array in arrays.items() if not name.endswith(("guesses_power", "counts_level"))}
    read = SpectrumBasis.from_arrays(earlier).rungs[0]
    assert read.counts_level and not read.guesses_power
    del earlier["0.mean"]
    with pytest.raises(ValueError, match="expected the array '0.mean'"):
        SpectrumBasis.from_arrays(earlier)


def test_pixels_that_are_wider_than_any_interval_are_refused_in_one_line(tiny_evidence):
    _, tokenizer = tiny_evidence
    with pytest.raises(ValueError, match="wavelength: .*, got 1000.0-299000.0 in pixels wider than an interval"):
        tokenizer([1000.0, 5100.0, 299_000.0], np.ones(3), np.full(3, 0.1))


def test_smoothed_spectra_get_the_resolving_power_of_the_observed_stars():
    fine = SpectrumBasis([rung(guesses_power=True, over_continuum=False)])
    further = SpectrumBasis([rung(guesses_power=True, over_continuum=False, observed_power=8_000.0)])
    wavelength = np.exp(np.arange(START + 0.001, START + 0.058, 1.0 / 60_000.0 / 2.5))
    flux = stars(3, seed=6, wavelength=wavelength, power=60_000.0)
    spectra = (wavelength, flux, np.full(flux.shape, 1e4))
    down = fine.brought_down(*spectra, 60_000.0)
    assert down[3] == POWER and fine.brought_further(*down) is None
    found = further.brought_further(*further.brought_down(*spectra, 60_000.0))
    assert found is not None and found[3] == 8_000.0 and len(found[0]) < 0.5 * len(down[0])
    # As if a spectrograph of that resolving power had seen them.
    seen = stars(3, seed=6, wavelength=found[0], power=8_000.0)
    inner = slice(30, -30)
    assert np.abs(found[1] - seen)[:, inner].max() < 0.05 * np.ptp(seen)
    # What was not brought down stays, whatever its resolving power is.
    assert further.brought_further(*spectra, 15_000.0) is None
    arrays = further.arrays()
    assert SpectrumBasis.from_arrays(arrays).rungs[0].observed_power == 8_000.0
    assert (
        SpectrumBasis.from_arrays({k: v for k, v in arrays.items() if "observed" not in k}).rungs[0].observed_power == 0
    )


def test_pixels_closer_than_rounding_have_a_width(basis):
    wavelength = np.sort(np.append(GRID[100:200], np.nextafter(GRID[150], np.inf)))
    assert (half_widths(wavelength) > 0).all()
    flux = np.ones((1, len(wavelength)))
    found = basis.evidence(wavelength, flux, np.full(flux.shape, 100.0), POWER)
    assert np.isfinite(found.coefficients).all()


def test_kinds_of_stars_are_kept_in_the_file():
    generator = np.random.default_rng(0)
    rung = survey().rungs[0]
    shape, size = (rung.n_intervals, rung.directions.shape[1] + 2), 3
    factors = np.tril(generator.normal(size=(2, size, size)))
    kinds = {
        "kind_shares": np.array([0.25, 0.75]),
        "kind_center": generator.normal(size=shape),
        "kind_directions": generator.normal(size=(*shape, size)),
        "kind_means": generator.normal(size=(2, size)),
        "kind_factors": factors[:, *np.tril_indices(size)],
    }
    arrays = SpectrumBasis([replace(rung, **kinds)]).arrays()
    assert arrays["0.kind_factors"].dtype == np.float16
    shares, means, read = SpectrumBasis.from_arrays(arrays).rungs[0].kinds()
    np.testing.assert_allclose(shares, [0.25, 0.75])
    np.testing.assert_allclose(means, kinds["kind_means"], rtol=1e-6)
    np.testing.assert_allclose(read, factors, rtol=1e-3)
    assert not any("kind" in name for name in survey().arrays())

"""Instruments: their files, and their effects on spectra."""

import copy
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from spectrafm_hf.models import vacuum_to_air
from spectrafm_hf.synthesis.instruments import Instrument, extinction_curve, instrument_names, measure_noise
from spectrafm_hf.synthesis.line_spread import FWHM, gaussian_noise, pixel_edges, resampling_matrix, subdivision_matrix


APSTAR = 10 ** (4.179 + 6e-6 * np.arange(8575))
BINS = 3306.0 + 2.5 * np.arange(2800)  # means over 2.5 Angstrom
RESOLVING_POWER = {"apogee": 22_500, "gaia-xp": None, "miles": None}
DEMO = Path(__file__).parents[2] / "src" / "spectrafm_hf" / "resources" / "gaia_xp_demo.parquet"

SMALL = {
    "name": "small",
    "wavelength": {"detectors": [{"start": 5000, "step": 2, "last": 200}]},
    "line_spread": {"fwhm": 10},
    "noise": {"snr": 100},
}


def small(**changes) -> Instrument:
    return Instrument.from_settings({**copy.deepcopy(SMALL), **changes})


def native(name: str) -> np.ndarray:
    return APSTAR if name == "apogee" else BINS


def line(wavelength: np.ndarray, center: float, sigma: float) -> np.ndarray:
    """A Gaussian of unit area, as means over the pixels."""
    edges = pixel_edges(wavelength)
    return np.diff(ndtr((edges - center) / sigma)) / np.diff(edges)


def gaussian(wavelength: np.ndarray, center: float, fwhm: float) -> np.ndarray:
    return np.exp(-0.5 * ((wavelength - center) / (fwhm / FWHM)) ** 2)


def measured_fwhm(wavelength: np.ndarray, flux: np.ndarray) -> tuple[float, float]:
    """Middle and FWHM from the moments of a line."""
    weight = flux * np.diff(pixel_edges(wavelength))
    middle = np.average(wavelength, weights=weight)
    return middle, FWHM * np.sqrt(np.average((wavelength - middle) ** 2, weights=weight))


def robust_std(values: np.ndarray) -> float:
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


# ----------------------------------------------------------------------------------------------------- the instruments

NAMES = ["apogee", "apogee-apstar", "desi", "gaia-rvs", "gaia-xp", "galah", "lamost-lrs", "miles", "sdss-boss"]


def test_instruments_that_come_with_the_package():
    assert instrument_names() == NAMES


@pytest.mark.parametrize(
    ("name", "low", "high", "at", "power"),
    [
        ("lamost-lrs", 3_700.0, 9_083.0, 5_500.0, 1_803),
        ("sdss-boss", 3_631.0, 10_233.0, 4_000.0, 1_653),
        ("desi", 3_600.0, 9_824.0, 6_600.0, 3_771),
        ("galah", 4_714.3, 7_890.1, 6_600.0, 28_000),
        ("gaia-rvs", 8_460.0, 8_700.0, 8_600.0, 11_500),
    ],
)
def test_range_and_resolving_power_of_instruments_of_surveys(name, low, high, at, power):
    instrument = Instrument.load(name)
    wavelength = instrument.wavelength
    assert abs(wavelength[0] - low) < 1.0 and abs(wavelength[-1] - high) < 1.0
    native = np.exp(np.arange(np.log(3_301.0), np.log(10_299.0), 2e-5))
    reached = np.interp(at, wavelength, instrument.reached_fwhm(native))
    assert at / reached == pytest.approx(power, rel=0.02)


def test_apogee_has_the_pixels_that_the_paper_used():
    pixels = Instrument.load("apogee").wavelength
    index = (np.log10(pixels) - 4.179) / 6e-6
    expected = np.concatenate([np.arange(246, 3274), np.arange(3585, 6080), np.arange(6344, 8335)])
    assert len(pixels) == 7514
    np.testing.assert_allclose(index, expected, atol=1e-6)


def test_gaia_xp_has_the_pixels_of_the_real_data_set():
    real = pq.read_table(DEMO, columns=["wavelength"])["wavelength"][0].as_py()
    np.testing.assert_array_equal(Instrument.load("gaia-xp").wavelength, real)


def test_miles_has_the_grid_of_the_library_in_air_turned_into_vacuum():
    instrument = Instrument.load("miles")
    np.testing.assert_allclose(vacuum_to_air(instrument.wavelength), 3540.5 + 0.9 * np.arange(4300), atol=1e-6)


def test_apogee_takes_the_pixels_of_the_emulator_as_they_are():
    instrument = Instrument.load("apogee")
    flux = np.random.default_rng(0).uniform(0.3, 1, (3, 8575)).astype(np.float32)
    columns = instrument.apply(APSTAR, flux, np.random.default_rng(1), 22_500)
    np.testing.assert_array_equal(columns["clean"], flux[:, np.isin(APSTAR.round(6), instrument.wavelength.round(6))])


@pytest.mark.parametrize("name", ["apogee", "miles"])
def test_the_requested_resolution_is_reached(name):
    instrument = Instrument.load(name)
    wanted = instrument.line_spread[0](instrument.wavelength)
    np.testing.assert_allclose(instrument.reached_fwhm(native(name), RESOLVING_POWER[name]), wanted, rtol=0.01)


def test_lines_far_narrower_than_a_bin_come_out_of_miles_in_their_places_and_as_wide_as_they_should():
    """Within a bin a line has no place: true of 25 lines on average, of one to half a bin."""
    instrument = Instrument.load("miles")
    centers = 5500.0 + 37.1 * np.arange(25)
    lines = np.stack([instrument.response(BINS) @ line(BINS, center, 1e-3) for center in centers])
    distance = instrument.wavelength - centers[:, None]
    assert abs(np.average(distance, weights=lines)) < 0.05
    assert abs(FWHM * np.sqrt(np.average(distance**2, weights=lines)) - 2.5) < 0.05
    assert np.abs(np.average(distance, weights=lines, axis=1)).max() < 1.26


def test_lines_of_an_emulator_that_is_not_infinitely_sharp_become_as_wide_as_asked():
    settings = {"detectors": [{"start": 15400, "step": 0.5, "last": 400}]}
    instrument = small(wavelength=settings, line_spread={"resolving_power": 5000})
    seen = gaussian(APSTAR, 15_500.2, 15_500 / 22_500)
    middle, fwhm = measured_fwhm(instrument.wavelength, instrument.response(APSTAR, 22_500) @ seen)
    assert abs(middle - 15_500.2) < 0.01
    assert abs(fwhm - 15_500 / 5000) < 0.02


def test_gaia_xp_blends_its_two_spectra_where_they_overlap():
    instrument = Instrument.load("gaia-xp")
    reached = instrument.reached_fwhm(BINS)
    blue, red = 69 * (instrument.wavelength / 4000) ** 2, 106 * (instrument.wavelength / 8000) ** 2.3
    at = np.searchsorted(instrument.wavelength, [4500, 6100, 6400, 6700, 9000])
    mixed = np.sqrt((blue[at[2]] ** 2 + red[at[2]] ** 2) / 2)
    np.testing.assert_allclose(reached[at], [*blue[at[:2]], mixed, *red[at[3:]]], rtol=0.01)


@pytest.mark.parametrize("name", ["apogee", "gaia-xp", "miles"])
def test_the_noise_has_the_size_of_the_errors(name):
    instrument = Instrument.load(name)
    wavelength = native(name)
    flux = (1 - 0.5 * np.sin(wavelength / 300) ** 8) * np.ones((300, 1))
    columns = instrument.apply(wavelength, flux, np.random.default_rng(0), RESOLVING_POWER[name])
    deviation = (columns["flux"] - columns["clean"]) / columns["flux_error"]
    assert abs(robust_std(deviation) - 1) < 0.02
    assert abs(np.mean(deviation)) < 0.02
    np.testing.assert_allclose(np.median(columns["clean"] / columns["flux_error"], axis=1), columns["snr"], rtol=1e-4)
    neighbours = np.mean(deviation[:, 1:] * deviation[:, :-1])
    assert abs(neighbours - (np.exp(-0.25 / 1.65**2) if name == "gaia-xp" else 0)) < 0.02
    for column in ("flux", "flux_error", "clean"):
        assert columns[column].shape == (300, len(instrument.wavelength))
        assert columns[column].dtype == np.float32


def test_gaia_xp_gives_real_spectra_the_errors_that_they_have():
    """64 observed stars: the errors that the instrument finds for their fluxes, against those of the archive."""
    stars = pq.read_table(DEMO)
    flux, error = (np.array(stars[name].to_pylist(), np.float64) for name in ("flux", "flux_error"))
    made = Instrument.load("gaia-xp").noise.errors(Instrument.load("gaia-xp").wavelength, flux, stars["snr"].to_numpy())
    ratio = np.log(made / error)
    assert np.abs(np.median(ratio, axis=0)).max() < 0.35, "the typical star, at the worst wavelength"
    assert np.median(np.abs(ratio)) < 0.2, "pixel by pixel"


def test_gaia_xp_is_normalised_as_the_real_spectra_are():
    columns = Instrument.load("gaia-xp").apply(BINS, np.full((20, 2800), 1e6), np.random.default_rng(0))
    np.testing.assert_allclose(np.median(columns["flux"], axis=1), 1, rtol=1e-6)


def test_extinction_reddens_and_is_recorded():
    instrument = small(
        wavelength={"detectors": [{"start": 4000, "step": 20, "last": 200}]}, extinction=2.0, noise={"snr": 1e6}
    )
    columns = instrument.apply(BINS, np.ones((2, 2800)), np.random.default_rng(0))
    expected = 10 ** (-0.4 * 2.0 * extinction_curve(instrument.wavelength))
    np.testing.assert_allclose(columns["clean"][1], expected, rtol=1e-3)
    np.testing.assert_allclose(columns["ak_targ"], 2.0 * 0.10655, rtol=1e-3)


def test_a_tilt_is_smooth_and_has_the_requested_size():
    instrument = small(tilt={"amplitude": 0.1, "degree": 2}, noise={"snr": 1e6})
    clean = np.log(instrument.apply(BINS, np.ones((2000, 2800)), np.random.default_rng(0))["clean"])
    x = np.linspace(-1, 1, clean.shape[1])
    factors = np.polynomial.legendre.legfit(x, clean.T, 4)
    np.testing.assert_allclose(factors.std(axis=1), [0, 0.1, 0.1, 0, 0], atol=0.006)


def test_masked_ranges_are_masked_in_every_star():
    instrument = small(masks=[[5000, 5010], [5399, 5500]])
    mask = instrument.apply(BINS, np.ones((3, 2800)), np.random.default_rng(0))["mask"]
    assert np.flatnonzero(mask.all(axis=0)).tolist() == [0, 1, 2, 3, 4, 5, 200]
    assert mask.any(axis=0).sum() == 7


def test_the_same_generator_gives_the_same_stars():
    first, second = (
        Instrument.load("gaia-xp").apply(BINS, np.ones((4, 2800)), np.random.default_rng(5)) for _ in range(2)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize(
    ("snr", "low", "median", "high"),
    [
        (70, 70, 70, 70),
        ({"uniform": [10, 30]}, 10, 20, 30),
        ({"log_uniform": [10, 1000]}, 10, 100, 1000),
        ({"quantiles": {0: 5, 0.5: 50, 1: 60}}, 5, 50, 60),
    ],
)
def test_the_signal_to_noise_ratio_is_drawn_from_its_distribution(snr, low, median, high):
    columns = small(noise={"snr": snr}).apply(BINS, np.ones((4000, 2800)), np.random.default_rng(0))
    drawn = columns["snr"]
    assert low * 0.999 <= drawn.min() <= drawn.max() <= high * 1.001
    assert abs(np.median(drawn) / median - 1) < 0.08


def test_errors_follow_the_shape_by_wavelength_and_signal_to_noise_ratio_and_the_flux():
    shape = {"wavelength": [5000, 5400], "snr": [10, 1000], "values": [[1, 1], [1, 3]]}
    instrument = small(noise={"snr": 100, "error_shape": shape, "flux_power": 0.5})
    wavelength = instrument.wavelength
    flux = np.where(np.arange(201) % 2, 1.0, 4.0)[None]
    error = instrument.noise.errors(wavelength, flux, np.array([100.0]))[0]
    expected = np.sqrt(flux[0]) * np.interp(wavelength, [5000, 5400], [1, 2])
    np.testing.assert_allclose(error / error[0], expected / expected[0], rtol=1e-5)


def test_measured_noise_is_the_noise_that_was_put_in():
    shape = {"wavelength": [5000.0, 5200.0, 5400.0], "snr": [30.0, 100.0], "values": [[1.0, 1.0, 3.0], [2.0, 1.0, 1.0]]}
    instrument = small(noise={"snr": {"log_uniform": [20, 150]}, "error_shape": shape}, normalisation="median")
    flux = np.random.default_rng(1).uniform(0.99, 1.01, (4000, 2800))
    columns = instrument.apply(BINS, flux, np.random.default_rng(0))
    found = measure_noise(columns["clean"], columns["flux_error"], instrument.wavelength, [30, 100])
    again = small(noise=found)
    snr = np.array([30.0, 100.0])
    old, new = (i.noise.errors(instrument.wavelength, np.ones((2, 201)), snr) for i in (instrument, again))
    np.testing.assert_allclose(new, old, rtol=0.15)
    assert len(found["error_shape"]["wavelength"]) < 20


# ---------------------------------------------------------------------------------------------------------- resampling


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0, 30))
def test_flux_is_conserved(seed, sigma):
    random = np.random.default_rng(seed)
    edges = np.cumsum(random.uniform(0.5, 2, 300)) + 5000
    flux = np.where(np.abs(np.arange(299) - 149) < 20, random.uniform(0, 2, 299), 0)
    new = np.linspace(edges[0], edges[-1], 78)
    seen = resampling_matrix(edges, np.stack([new[:-1], new[1:]], 1), np.full(77, sigma)) @ flux
    assert np.isclose(seen @ np.diff(new), flux @ np.diff(edges), rtol=2e-3)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_subdivision_keeps_the_mean_of_each_pixel_and_a_polynomial_as_it_is(seed):
    random = np.random.default_rng(seed)
    edges = np.cumsum(random.uniform(1, 1.5, 30))
    matrix = subdivision_matrix(edges, 4)
    flux = random.uniform(0, 1, 29)
    np.testing.assert_allclose((matrix @ flux).reshape(29, 4).mean(axis=1), flux, rtol=1e-9)
    parts = np.append(edges[:-1, None] + np.diff(edges)[:, None] * np.arange(4) / 4, edges[-1])
    polynomial = np.polynomial.Polynomial(random.uniform(-1, 1, 5)).integ()
    old, new = (np.diff(polynomial(e)) / np.diff(e) for e in (edges, parts))
    np.testing.assert_allclose(matrix @ old, new, rtol=1e-6, atol=1e-6 * np.abs(new).max())


def test_a_constant_stays_a_constant_and_a_slope_a_slope():
    instrument = small()
    response = instrument.response(BINS)
    np.testing.assert_allclose(response @ np.ones(2800), 1, rtol=1e-6)
    np.testing.assert_allclose(response @ BINS, instrument.wavelength, rtol=1e-6)


def test_no_steps_show_where_pixels_are_finer_than_those_of_the_emulator():
    instrument = Instrument.load("miles")
    smooth = 1 + 0.3 * np.sin(BINS / 20)
    seen = instrument.response(BINS) @ smooth
    np.testing.assert_allclose(seen, 1 + 0.3 * np.sin(instrument.wavelength / 20), atol=2e-3)


def test_the_matrix_is_made_once():
    instrument = small()
    assert instrument.response(BINS) is instrument.response(BINS.copy())


def test_correlated_noise_has_unit_variance():
    noise = gaussian_noise(np.random.default_rng(0), (500, 400), 3.0)
    assert abs(noise.std() - 1) < 0.02


# ----------------------------------------------------------------------------------------------------------- bad input


def test_an_unknown_instrument_is_refused_with_the_names_there_are():
    with pytest.raises(
        ValueError,
        match=r"instrument: expected one of \['apogee', 'apogee-apstar', .*'sdss-boss'\] or a YAML file, got",
    ):
        Instrument.load("hubble")


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("name: [")
    with pytest.raises(ValueError, match="a.yaml: expected YAML, got"):
        Instrument.load(tmp_path / "a.yaml")


def test_a_user_file_is_read_and_1e5_is_a_number(tmp_path):
    settings = copy.deepcopy(SMALL)
    settings["wavelength"]["detectors"] = [{"log10_start": 3.7, "log10_step": "5e-5", "last": 99}]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings).replace("'", ""))
    assert "5e-5" in (tmp_path / "own.yaml").read_text()
    instrument = Instrument.load(tmp_path / "own.yaml")
    np.testing.assert_allclose(instrument.wavelength, 10 ** (3.7 + 5e-5 * np.arange(100)))


BAD = {
    "names": ("file: expected fields out of .*, got 'names'", {"names": "x"}),
    "name": ("name: expected a text, got 3", {"name": 3}),
    "list": ("wavelength: expected fields out of .*, got 5000", {"wavelength": 5000}),
    "medium": (
        "wavelength.medium: expected 'vacuum' or 'air', got 'water'",
        {"wavelength": {"medium": "water", "detectors": [{"start": 5000, "step": 2, "last": 200}]}},
    ),
    "step": (
        r"wavelength.detectors\[0\].step: expected a number from 0 to inf, got -2",
        {"wavelength": {"detectors": [{"start": 5000, "step": -2, "last": 200}]}},
    ),
    "no step": (
        r"wavelength.detectors\[0\]: expected a field 'step', got \['last', 'start'\]",
        {"wavelength": {"detectors": [{"start": 5000, "last": 200}]}},
    ),
    "nanometres": (
        r"wavelength.detectors\[0\]: expected at least 4 increasing wavelengths from 912 to 320,000 Angstrom",
        {"wavelength": {"detectors": [{"start": 500, "step": 0.2, "last": 200}]}},
    ),
    "order": (
        r"wavelength.detectors\[1\]: expected a start above 5020.000, got 5000",
        {"wavelength": {"detectors": [{"start": 5000, "step": 2, "last": 10}] * 2}},
    ),
    "values": (
        r"wavelength.detectors\[0\].values: expected increasing numbers",
        {"wavelength": {"detectors": [{"values": [5000, 5001, 5001, 5002]}]}},
    ),
    "width": ("line_spread.fwhm: expected a number .*, got 0", {"line_spread": {"fwhm": 0}}),
    "two widths": (
        "line_spread: expected one of resolving_power, fwhm, sigma, got",
        {"line_spread": {"fwhm": 1, "sigma": 1}},
    ),
    "table": (
        "line_spread.sigma: expected a list of 2 numbers, got",
        {"line_spread": {"wavelength": [1, 2], "sigma": [3]}},
    ),
    "gap": (
        "line_spread: expected ranges that cover all wavelengths, .*, got 'none at 5200'",
        {"line_spread": [{"fwhm": 10, "range": [4000, 5200]}, {"fwhm": 10, "range": [5300, 6000]}]},
    ),
    "snr": ("noise.snr: expected a number from 0.001 to inf, got -1", {"noise": {"snr": -1}}),
    "no snr": (r"noise: expected a field 'snr', got \['correlation'\]", {"noise": {"correlation": 1}}),
    "bool": ("noise.snr: expected a number .*, got True", {"noise": {"snr": True}}),
    "kind": ("noise.snr: expected fields out of .*, got 'normal'", {"noise": {"snr": {"normal": [1, 2]}}}),
    "uniform": ("noise.snr.uniform: expected increasing numbers", {"noise": {"snr": {"uniform": [2, 1]}}}),
    "quantiles": (
        "noise.snr.quantiles: expected probabilities from 0 to 1",
        {"noise": {"snr": {"quantiles": {0.1: 5, 1: 6}}}},
    ),
    "shape": (
        r"noise.error_shape.values: expected a list for each of the 1 values of snr, got",
        {"noise": {"snr": 1, "error_shape": {"wavelength": [5000], "values": [[1], [2]]}}},
    ),
    "mask": (r"masks\[0\]: expected increasing numbers, got \[5100, 5000\]", {"masks": [[5100, 5000]]}),
    "extinction": ("extinction: expected a number from 0 to inf, got -1", {"extinction": -1}),
    "tilt": ("tilt.degree: expected a whole number of at least 1, got 0", {"tilt": {"amplitude": 0.1, "degree": 0}}),
    "normalisation": ("normalisation: expected one of .*, got 'mean'", {"normalisation": "mean"}),
}


@pytest.mark.parametrize("case", BAD)
def test_an_error_in_a_file_names_file_field_expectation_and_value(tmp_path, case):
    message, changes = BAD[case]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**SMALL, **changes}))
    with pytest.raises(ValueError, match=f"^mine.yaml: {message}"):
        Instrument.load(tmp_path / "mine.yaml")


def test_of_a_value_of_any_length_an_error_shows_the_beginning(tmp_path):
    (tmp_path / "mine.yaml").write_text("name:" + 1000 * "1e999")  # without a space this is one text
    with pytest.raises(ValueError, match=r"^mine.yaml: file: expected fields .*, got 'name:1e9991e999\w{150,200}$"):
        Instrument.load(tmp_path / "mine.yaml")


def test_an_instrument_sharper_than_the_emulator_is_refused_naming_both():
    instrument = small(
        wavelength={"detectors": [{"start": 16000, "step": 0.2, "last": 99}]}, line_spread={"resolving_power": 40_000}
    )
    with pytest.raises(
        ValueError, match=r"line_spread: expected a FWHM of at least 0.711 .* at 16000 .* got 0.4 in 'small'"
    ):
        instrument.response(APSTAR, 22_500)


def test_a_range_that_the_emulator_does_not_cover_is_refused_naming_both():
    with pytest.raises(ValueError, match="covers 5000.0-5400.0 Angstrom for 'small', got 15100.8-16999.8"):
        small().response(APSTAR, 22_500)


def test_a_spectrum_that_is_not_finite_or_has_no_light_is_refused():
    flux = np.ones((3, 2800))
    flux[1, 720] = np.nan
    with pytest.raises(ValueError, match="flux: expected finite numbers of a positive median, got .* in star 1"):
        small().apply(BINS, flux, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"got a median of 0.0 in star 0"):
        small().apply(BINS, np.zeros((2, 2800)), np.random.default_rng(0))

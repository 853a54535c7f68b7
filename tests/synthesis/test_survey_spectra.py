"""Spectra of stars with known labels through random surveys and instruments."""

import numpy as np
import pytest

from spectrafm_hf.synthesis import survey_spectra
from spectrafm_hf.synthesis.bases import survey_grid


@pytest.fixture(scope="module")
def stars():
    wavelength = np.arange(3_550.0, 7_400.0, 0.9)
    line = 1.0 - 0.5 * np.exp(-0.5 * ((wavelength - 5_000.0) / 1.2) ** 2)
    flux = np.tile(line, (3, 1)).astype(np.float32)
    columns = {"wavelength": wavelength, "flux": flux, "mask": np.zeros(flux.shape, bool)}
    return columns | {name: np.array([5_000.0, 5_500.0, 6_000.0]) for name in ("teff", "logg", "fe_h")}


def test_a_drawn_window_lies_between_its_limits_and_is_as_likely_narrow_as_wide():
    generator = np.random.default_rng(0)
    found = np.array([survey_spectra.drawn_range((4_000.0, 8_000.0), generator)[0] for _ in range(400)])
    assert found.min() >= 4_000.0 - 1e-6 and found.max() <= 8_000.0 + 1e-6
    width = np.log(found[:, 1] / found[:, 0])
    assert width.min() >= survey_spectra.NARROWEST
    middle = np.exp(0.5 * (np.log(survey_spectra.NARROWEST) + np.log(np.log(2.0))))
    assert np.mean(width < middle) == pytest.approx(0.5, abs=0.08)


def test_observed_stars_are_used_complete_in_the_ranges_of_surveys_and_as_by_other_instruments(stars):
    drawn = list(survey_spectra.observed_spectra(stars, 8, np.random.default_rng(1)))
    names = [each.name for each in drawn]
    assert names[:5] == ["whole", "lamost", "galah", "desi b", "desi r"]  # nothing of the others is in the library
    assert set(names[5:]) == {"drawn"} and len(names) >= 10
    whole, galah = drawn[0], drawn[2]
    assert not whole.rows[0]["mask"].any() and np.isnan(whole.rows[0]["flux_error"]).all()
    seen = galah.rows[1]["wavelength"][~galah.rows[1]["mask"]]
    assert survey_spectra.within(seen, survey_spectra.RANGES["galah"]).all() and len(seen) > 700
    for each in drawn[5:]:
        assert each.kind == "observed" and each.stars.tolist() == [0, 1, 2]
        assert each.labels["teff"].tolist() == [5_000.0, 5_500.0, 6_000.0]
        assert 500.0 <= each.rows[0]["resolving_power"] <= 2_000.0


def test_an_instrument_adds_the_noise_that_it_states(stars):
    flat = stars | {"flux": np.ones((300, len(stars["wavelength"])), np.float32)}
    args = flat["wavelength"], flat["flux"], np.zeros(flat["flux"].shape, bool), 2_200.0, (1_000.0, 1_000.0)
    rows = survey_spectra.seen_at_random(*args, ((5_000.0, 5_100.0),), np.random.default_rng(2))
    z = []
    for row in rows:
        assert row["resolving_power"] == pytest.approx(1_000.0) and not row["mask"].any()
        smooth = np.polynomial.Polynomial.fit(row["wavelength"], row["flux"], 2, w=1.0 / row["flux_error"])
        z.append((row["flux"] - smooth(row["wavelength"])) / row["flux_error"])
    n = len(rows[0]["wavelength"])
    assert np.std(z) == pytest.approx(np.sqrt(1.0 - 3.0 / n), rel=0.03)
    snr = [np.median(row["flux"] / row["flux_error"]) for row in rows]
    low, high = survey_spectra.SNR
    assert 0.7 * low < min(snr) < 1.5 * low and 0.7 * high < max(snr) < 1.3 * high
    outside = survey_spectra.seen_at_random(*args, ((9_000.0, 9_100.0),), np.random.default_rng(2))
    assert outside == []


def test_a_line_is_as_wide_as_the_resolving_power_says(stars, monkeypatch):
    monkeypatch.setattr(survey_spectra, "SNR", (1e5, 1.1e5))
    generator = np.random.default_rng(3)
    args = stars["wavelength"], stars["flux"], stars["mask"], 1e6, (700.0, 700.0)
    widths = []
    for _ in range(60):
        (row, *_) = survey_spectra.seen_at_random(*args, ((4_900.0, 5_100.0),), generator)
        x = row["wavelength"] - 5_000.0
        far = np.abs(x) > 20.0
        level = np.polynomial.Polynomial.fit(x[far], row["flux"][far], 3)(x)
        depth = 1.0 - row["flux"] / level
        widths.append(np.sqrt(np.average(x[~far] ** 2, weights=depth[~far].clip(0.0))))
    expected = np.hypot(1.2, 5_000.0 / 700.0 / 2.3548)
    assert np.median(widths) == pytest.approx(expected, rel=0.08)
    assert np.std(widths) / expected == pytest.approx(survey_spectra.POWER_ERROR, rel=0.4)


class AsModels:
    """In place of observed stars that differ from models: none does."""

    def added(self, wavelength, labels, generator):
        return np.zeros((len(labels["teff"]), len(wavelength)))


def test_synthetic_stars_are_observed_by_every_survey_and_other_instruments():
    drawn = list(survey_spectra.synthetic_spectra(survey_grid(), AsModels(), 6, 3, np.random.default_rng(4)))
    surveys = {each.name: each for each in drawn if each.name != "drawn"}
    assert list(surveys) == list(survey_spectra.SURVEYS)
    for name, each in surveys.items():
        assert each.kind == "synthetic" and len(each.rows) == 6
        assert each.rows[0]["resolving_power"] == survey_spectra.SURVEYS[name]
        assert (each.labels["teff"] > survey_spectra.COOLEST).all() and np.isfinite(each.labels["alpha_m"]).all()
    others = [each for each in drawn if each.name == "drawn"]
    numbers = np.concatenate([each.stars for each in others])
    assert len(set(numbers)) == len(numbers) and numbers.min() == 6  # other stars than those of the surveys
    again = list(survey_spectra.synthetic_spectra(survey_grid(), AsModels(), 6, 3, np.random.default_rng(4)))
    np.testing.assert_array_equal(again[0].rows[0]["flux"], drawn[0].rows[0]["flux"])

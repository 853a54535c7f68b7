"""Synthetic stars with the labels of a catalogue and the residuals of observed stars."""

import numpy as np
import pytest

from spectrafm_hf.data.calibrated import CalibratedStars


N = 60


@pytest.fixture(scope="module")
def catalogue():
    generator = np.random.default_rng(0)
    fe_h = np.where(generator.random(400) < 0.1, -1.5, -0.2) + 0.1 * generator.standard_normal(400)
    return {
        "teff": generator.uniform(4300, 5200, 400),
        "logg": generator.uniform(1.5, 3.0, 400),
        "fe_h": fe_h,
        "alpha_m": np.full(400, 0.1),
        "ak_targ": generator.uniform(0.0, 0.2, 400),
    }


@pytest.fixture(scope="module")
def observed(catalogue):
    """Stars of the emulator, with a wiggle that all share and one that comes and goes from star to star."""
    stars = CalibratedStars("gaia-xp", {name: column[:N] for name, column in catalogue.items()}, flatness=0.0)
    _, table, covered = stars._table(stars.catalogue)
    assert covered.all()
    wavelength = stars._stars.instrument.wavelength
    shared, own = 0.05 * np.sin(wavelength / 150), 0.03 * np.cos(wavelength / 90)
    size = np.random.default_rng(1).standard_normal((len(table), 1))
    a_v = stars.catalogue[:, -1] / 0.1066
    still = np.exp(shared + size * own).astype(np.float32)
    instrument = stars._stars.instrument
    columns = stars._observe(instrument, table, a_v, still, np.random.default_rng(2))
    columns["flux"] = columns["clean"]
    columns["wavelength"] = np.tile(columns["wavelength"], (len(table), 1))
    columns["mask"][:, :50] = True
    return {**columns, **dict(zip(catalogue, stars.catalogue.T, strict=True))}, shared, own


def test_stars_have_the_labels_of_the_catalogue_and_rare_metallicities_come_more_often(catalogue):
    generator = np.random.default_rng(3)
    poor = [
        np.mean(CalibratedStars("gaia-xp", catalogue, flatness=flatness).draw(2000, generator)["fe_h"] < -1)
        for flatness in (0.0, 1.0)
    ]
    assert 0.06 < poor[0] < 0.14 and poor[1] > 0.3
    stars = CalibratedStars("gaia-xp", catalogue).draw(500, generator)
    assert stars["flux"].shape == (500, 343) and np.isfinite(stars["flux"]).all()
    assert stars["teff"].min() > 4000 and stars["teff"].max() < 5500
    np.testing.assert_allclose(np.median(stars["mg_fe"]), 0.1, atol=0.02)


def test_what_observed_stars_have_in_common_is_found_again(catalogue, observed):
    columns, shared, _ = observed
    stars = CalibratedStars("gaia-xp", catalogue, columns)
    found = stars.coefficients[0, 50:]
    assert np.all(stars.coefficients[:, :50] == 0), "masked in all"
    assert np.corrcoef(found, shared[50:])[0, 1] > 0.9
    assert 0.8 < np.std(found) / np.std(shared[50:]) < 1.2


def test_what_comes_and_goes_comes_and_goes_in_the_stars_that_are_drawn(catalogue, observed):
    columns, _, own = observed
    stars = CalibratedStars("gaia-xp", catalogue, columns)
    factors = np.log(stars._factors(stars.catalogue[:300], np.random.default_rng(5)))[:, 50:]
    # Rapid along the pixels, so that the smooth part of the scatter does not count.
    pattern = np.diff(own[50:], n=2)
    size = np.diff(factors, n=2, axis=1) @ pattern / (pattern @ pattern)
    assert 0.7 < np.std(size) < 1.4


def test_a_star_that_is_something_else_does_not_count(catalogue, observed):
    columns = {name: column.copy() for name, column in observed[0].items()}
    columns["flux"][3] *= np.where(np.arange(343) % 2, 0.3, 1.5)
    stars = CalibratedStars("gaia-xp", catalogue, columns)
    assert len(stars.residuals) < len(columns["flux"])
    assert np.abs(stars.residuals).max() < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wavelength": lambda values: values * 1.01}, "wavelength: expected the 343 pixels of gaia-xp"),
        ({"teff": lambda values: values * np.nan}, "observed: expected at least ten stars"),
    ],
)
def test_observed_stars_that_cannot_be_used_are_named(catalogue, observed, change, message):
    columns = {**observed[0], **{name: edit(observed[0][name]) for name, edit in change.items()}}
    with pytest.raises(ValueError, match=message):
        CalibratedStars("gaia-xp", catalogue, columns)


def test_a_catalogue_without_stars_in_range_is_named(catalogue):
    with pytest.raises(ValueError, match="catalogue: expected stars that the emulator covers, got none of 400"):
        CalibratedStars("gaia-xp", {**catalogue, "teff": catalogue["teff"] + 9000})

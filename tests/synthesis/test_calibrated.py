"""Synthetic stars with labels of a catalogue and residuals of observed stars."""

import numpy as np
import pytest

from spectrafm_hf.synthesis.calibrated import CalibratedStars, extended_catalogue, mean_alpha


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
    columns = stars._observe(instrument, *stars._synthesize(table), a_v, still, np.random.default_rng(2))
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


def test_common_residuals_of_observed_stars_are_recovered(catalogue, observed):
    columns, shared, _ = observed
    stars = CalibratedStars("gaia-xp", catalogue, columns)
    found = stars.coefficients[0, 50:]
    assert np.all(stars.coefficients[:, :50] == 0), "masked in all"
    assert np.corrcoef(found, shared[50:])[0, 1] > 0.9
    assert 0.8 < np.std(found) / np.std(shared[50:]) < 1.2


def test_variable_features_vary_in_the_drawn_stars(catalogue, observed):
    columns, _, own = observed
    stars = CalibratedStars("gaia-xp", catalogue, columns)
    factors = np.log(stars._factors(stars.catalogue[:300], np.random.default_rng(5)))[:, 50:]
    # Rapid along the pixels, so that the smooth part of the scatter does not count.
    pattern = np.diff(own[50:], n=2)
    size = np.diff(factors, n=2, axis=1) @ pattern / (pattern @ pattern)
    assert 0.7 < np.std(size) < 1.4


def test_molecules_that_are_wrong_in_cool_stars_change_a_star_with_fewer_molecules_less():
    generator = np.random.default_rng(6)
    giants = {
        "teff": np.append(generator.uniform(3700, 5000, 200), 4000.0),
        "logg": np.append(generator.uniform(0.8, 2.0, 200), 1.0),
        "fe_h": np.append(generator.uniform(-0.4, 0.3, 200), -1.5),
    }
    stars = CalibratedStars("gaia-xp", giants, flatness=0.0)
    _, table, _ = stars._table(stars.catalogue)
    tio = stars._features(stars.catalogue, table)[:, 1]
    columns = stars._observe(stars._stars.instrument, *stars._synthesize(table), np.zeros(len(table)), None, generator)
    wavelength = stars._stars.instrument.wavelength
    band = (wavelength > 7050) & (wavelength < 7250)
    columns["flux"] = columns["clean"] * np.exp(0.1 * np.outer(np.minimum(tio, 0), band))
    columns["wavelength"] = np.tile(wavelength, (len(table), 1))
    columns |= dict(zip(("teff", "logg", "fe_h"), stars.catalogue[:, :3].T, strict=True))
    stars.calibrate({name: column[:-1] for name, column in columns.items()})
    change = (stars._features(stars.catalogue, table) @ stars.coefficients)[:, band].mean(axis=1)
    alike = np.abs(stars.catalogue[:, 0] - 4000) < 100
    assert np.median(change[alike]) < -0.1
    # The metal-poor star changes by what its own weaker band calls for, not by what others of its temperature do.
    np.testing.assert_allclose(change[-1], 0.1 * tio[-1], atol=0.02)
    assert abs(change[-1]) < 0.6 * abs(np.median(change[alike]))


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


def test_a_small_catalogue_is_extended_to_metal_poor_stars(catalogue):
    rich = {name: column[catalogue["fe_h"] > -1][:100] for name, column in catalogue.items()}
    wide = extended_catalogue(rich, 5000, lowest=-2.0)
    assert wide["fe_h"].min() < -1.99 and wide["fe_h"].max() < rich["fe_h"].max()
    assert np.std(np.histogram(wide["fe_h"], 10)[0]) < 60, "as many of each [Fe/H]"
    np.testing.assert_allclose(np.mean(wide["logg"]), np.mean(rich["logg"]), atol=0.1)
    # Iron-poor giants are hotter, and richer in alpha elements.
    poor = wide["fe_h"] < -1.5
    assert np.mean(wide["teff"][poor]) > np.mean(wide["teff"][~poor]) + 150
    added = mean_alpha(-1.75) - mean_alpha(-0.2)
    np.testing.assert_allclose(np.mean(wide["alpha_m"][poor]), 0.1 + added, atol=0.03)
    np.testing.assert_array_equal(wide["teff"], extended_catalogue(rich, 5000, lowest=-2.0)["teff"])
    stars = CalibratedStars("gaia-xp", wide).draw(300, np.random.default_rng(0))
    assert np.mean(stars["fe_h"] < -1) > 0.3


def test_without_alpha_and_extinction_stars_have_the_mean_of_the_one_and_none_of_the_other(catalogue):
    few = {name: catalogue[name] for name in ("teff", "logg", "fe_h")}
    assert set(extended_catalogue(few, 10)) == {"teff", "logg", "fe_h", "alpha_m"}
    stars = CalibratedStars("gaia-xp", few).draw(1000, np.random.default_rng(1))
    np.testing.assert_array_equal(stars["ak_targ"], 0.0)
    poor = stars["fe_h"] < -1
    np.testing.assert_allclose(np.median(stars["mg_fe"][poor]), 0.22, atol=0.03)
    np.testing.assert_allclose(np.median(stars["mg_fe"][~poor]), 0.045, atol=0.03)


@pytest.mark.parametrize("name", ["miles", "apogee"])
def test_errors_of_other_instruments_are_found_too(catalogue, name):
    few = {label: catalogue[label][:40] for label in ("teff", "logg", "fe_h")}
    plain = CalibratedStars(name, few, flatness=0.0)
    _, table, covered = plain._table(plain.catalogue)
    wavelength = plain._stars.instrument.wavelength
    shared = 0.02 * np.sin(np.arange(wavelength.size) / 7.0)
    factors = np.broadcast_to(np.exp(shared).astype(np.float32), (len(table), wavelength.size))
    columns = plain._observe(
        plain._stars.instrument, *plain._synthesize(table), np.zeros(len(table)), factors, np.random.default_rng(2)
    )
    columns["flux"], columns["wavelength"] = columns["clean"], np.tile(columns["wavelength"], (len(table), 1))
    columns |= dict(zip(("teff", "logg", "fe_h"), plain.catalogue.T[:3], strict=True))
    inside = (wavelength > 15160) & (wavelength < 15300) if name == "apogee" else (wavelength > 4840)
    columns["mask"] = np.tile(~inside, (len(table), 1))
    stars = CalibratedStars(name, extended_catalogue(few, 500), columns, tilt=0.0)
    assert np.all(stars.coefficients[:, ~inside] == 0), "masked in all"
    assert np.corrcoef(stars.coefficients[0, inside], shared[inside])[0, 1] > 0.95
    assert np.isfinite(stars.draw(20, np.random.default_rng(3))["flux"]).all()


def test_scaling_by_depth_gives_metal_poor_stars_smaller_line_errors(catalogue):
    rich = {label: catalogue[label][catalogue["fe_h"] > -1][:40] for label in ("teff", "logg", "fe_h")}
    plain = CalibratedStars("miles", rich, flatness=0.0)
    _, table, _ = plain._table(plain.catalogue)
    columns = plain._observe(
        plain._stars.instrument, *plain._synthesize(table), np.zeros(len(table)), None, np.random.default_rng(2)
    )
    # The lines are 10 % weaker.
    wavelength, depth = columns["wavelength"], plain._depth(table)
    columns["flux"] = columns["clean"] * (1 - 0.9 * depth) / (1 - depth)
    columns["wavelength"] = np.tile(wavelength, (len(table), 1))
    columns["mask"] = np.tile(wavelength < 4840, (len(table), 1))
    columns |= dict(zip(("teff", "logg", "fe_h"), plain.catalogue.T[:3], strict=True))
    poor = extended_catalogue(rich, 2000, lowest=-1.8)
    poor = {name: column[poor["fe_h"] < -1.5] for name, column in poor.items()}

    def error(by_depth):
        stars = CalibratedStars("miles", poor, columns, by_depth=by_depth, tilt=0.0)
        few = stars.catalogue[:50]
        depth = stars._depth(stars._table(few)[1])
        wanted = np.log((1 - 0.9 * depth) / (1 - depth))[:, wavelength > 4840]
        stars.residuals[:] = 0
        made = np.log(stars._factors(few, np.random.default_rng(0)))[:, wavelength > 4840]
        wanted, made = (value - np.median(value, axis=1, keepdims=True) for value in (wanted, made))
        return np.sqrt(np.mean((made - wanted) ** 2))

    assert error(True) < 0.6 * error(False)


def test_a_star_for_which_the_emulator_has_no_flux_is_drawn_again(catalogue):
    labels = {"teff": 3050.0, "logg": 0.0, "fe_h": 0.3, "vmicro": 2.0}

    class Unlucky(CalibratedStars):
        drawn = 0

        def _draw_labels(self, n, generator):
            stars, labelled, table = super()._draw_labels(n, generator)
            self.drawn += n
            if n > 1:
                table[2] = [labels.get(name, 0.0) for name in self._stars.emulator.config.label_names]
            return stars, labelled, table

    stars = Unlucky("miles", catalogue)
    columns = stars.draw(5, np.random.default_rng(0))
    assert stars.drawn == 6
    assert np.isfinite(columns["flux"]).all() and (np.median(columns["clean"], axis=1) > 0).all()
    assert columns["teff"].min() > 4000

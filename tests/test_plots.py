"""Pictures: that they are made whole, and that what they show is what was given."""

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from spectrafm_hf.plots import (
    axis_label,
    draw_spectrum,
    plot_comparison,
    plot_label_distribution,
    plot_observed,
    plot_overview,
    plot_star,
    symbol,
)


UNITS = {"teff": "K", "logg": "dex"}


def ink(path) -> float:
    """Part of the picture that is not white."""
    pixels = image.imread(path)[..., :3]
    return float((pixels.min(axis=-1) < 0.99).mean())


@pytest.mark.parametrize(
    ("label", "expected"),
    [("teff", r"$T_\mathrm{eff}$"), ("fe_h", "[Fe/H]"), ("alpha_m", r"[$\alpha$/M]"), ("age", "age")],
)
def test_labels_are_written_as_astronomers_write_them(label, expected):
    assert symbol(label) == expected


def test_axes_say_quantity_and_unit():
    assert axis_label("fe_h", {"fe_h": "dex"}, "APOGEE ") == "APOGEE [Fe/H] [dex]"
    assert axis_label("age", {}) == "age"


def test_masked_pixels_are_shaded_and_left_out_of_the_line(stars):
    star = stars[0]
    axes = Figure().add_subplot()
    draw_spectrum(axes, star)
    (line,) = axes.lines
    np.testing.assert_array_equal(np.isnan(line.get_ydata()), star["mask"])
    shades = [patch.get_x() for patch in axes.patches]
    # One pixel is 2 Angstrom wide, so a shade starts 1 Angstrom before its middle.
    np.testing.assert_allclose(shades, star["wavelength"][star["mask"]] - 1.0)
    assert "Wavelength" in axes.get_xlabel()
    assert r"\AA" in axes.get_xlabel()


def test_a_cosmic_ray_does_not_set_the_scale(stars):
    star = {**stars[1], "flux": stars[1]["flux"].copy()}
    star["flux"] = np.tile(star["flux"], 10)
    star |= {name: np.tile(star[name], 10) for name in ("flux_error", "mask")}
    star["wavelength"] = np.arange(5000.0, 5000.0 + star["flux"].size)
    star["flux"][100] = 1e6
    axes = Figure().add_subplot()
    draw_spectrum(axes, star)
    assert axes.get_ylim()[1] < 3


def test_a_star_is_drawn_with_or_without_labels_and_errors(tmp_path, stars):
    plot_star(tmp_path / "good.png", stars[0], {"teff": 5000.0, "logg": 2.0}, {"teff": 50.0, "logg": 0.1}, UNITS)
    nothing = {"teff": np.nan, "logg": np.nan}
    bad = {**stars[0], "mask": np.ones_like(stars[0]["mask"])}
    plot_star(tmp_path / "bad.png", bad, nothing, nothing, UNITS, "no valid pixel")
    bare = {**stars[0], "flux_error": np.full_like(stars[0]["flux_error"], np.nan)}
    plot_star(tmp_path / "bare.png", bare, nothing, nothing, UNITS, "x" * 500)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "bare.png", "good.png"]
    assert all(ink(path) > 0.01 for path in tmp_path.iterdir())


def test_the_overview_is_drawn_with_unknown_labels_among_the_stars(tmp_path):
    random = np.random.default_rng(0)
    columns = {
        "teff": random.uniform(4000, 6000, 50),
        "logg": random.uniform(0, 5, 50),
        "fe_h": random.normal(0, 1, 50),
    }
    columns["teff"][3] = columns["logg"][3] = columns["fe_h"][3] = np.nan
    plot_overview(tmp_path / "all.png", columns, 1000)
    plot_overview(tmp_path / "plain.png", {name: columns[name] for name in ("teff", "logg")}, 50)
    plot_overview(tmp_path / "none.png", {name: np.full(3, np.nan) for name in columns}, 3)
    assert ink(tmp_path / "all.png") > ink(tmp_path / "none.png") > 0.005
    assert ink(tmp_path / "plain.png") > 0.005


def test_the_comparison_is_drawn(tmp_path, stars):
    random = np.random.default_rng(0)
    truth = {"teff": random.uniform(4000, 6000, 20), "logg": random.uniform(0, 5, 20)}
    catalogue = {**truth, "teff_err": np.full(20, 20.0), "logg_err": np.full(20, np.nan)}
    predicted = {"teff": truth["teff"] + 50, "logg": truth["logg"] - 0.1}
    predicted |= {"teff_err": np.full(20, 60.0), "logg_err": np.full(20, 0.2)}
    plot_comparison(tmp_path / "a.png", predicted, catalogue, UNITS, stars[0], [(5000.0, 5040.0), (5040.0, 5080.0)])
    assert ink(tmp_path / "a.png") > 0.02


def test_the_distribution_of_any_number_of_stars_and_labels_is_drawn(tmp_path):
    random = np.random.default_rng(0)
    names = ("teff", "logg", "fe_h", "mg_fe", "vmicro", "alpha_m")
    stars = {name: random.normal(0, 1, 500) for name in names}
    plot_label_distribution(tmp_path / "many.png", stars)
    plot_label_distribution(tmp_path / "one.png", {name: column[:1] for name, column in stars.items()})
    assert ink(tmp_path / "many.png") > ink(tmp_path / "one.png") > 0.005


@pytest.mark.parametrize("n_pixels", [300, 4000])
def test_observed_spectra_are_drawn_with_gaps_between_detectors(tmp_path, n_pixels):
    random = np.random.default_rng(0)
    wavelength = np.arange(n_pixels) + 5000.0
    wavelength[n_pixels // 2 :] += 300
    clean = 1 - 0.1 * np.sin(wavelength / 50) * np.ones((6, 1))
    error = np.full_like(clean, 0.01)
    stars = {name: random.normal(0, 1, 6) for name in ("teff", "logg", "fe_h", "snr")}
    stars |= {"wavelength": np.tile(wavelength, (6, 1)), "flux": clean + random.normal(0, error), "clean": clean}
    plot_observed(tmp_path / "stars.png", stars | {"flux_error": error})
    assert ink(tmp_path / "stars.png") > 0.02

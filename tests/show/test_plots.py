"""Plots: they are complete and show the data."""

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from spectrafm_hf.data.lines import line_list
from spectrafm_hf.inference.explain import Explanation, Peak
from spectrafm_hf.show.explained import plot_explanation
from spectrafm_hf.show.labels import plot_comparison, plot_label_distribution, plot_observed, plot_overview
from spectrafm_hf.show.spectra import draw_spectrum, find_gaps, mark_lines, plot_spectrum, plot_star
from spectrafm_hf.show.style import axis_label, symbol


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


def test_axes_have_quantity_and_unit():
    assert axis_label("fe_h", {"fe_h": "dex"}, "APOGEE ") == "APOGEE [Fe/H] [dex]"
    assert axis_label("age", {}) == "age"


def shades(axes, label: str) -> list[tuple[float, float]]:
    """Wavelengths from and to of what is shaded under this name in the legend."""
    found = [patch for patch in axes.collections if patch.get_label() == label]
    return [tuple(path.vertices[[0, 2], 0].tolist()) for patch in found for path in patch.get_paths()]


def test_masked_pixels_are_shaded_and_left_out_of_the_line(stars):
    star = stars[0]
    axes = Figure().add_subplot()
    draw_spectrum(axes, star)
    line, masked = axes.lines
    np.testing.assert_array_equal(np.isnan(line.get_ydata()), star["mask"])
    np.testing.assert_array_equal(np.isnan(masked.get_ydata()), ~star["mask"])
    # One pixel is 2 Angstrom wide, so a shade starts 1 Angstrom before its middle.
    middles, last = star["wavelength"][star["mask"]], star["wavelength"][-1]
    np.testing.assert_allclose(
        sorted(sorted(edges) for edges in shades(axes, "masked")), [[w - 1, min(w + 1, last)] for w in middles]
    )
    assert shades(axes, "gap") == []
    assert "Wavelength" in axes.get_xlabel()
    assert r"\AA" in axes.get_xlabel()


def spectrum_with_gaps(zeros: bool) -> dict:
    """1,000 pixels from 16,000 to 16,200 Angstrom; nothing was measured in two places, a masked run was."""
    wavelength = np.linspace(16000.0, 16200.0, 1001)
    flux, mask = 1 + 0.01 * np.sin(wavelength), np.zeros(1001, bool)
    dark = np.zeros(1001, bool)
    dark[300:400] = dark[600:700] = True
    mask[450:550] = True
    row = {"object_id": "x", "wavelength": wavelength, "flux": np.where(dark, 0, flux), "mask": mask | dark}
    row["flux_error"] = np.full(1001, 0.01)
    names = ("wavelength", "flux", "flux_error", "mask")
    return row if zeros else {"object_id": "x", **{name: row[name][~dark] for name in names}}


@pytest.mark.parametrize("zeros", [True, False])
def test_gaps_between_detectors_are_found_with_or_without_pixels_in_them(zeros):
    row = spectrum_with_gaps(zeros)
    np.testing.assert_allclose(find_gaps(row), [(16059.8, 16080.0), (16119.8, 16140.0)])
    axes = Figure().add_subplot()
    draw_spectrum(axes, row)
    np.testing.assert_allclose(sorted(sorted(edges) for edges in shades(axes, "gap")), find_gaps(row))
    (masked,) = shades(axes, "masked")
    np.testing.assert_allclose(sorted(masked), (16089.9, 16109.9))
    flux = axes.lines[0].get_ydata()
    between = (axes.lines[0].get_xdata() > 16060) & (axes.lines[0].get_xdata() < 16079.9)
    assert between.any() and np.isnan(flux[between]).all()


def test_lines_are_marked_in_vacuum_where_there_is_flux():
    axes = Figure().add_subplot()
    row = spectrum_with_gaps(True)
    draw_spectrum(axes, row)
    mark_lines(axes, row)
    # Br 13 at 16113.8 is there, Ca I at 16141.2 and 16155.2 too; nothing is marked in the gaps.
    assert [text.get_text() for text in axes.texts] == ["Ca I", "Ca I", "Br 13"]
    lines = {(line.name, line.wavelength) for line in line_list()}
    assert {("Hα", 6564.7), ("Mg I", 15770.11), ("Ca II", 8544.44)} <= lines


def test_the_lines_of_a_coarse_spectrum_are_the_strongest():
    axes = Figure().add_subplot()
    wavelength = np.arange(3360.0, 10201.0, 20.0)
    row = {"wavelength": wavelength, "flux": 1 + wavelength / 1e4, "mask": np.zeros(343, bool)}
    row["flux_error"] = np.full(343, 0.01)
    draw_spectrum(axes, row)
    mark_lines(axes, row)
    named = [text.get_text() for text in axes.texts]
    assert {"Hα", "Hβ", "Na D", "Mg b", "Ca II K"} <= set(named)
    assert "Ca I" not in named


def test_a_spectrum_is_drawn_with_a_panel_for_each_detector_or_in_a_range(tmp_path):
    row = {**spectrum_with_gaps(True), "survey": "apogee", "snr": 100.0, "rest_frame": False}
    plot_spectrum(tmp_path / "whole.png", row)
    plot_spectrum(tmp_path / "part.png", row, wavelength_range=(16130.0, 16160.0))
    dark = {**row, "mask": np.ones(1001, bool), "snr": np.nan}
    plot_spectrum(tmp_path / "dark.png", dark)
    assert {image.imread(path).shape[:2] for path in tmp_path.glob("*.png")} == {(1125, 1999)}
    assert min(ink(tmp_path / "whole.png"), ink(tmp_path / "part.png")) > 0.1
    assert ink(tmp_path / "dark.png") > 0.005
    with pytest.raises(ValueError, match="range: expected a range with valid pixels, got 16065 to 16070"):
        plot_spectrum(tmp_path / "gap.png", row, wavelength_range=(16065.0, 16070.0))


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


def test_eight_labels_fit_into_the_picture_of_a_star(tmp_path, stars):
    names = ("teff", "logg", "fe_h", "alpha_m", "mg_fe", "o_fe", "c_fe", "n_fe")
    units = {name: "K" if name == "teff" else "dex" for name in names}
    plot_star(tmp_path / "star.png", stars[0], dict.fromkeys(names, -0.25), dict.fromkeys(names, 0.05), units)
    pixels = image.imread(tmp_path / "star.png")[..., :3]
    above = pixels[: len(pixels) // 8]
    assert above.min() < 0.5, "the labels"
    assert above[:, :5].min() == above[:, -5:].min() == 1.0, "nothing runs off the sides"


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


@pytest.mark.parametrize(("n_pixels", "panels"), [(400, 3), (2400, 3 + 2 * 2)])
def test_an_explanation_names_the_lines_at_peaks_and_shows_long_spectra_close_up(
    tmp_path, monkeypatch, n_pixels, panels
):
    figures = []
    monkeypatch.setattr("spectrafm_hf.show.explained.save_figure", lambda figure, path: figures.append(figure))
    wavelength = np.linspace(15700.0, 15980.0, n_pixels)
    curve = np.sin(wavelength / 3)[None]
    intervals, shares = np.array([[15690.0, 15800.0], [15800.0, 15990.0]]), np.array([[0.25, 0.75]])
    found = Explanation(["mg_fe"], 3, wavelength, 1 + 0.1 * curve[0], curve, curve, intervals, shares, 0.1, 0.3)
    lines = [line for line in line_list() if line.name == "Mg I" and line.wavelength in (15770.11, 15958.86)]
    peaks = [Peak(line.wavelength, 1.0, 1.0, line) for line in lines] + [Peak(15771.0, 1.0, 0.5, None)]
    plot_explanation(tmp_path / "picture.png", found, "mg_fe", peaks, {"mg_fe": "dex"}, "what it looks at")
    (figure,) = figures
    assert len(figure.axes) == panels
    assert figure._suptitle.get_text() == "[Mg/Fe]: what it looks at"
    assert [text.get_text() for text in figure.axes[0].texts] == ["Mg I", "Mg I"]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [25.0, 75.0]
    assert figure.axes[2].get_ylabel().startswith("[Mg/Fe] [dex]")

"""Explanations: sums over stars against single stars, statistics against planted lines."""

import csv

import numpy as np
import pytest

from spectrafm_hf.data.lines import Line, line_list
from spectrafm_hf.inference.explain import (
    ALL_LABELS,
    Explainer,
    match_lines,
    peaks_of,
    recovery,
    spread_over_line,
    star_types,
    write_curves,
    write_intervals,
    write_peaks,
)
from spectrafm_hf.inference.prediction import tokenize_rows
from spectrafm_hf.inference.response import pixel_responses
from spectrafm_hf.models.flags_spectrafm import QUALITY


LABELS = ["teff", "logg", "fe_h", "alpha_m"]


@pytest.fixture
def quiet_stars(stars):
    """Stars whose errors are those of their scatter, so that no pixel is clipped."""
    return [{**star, "flux_error": np.full(len(star["flux"]), 0.1)} for star in stars]


def responses_of(tiny_evidence, row, names):
    model, tokenizer = tiny_evidence
    ((inputs, _),) = tokenize_rows(tokenizer, [row], names, [""])
    tokens = {name: value for name, value in inputs.items() if name not in QUALITY}
    return pixel_responses(model, tokenizer, [row], tokens)[0]


def test_one_star_is_explained_by_its_responses(tiny_evidence, quiet_stars):
    explainer = Explainer(*tiny_evidence, LABELS[:2])
    assert explainer.add(quiet_stars[:1]) == {}
    found, expected = explainer.explanations()["all"], responses_of(tiny_evidence, quiet_stars[0], LABELS[:2])
    valid = ~quiet_stars[0]["mask"]
    np.testing.assert_allclose(found.wavelength, quiet_stars[0]["wavelength"][valid])
    flux = quiet_stars[0]["flux"][valid]
    np.testing.assert_allclose(found.flux, flux / expected.level, rtol=1e-5)
    np.testing.assert_allclose(found.gradient[:2], 0.01 * flux * expected.response[0][:, valid], rtol=1e-5)
    np.testing.assert_allclose(found.information[:2], expected.information()[0], rtol=1e-6)
    np.testing.assert_allclose(found.information.sum(axis=1), 1.0)
    basis = tiny_evidence[1].basis
    np.testing.assert_allclose(found.intervals, basis.interval_edges[:2])
    scales = np.array(tiny_evidence[0].config.label_scales[:2])
    assert found.labels == ["teff", "logg", ALL_LABELS]
    together = np.sqrt(((found.gradient[:2] / scales[:, None]) ** 2).sum(axis=0))
    np.testing.assert_allclose(found.gradient[2], together, rtol=1e-6)


def test_a_star_has_the_same_part_in_any_batch(tiny_evidence, quiet_stars):
    rows = [quiet_stars[0], quiet_stars[3]]  # of one grid
    together, apart = (Explainer(*tiny_evidence) for _ in range(2))
    assert together.add(rows) == {}
    assert apart.add(rows[:1]) == apart.add(rows[1:]) == {}
    a, b = together.explanations()["all"], apart.explanations()["all"]
    assert a.n_stars == b.n_stars == 2
    assert a.labels == [*LABELS, ALL_LABELS]
    for name in ("wavelength", "flux", "gradient", "response", "information"):
        values = getattr(a, name)
        np.testing.assert_allclose(values, getattr(b, name), rtol=1e-3, atol=1e-4 * np.abs(values).max())


def test_the_mean_is_over_the_stars_that_have_the_pixel(tiny_evidence, quiet_stars):
    rows = [quiet_stars[0], {**quiet_stars[3], "mask": np.arange(40) < 8}]
    explainer = Explainer(*tiny_evidence, ["fe_h"])
    explainer.add(rows)
    alone = Explainer(*tiny_evidence, ["fe_h"])
    alone.add(rows[:1])
    both = explainer.explanations()["all"]
    assert both.wavelength[0] >= 5016  # what only half of the stars have is left out
    explainer.add([rows[0]])
    most = explainer.explanations()["all"]
    assert most.wavelength[0] == 5000
    np.testing.assert_allclose(most.gradient[0, 0], alone.explanations()["all"].gradient[0, 0], rtol=1e-3)


def test_a_star_with_other_wavelengths_is_reported(tiny_evidence, quiet_stars):
    explainer = Explainer(*tiny_evidence)
    far = {**quiet_stars[1], "wavelength": quiet_stars[1]["wavelength"] + 60}
    empty = {**quiet_stars[2], "mask": np.ones(33, bool)}
    refused = {**quiet_stars[2], "refused": "object_class: expected a star, got QSO"}
    bad = explainer.add([quiet_stars[0], far, empty, refused])
    assert bad == {
        1: "expected the wavelengths of the first star, got others",
        2: "no valid pixel",
        3: "object_class: expected a star, got QSO",
    }
    assert explainer.explanations()["all"].n_stars == 1


def test_a_label_without_a_prediction_is_reported(tiny_evidence, quiet_stars):
    model, tokenizer = tiny_evidence
    model.config.network_labels = ["teff"]
    explainer = Explainer(model, tokenizer, ["teff", "fe_h"])
    assert explainer.add(quiet_stars[:1]) == {0: "no answer from this spectrum: fe_h"}
    assert explainer.explanations() == {}


def test_a_model_whose_tokens_are_pixels_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="^model: expected a checkpoint on evidence to explain"):
        Explainer(tiny_model, tiny_tokenizer)


def test_the_type_of_a_star_follows_its_own_or_its_predicted_labels():
    assert star_types({"teff": 4500.0, "logg": 2.0}, {"teff": 6000.0, "logg": 4.5}) == ["all", "giants", "cool"]
    assert star_types({"teff": np.nan}, {"teff": 6000.0, "logg": 4.5}) == ["all", "dwarfs", "hot"]
    assert star_types({}, {"fe_h": 0.0}) == ["all"]


def test_types_add_up(tiny_evidence, quiet_stars):
    rows = [
        {**star, "logg": logg, "teff": 4000.0}
        for star, logg in zip((quiet_stars[0], quiet_stars[3]), (1.0, 4.0), strict=True)
    ]
    explainer = Explainer(*tiny_evidence, LABELS, by_type=True)
    explainer.add(rows)
    found = explainer.explanations()
    assert {name: one.n_stars for name, one in found.items()} == {"all": 2, "giants": 1, "dwarfs": 1, "cool": 2}
    np.testing.assert_array_equal(found["cool"].gradient, found["all"].gradient)
    np.testing.assert_array_equal(found["cool"].information, found["all"].information)


def test_a_line_sums_the_gradients_below_it_and_does_not_reach_over_a_gap():
    wavelength = np.concatenate([np.arange(5000.0, 5010.0), np.arange(5100.0, 5110.0)])
    gradient = np.zeros((2, 20))
    gradient[0, 9] = 1.0
    gradient[1] = 1.0
    spread = spread_over_line(wavelength, gradient, 2.0)
    np.testing.assert_allclose(spread[0, [8, 9]], [0.5, 1.0])  # half depth at half of the full width
    np.testing.assert_allclose(spread[0, 10:], 0.0, atol=1e-12)
    area = 2.0 * np.sqrt(np.pi / np.log(2)) / 2
    np.testing.assert_allclose(spread[1, 5], area, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------ peaks and lines


def test_the_lines_of_the_paper_are_fourteen():
    lines = line_list()
    assert sum(line.paper for line in lines) == 14
    assert sum(line.rank == 4 for line in lines) == 180
    assert [line.wavelength for line in lines] == sorted(line.wavelength for line in lines)
    # Two that every spectroscopist of the H band knows, out of the synthesis list.
    names = {(line.name, round(line.wavelength)) for line in lines if line.rank == 4}
    assert {("Fe I", 15212), ("Si I", 15964)} <= names


def test_planted_peaks_are_found_in_their_order_and_named():
    wavelength = np.arange(15200.0, 15800.0, 0.2)
    curve = sum(
        height * np.exp(-0.5 * ((wavelength - center) / 0.5) ** 2)
        for center, height in ((15300.0, -3.0), (15500.0, 2.0), (15700.0, 1.0))
    )
    lines = [Line(15300.4, "Fe I", 1, False), Line(15498.0, "OH", 1, False)]
    peaks = peaks_of(wavelength, curve, lines, 1.0)[:3]
    np.testing.assert_allclose([peak.wavelength for peak in peaks], [15300, 15500, 15700], atol=0.11)
    np.testing.assert_allclose([peak.prominence for peak in peaks], [3, 2, 1], rtol=1e-3)
    assert [peak.line and peak.line.name for peak in peaks] == ["Fe I", None, None]


def test_lines_at_peaks_are_unlikely_by_chance_and_others_are_not():
    wavelength = np.arange(15000.0, 16000.0, 0.2)
    random = np.random.default_rng(1)
    lines = np.sort(random.uniform(15010, 15990, 14))
    found = recovery(np.concatenate([lines[:10] + 0.3, random.uniform(15010, 15990, 20)]), lines, wavelength, 1.0)
    assert found.n_lines == 14
    assert found.n_found >= 10
    assert found.random == pytest.approx(14 * 30 * 2 / 1000, rel=0.1)
    assert found.p_value < 0.001
    nothing = recovery(random.uniform(15010, 15990, 30), lines, wavelength, 1.0)
    assert nothing.p_value > 0.05
    beyond = recovery([15300.0], [14000.0], wavelength, 1.0)
    assert (beyond.n_found, beyond.n_lines, beyond.p_value) == (0, 0, 1.0)


def test_the_p_value_is_right_for_lines_that_cluster():
    """Peaks and lines in clusters that have nothing to do with each other: p is even between 0 and 1."""
    wavelength = np.arange(10000.0)
    random = np.random.default_rng(2)
    values = []
    for _ in range(60):
        lines = (random.uniform(0, 1e4) + np.arange(14) * 3.0) % 9999
        peaks = (random.uniform(0, 1e4) + np.arange(300) * 7.0) % 9999
        values.append(recovery(peaks, lines, wavelength, 1.0).p_value)
    assert np.mean(np.array(values) < 0.05) < 0.15


def test_tables_hold_the_explanation(tiny_evidence, quiet_stars, tmp_path):
    explainer = Explainer(*tiny_evidence, ["teff", "fe_h"])
    explainer.add([quiet_stars[1]])
    found = explainer.explanations()
    write_curves(tmp_path / "curves.csv", found)
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["all"].wavelength.size
    assert float(rows[3]["fe_h_gradient"]) == pytest.approx(found["all"].gradient[1, 3], rel=1e-4)
    assert float(rows[3]["all_response"]) == pytest.approx(found["all"].response[2, 3], rel=1e-4)
    write_intervals(tmp_path / "intervals.csv", found)
    with (tmp_path / "intervals.csv").open() as file:
        intervals = list(csv.DictReader(file))
    assert [float(row["low"]) for row in intervals] == pytest.approx(found["all"].intervals[:, 0], abs=0.01)
    assert sum(float(row["teff"]) for row in intervals) == pytest.approx(1.0, abs=1e-4)
    matches = match_lines(found["all"])
    assert [match.label for match in matches] == ["teff", "fe_h", ALL_LABELS]
    write_peaks(tmp_path / "peaks.csv", {"all": matches})
    with (tmp_path / "peaks.csv").open() as file:
        peaks = list(csv.DictReader(file))
    assert len(peaks) == sum(len(match.peaks) for match in matches)
    assert float(peaks[0]["prominence"]) >= float(peaks[1]["prominence"])

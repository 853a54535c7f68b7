"""What a model looks at: the numbers against finite differences, the statistics against what is planted."""

import csv

import numpy as np
import pytest
import torch

from spectrafm_hf import SpectraFMTokenizer
from spectrafm_hf.explain import (
    ALL_LABELS,
    Explainer,
    Line,
    attributions,
    eager_attention,
    line_list,
    match_lines,
    peaks_of,
    recovery,
    spread_over_line,
    star_types,
    write_curves,
    write_peaks,
)


LABELS = ["teff", "logg", "fe_h", "alpha_m"]


@pytest.fixture
def tokenizer() -> SpectraFMTokenizer:
    """With all that stands between flux and what the model sees: continuum, centre and scale that vary."""
    return SpectraFMTokenizer(
        patch_size=4,
        continuum="median",
        standardize_wavelength=[4900.0, 5200.0],
        standardize_center=[0.9, 1.1],
        standardize_scale=[0.05, 0.2],
        clip=None,
    )


@pytest.fixture
def one(tiny_model, tokenizer, stars):
    inputs = tokenizer(stars[0], requests=LABELS)
    return attributions(tiny_model, tokenizer, inputs), inputs


def test_the_gradient_is_what_one_percent_of_flux_does(tiny_model, tokenizer, stars, one):
    found, _ = one
    model = tiny_model.double()
    star = {name: np.asarray(value, np.float64) if name != "object_id" else value for name, value in stars[0].items()}
    star["mask"] = stars[0]["mask"]

    def answers(flux):
        with torch.no_grad():
            inputs = tokenizer({**star, "flux": flux}, requests=LABELS)
            inputs["flux"], inputs["flux_error"] = inputs["flux"].double(), inputs["flux_error"].double()
            return model(**inputs).values[0].double().numpy()

    good = np.flatnonzero(~star["mask"])
    middle = good[np.argsort(star["flux"][good])[(len(good) - 1) // 2 : len(good) // 2 + 1]]
    checked = 0
    for pixel in (0, 9, 21, 39):
        if star["mask"][pixel] or pixel in middle:  # these make the median, which is held fixed
            continue
        up, down = star["flux"].copy(), star["flux"].copy()
        up[pixel] *= 1.0 + 1e-3
        down[pixel] *= 1.0 - 1e-3
        expected = (answers(up) - answers(down)) / 0.2
        at = found.valid[0] & (np.abs(found.wavelength[0] - star["wavelength"][pixel]) < 0.1)
        np.testing.assert_allclose(found.gradient[0][:, at][:, 0], expected, rtol=0.01)
        checked += 1
    assert checked >= 3


def test_attention_is_one_on_average_and_masked_pixels_have_none(one, stars):
    found, _ = one
    np.testing.assert_allclose(found.attention[0][:, found.valid[0]].mean(axis=1), 1.0, rtol=1e-5)
    assert not found.attention[0][:, ~found.valid[0]].any()
    assert not found.gradient[0][:, ~found.valid[0]].any()
    assert found.valid.sum() == np.count_nonzero(~stars[0]["mask"])


def test_flux_comes_back_over_the_continuum(one, stars):
    found, _ = one
    good = ~stars[0]["mask"]
    expected = stars[0]["flux"][good] / np.median(stars[0]["flux"][good])
    np.testing.assert_allclose(found.flux[0][found.valid[0]], expected, rtol=1e-5)
    np.testing.assert_allclose(found.wavelength[0][found.valid[0]], stars[0]["wavelength"][good])


def test_attention_is_that_of_the_head_that_is_asked_for(tiny_model, tokenizer, stars, one):
    mean, inputs = one
    heads = [attributions(tiny_model, tokenizer, inputs, head=head).attention for head in (0, 1)]
    np.testing.assert_allclose(np.mean(heads, axis=0), mean.attention, rtol=1e-5)
    assert np.abs(heads[0] - heads[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("choice", "field"), [({"layer": 1}, "layer"), ({"layer": -2}, "layer"), ({"head": 2}, "head")]
)
def test_a_layer_or_head_that_is_not_there_is_a_clear_error(tiny_model, tokenizer, one, choice, field):
    with pytest.raises(ValueError, match=f"^{field}: expected 0 to"):
        attributions(tiny_model, tokenizer, one[1], **choice)


def test_the_attention_of_the_model_is_as_it_was_even_after_an_error(tiny_model):
    before = tiny_model.config._attn_implementation
    with pytest.raises(KeyError), eager_attention(tiny_model):
        assert tiny_model.model.decoder.config._attn_implementation == "eager"
        raise KeyError
    assert before != "eager"
    assert tiny_model.config._attn_implementation == before
    assert tiny_model.model.decoder.config._attn_implementation == before


def test_a_star_has_the_same_part_in_any_batch(tiny_model, tokenizer, stars):
    rows = [stars[0], stars[3]]  # of one grid
    together, apart = (Explainer(tiny_model, tokenizer, LABELS) for _ in range(2))
    assert together.add(rows) == {}
    assert apart.add(rows[:1]) == apart.add(rows[1:]) == {}
    a, b = together.explanations()["all"], apart.explanations()["all"]
    assert a.n_stars == b.n_stars == 2
    assert a.labels == [*LABELS, ALL_LABELS]
    for name in ("wavelength", "flux", "attention", "gradient", "response"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-6)


def test_the_mean_is_over_the_stars_that_have_the_pixel(tiny_model, tokenizer, stars):
    rows = [stars[0], {**stars[3], "mask": np.arange(40) < 8}]
    explainer = Explainer(tiny_model, tokenizer, ["fe_h"])
    explainer.add(rows)
    alone = attributions(tiny_model, tokenizer, tokenizer(rows[0], requests=["fe_h"]))
    both = explainer.explanations()["all"]
    assert both.wavelength[0] >= 5016  # what only half of the stars have is left out
    explainer.add([rows[0]])
    most = explainer.explanations()["all"]
    assert most.wavelength[0] == 5000
    np.testing.assert_allclose(most.gradient[0, 0], alone.gradient[0, 0][alone.valid[0]][0], rtol=1e-4)


def test_a_star_of_other_wavelengths_is_told(tiny_model, tokenizer, stars):
    explainer = Explainer(tiny_model, tokenizer)
    far = {**stars[1], "wavelength": stars[1]["wavelength"] + 500}
    empty = {**stars[2], "mask": np.ones(33, bool)}
    bad = explainer.add([stars[0], far, empty])
    assert bad == {1: "expected the wavelengths of the first star, got others", 2: "no valid pixel"}
    assert explainer.explanations()["all"].n_stars == 1


def test_phases_are_the_mean_over_tokens_that_start_elsewhere(tiny_model, tokenizer, stars):
    star = {**stars[0], "mask": np.zeros(len(stars[0]["flux"]), bool)}
    explainer = Explainer(tiny_model, tokenizer, ["fe_h"], phases=4)
    assert explainer.add([star]) == {} and explainer.n_stars["all"] == 1
    found = explainer.explanations()["all"]
    cut = [{name: value if np.ndim(value) == 0 else value[k:] for name, value in star.items()} for k in range(4)]
    parts = [attributions(tiny_model, tokenizer, tokenizer(part, requests=["fe_h"])) for part in cut]
    for curve in ("attention", "gradient"):
        values = [getattr(part, curve)[0, 0][part.valid[0]] for part in parts]
        total = sum(np.pad(value, (k, 0)) for k, value in enumerate(values))
        expected = total / np.minimum(np.arange(1, len(total) + 1), 4)
        n_found = found.wavelength.size  # pixels that few of the phases have are left out
        assert len(expected) - 2 <= n_found < len(expected)
        np.testing.assert_allclose(getattr(found, curve)[0], expected[-n_found:], rtol=1e-6)
    once = Explainer(tiny_model, tokenizer, ["fe_h"])
    once.add([star])
    steps = [np.count_nonzero(np.diff(e.attention[0])) for e in (found, once.explanations()["all"])]
    assert steps[0] > 3 * steps[1], "attention changes within a token"


def test_more_phases_than_a_token_has_pixels_are_a_clear_error(tiny_model, tokenizer):
    with pytest.raises(ValueError, match="phases: expected 1 to 4, the pixels of a token, got 5"):
        Explainer(tiny_model, tokenizer, phases=5)


def test_stars_are_told_apart_by_their_own_labels_and_else_by_the_predicted():
    assert star_types({"teff": 4500.0, "logg": 2.0}, {"teff": 6000.0, "logg": 4.5}) == ["all", "giants", "cool"]
    assert star_types({"teff": np.nan}, {"teff": 6000.0, "logg": 4.5}) == ["all", "dwarfs", "hot"]
    assert star_types({}, {"fe_h": 0.0}) == ["all"]


def test_types_add_up(tiny_model, tokenizer, stars):
    rows = [{**star, "logg": logg, "teff": 4000.0} for star, logg in zip((stars[0], stars[3]), (1.0, 4.0), strict=True)]
    explainer = Explainer(tiny_model, tokenizer, LABELS, by_type=True)
    explainer.add(rows)
    found = explainer.explanations()
    assert {name: one.n_stars for name, one in found.items()} == {"all": 2, "giants": 1, "dwarfs": 1, "cool": 2}
    np.testing.assert_array_equal(found["cool"].gradient, found["all"].gradient)


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


def test_tables_hold_what_was_found(tiny_model, tokenizer, stars, tmp_path):
    explainer = Explainer(tiny_model, tokenizer, ["teff", "fe_h"])
    explainer.add([stars[1]])
    found = explainer.explanations()
    write_curves(tmp_path / "curves.csv", found)
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["all"].wavelength.size
    assert float(rows[3]["fe_h_gradient"]) == pytest.approx(found["all"].gradient[1, 3], rel=1e-4)
    assert float(rows[3]["all_response"]) == pytest.approx(found["all"].response[2, 3], rel=1e-4)
    matches = match_lines(found["all"])
    assert {match.curve for match in matches} == {"response"}  # 15 tokens are too coarse for lines
    write_peaks(tmp_path / "peaks.csv", {"all": matches})
    with (tmp_path / "peaks.csv").open() as file:
        peaks = list(csv.DictReader(file))
    assert len(peaks) == sum(len(match.peaks) for match in matches)
    assert float(peaks[0]["prominence"]) >= float(peaks[1]["prominence"])

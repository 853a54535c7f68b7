import numpy as np
import pytest

from spectrafm_hf.data.schema import LABEL_UNITS
from spectrafm_hf.models.modeling_emulator import default_vmicro
from spectrafm_hf.synthesis.labels import (
    LABEL_NAMES,
    LABEL_RANGES,
    OPTICAL_LABEL_NAMES,
    OPTICAL_LABEL_RANGES,
    draw_labels,
    draw_optical_labels,
)


@pytest.fixture(scope="module")
def stars() -> dict[str, np.ndarray]:
    return draw_labels(20_000, np.random.default_rng(0))


def test_every_label_is_one_of_the_schema_and_lies_in_its_range(stars):
    assert tuple(stars) == LABEL_NAMES
    assert set(LABEL_NAMES) <= set(LABEL_UNITS)
    for name, (low, high) in LABEL_RANGES.items():
        assert stars[name].shape == (20_000,)
        assert stars[name].min() >= low and stars[name].max() <= high


def test_a_seed_gives_the_same_stars_again_and_another_gives_others():
    first, again, other = (draw_labels(50, np.random.default_rng(seed))["teff"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.isin(first, other).any()


def test_the_kiel_diagram_has_a_giant_branch_and_a_main_sequence(stars):
    giants = stars["logg"] < 3.5
    assert 0.5 < giants.mean() < 0.65
    assert np.corrcoef(stars["teff"][giants], stars["logg"][giants])[0, 1] > 0.8  # luminous giants are cool
    hot = (stars["teff"] > 6000) & (stars["logg"] < 3)
    assert hot.mean() < 0.01
    dwarfs = stars["logg"] > 4.4
    assert np.percentile(stars["teff"][dwarfs], 5) < 4200 and np.percentile(stars["teff"][dwarfs], 95) > 5700


def test_all_ranges_of_temperature_and_metallicity_are_populated(stars):
    assert (np.histogram(stars["teff"], np.arange(3250, 6751, 500))[0] > 400).all()
    assert (np.histogram(stars["fe_h"], np.arange(-2, 0.51, 0.5))[0] > 300).all()


def test_alpha_elements_are_enhanced_in_metal_poor_stars_and_scatter_by_themselves(stars):
    poor, rich = stars["fe_h"] < -1, stars["fe_h"] > 0
    for name in ("o_fe", "mg_fe", "si_fe", "ca_fe", "ti_fe"):
        assert stars[name][poor].mean() > stars[name][rich].mean() + 0.05
    assert np.std(stars["si_fe"] - 0.7 * stars["mg_fe"]) > 0.05


def test_microturbulence_scatters_around_its_usual_relation(stars):
    ratio = np.log(stars["vmicro"] / default_vmicro(stars["teff"], stars["logg"]))
    assert abs(np.median(ratio)) < 0.02
    assert 0.15 < np.std(ratio) < 0.2


def test_narrower_ranges_are_kept_to_without_a_heap_at_their_edges():
    labels = draw_labels(2000, np.random.default_rng(0), {"fe_h": (-1.88, 0.5), "teff": (3300, 6700)})
    assert len(labels["fe_h"]) == 2000
    assert labels["fe_h"].min() > -1.88 and labels["teff"].max() < 6700
    assert np.unique(labels["fe_h"]).size == 2000


def test_drawing_zero_stars_works():
    assert all(values.shape == (0,) for values in draw_labels(0, np.random.default_rng(0)).values())


def test_the_labels_of_a_seed_are_those_of_older_grids():
    labels = draw_labels(3, np.random.default_rng(1))
    assert labels["teff"] == pytest.approx([4358.858, 6066.680, 4174.879], abs=0.01)
    assert labels["ni_fe"] == pytest.approx([0.07037, 0.10930, -0.15739], abs=1e-5)


@pytest.fixture(scope="module")
def optical() -> dict[str, np.ndarray]:
    return draw_optical_labels(10_000, np.random.default_rng(0))


def test_optical_labels_are_of_the_schema_and_lie_in_their_ranges(optical):
    assert tuple(optical) == OPTICAL_LABEL_NAMES
    assert set(LABEL_NAMES) < set(OPTICAL_LABEL_NAMES) <= set(LABEL_UNITS)
    for name, (low, high) in OPTICAL_LABEL_RANGES.items():
        assert optical[name].shape == (10_000,)
        assert optical[name].min() >= low and optical[name].max() <= high


def test_a_fifth_each_is_hot_cool_and_metal_poor(optical):
    teff, logg, fe_h = (optical[name] for name in ("teff", "logg", "fe_h"))
    assert 0.18 < (teff > 6500).mean() < 0.3
    assert 0.18 < (teff < 4000).mean() < 0.3
    assert 0.18 < (fe_h < -1).mean() < 0.35 and (fe_h < -2).mean() > 0.08
    assert ((teff < 4000) & (logg > 4)).mean() > 0.08 and ((teff < 4000) & (logg < 2)).mean() > 0.08


def test_elements_scatter_by_themselves_in_the_optical(optical):
    names = [name for name in OPTICAL_LABEL_NAMES if name.endswith("_fe") and name != "li_fe"]
    table = np.stack([optical[name] for name in names])
    assert (table.std(axis=1) > 0.14).all()
    assert (np.linalg.eigvalsh(np.corrcoef(table)) > 0.25).all()  # none follows from the others
    lithium = optical["li_fe"] + optical["fe_h"] + 1.05
    assert -0.51 < lithium.min() < -0.4 and 3.4 < lithium.max() < 3.51


def test_stars_that_are_refused_are_drawn_again():
    labels = draw_optical_labels(100, np.random.default_rng(0), lambda stars: stars["teff"] < 5000)
    assert len(labels["teff"]) == 100 and labels["teff"].max() < 5000
    with pytest.raises(ValueError, match="accept: expected some stars to be accepted, got 0 of 2"):
        draw_optical_labels(2, np.random.default_rng(0), lambda stars: np.zeros(len(stars["teff"]), bool))
    with pytest.raises(ValueError, match="n: expected a number of stars of at least 0, got -1"):
        draw_optical_labels(-1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("n", "ranges", "message"),
    [
        (-1, {}, "n: expected a number of stars of at least 0, got -1"),
        (1, {"mass": (0, 1)}, r"ranges: expected some of the labels .*'teff'.*, got 'mass'"),
        (1, {"teff": (9000, 9001)}, "ranges: expected some that hold stars, got {'teff'"),
    ],
)
def test_labels_that_cannot_be_drawn_are_named(n, ranges, message):
    with pytest.raises(ValueError, match=message):
        draw_labels(n, np.random.default_rng(0), ranges)

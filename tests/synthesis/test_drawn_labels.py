import numpy as np
import pytest

from spectrafm_hf.data.schema import LABEL_UNITS
from spectrafm_hf.models.modeling_emulator import default_vmicro
from spectrafm_hf.synthesis.labels import LABEL_NAMES, LABEL_RANGES, draw_labels


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


def test_no_stars_is_an_answer():
    assert all(values.shape == (0,) for values in draw_labels(0, np.random.default_rng(0)).values())


@pytest.mark.parametrize(
    ("n", "ranges", "message"),
    [
        (-1, {}, "n: expected a number of stars of at least 0, got -1"),
        (1, {"mass": (0, 1)}, r"ranges: expected some of the labels .*'teff'.*, got 'mass'"),
        (1, {"teff": (9000, 9001)}, "ranges: expected some that hold stars, got {'teff'"),
    ],
)
def test_what_cannot_be_drawn_is_named(n, ranges, message):
    with pytest.raises(ValueError, match=message):
        draw_labels(n, np.random.default_rng(0), ranges)

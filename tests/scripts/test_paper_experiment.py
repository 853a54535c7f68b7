"""The experiment of the paper: the same stars and the same rule for every method, and no iron-poor star in a choice."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest


SCRIPT = Path(__file__).parents[2] / "scripts" / "paper_experiment.py"
SPEC = importlib.util.spec_from_file_location("paper_experiment", SCRIPT)
experiment = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(experiment)

WINDOW = (6400.0, 10200.0)


def make_stars(n: int, seed: int) -> dict:
    """Stars with a line as deep as they are iron-rich."""
    generator = np.random.default_rng(seed)
    wavelength = np.arange(3360, 10201, 20, dtype=np.float32)
    fe_h = generator.uniform(-2.2, 0.4, n)
    line = np.exp(-0.5 * ((wavelength - 8500) / 120) ** 2)
    flux = 1 - 0.1 * (fe_h[:, None] + 3) * line + 0.002 * generator.standard_normal((n, wavelength.size))
    stars = {"fe_h": fe_h, "teff": generator.uniform(4000, 6000, n), "logg": generator.uniform(1, 5, n)}
    stars |= {f"{name}_err": np.full(n, 0.01) for name in ("fe_h", "teff", "logg")}
    stars |= {"alpha_m": np.zeros(n), "ak_targ": np.zeros(n), "wavelength": np.tile(wavelength, (n, 1))}
    return stars | {"flux": flux, "flux_error": np.full(flux.shape, 0.002), "mask": np.zeros(flux.shape, bool)}


@pytest.fixture(scope="module")
def stars():
    return make_stars(800, 0)


def test_the_drawn_stars_are_iron_rich_and_follow_from_the_seed(stars):
    drawn = [experiment.draw_stars(stars, 100, seed) for seed in (0, 0, 1)]
    assert all(part["fe_h"].min() > -1 and len(np.unique(part["fe_h"])) == 100 for part in drawn)
    np.testing.assert_array_equal(drawn[0]["flux"], drawn[1]["flux"])
    assert not np.array_equal(drawn[0]["fe_h"], drawn[2]["fe_h"])


def test_a_method_sees_the_pixels_of_the_window_over_their_median(stars):
    given = experiment.spectra(stars, WINDOW, ("fe_h",))
    assert given.flux.shape == (800, 191)
    np.testing.assert_allclose(np.median(given.flux, axis=1), 1.0)
    # What lies outside the window changes nothing.
    other = {**stars, "flux": np.where(stars["wavelength"] < 6400, 7.0, stars["flux"])}
    np.testing.assert_array_equal(experiment.spectra(other, WINDOW, ("fe_h",)).flux, given.flux)


@pytest.mark.parametrize("name", ["ridge", "boosting"])
def test_a_method_learns_from_a_hundred_stars(stars, name):
    if name == "boosting":
        pytest.importorskip("sklearn")
    hundred, choosing = experiment.draw_stars(stars, 100, 0), experiment.draw_stars(make_stars(900, 1), 200, 0)
    values, errors = experiment.fit_predict(experiment.METHODS[name], {}, WINDOW, hundred, choosing, choosing)
    assert np.std(values - choosing["fe_h"]) < 0.5 * np.std(choosing["fe_h"])
    assert experiment.figures(values, errors, choosing)["all"]["robust_z"] == pytest.approx(1.0, abs=0.1)


def test_the_settings_with_the_smallest_rmse_are_chosen_and_all_trials_are_kept(stars):
    choosing = experiment.draw_stars(make_stars(900, 1), 200, 0)
    method = experiment.Method("ridge", experiment.RidgeBaseline, ("fe_h",), {"alpha": [1e-4, 100.0]})
    found = experiment.tune(method, WINDOW, stars, choosing)
    assert found["chosen"] == {"alpha": 1e-4} and len(found["trials"]) == 2
    assert found["trials"][0]["rmse"] < found["trials"][1]["rmse"]


def test_the_figures_tell_iron_poor_stars_from_all(stars):
    poor = stars["fe_h"] < -1
    figures = experiment.figures(np.where(poor, stars["fe_h"] + 1, stars["fe_h"]), np.full(800, 0.1), stars)
    assert figures["iron-poor"]["rmse"] == pytest.approx(1.0) and figures["iron-poor"]["n"] == poor.sum()
    assert figures["all"]["rmse"] == pytest.approx(np.sqrt(poor.mean()))


def test_the_recipe_holds_a_choice_out_of_what_was_tried_for_each_method():
    recipe = json.loads(experiment.RECIPE.read_text())
    for task, methods in recipe.items():
        assert task in experiment.TASKS
        for name, found in methods.items():
            assert name in experiment.METHODS
            best = min(found["trials"], key=lambda trial: trial["rmse"])
            assert found["chosen"] == best["settings"]

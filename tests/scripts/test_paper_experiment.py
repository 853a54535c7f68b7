"""The experiment of the paper: the same stars and the same rule for every method, and no iron-poor star in a choice."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest


SCRIPT = Path(__file__).parents[2] / "scripts" / "paper_experiment.py"
SPEC = importlib.util.spec_from_file_location("paper_experiment", SCRIPT)
experiment = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = experiment
sys.path.append(str(SCRIPT.parent))  # its neighbours; last, as one has the name of a library, evaluate
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


def make_task(**changes):
    """A task of stars that are made up, 800 in each split."""
    splits = {"train": 0, "validation": 1, "test": 2, "all": 3}
    stars = {name: make_stars(800, seed) for name, seed in splits.items()}
    task = experiment.Task("made-up", WINDOW, -1.0, -1.0, stars.__getitem__, lambda: None, n_choosing=200)
    return dataclasses.replace(task, **changes)


@pytest.fixture(scope="module")
def task():
    return make_task()


def numbers(stars) -> set:
    return set(stars["teff"])


def test_the_drawn_stars_are_iron_rich_and_follow_from_the_seed(task):
    drawn = [task.draw(task.read("train"), 100, seed) for seed in (0, 0, 1)]
    assert all(part["fe_h"].min() > -1 and len(np.unique(part["fe_h"])) == 100 for part in drawn)
    np.testing.assert_array_equal(drawn[0]["flux"], drawn[1]["flux"])
    assert not np.array_equal(drawn[0]["fe_h"], drawn[2]["fe_h"])


def test_with_splits_those_that_choose_stay_and_are_validation_stars(task):
    first, second = task.parts("test", 0), task.parts("test", 1)
    assert numbers(first.hundred) != numbers(second.hundred) and numbers(first.hundred) < numbers(first.training)
    assert numbers(first.choosing) == numbers(second.choosing) < numbers(task.read("validation"))
    assert first.choosing["fe_h"].min() > -1
    assert numbers(first.asked) == numbers(task.read("test"))
    assert numbers(task.parts("validation", 0).asked) == numbers(task.read("validation"))


def test_of_few_stars_none_that_is_asked_was_seen_and_those_that_choose_are_never_asked():
    task = make_task(splits=False)
    choosing = numbers(task.parts("test", 0).choosing)
    asked = set()
    for draw in range(6):
        parts = task.parts("test", draw)
        assert not numbers(parts.asked) & (numbers(parts.training) | choosing)
        assert not choosing & numbers(parts.training) and numbers(parts.hundred) < numbers(parts.training)
        assert len(numbers(parts.hundred)) == 100 and len(numbers(parts.asked)) == 250
        assert parts.hundred["fe_h"].min() > -1 and numbers(parts.choosing) == choosing
        assert numbers(task.parts("validation", draw).asked) == choosing
        asked |= numbers(parts.asked)
    poor = task.read("all")["fe_h"] < -1
    assert len(asked & set(task.read("all")["teff"][poor])) > 0.95 * poor.sum()


def test_a_method_sees_the_pixels_of_the_window_over_their_median(task):
    stars = task.read("train")
    given = experiment.spectra(stars, WINDOW, ("fe_h",))
    assert given.flux.shape == (800, 191)
    np.testing.assert_allclose(np.median(given.flux, axis=1), 1.0)
    # What lies outside the window changes nothing.
    other = {**stars, "flux": np.where(stars["wavelength"] < 6400, 7.0, stars["flux"])}
    np.testing.assert_array_equal(experiment.spectra(other, WINDOW, ("fe_h",)).flux, given.flux)


@pytest.mark.parametrize("name", ["ridge", "boosting"])
def test_a_method_learns_from_a_hundred_stars(task, name):
    if name == "boosting":
        pytest.importorskip("sklearn")
    parts = task.parts("validation", 0)
    method = experiment.METHODS[name]
    values, errors = method.fit_predict(task, {}, dataclasses.replace(parts, asked=parts.choosing), 0)
    fe_h = parts.choosing["fe_h"]
    assert np.std(values - fe_h) < 0.5 * np.std(fe_h)
    assert experiment.figures(task, values, errors, parts.choosing)["all"]["robust_z"] == pytest.approx(1.0, abs=0.1)


def test_stars_without_extinction_are_no_obstacle(task):
    parts = task.parts("validation", 0)
    hundred, choosing = (
        {k: v for k, v in stars.items() if k != "ak_targ"} for stars in (parts.hundred, parts.choosing)
    )
    parts = experiment.Parts(hundred, hundred, choosing, choosing)
    values, _ = experiment.METHODS["cannon"].fit_predict(task, {"alpha": 0.1}, parts, 0)
    assert np.std(values - choosing["fe_h"]) < 0.5 * np.std(choosing["fe_h"])


def test_the_settings_with_the_smallest_rmse_are_chosen_and_all_trials_are_kept(task):
    method = experiment.Classical("ridge", experiment.RidgeBaseline, ("fe_h",), {"alpha": [1e-4, 100.0]})
    found = experiment.tune(task, method)
    assert found["chosen"] == {"alpha": 1e-4} and len(found["trials"]) == 2
    assert found["trials"][0]["rmse"] < found["trials"][1]["rmse"]


def test_the_figures_tell_iron_poor_stars_from_all(task):
    stars = task.read("test")
    poor = stars["fe_h"] < -1
    values = np.where(poor, stars["fe_h"] + 1, stars["fe_h"])
    figures = experiment.figures(task, values, np.full(800, 0.1), stars)
    assert figures["iron-poor"]["rmse"] == pytest.approx(1.0) and figures["iron-poor"]["n"] == poor.sum()
    assert figures["all"]["rmse"] == pytest.approx(np.sqrt(poor.mean()))
    rich = {name: column[~poor] for name, column in stars.items()}
    assert list(experiment.figures(task, values[~poor], np.full((~poor).sum(), 0.1), rich)) == ["all"]


@pytest.fixture
def one_task(task, monkeypatch):
    monkeypatch.setitem(experiment.TASKS, "made-up", task)
    return ["--tasks", "made-up", "--methods", "ridge", "mlp", "--draws", "2"]


@pytest.fixture
def quick_mlp(monkeypatch):
    method = dataclasses.replace(
        experiment.METHODS["mlp"], make=lambda **_: experiment.MLPBaseline(widths=(8,), epochs=2, n_components=0)
    )
    monkeypatch.setitem(experiment.METHODS, "mlp", method)


def test_the_command_writes_answers_figures_a_table_and_pictures_and_goes_on_from_there(
    one_task, quick_mlp, tmp_path, capsys
):
    arguments = [*one_task, "--output", str(tmp_path)]
    assert experiment.main(arguments) == 0
    table = capsys.readouterr().out
    assert "| MLP of the paper, from scratch |" in table and (tmp_path / "test" / "summary.md").read_text() == table
    results = [json.loads((tmp_path / "test" / "made-up" / f"ridge-{draw}.json").read_text()) for draw in range(2)]
    summary = json.loads((tmp_path / "test" / "summary.json").read_text())["made-up"]["ridge"]
    rmse = [result["iron-poor"]["rmse"] for result in results]
    assert summary["iron-poor"]["rmse"] == pytest.approx([np.mean(rmse), np.std(rmse)])
    answers = {name: np.array(values) for name, values in results[0]["answers"].items()}
    assert np.sqrt(np.mean((answers["value"] - answers["fe_h"]) ** 2)) == pytest.approx(
        results[0]["all"]["rmse"], abs=1e-3
    )
    assert {path.name for path in (tmp_path / "test").glob("*.png")} == {"made-up.png", "made-up-stars.png"}

    # What is there is not computed again.
    path = tmp_path / "test" / "made-up" / "ridge-1.json"
    results[1]["all"]["bias"] = 7.0
    path.write_text(json.dumps(results[1]))
    (tmp_path / "test" / "made-up" / "ridge-0.json").unlink()
    assert experiment.main(arguments) == 0
    summary = json.loads((tmp_path / "test" / "summary.json").read_text())["made-up"]["ridge"]
    assert summary["all"]["bias"][0] == pytest.approx((7.0 + results[0]["all"]["bias"]) / 2)

    # A summary is enough for table and pictures.
    kept = tmp_path / "test" / "summary.json"
    assert experiment.main(["--show", str(kept), "--output", str(tmp_path / "again")]) == 0
    for name in ("summary.md", "made-up.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "test" / name).read_bytes()
    # The ceiling, a line in the picture of the others, may be asked for by itself.
    experiment.draw_summary(tmp_path / "ceiling.png", experiment.TASKS["made-up"], {"ceiling": summary})
    assert (tmp_path / "ceiling.png").stat().st_size > 1000


def test_a_task_whose_stars_are_not_there_is_left_out_with_a_line_that_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "SHARED", tmp_path / "nowhere")
    experiment.read_apogee_dr12.cache_clear()
    assert experiment.main(["--tasks", "apogee-dr12", "--methods", "ridge", "--output", str(tmp_path)]) == 0
    assert "left out: apogee-dr12: expected the file" in capsys.readouterr().err
    assert not list(tmp_path.rglob("ridge-*.json"))


def test_the_recipe_holds_a_choice_out_of_what_was_tried_for_each_method():
    recipe = json.loads(experiment.RECIPE.read_text())
    for task, methods in recipe.items():
        assert task in experiment.TASKS
        for name, found in methods.items():
            assert name in experiment.METHODS
            best = min(found["trials"], key=lambda trial: trial["rmse"])
            assert found["chosen"] == best["settings"]

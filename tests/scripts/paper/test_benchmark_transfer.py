"""The benchmark of transfer tasks: samples, saved results, and its table."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from spectrafm_hf.inference.states import States
from spectrafm_hf.training import rivals


SCRIPTS = Path(__file__).parents[3] / "scripts" / "paper"
N_STARS = 60
OWN, UNTOUCHED = "fine-tuned", "checkpoint, untouched"


@pytest.fixture(scope="module")
def scripts():
    """The bench, and the experiment of the paper, which imports it."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("benchmark_transfer"), importlib.import_module("paper_experiment")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def bench(scripts):
    return scripts[0]


@pytest.fixture
def stars(bench):
    """Whose answers for log g are all by one too low, and whose depth of a line is another label."""
    config, _ = bench.load_config()
    generator = np.random.default_rng(0)
    logg, depth = generator.uniform(1.0, 5.0, N_STARS), generator.uniform(0.1, 0.5, N_STARS)
    values = np.stack([generator.uniform(4_000.0, 6_000.0, N_STARS), logg + 0.02 * generator.standard_normal(N_STARS)])
    first, last = config.rung_intervals[0]
    coefficients = 0.1 * generator.standard_normal((N_STARS, last - first, config.num_coefficients))
    flux = 1.0 - depth[:, None] * np.exp(-(np.linspace(-2.0, 2.0, 30) ** 2))
    parts_of_states = (
        np.tile([50.0, 0.02], (N_STARS, 1)),
        coefficients,
        np.ones_like(coefficients),
        flux,
        np.arange(30.0),
    )
    parts = {"learnt": np.arange(40), "validation": np.arange(40, 50), "test": np.arange(50, N_STARS)}
    labels = {"logg": logg + 1.0, "depth": depth}
    return bench.Pool(
        flux, np.full_like(flux, 0.01), States(["teff", "logg"], values.T, *parts_of_states), labels, parts, 0
    )


def test_all_take_part_and_finetune_is_measured_by_itself_the_same(bench, stars, monkeypatch):
    monkeypatch.setattr(rivals, "MLP_STEPS", 5)
    task = bench.Task("", "logg", lambda labels: labels["logg"])
    lines = bench.measure(task, stars, 30, "test", 0, rivals=True)
    assert {line["model"] for line in lines} == {OWN, UNTOUCHED, *rivals.RIVALS}
    rmse = {line["model"]: float(line["rmse"]) for line in lines}
    assert rmse[UNTOUCHED] == pytest.approx(1.0, abs=0.02) and rmse[OWN] < 0.05
    (again,) = bench.measure(task, stars, 30, "test", 0, rivals=False)
    assert again["rmse"] == lines[0]["rmse"] and again["asked"] == "10"
    assert bench.measure(task, stars, 41, "test", 0, rivals=False) == [], "no more stars than there are"


def test_a_sample_keeps_all_columns(bench, stars, tmp_path):
    stars.save(tmp_path / "stars.npz")
    again = bench.Pool.load(tmp_path / "stars.npz")
    assert again.states.inputs == stars.states.inputs and again.rung == 0
    np.testing.assert_array_equal(again.labels["logg"], stars.labels["logg"])
    np.testing.assert_array_equal(again.states.coefficients, stars.states.coefficients)
    assert bench.without(again.states, ("logg",)).values.shape == (N_STARS, 1)


def test_types_of_dwarfs_are_numbers(bench):
    assert [bench._type(text) for text in ("M7.5", "L3.5", "T9", "sdL7", "L1 pec (blue)", "L5:")] == [
        17.5,
        23.5,
        39,
        27,
        21,
        25,
    ]
    assert [bench._type(text) for text in ("", "galaxy", "G2V")] == [None] * 3


def test_the_table_names_the_worse_methods(bench):
    lines = [
        {
            "task": next(iter(bench.TASKS)),
            "stars": "30",
            "draw": draw,
            "model": model,
            "rmse": rmse,
            "error_over_sigma": "1.3",
        }
        for draw, own in (("0", "1.0"), ("1", "1.1"))
        for model, rmse in ((OWN, own), ("ridge on pixels", "0.5"), ("PCA + MLP on pixels", "2.0"))
    ]
    text = bench.summary(lines)
    assert "| ridge on pixels | 2.10 ± 0.10 | 2 | 1.30 | behind outside |" in text
    assert "best, or within a standard error of it, in 0 of 1 rows" in text
    assert (
        "Mean rank (RMSE over that of fine-tuned, geometric mean): ridge on pixels 1.00 (0.48); fine-tuned 2.00" in text
    )


def test_the_experiment_has_figures_of_all_and_of_metal_poor_stars(scripts):
    _, paper_experiment = scripts
    figures = {"rmse": "0.1", "bias": "0.0", "robust_scatter": "0.1", "robust_z": "1.0"}
    lines = [
        {"task": "miles", "draw": "0", "model": model, "stars": group, "n": "5", **figures}
        for model in (OWN, UNTOUCHED)
        for group in ("all", "iron-poor")
    ]
    first, *_ = paper_experiment.table(lines).splitlines()
    assert first.startswith("| miles | all: RMSE |") and "[Fe/H] < -0.5: RMSE" in first
    assert "| closed form on frozen states | 0.100 ± 0.000 |" in paper_experiment.table(lines)

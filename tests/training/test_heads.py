"""Heads on frozen states: the right one is chosen, zero points become right, and errors are what they say."""

import copy

import numpy as np
import pytest
import torch

from spectrafm_hf.inference.states import States
from spectrafm_hf.models import SpectraFMConfig
from spectrafm_hf.statistics import robust_scatter
from spectrafm_hf.training.choices import choose_heads, make_folds
from spectrafm_hf.training.components import fit_pixels
from spectrafm_hf.training.heads import NEW_LABEL_HEADS, ZERO_POINT, fit_head
from spectrafm_hf.training.weights import error_factor, weights_of_heads, winsorised


SIGMA = 0.1  # of the answers
CONFIG = SpectraFMConfig(
    token_embedding="basis",
    num_intervals=3,
    num_coefficients=4,
    rung_intervals=[[0, 3]],
    rung_components=[4],
    label_names=["teff", "logg"],
    label_units=["K", "dex"],
    label_centers=[5000.0, 3.0],
    label_scales=[500.0, 1.0],
)


def draw(n, seed=0):
    """States of stars whose answer for log g is right within `SIGMA`, and their log g."""
    generator = np.random.default_rng(seed)
    logg, teff = generator.uniform(1.0, 5.0, n), generator.uniform(4000.0, 6000.0, n)
    values = np.stack([teff, logg + SIGMA * generator.standard_normal(n)], axis=1)
    errors = np.tile([50.0, SIGMA], (n, 1))
    coefficients = generator.standard_normal((n, 3, 4))
    # Some absorption lines, of different strengths in each star.
    lines, strengths = np.random.default_rng(9).random((4, 40)), generator.random((n, 4))
    pixels = 1.0 - 0.3 * strengths @ lines + 0.002 * generator.standard_normal((n, 40))
    evidence = coefficients, np.ones_like(coefficients)
    return States(["teff", "logg"], values, errors, *evidence, pixels, np.linspace(5000.0, 6000.0, 40)), logg


def label_in_pixels(states):
    """How strong one of the lines is."""
    lines = np.random.default_rng(9).random((4, 40))
    return np.linalg.lstsq(lines.T, (1.0 - states.pixels).T)[0][1]


def choose(states, target, error=0.0, label="logg"):
    errors = np.full(len(target), error)
    return choose_heads(
        CONFIG, 0, label, states, target, errors, make_folds([str(i) for i in range(len(target))], 5, 0)
    )


def choose_with_pixels(states, target):
    """The choice for a new label, the components of the pixels, and a config that knows of them."""
    pixels, config = fit_pixels(states.pixels), copy.deepcopy(CONFIG)
    config.pixel_sets = [[0, *pixels.directions.shape]]
    folds = make_folds([str(i) for i in range(len(target))], 5, 0)
    choice = choose_heads(config, 0, "age", states, target, np.zeros(len(target)), folds, pixels)
    return choice, pixels, config


@pytest.mark.parametrize("shift", [0.0, 0.85])
def test_when_only_a_zero_point_is_wrong_then_little_else_is_learnt(shift):
    states, logg = draw(40)
    choice = choose(states, logg + shift)
    assert choice.weights.get("the model as it is", 0.0) < (1.0 if shift == 0.0 else 0.01)
    states, logg = draw(400, seed=1)
    found, errors = choice.predict(CONFIG, states)
    assert abs(np.median(found - logg - shift)) < 0.05
    assert np.std(found - logg - shift) < 1.1 * SIGMA
    assert robust_scatter((found - logg - shift) / errors) == pytest.approx(1.0, abs=0.25)


def test_when_a_new_label_is_in_the_coefficients_then_it_is_found_there():
    def label(states):
        return states.coefficients[:, 1, 3] + 0.5 * states.coefficients[:, 2, 2]

    states, _ = draw(100)
    choice = choose(states, label(states), label="age")
    assert choice.fitted[0].head is NEW_LABEL_HEADS[1]
    others, _ = draw(200, seed=1)
    found, _ = choice.predict(CONFIG, others)
    assert np.std(found - label(others)) < 0.3 * np.std(label(others))


@pytest.mark.parametrize("holes", [0.0, 0.2])
def test_when_a_new_label_is_in_the_pixels_alone_then_it_is_found_there(holes):
    states, _ = draw(100)
    choice, pixels, config = choose_with_pixels(states, label_in_pixels(states))
    assert sum(weight for name, weight in choice.weights.items() if "pixels" in name) > 0.8
    others, _ = draw(200, seed=1)
    truth = label_in_pixels(others)
    others.pixels[np.random.default_rng(3).random(others.pixels.shape) < holes] = np.nan
    found, _ = choice.predict(config, others, pixels(torch.from_numpy(others.pixels)))
    assert np.std(found - truth) < (0.5 if holes else 0.2) * np.std(truth)


def test_when_some_labels_are_wild_then_the_others_count():
    states, logg = draw(60)
    target = np.sin(logg)
    wild = target.copy()
    wild[::10] += 20.0
    others, truth = draw(200, seed=1)
    sizes = []
    for labels in (target, wild):
        found, _ = choose(states, labels, label="age").predict(CONFIG, others)
        sizes.append(np.sqrt(np.mean((found - np.sin(truth)) ** 2)))
    assert sizes[1] < 2.0 * sizes[0]


def test_the_unit_of_a_label_plays_no_part():
    states, logg = draw(60)
    other, _ = draw(50, seed=1)
    first = choose(states, np.sin(logg), error=0.05, label="age")
    values, errors = first.predict(CONFIG, other)
    for unit in (1e-20, 1e20):
        choice = choose(states, unit * np.sin(logg), error=unit * 0.05, label="age")
        assert choice.weights == pytest.approx(first.weights, abs=0.02)
        found = np.array(choice.predict(CONFIG, other)) / unit
        np.testing.assert_allclose(found, [values, errors], rtol=0.02, atol=0.01)


def test_a_label_with_two_values_is_learnt():
    states, logg = draw(60)
    others, truth = draw(200, seed=1)
    found, errors = choose(states, (logg > 4.0).astype(float), label="clump").predict(CONFIG, others)
    assert np.mean((found > 0.5) == (truth > 4.0)) > 0.9 and np.isfinite(errors).all()


def test_beyond_the_labelled_stars_the_model_counts_where_they_tell_so():
    states, logg = draw(300)
    # The answers are poor, so that those for the stars with high labels alone are best drawn to the middle of these.
    states.values[:, 1] += 0.4 * np.random.default_rng(8).standard_normal(300)
    high = logg > 3.5
    choice = choose(states[high], logg[high] + 0.3)
    assert all(part.settings["beyond"] == (part.head is ZERO_POINT) for part in choice.fitted)
    low = logg < 2.5
    found, _ = choice.predict(CONFIG, states[low])
    assert abs(np.median(found - logg[low] - 0.3)) < 0.5
    # An answer that goes along with the label twice as slowly is made right beyond the stars, too.
    states, logg = draw(60)
    assert all(part.settings["beyond"] == part.settings["weight"] for part in choose(states, 2.0 * logg).fitted)


def test_heads_that_are_wrong_in_other_ways_are_averaged_and_a_bad_one_is_left_out():
    generator = np.random.default_rng(0)
    weights = weights_of_heads(np.stack([*generator.standard_normal((2, 300)), 5.0 * generator.standard_normal(300)]))
    assert weights.sum() == pytest.approx(1.0) and weights[2] < 0.1
    assert 0.3 < weights[0] < 0.7
    assert weights_of_heads(np.stack([np.zeros(30), np.ones(30)])).tolist() == [1.0, 0.0]


def test_when_labels_have_errors_then_these_are_not_those_of_the_answers():
    states, logg = draw(300)
    noisy = logg + 0.3 * np.random.default_rng(5).standard_normal(len(logg))
    choice = choose(states, noisy, error=0.3)
    others, truth = draw(300, seed=1)
    found, errors = choice.predict(CONFIG, others)
    assert np.median(errors) < 0.16
    assert robust_scatter((found - truth) / errors) == pytest.approx(1.0, abs=0.35)


def test_when_a_star_is_among_the_fitted_then_cross_validation_does_not_ask_with_it():
    states, logg = draw(40)
    target = logg.copy()
    target[7] += 3.0
    choice = choose(states, target)
    assert abs(choice.values[7] - logg[7]) < 0.5


def test_more_stars_make_the_error_of_a_process_smaller():
    found = []
    for number in (30, 200):
        states, logg = draw(number)
        fitted = fit_head(NEW_LABEL_HEADS[1], CONFIG, 0, "age", states, logg**2, np.zeros(number))
        found.append(np.median(fitted.predict(CONFIG, draw(100, seed=1)[0])[1]))
    assert found[1] < found[0]


def test_spectra_of_a_star_are_in_one_fold_and_folds_are_of_one_size():
    folds = make_folds([f"star {i // 2}" for i in range(40)], 5, 0)
    assert all(folds[2 * i] == folds[2 * i + 1] for i in range(20))
    assert np.bincount(folds).tolist() == [8] * 5


def test_errors_are_scaled_to_a_scatter_of_one_and_wild_residuals_do_not_count():
    residual = np.random.default_rng(0).standard_normal(1000)
    factor = error_factor(3.0 * residual, np.ones(1000), np.zeros(1000), prior_stars=0.0)
    assert factor == pytest.approx(3.0, rel=0.1)
    assert 1.0 < error_factor(3.0 * residual[:20], np.ones(20), np.zeros(20)) < 2.5
    assert np.abs(winsorised(np.append(residual, 100.0))).max() < 5.0

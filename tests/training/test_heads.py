"""Heads on frozen states: the right one is chosen, zero points become right, and errors are what they say."""

import numpy as np
import pytest

from spectrafm_hf.inference.states import States
from spectrafm_hf.models import SpectraFMConfig
from spectrafm_hf.statistics import robust_scatter
from spectrafm_hf.training.heads import (
    HEADS,
    NEW_LABEL_HEADS,
    choose_head,
    error_factor,
    fit_head,
    make_folds,
    winsorised,
)


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
    return States(["teff", "logg"], values, errors, coefficients, np.ones_like(coefficients)), logg


def choose(states, target, error=0.0, label="logg"):
    errors = np.full(len(target), error)
    return choose_head(CONFIG, 0, label, states, target, errors, make_folds([str(i) for i in range(len(target))], 5, 0))


@pytest.mark.parametrize(("shift", "names"), [(0.0, HEADS[:1]), (0.85, HEADS[1:2])])
def test_when_only_a_zero_point_is_wrong_then_only_that_is_learnt(shift, names):
    choice = choose(*(lambda states, logg: (states, logg + shift))(*draw(40)))
    assert choice.fitted.head in names
    states, logg = draw(400, seed=1)
    found, errors = choice.fitted.predict(CONFIG, states)
    assert abs(np.median(found - logg - shift)) < 0.05
    assert robust_scatter((found - logg - shift) / errors) == pytest.approx(1.0, abs=0.25)


def test_when_a_new_label_is_in_the_coefficients_then_it_is_found_there():
    def label(states):
        return states.coefficients[:, 1, 3] + 0.5 * states.coefficients[:, 2, 2]

    states, _ = draw(100)
    choice = choose(states, label(states), label="age")
    assert choice.fitted.head is NEW_LABEL_HEADS[-1]
    others, _ = draw(200, seed=1)
    found, _ = choice.fitted.predict(CONFIG, others)
    assert np.std(found - label(others)) < 0.3 * np.std(label(others))


@pytest.mark.xfail(strict=True, reason="errors are 2.4 times too small where labels are noisier than what is learnt")
def test_when_labels_have_errors_then_these_are_not_those_of_the_answers():
    states, logg = draw(300)
    noisy = logg + 0.3 * np.random.default_rng(5).standard_normal(len(logg))
    choice = choose(states, noisy, error=0.3)
    others, truth = draw(300, seed=1)
    found, errors = choice.fitted.predict(CONFIG, others)
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

"""Scalars beside spectra: those that help are used, others are not, and their errors and gaps count."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_heads import CONFIG, SIGMA, draw

from spectrafm_hf.statistics import robust_scatter
from spectrafm_hf.training.choices import choose_heads, make_folds


def with_scalars(n, seed=0, error=0.0):
    """States of stars with two scalars, the first of which counts for a label, and that label."""
    states, logg = draw(n, seed)
    generator = np.random.default_rng(seed + 100)
    true = generator.standard_normal((n, 2))
    scalars = np.stack([true + error * generator.standard_normal((n, 2)), np.full((n, 2), error)], axis=2)
    config = replace(states, scalar_names=["distance", "useless"], scalars=scalars)
    return config, logg, logg + true[:, 0] ** 2 + true[:, 0]


def choose(states, target, label="age"):
    folds = make_folds([str(i) for i in range(len(target))], 5, 0)
    return choose_heads(CONFIG, 0, label, states, target, np.zeros(len(target)), folds)


@pytest.fixture(scope="module")
def chosen():
    states, _, target = with_scalars(100)
    states.scalars[::10, 0] = np.nan
    return choose(states, target)


def test_a_scalar_that_helps_is_used_and_another_is_not(chosen):
    assert chosen.scalars == ["distance"]
    assert chosen.note.startswith("distance used: RMSE ") and chosen.note.endswith("useless not used: no improvement")
    states, _, target = with_scalars(300, seed=1)
    values, errors = chosen.predict(CONFIG, states)
    assert np.std(values - target) < 2.0 * SIGMA < 0.2 * np.std(target)
    assert robust_scatter((values - target) / errors) == pytest.approx(1.0, abs=0.3)


def test_where_it_is_unknown_or_far_the_spectrum_alone_counts(chosen):
    states, _, target = with_scalars(300, seed=1)
    plain, _, labels = with_scalars(100)
    without = choose(replace(plain, scalar_names=[], scalars=None), labels)
    expected = np.std(without.predict(CONFIG, states)[0] - target)
    for nothing in (np.nan, -9999.0, np.inf):
        blind = replace(states, scalars=np.full_like(states.scalars, nothing))
        values, errors = chosen.predict(CONFIG, blind)
        assert np.std(values - target) < 1.1 * expected
        assert robust_scatter((values - target) / errors) == pytest.approx(1.0, abs=0.35)


def test_no_scalar_is_used_where_none_helps_or_is_known():
    states, logg, _ = with_scalars(60)
    choice = choose(states, np.sin(logg))
    assert choice.scalars == [] and choice.note == "distance, useless not used: no improvement"
    assert not any("scalars" in part.settings for part in choice.fitted)
    states.scalars[19:, 1] = np.nan
    assert "useless known for fewer than 20 spectra" in choose(states, np.sin(logg)).note


def test_errors_of_a_scalar_count():
    """Stars with a large error of it have a larger error of the label."""
    states, _, target = with_scalars(200, error=0.3)
    choice = choose(states, target)
    assert choice.scalars == ["distance"]
    others, _, truth = with_scalars(400, seed=1)
    noisy = others.scalars.copy()
    noisy[:, 0, 1] = np.where(np.arange(400) % 2, 1.0, 0.05)
    noisy[:, 0, 0] += noisy[:, 0, 1] * np.random.default_rng(5).standard_normal(400)
    values, errors = choice.predict(CONFIG, replace(others, scalars=noisy))
    ratio = (values - truth) / errors
    assert np.median(errors[1::2]) > 1.3 * np.median(errors[::2])
    assert robust_scatter(ratio[1::2]) == pytest.approx(1.0, abs=0.4)
    # Errors that are not stated are those of the stars it was fitted to.
    usual = others.scalars.copy()
    usual[..., 1] = np.nan
    stated = others.scalars.copy()
    stated[..., 1] = 0.3
    for one, other in zip(
        choice.predict(CONFIG, replace(others, scalars=usual)),
        choice.predict(CONFIG, replace(others, scalars=stated)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other)


def test_a_correction_of_a_known_label_takes_scalars_too():
    states, logg, _ = with_scalars(100)
    target = logg + 0.5 * states.scalars[:, 0, 0]
    choice = choose(states, target, "logg")
    assert choice.scalars == ["distance"]
    part = next(part for part in choice.fitted if part.settings.get("scalars"))
    estimate, variance, known = part.correction(CONFIG).estimated(torch.from_numpy(states.scalars[:, :1]))
    assert bool(known.all()) and not bool(variance.any())
    np.testing.assert_allclose(np.std(estimate.numpy()), 1.0, rtol=0.01)

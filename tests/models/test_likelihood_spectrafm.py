# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""A mixture of Gaussians as a prior, against numerical integration and drawn stars."""

import numpy as np
import pytest
import torch

from spectrafm_hf.models.likelihood_spectrafm import Kinds


SHARES, MEANS, SPREADS = np.array([0.7, 0.3]), np.array([[-1.0], [2.0]]), np.array([0.5, 0.2])


@pytest.fixture
def kinds():
    return Kinds(SHARES, MEANS, SPREADS[:, None, None])


@pytest.mark.parametrize("seen", [-1.2, 0.4, 1.1, 1.9])
def test_the_probability_of_a_kind_is_that_of_an_integral(kinds, seen):
    error = 0.6
    information = torch.tensor([[[error**-2.0]]], dtype=torch.float64)
    (found,) = kinds.shares_of(information, torch.tensor([[seen / error**2]], dtype=torch.float64)).numpy()
    value = np.linspace(-6, 6, 20_001)
    prior = SHARES[:, None] * np.exp(-0.5 * ((value - MEANS) / SPREADS[:, None]) ** 2) / SPREADS[:, None]
    expected = (prior * np.exp(-0.5 * ((value - seen) / error) ** 2)).sum(axis=1)
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-6)


def test_without_pixels_kinds_are_as_likely_as_they_are_frequent(kinds):
    nothing = torch.zeros(1, 1, 1, dtype=torch.float64)
    np.testing.assert_allclose(kinds.shares_of(nothing, nothing[0]).numpy(), SHARES[None], rtol=1e-12)


def test_the_prior_has_mean_and_covariance_of_stars_of_all_kinds():
    generator = np.random.default_rng(0)
    means, factors = generator.normal(size=(3, 2)), np.tril(generator.normal(size=(3, 2, 2)))
    shares = np.array([0.2, 0.5, 0.3])
    kind = generator.choice(3, size=200_000, p=shares)
    stars = means[kind] + np.einsum("nij,nj->ni", factors[kind], generator.normal(size=(len(kind), 2)))
    mean, precision = Kinds(shares, means, factors).prior(torch.from_numpy(shares)[None])
    np.testing.assert_allclose(mean[0], stars.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(np.linalg.inv(precision[0].numpy()), np.cov(stars.T), rtol=0.02, atol=0.01)


def test_a_kind_that_is_certain_is_the_prior(kinds):
    mean, precision = kinds.prior(torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    assert mean.item() == pytest.approx(2.0)
    assert precision.item() == pytest.approx(0.2**-2.0)

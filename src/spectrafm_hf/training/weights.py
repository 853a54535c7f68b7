# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Weights of heads from their residuals in cross-validation, and factors of their errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from ..statistics import MAD_TO_SIGMA, robust_scatter


FloatArray = NDArray[np.floating[Any]]
#: Weights of heads: how sure one is, beforehand, that the one that did best is best, as a share of what the likelihood
#: of as many independent stars would say; how many stars this counts as much as; and the least weight.
SURE, PRIOR_WEIGHT, LEAST_WEIGHT = 0.3, 3.0, 0.02
TINY = 1e-30
WINSORISED = 4.0  # times the robust scatter: limit of residuals in comparisons
PRIOR_STARS = 20.0  # that a factor of 1 for the errors counts as much as
FACTORS = 0.3, 20.0  # of errors, least and greatest
CLIPPED_AT, CLIPPED_VARIANCE = 2.5, 0.9765  # in sigma; mean square of a Gaussian that is clipped there


def weights_of_heads(residuals: FloatArray) -> FloatArray:
    """
    Weights, 0 or more and 1 in sum, with which the mean of some heads is best in cross-validation.

    Parameters
    ----------
    residuals : array of shape (heads, stars)
        Predicted - true, with outliers winsorised.
    """
    n_heads, n_stars = residuals.shape
    residuals = residuals / (np.abs(residuals).max() or 1.0)  # in any unit
    squares = np.maximum((residuals**2).mean(axis=1), TINY)
    least = squares.min()
    prior = np.exp(-0.5 * SURE * n_stars * np.log(squares / least))
    prior /= prior.sum()
    # Least squares, with rows for the prior and one for a sum of 1.
    rows = [residuals.T / math.sqrt(least), math.sqrt(PRIOR_WEIGHT) * np.eye(n_heads), np.full((1, n_heads), 1e3)]
    wanted = np.concatenate([np.zeros(n_stars), math.sqrt(PRIOR_WEIGHT) * prior, [1e3]])
    weights, _ = nnls(np.concatenate(rows), wanted)
    weights = np.where(weights < LEAST_WEIGHT * weights.sum(), 0.0, weights)
    return weights / weights.sum()


def winsorised(residual: FloatArray) -> FloatArray:
    """Residuals, none larger than `WINSORISED` times their robust size."""
    limit = WINSORISED * MAD_TO_SIGMA * float(np.median(np.abs(residual)))
    return np.clip(residual, -limit, limit) if limit > 0 else residual


def error_factor(
    residual: FloatArray, error: FloatArray, label_error: FloatArray, prior_stars: float = PRIOR_STARS
) -> float:
    """
    What errors are to be multiplied by for a scatter of error/sigma of 1, drawn to 1 where stars are few, or where the
    errors of their labels hide it. The scatter is between the robust one, which needs many stars, and that of all but
    wild ones.
    """

    unit = float(np.median(error)) or 1.0
    residual, error, label_error = residual / unit, error / unit, label_error / unit

    def excess(factor: float) -> float:
        ratio = residual / np.hypot(error * factor, label_error)
        usual = np.mean(np.clip(ratio, -CLIPPED_AT, CLIPPED_AT) ** 2) / CLIPPED_VARIANCE
        return robust_scatter(ratio) * math.sqrt(usual) - 1.0

    low, high = FACTORS
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    label_share = float(np.sum((error**2 / np.maximum(error**2 + label_error**2, TINY)) ** 2))
    return float(math.sqrt(low * high) ** (label_share / (label_share + prior_stars)))


__all__ = ["error_factor", "weights_of_heads", "winsorised"]

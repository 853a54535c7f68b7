# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Weights of heads from their residuals in cross-validation, and factors for their errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from ..statistics import MAD_TO_SIGMA, robust_scatter


FloatArray = NDArray[np.floating[Any]]
#: Weights of heads: exponent of the likelihood in their prior (1: of independent stars); weight of the prior, as a
#: number of stars; and the smallest weight.
SURE, PRIOR_WEIGHT, LEAST_WEIGHT = 0.3, 3.0, 0.02
TINY = 1e-30
WINSORISED = 4.0  # times the robust scatter: limit of residuals in comparisons
PRIOR_STARS = 20.0  # weight of the prior, a factor of 1 for the errors, as a number of stars
FACTORS = 0.3, 20.0  # limits of factors of errors
CLIPPED_AT, CLIPPED_VARIANCE = 2.5, 0.9765  # in sigma; mean square of a Gaussian that is clipped there


def weights_of_heads(residuals: FloatArray) -> FloatArray:
    """
    Non-negative weights with a sum of 1 that minimise the squared residual of the weighted mean of the heads, with a
    prior that favours the best head.

    Parameters
    ----------
    residuals : array of shape (heads, stars)
        Predicted - true, with outliers winsorised.
    """
    n_heads, n_stars = residuals.shape
    residuals = residuals / (np.abs(residuals).max() or 1.0)  # the unit does not matter
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
    """Residuals, clipped at `WINSORISED` times their robust scatter."""
    limit = WINSORISED * MAD_TO_SIGMA * float(np.median(np.abs(residual)))
    return np.clip(residual, -limit, limit) if limit > 0 else residual


def error_factor(
    residual: FloatArray, error: FloatArray, label_error: FloatArray, prior_stars: float = PRIOR_STARS
) -> float:
    """
    Factor of the errors for a scatter of error/sigma of 1, closer to 1 if stars are few or the errors of their labels
    dominate. The scatter is the geometric mean of the robust one, which needs many stars, and that with outliers
    clipped.
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

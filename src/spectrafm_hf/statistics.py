# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The robust scatter that all figures are given in."""

import numpy as np
from numpy.typing import ArrayLike


#: Median absolute deviation of a Gaussian, times this, is its standard deviation.
MAD_TO_SIGMA = 1.4826


def robust_scatter(values: ArrayLike) -> float:
    """1.4826 times the median absolute deviation about the median; NaN for no values."""
    values = np.asarray(values, dtype=np.float64)
    return float(MAD_TO_SIGMA * np.median(np.abs(values - np.median(values)))) if values.size else float("nan")

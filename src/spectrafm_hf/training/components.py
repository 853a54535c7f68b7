# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Principal components of the pixels of labelled stars, for heads on pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..models.correction_spectrafm import FARTHEST, PIXEL_SOFTENING, SpectraFMPixels, filled
from ..statistics import MAD_TO_SIGMA


FloatArray = NDArray[np.floating[Any]]
MOST_COMPONENTS = 100  # maximum number of principal components of the pixels
LEAST_SHARE = 1e-9  # of the variance of the first component: smaller ones are rounding
LEAST_SCALE = 1e-6  # of the size of the components
#: With at least NOISE_STARS, pixels are weighted by the inverse of their noise, the residual from NOISE_COMPONENTS
#: components, plus OWN_SHARE of their own variance.
NOISE_STARS, NOISE_COMPONENTS, OWN_SHARE = 60, 10, 0.01


#: Output of [`SpectraFMPixels`] for stars, by group.
Components = dict[str, torch.Tensor]


def fit_pixels(pixels: FloatArray) -> SpectraFMPixels:
    """
    Principal components of the pixels of labelled stars.

    Parameters
    ----------
    pixels : array of shape (stars, pixels)
        Divided by the median of the spectrum, NaN where unknown.
    """
    flux = np.arcsinh(np.asarray(pixels, np.float64) / PIXEL_SOFTENING)
    known = np.isfinite(flux).any(axis=0)
    middle = np.nanmedian(np.where(known, flux, 0.0), axis=0)
    flux = flux - middle
    spread = MAD_TO_SIGMA * np.nanmedian(np.abs(np.where(known, flux, 0.0)), axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    n_components = min(MOST_COMPONENTS, max(len(flux) - 1, 1), flux.shape[1])
    module = SpectraFMPixels(0, flux.shape[1], n_components).double()
    # Missing pixels are first zero, then filled from the components.
    deviation = torch.from_numpy(flux)
    some = torch.nan_to_num(deviation)
    for _ in range(3 if bool(deviation.isnan().any()) else 1):
        size, directions = _principal(some, n_components)
        some = filled(deviation, directions)
    scaled = (some / torch.from_numpy(spread)).clamp(-FARTHEST, FARTHEST)
    weight = _weights_of_pixels(scaled)
    scaled_size, scaled_directions = _principal(scaled * weight, n_components)
    scaled_directions = weight[:, None] * scaled_directions
    unit = torch.stack([size, scaled_size]).clamp(min=LEAST_SCALE) / math.sqrt(len(flux))
    for name, tensor in {
        "middle": torch.from_numpy(middle), "spread": torch.from_numpy(spread), "directions": directions,
        "scaled_directions": scaled_directions, "size": unit,
    }.items():  # fmt: skip
        getattr(module, name).copy_(tensor)
    return module


def _weights_of_pixels(scaled: torch.Tensor) -> torch.Tensor:
    """
    Weight of each pixel, (pixels,), from pixels in units of their spread, (stars, pixels). The residuals from the first
    components are mostly noise; pixels with less noise get a larger weight. With few stars, all weights are 1.
    """
    if len(scaled) < NOISE_STARS:
        return torch.ones_like(scaled[0])
    _, directions = _principal(scaled, NOISE_COMPONENTS)
    noise = (scaled - (scaled @ directions) @ directions.T).pow(2).mean(dim=0)
    return (OWN_SHARE + noise).rsqrt()


def _principal(columns: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    First singular value of (stars, pixels), and its first right singular vectors (pixels, number), zero beyond its
    rank. Computed from the Gram matrix of the stars or of the pixels, whichever is smaller: faster than an SVD.
    """
    few = len(columns) <= columns.shape[1]
    values, vectors = torch.linalg.eigh(columns @ columns.T if few else columns.T @ columns)
    values, vectors = values.flip(0)[:number], vectors.flip(1)[:, :number]
    size = values[0].clamp(min=0.0).sqrt()
    if not few:
        return size, vectors
    usable = values > LEAST_SHARE * values[0]
    directions = columns.T @ vectors / torch.where(usable, values, 1.0).sqrt()
    return size, torch.where(usable, directions, 0.0)

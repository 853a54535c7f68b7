# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Common parts of the baselines: spectra, scales of the flux, standardisation."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..statistics import MAD_TO_SIGMA, robust_scatter


FloatArray = NDArray[np.floating[Any]]


TRANSFORMS = ("raw", "log", "asinh")


@dataclass(frozen=True)
class Spectra:
    """Spectra on one wavelength grid, with labels.

    Attributes
    ----------
    flux, flux_error : array, shape (stars, pixels)
        NaN in bad pixels.
    labels, label_errors : array, shape (stars, labels)
        NaN where unknown.
    nuisance : array, shape (stars, quantities)
        Other quantities that change a spectrum (extinction), known for training stars only. Only the Cannon uses them.
    """

    flux: FloatArray
    flux_error: FloatArray
    labels: FloatArray
    label_errors: FloatArray
    nuisance: FloatArray

    def __post_init__(self) -> None:
        for name in ("labels", "flux", "nuisance"):
            if getattr(self, name).ndim != 2 or len(getattr(self, name)) != len(self.labels):
                raise ValueError(f"{name}: expected shape ({len(self.labels)}, any), got {getattr(self, name).shape}")
        for name, expected in (("flux_error", self.flux.shape), ("label_errors", self.labels.shape)):
            if getattr(self, name).shape != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {getattr(self, name).shape}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> "Spectra":
        return Spectra(
            self.flux[rows], self.flux_error[rows], self.labels[rows], self.label_errors[rows], self.nuisance[rows]
        )


def transform_flux(flux: ArrayLike, flux_error: ArrayLike, transform: str) -> tuple[FloatArray, FloatArray]:
    """Flux and its error on another scale.

    Parameters
    ----------
    flux, flux_error : array
        Flux of order one, divided by the median of the spectrum.
    transform : {"raw", "log", "asinh"}
        ``log`` of the flux, at least 0.01 (on this scale extinction adds); ``asinh`` of flux / 0.1, which is linear
        where the flux is weak, noisy or negative.

    Returns
    -------
    flux, flux_error : array
        The error propagated to first order.
    """
    flux, flux_error = np.asarray(flux), np.asarray(flux_error)
    if transform == "raw":
        return flux, flux_error
    if transform == "log":
        return np.log(np.maximum(flux, 0.01)), flux_error / np.maximum(flux, 0.01)
    if transform == "asinh":
        return np.arcsinh(flux / 0.1), flux_error / np.hypot(flux, 0.1)
    raise ValueError(f"transform: expected one of {TRANSFORMS}, got {transform!r}")


class Baseline(ABC):
    """`fit` on training stars, `calibrate` on validation stars, then `predict`."""

    error_factors: FloatArray | float = 1.0

    @abstractmethod
    def fit(self, train: Spectra) -> Self:
        """Fit to training stars; returns self."""

    @abstractmethod
    def raw_predict(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Labels and errors before calibration, each (stars, labels)."""

    def predict(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Labels and their one-sigma errors, each (stars, labels), from (stars, pixels)."""
        values, errors = self.raw_predict(flux, flux_error)
        return values, errors * self.error_factors

    def calibrate(self, held_out: Spectra) -> Self:
        """Choose `error_factors` so that the robust scatter of error/sigma is 1 on held-out stars."""
        values, errors = self.raw_predict(held_out.flux, held_out.flux_error)
        factors = []
        for column in range(held_out.labels.shape[1]):
            label, label_error = held_out.labels[:, column], held_out.label_errors[:, column]
            known = np.isfinite(label)
            if not known.any():
                raise ValueError(f"held_out.labels: expected known ones in each column, got none in column {column}")
            residual, sigma = (values[:, column] - label)[known], errors[known, column]
            label_error = np.nan_to_num(label_error[known])
            # The scatter decreases with the factor: bisection over its logarithm. It starts from the size of the
            # residuals, so that the unit of the label does not matter.
            size = float(np.median(np.abs(residual)) / np.median(sigma)) or 1.0
            low, high = math.log(size) + math.log(1e-6), math.log(size) + math.log(1e6)
            for _ in range(60):
                middle = (low + high) / 2
                wide = robust_scatter(residual / np.hypot(math.exp(middle) * sigma, label_error)) > 1
                low, high = (middle, high) if wide else (low, middle)
            factors.append(math.exp(high))
        self.error_factors = np.array(factors)
        return self


class Standardizer:
    """(x - median) / (1.4826 MAD) of each column, clipped at +-10; NaN becomes 0, the median."""

    def __init__(self, columns: FloatArray):
        columns = _without_empty(columns)
        self.center = np.nanmedian(columns, axis=0)
        scale = MAD_TO_SIGMA * np.nanmedian(np.abs(columns - self.center), axis=0)
        self.scale = np.where(scale > 0, scale, 1.0)

    def __call__(self, columns: FloatArray) -> FloatArray:
        return np.nan_to_num(np.clip((columns - self.center) / self.scale, -10, 10))


def _without_empty(columns: FloatArray) -> FloatArray:
    """0 in columns of NaN only, as their median is not defined."""
    return np.where(np.isnan(columns).all(axis=0), 0.0, columns)


class PixelInputs:
    """Standardised pixels, and with `errors_as_inputs` the standardised logarithms of their errors."""

    def __init__(self, spectra: Spectra, transform: str, errors_as_inputs: bool):
        self.transform = transform
        self.flux = Standardizer(transform_flux(spectra.flux, spectra.flux_error, transform)[0])
        self.log_error = Standardizer(np.log(spectra.flux_error)) if errors_as_inputs else None

    def __call__(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(stars, pixels) twice -> inputs (stars, pixels or 2 pixels) and the errors of the standardised pixels."""
        value, error = transform_flux(flux, flux_error, self.transform)
        inputs = self.flux(value)
        if self.log_error is not None:
            inputs = np.concatenate([inputs, self.log_error(np.log(flux_error))], axis=1)
        return inputs, np.nan_to_num(error / self.flux.scale)

# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Classical models that infer stellar labels from spectra, to compare SpectraFM with.

Ridge regression (spectrum -> labels), a quadratic model in the manner of The Cannon (labels -> spectrum, inverted; Ness
et al. 2015, ApJ 808, 16), boosted trees on principal components (spectrum -> labels), and a multilayer perceptron on
pixels and principal components (spectrum -> labels).

All see what SpectraFM sees: flux and flux error, on one wavelength grid. Each gives a raw error with each label: 1 for
ridge and the trees, the formal error of the fit for the Cannon, the predicted one for the MLP. The former have no
better one, and the formal one ignores that the misfits of neighbouring pixels go together. So `calibrate` multiplies
the raw errors of each label by one factor, for all models alike: the one that makes the robust scatter of error/sigma 1
on held-out (validation) stars.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn
from tqdm.auto import tqdm

from ..models.modeling_spectrafm import prediction_loss
from ..statistics import MAD_TO_SIGMA, robust_scatter


FloatArray = NDArray[np.floating[Any]]
TRANSFORMS = ("raw", "log", "asinh")


@dataclass(frozen=True)
class Spectra:
    """Spectra on one wavelength grid, with labels.

    Attributes
    ----------
    flux, flux_error : array, shape (stars, pixels)
        NaN where a pixel is not to be used.
    labels, label_errors : array, shape (stars, labels)
        NaN where unknown.
    nuisance : array, shape (stars, quantities)
        What shapes a spectrum beside the labels (extinction), known for training stars only. Only the Cannon uses it.
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
        Flux of order one, as divided by the median of the spectrum.
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
    """`fit` on training stars, `calibrate` on validation stars, `predict` any."""

    error_factors: FloatArray | float = 1.0

    @abstractmethod
    def fit(self, train: Spectra) -> Self:
        """Fit to training stars; returns itself."""

    @abstractmethod
    def raw_predict(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Labels and errors before calibration, each (stars, labels)."""

    def predict(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Labels and their one-sigma errors, each (stars, labels), from (stars, pixels)."""
        values, errors = self.raw_predict(flux, flux_error)
        return values, errors * self.error_factors

    def calibrate(self, held_out: Spectra) -> Self:
        """Choose `error_factors` so that the robust scatter of error/sigma is 1 on stars that were not fitted."""
        values, errors = self.raw_predict(held_out.flux, held_out.flux_error)
        factors = []
        for column in range(held_out.labels.shape[1]):
            label, label_error = held_out.labels[:, column], held_out.label_errors[:, column]
            known = np.isfinite(label)
            if not known.any():
                raise ValueError(f"held_out.labels: expected known ones in each column, got none in column {column}")
            residual, sigma = (values[:, column] - label)[known], errors[known, column]
            label_error = np.nan_to_num(label_error[known])
            # The scatter falls as the factor grows: bisection over its logarithm finds where it is 1. It starts from
            # the size of the residuals, so that the unit of the label does not matter.
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
    """0 in columns that hold nothing but NaN, as their median is not defined."""
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


class RidgeBaseline(Baseline):
    """Linear regression of each label on the pixels, with a penalty on squared weights.

    Parameters
    ----------
    alpha : float
        Penalty for each star: the weights w of the standardised label y minimise mean((y - x w)^2) + alpha w^2.
    transform : {"raw", "log", "asinh"}
        See `transform_flux`.
    errors_as_inputs : bool
        Regress on the logarithms of the flux errors too.
    """

    def __init__(self, alpha: float = 1e-4, transform: str = "log", errors_as_inputs: bool = False):
        self.alpha, self.transform, self.errors_as_inputs = alpha, transform, errors_as_inputs

    def fit(self, train: Spectra) -> Self:
        self.inputs = PixelInputs(train, self.transform, self.errors_as_inputs)
        x = self.inputs(train.flux, train.flux_error)[0].astype(np.float64)
        weights, offsets = [], []
        for label in train.labels.T:
            known = np.isfinite(label)
            center = x[known].mean(axis=0)
            # Also in units of the label's scatter, so that one alpha suits all.
            scale = robust_scatter(label[known]) or 1.0
            offset = label[known].mean(dtype=np.float64)
            design, target = x[known] - center, (label[known] - offset) / scale
            if len(design) < x.shape[1]:  # the same solution, from a matrix of the size of the stars
                normal = design @ design.T / len(design) + self.alpha * np.eye(len(design))
                solution = design.T @ np.linalg.solve(normal, target) / len(design)
            else:
                normal = design.T @ design / len(design) + self.alpha * np.eye(x.shape[1])
                solution = np.linalg.solve(normal, design.T @ target / len(design))
            weights.append(solution * scale)
            offsets.append(offset - center @ weights[-1])
        self.weights, self.offsets = np.array(weights).T, np.array(offsets)
        return self

    def raw_predict(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        values = self.inputs(flux, flux_error)[0] @ self.weights + self.offsets
        return values, np.ones_like(values)


class BoostingBaseline(Baseline):
    """Boosted trees on the principal components of the pixels, for each label by itself (scikit-learn).

    Parameters
    ----------
    transform : {"raw", "log", "asinh"}
        See `transform_flux`.
    errors_as_inputs : bool
        Principal components of the logarithms of the flux errors too.
    n_components : int
        Components of the pixels; of the errors there are a tenth as many.
    loss : {"squared_error", "absolute_error"}
    learning_rate, iterations, leaves, l2
        Of scikit-learn's `HistGradientBoostingRegressor`.
    seed : int
    """

    def __init__(
        self,
        transform: str = "asinh",
        errors_as_inputs: bool = False,
        n_components: int = 60,
        loss: str = "squared_error",
        learning_rate: float = 0.1,
        iterations: int = 300,
        leaves: int = 31,
        l2: float = 0.0,
        seed: int = 0,
    ):
        self.transform, self.errors_as_inputs, self.n_components = transform, errors_as_inputs, n_components
        self.loss, self.learning_rate, self.iterations, self.leaves = loss, learning_rate, iterations, leaves
        self.l2, self.seed = l2, seed

    def fit(self, train: Spectra) -> Self:
        from sklearn.ensemble import HistGradientBoostingRegressor

        self.pixels = PixelInputs(train, self.transform, self.errors_as_inputs)
        x = self.pixels(train.flux, train.flux_error)[0]
        n_pixels = train.flux.shape[1]
        parts = [(slice(0, n_pixels), self.n_components)]
        if self.errors_as_inputs:
            parts.append((slice(n_pixels, None), max(1, self.n_components // 10)))
        self.components = []
        for columns, number in parts:
            variances, vectors = _principal_components(x[:, columns].astype(np.float64))
            self.components.append((columns, vectors[:, np.argsort(-variances)[:number]]))
        settings = {"loss": self.loss, "learning_rate": self.learning_rate, "max_iter": self.iterations}
        settings |= {"max_leaf_nodes": self.leaves, "l2_regularization": self.l2, "random_state": self.seed}
        inputs = self._project(x)
        self.models = []
        for label in train.labels.T:
            known = np.isfinite(label)
            # Early stopping would take stars away that the other models learn from.
            model = HistGradientBoostingRegressor(early_stopping=False, **settings)
            self.models.append(model.fit(inputs[known], label[known]))
        return self

    def _project(self, x: FloatArray) -> FloatArray:
        return np.concatenate([x[:, columns] @ vectors for columns, vectors in self.components], axis=1)

    def raw_predict(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        inputs = self._project(self.pixels(flux, flux_error)[0])
        values = np.stack([model.predict(inputs) for model in self.models], axis=1)
        return values, np.ones_like(values)


class CannonBaseline(Baseline):
    """Each pixel's flux is a quadratic polynomial in the labels, with an intrinsic scatter of its own.

    Fitted to training stars of which all labels are known; the labels of a new star are those that minimise the
    chi-squared of its spectrum.

    Parameters
    ----------
    transform : {"raw", "log", "asinh"}
        Scale on which the flux is modelled, see `transform_flux`.
    alpha : float
        Penalty on squared coefficients except the constant, relative to the weight of the training stars.
    use_nuisance : bool
        Model `Spectra.nuisance` like labels; it is fitted with them and then dropped.
    decorrelate : bool
        Replace the pixels by the principal components of their misfits, so that an error that many pixels share
        (extinction, calibration) counts once. False: each pixel is independent, as published.
    use_prior : bool
        Add the Gaussian with mean and covariance of the training labels to the likelihood.
    n_starts, n_candidates : int
        The fit of each star starts from the `n_starts` best of `n_candidates` training stars drawn at random.
    iterations : int
        Of each fit (Levenberg-Marquardt); labels stay within the range of the training stars.
    seed : int
        Of the draw.
    """

    def __init__(
        self,
        transform: str = "log",
        alpha: float = 0.0,
        use_nuisance: bool = True,
        decorrelate: bool = False,
        use_prior: bool = False,
        n_starts: int = 4,
        n_candidates: int = 2000,
        iterations: int = 15,
        seed: int = 0,
    ):
        self.transform, self.alpha = transform, alpha
        self.use_nuisance, self.decorrelate, self.use_prior = use_nuisance, decorrelate, use_prior
        self.n_starts, self.n_candidates, self.iterations, self.seed = n_starts, n_candidates, iterations, seed

    def fit(self, train: Spectra) -> Self:
        quantities = np.concatenate([train.labels, train.nuisance], axis=1) if self.use_nuisance else train.labels
        known = np.isfinite(quantities).all(axis=1)
        if not known.any():
            raise ValueError("train.labels: expected stars of which all are known, got none")
        self.n_labels = train.labels.shape[1]
        quantities = quantities[known].astype(np.float64)
        self.center, scale = np.median(quantities, axis=0), np.std(quantities, axis=0)
        self.scale = np.where(scale > 0, scale, 1.0)
        x = (quantities - self.center) / self.scale
        self.low, self.high = x.min(axis=0), x.max(axis=0)
        chosen = np.random.default_rng(self.seed).permutation(len(x))[: self.n_candidates]
        self.candidates = x[chosen]
        self.prior_mean = x.mean(axis=0)
        # Without the prior a trace of it keeps directions that no pixel constrains invertible.
        n_quantities = x.shape[1]
        self.prior_precision = np.linalg.pinv(np.cov(x.T, ddof=0).reshape(n_quantities, n_quantities), hermitian=True)
        if not self.use_prior:
            self.prior_precision = 1e-9 * np.eye(n_quantities)

        y, error = transform_flux(train.flux[known], train.flux_error[known], self.transform)
        usable = _without_empty(y)
        self.fill, self.fill_variance = np.nanmedian(usable, axis=0), np.nanvar(usable, axis=0)
        terms = _quadratic(x)
        self.basis = np.eye(y.shape[1])
        if self.decorrelate:
            filled = self._in_basis(y, error)[0]
            residual = filled - terms @ np.linalg.lstsq(terms, filled)[0]
            self.basis = np.linalg.eigh(residual.T @ residual)[1]
        y, variance = self._in_basis(y, error)

        n_terms = terms.shape[1]
        first, second = np.triu_indices(n_terms)
        products = terms[:, first] * terms[:, second]
        penalty = np.diag([0.0, *np.full(n_terms - 1, self.alpha)])
        self.coefficients = np.linalg.lstsq(terms, y)[0].T
        self.scatter2 = np.var(y - terms @ self.coefficients.T, axis=0) + 1e-12
        # Both must be solved for: the scatter sets the weights of the stars, and the fit leaves the scatter.
        for _ in range(10):
            weights = 1 / (self.scatter2 + variance)
            normal = np.empty((y.shape[1], n_terms, n_terms))
            normal[:, first, second] = normal[:, second, first] = weights.T @ products
            normal += weights.sum(axis=0)[:, None, None] * penalty
            right = (weights * y).T @ terms
            self.coefficients = np.linalg.solve(normal, right[..., None])[..., 0]
            residual = y - terms @ self.coefficients.T
            # Where this factor is 1, the derivative of the likelihood with respect to the scatter vanishes.
            factor = (weights**2 * residual**2).sum(axis=0) / weights.sum(axis=0)
            self.scatter2 = np.maximum(self.scatter2 * factor, 1e-12)
        return self

    def _in_basis(self, y: FloatArray, error: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Transformed flux and its variance along the basis; unusable pixels are as uncertain as if never observed."""
        valid = np.isfinite(y) & np.isfinite(error)
        y = np.where(valid, y, self.fill).astype(np.float64)
        variance = np.where(valid, error.astype(np.float64) ** 2, self.fill_variance)
        return y @ self.basis, variance @ self.basis**2

    def raw_predict(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        chunks = [
            self._infer(flux[start : start + 256], flux_error[start : start + 256])
            for start in tqdm(
                range(0, len(flux), 256), desc="Cannon, 256 stars a step", delay=5, leave=False, disable=None
            )
        ]
        values, errors = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
        return values, errors

    def _infer(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        y, error = transform_flux(flux, flux_error, self.transform)
        y, variance = self._in_basis(y, error)
        weights = 1 / (self.scatter2 + variance)
        # chi-squared of every candidate, but for a constant.
        model = _quadratic(self.candidates) @ self.coefficients.T
        cost = weights @ (model**2).T - 2 * (weights * y) @ model.T + self._prior_cost(self.candidates)
        best = np.argsort(cost, axis=1)[:, : self.n_starts]
        n_stars, n_starts = best.shape
        x = self.candidates[best].reshape(n_stars * n_starts, -1)
        y, weights = np.repeat(y, n_starts, axis=0), np.repeat(weights, n_starts, axis=0)

        def cost_at(x: FloatArray) -> tuple[FloatArray, FloatArray]:
            residual = y - _quadratic(x) @ self.coefficients.T
            return residual, (weights * residual**2).sum(axis=1) + self._prior_cost(x)

        def curvature_at(x: FloatArray) -> tuple[FloatArray, FloatArray]:
            slopes = _quadratic_slopes(x) @ self.coefficients.T  # (fits, quantities, pixels)
            weighted = slopes * weights[:, None]
            return weighted, weighted @ slopes.transpose(0, 2, 1) + self.prior_precision

        damping = np.full(len(x), 1e-2)
        residual, cost = cost_at(x)
        for _ in range(self.iterations):
            weighted, curvature = curvature_at(x)
            downhill = (weighted @ residual[..., None])[..., 0] - (x - self.prior_mean) @ self.prior_precision
            diagonal = np.einsum("bii->bi", curvature)
            damped = curvature + np.eye(x.shape[1]) * (damping[:, None] * diagonal)[..., None]
            step = np.linalg.solve(damped, downhill[..., None])[..., 0]
            trial = np.clip(x + step, self.low, self.high)
            trial_residual, trial_cost = cost_at(trial)
            better = trial_cost < cost
            x, residual = np.where(better[:, None], trial, x), np.where(better[:, None], trial_residual, residual)
            cost = np.where(better, trial_cost, cost)
            damping = np.clip(np.where(better, damping / 5, damping * 5), 1e-9, 1e9)

        errors = np.sqrt(np.einsum("bii->bi", np.linalg.inv(curvature_at(x)[1])))
        winner = np.arange(n_stars) * n_starts + cost.reshape(n_stars, n_starts).argmin(axis=1)
        values = (x * self.scale + self.center)[winner, : self.n_labels]
        return values, (errors * self.scale)[winner, : self.n_labels]

    def _prior_cost(self, x: FloatArray) -> FloatArray:
        offset = x - self.prior_mean
        return np.einsum("bi,ij,bj->b", offset, self.prior_precision, offset)


def _quadratic(x: FloatArray) -> FloatArray:
    """(n, quantities) -> (n, terms): 1, the quantities, their squares and products."""
    first, second = np.triu_indices(x.shape[1])
    return np.concatenate([np.ones((len(x), 1)), x, x[:, first] * x[:, second]], axis=1)


def _quadratic_slopes(x: FloatArray) -> FloatArray:
    """(n, quantities) -> (n, quantities, terms): derivatives of `_quadratic`."""
    one = np.eye(x.shape[1])
    first, second = np.triu_indices(x.shape[1])
    products = one[:, first] * x[:, None, second] + one[:, second] * x[:, None, first]
    linear = np.broadcast_to(one, (len(x), *one.shape))
    return np.concatenate([np.zeros((len(x), len(one), 1)), linear, products], axis=2)


class PCAMLP(nn.Module):
    """Inputs and whitened principal components of the pixels -> hidden layers of `widths` -> (labels, 2)."""

    components: torch.Tensor

    def __init__(self, components: torch.Tensor, n_inputs: int, widths: Sequence[int], n_labels: int, dropout: float):
        super().__init__()
        self.register_buffer("components", components)  # (pixels, n_components)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([n_inputs + components.shape[1], *widths]):
            layers += [nn.Linear(n_in, n_out), nn.GELU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 2 * n_labels))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(stars, inputs) -> (stars, labels, 2): mean and log-variance in standardised units."""
        projected = inputs[:, : len(self.components)] @ self.components
        return self.layers(torch.cat([inputs, projected], dim=1)).unflatten(1, (-1, 2))


def _principal_components(pixels: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Variances, (components,), and components, (pixels, components): as many as there are pixels, or stars."""
    if len(pixels) >= pixels.shape[1]:
        return np.linalg.eigh(np.atleast_2d(np.cov(pixels.T)))
    # Of a few long spectra: the same from a matrix of the size of the stars.
    _, lengths, vectors = np.linalg.svd(pixels - pixels.mean(axis=0), full_matrices=False)
    return lengths**2 / (len(pixels) - 1), vectors.T


class MLPBaseline(Baseline):
    """Multilayer perceptron on pixels and principal components, with the loss of SpectraFM.

    Parameters
    ----------
    learning_rate, weight_decay, batch_size, epochs
        Of AdamW, with a cosine schedule after a warm-up over the first twentieth.
    dropout : float
    noise : float
        Add Gaussian noise of this many flux errors to the pixels of each training batch.
    degrees_of_freedom : float
        Of the loss, as in `SpectraFMConfig`.
    transform, errors_as_inputs
        As in `RidgeBaseline`.
    ema : float
        Decay per step of the running mean of the weights that is kept; 0 keeps the last weights.
    n_components : int
        Number of principal components beside the pixels.
    widths : sequence of int
        Of the hidden layers.
    seed : int
        Of weights, order, dropout and noise.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        dropout: float = 0.0,
        noise: float = 0.0,
        degrees_of_freedom: float = 0.0,
        transform: str = "asinh",
        errors_as_inputs: bool = False,
        ema: float = 0.0,
        epochs: int = 45,
        batch_size: int = 256,
        n_components: int = 80,
        widths: Sequence[int] = (512, 512, 256),
        seed: int = 0,
    ):
        self.learning_rate, self.weight_decay, self.dropout, self.noise = learning_rate, weight_decay, dropout, noise
        self.degrees_of_freedom = degrees_of_freedom
        self.transform, self.errors_as_inputs, self.ema = transform, errors_as_inputs, ema
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.n_components, self.widths = n_components, tuple(widths)

    def fit(self, train: Spectra) -> Self:
        self.inputs = PixelInputs(train, self.transform, self.errors_as_inputs)
        x, sigma = (torch.from_numpy(a.astype(np.float32)) for a in self.inputs(train.flux, train.flux_error))
        n_pixels = sigma.shape[1]
        variances, vectors = _principal_components(x[:, :n_pixels].double().numpy())
        kept = np.argsort(-variances)[: self.n_components]
        # Noise-free toy spectra have fewer components than pixels; the rest must not blow up.
        whitened = vectors[:, kept] / np.sqrt(np.maximum(variances[kept], 1e-6 * variances.max()))

        self.labels = Standardizer(train.labels)
        known = torch.from_numpy(np.isfinite(train.labels))
        y = torch.from_numpy(np.nan_to_num((train.labels - self.labels.center) / self.labels.scale).astype(np.float32))
        label_error = torch.from_numpy(np.nan_to_num(train.label_errors / self.labels.scale).astype(np.float32))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            components = torch.from_numpy(whitened.astype(np.float32))
            network = PCAMLP(components, x.shape[1], self.widths, y.shape[1], self.dropout)
            self.network: nn.Module = network
            averaged = None
            if self.ema:
                averaged = torch.optim.swa_utils.AveragedModel(
                    network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(self.ema)
                )
            optimizer = torch.optim.AdamW(
                network.parameters(), self.learning_rate, weight_decay=self.weight_decay, fused=True
            )
            batches = -(-len(x) // self.batch_size)
            steps = self.epochs * batches
            warmup = max(1, steps // 20)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0))),
            )
            for _ in tqdm(range(self.epochs), desc="PCA + MLP", unit="epoch", delay=2, leave=False, disable=None):
                for rows in torch.randperm(len(x)).split(self.batch_size):
                    batch = x[rows]
                    if self.noise:
                        batch[:, :n_pixels] += self.noise * sigma[rows] * torch.randn(len(rows), n_pixels)
                    mean, log_variance = network(batch).unbind(-1)
                    target, target_error = y[rows].masked_fill(~known[rows], math.nan), label_error[rows]
                    log_variance = log_variance.clamp(-12, 8)
                    loss = prediction_loss(mean, log_variance, target, target_error, self.degrees_of_freedom)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    if averaged is not None:
                        averaged.update_parameters(network)
        self.network = (network if averaged is None else averaged).eval()
        return self

    @torch.no_grad()
    def raw_predict(self, flux: FloatArray, flux_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        x = torch.from_numpy(self.inputs(flux, flux_error)[0].astype(np.float32))
        answers = torch.cat([self.network(part) for part in x.split(4096)]).double().numpy()
        mean, log_variance = answers[..., 0], answers[..., 1]
        errors = np.exp(0.5 * np.clip(log_variance, -12, 8)) * self.labels.scale
        return mean * self.labels.scale + self.labels.center, errors


BASELINES: dict[str, type[Baseline]] = {
    "ridge": RidgeBaseline,
    "cannon": CannonBaseline,
    "boosting": BoostingBaseline,
    "mlp": MLPBaseline,
}

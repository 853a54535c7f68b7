# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The Cannon: labels from a quadratic model of each pixel."""

from typing import Self

import numpy as np
from tqdm.auto import tqdm

from .baseline import Baseline, FloatArray, Spectra, _without_empty, transform_flux


class CannonBaseline(Baseline):
    """Each pixel's flux is a quadratic polynomial in the labels, with an intrinsic scatter of its own.

    Fitted to training stars with all labels known; the labels of a new star minimise the chi-squared of its spectrum.

    Parameters
    ----------
    transform : {"raw", "log", "asinh"}
        Scale on which the flux is modelled, see `transform_flux`.
    alpha : float
        Penalty on squared coefficients except the constant, relative to the weight of the training stars.
    use_nuisance : bool
        Model `Spectra.nuisance` like labels; it is fitted with them and then dropped.
    decorrelate : bool
        Replace the pixels by the principal components of their residuals, so that an error common to many pixels
        (extinction, calibration) has the weight of one. False: each pixel is independent, as published.
    use_prior : bool
        Add the Gaussian with mean and covariance of the training labels to the likelihood.
    n_starts, n_candidates : int
        The fit of each star starts from the `n_starts` best of `n_candidates` training stars drawn at random.
    iterations : int
        Iterations of each fit (Levenberg-Marquardt); labels are limited to the range of the training stars.
    seed : int
        Seed of the draw.
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
            raise ValueError("train.labels: expected stars with all labels known, got none")
        self.n_labels = train.labels.shape[1]
        quantities = quantities[known].astype(np.float64)
        self.center, scale = np.median(quantities, axis=0), np.std(quantities, axis=0)
        self.scale = np.where(scale > 0, scale, 1.0)
        x = (quantities - self.center) / self.scale
        self.low, self.high = x.min(axis=0), x.max(axis=0)
        chosen = np.random.default_rng(self.seed).permutation(len(x))[: self.n_candidates]
        self.candidates = x[chosen]
        self.prior_mean = x.mean(axis=0)
        # Without the prior, a very wide one keeps the matrix invertible in unconstrained directions.
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
        # Alternate, as the scatter determines the weights of the stars, and the residuals determine the scatter.
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
        """Transformed flux and its variance along the basis; bad pixels have the variance of the training stars."""
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
        # chi-squared of each candidate, up to a constant.
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

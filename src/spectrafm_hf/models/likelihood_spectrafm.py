# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
The likelihood of the pixels of whole spectra: linear models of stars, their priors, and the posterior of both.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .products_spectrafm import inverse_factor


@dataclass
class Stars:
    """
    A linear model of stars: coefficients are `start + directions a`, with a Gaussian prior of a around `prior_mean`,
    and deviations from it, by interval. T intervals, K coefficients, A parameters; float64.
    """

    start: torch.Tensor  # B, T, K
    directions: torch.Tensor  # B, T, K, A
    precision: torch.Tensor  # A, A, or B, A, A
    prior_mean: torch.Tensor  # B, A
    own: torch.Tensor  # B, T, K, D: root of the covariance of other differences between stars, in coefficients
    continuum: torch.Tensor  # B, T, K, 2: that of level and slope, in units of the level
    level: torch.Tensor  # B: standard deviation of the level

    def of(self, stars: slice) -> "Stars":
        parts = {each.name: getattr(self, each.name)[stars] for each in fields(self) if each.name != "precision"}
        return replace(self, **parts)


class Kinds:
    """
    A mixture of Gaussians as the prior of amplitudes: stars of one kind differ less than all stars.

    Parameters
    ----------
    shares : array of shape (N,)
        Of the stars, by kind.
    means : array of shape (N, A)
    factors : array of shape (N, A, A)
        Lower triangular; a factor times its transpose is the covariance of a kind.
    """

    def __init__(self, shares: Any, means: Any, factors: Any):
        self.shares, self.means, self.factors = (
            torch.as_tensor(part, dtype=torch.float64) for part in (shares, means, factors)
        )
        self.covariances = self.factors @ self.factors.mT
        self.precisions = torch.cholesky_inverse(self.factors)

    def prior(self, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, A) and precision (B, A, A) of the mixtures with these shares, (B, N)."""
        mean = shares @ self.means
        from_mean = self.means - mean[:, None]
        covariance = (shares @ self.covariances.flatten(1)).unflatten(1, self.covariances.shape[1:])
        covariance += (shares[..., None] * from_mean).mT @ from_mean
        return mean, torch.linalg.inv(covariance)

    def shares_of(self, information: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
        """
        The probability of each kind, (B, N), from the information of the pixels about the amplitudes (B, A, A), and
        that times the most likely amplitudes (B, A).
        """
        evidence = []
        for mean, factor, precision in zip(self.means, self.factors, self.precisions, strict=True):
            along = precision @ mean
            root = torch.linalg.cholesky(information + precision)
            found = torch.linalg.solve_triangular(root, (pull + along)[..., None], upper=False)[..., 0]
            spread = root.diagonal(dim1=1, dim2=2).log().sum(dim=1) + factor.diagonal().log().sum()
            evidence.append(0.5 * ((found**2).sum(dim=1) - mean @ along) - spread)
        return torch.softmax(torch.stack(evidence, dim=1) + self.shares.log(), dim=1)


class Likelihood:
    """
    The parts of the likelihood of the pixels that do not depend on the misfit of the star model.

    With the information L, and R R^T the covariance of the differences from a star, the information about the star is
    (L^-1 + R R^T)^-1 = L - L R (1 + R^T L R)^-1 R^T L: the inverse is that of a positive matrix of 1 and more.
    """

    def __init__(self, linear: Stars, information, right):
        self.linear = linear
        self.root = torch.cat((linear.own, linear.continuum), dim=3)  # B, T, K, R, before their sizes are known
        self.flat = linear.directions.flatten(1, 2)  # B, T * K, A
        along = self.root.mT @ information
        self.pairs = along @ self.root  # B, T, R, R
        self.by_directions = information @ linear.directions  # B, T, K, A
        self.along, self.along_directions = along, along @ linear.directions  # B, T, R, A
        left = right - times(information, linear.start)
        self.along_left = times(self.root.mT, left)  # B, T, R
        self.fisher = self.flat.mT @ self.by_directions.flatten(1, 2)
        self.pull = times(self.flat.mT, left.flatten(1))

    def of_star(self, unexplained, level):
        """
        The sizes as in [`Likelihood.solve`], two factors that it needs, and the information of the pixels about the
        amplitudes: (B, A, A), and that times the most likely amplitudes (B, A).
        """
        number = self.root.shape[3]
        size = torch.cat((unexplained[:, None].expand(-1, number - 2), level[:, None].expand(-1, 2)), dim=1)[:, None]
        matrix = self.pairs * size[..., None] * size[:, :, None]
        matrix.diagonal(dim1=2, dim2=3).add_(1.0)
        factor, failed = inverse_factor(matrix.flatten(0, 1))
        factor = factor.masked_fill_(failed[:, None, None], torch.nan).unflatten(0, matrix.shape[:2])
        along_directions = size[..., None] * self.along_directions
        lost = (factor @ along_directions).flatten(1, 2)
        taken = times(along_directions.flatten(1, 2).mT, _differing(size, factor, self.along_left).flatten(1))
        return size, factor, lost, self.fisher - lost.mT @ lost, self.pull - taken

    def solve(self, unexplained, level, *, whole: bool = True):
        """
        Solve for given sizes (B,) of the misfit of the star model and of the continuum.

        Posterior mean and fit (B, T, K), covariance (B, T, K, K), number of parameters (B,), amplitudes (B, A); level
        and slope of each interval in units of their prior, with variances, (B, T, 2) each. Not `whole`: mean and
        covariance stay None.
        """
        linear, number = self.linear, self.root.shape[3]
        size, factor, lost, fisher, pull = self.of_star(unexplained, level)
        inverse = torch.linalg.inv((fisher + linear.precision).double()).to(fisher.dtype)
        amplitudes = times(inverse, pull + times(linear.precision, linear.prior_mean))
        star = linear.start + times(self.flat, amplitudes).unflatten(1, linear.start.shape[1:])
        by_star = times(self.along_directions.flatten(1, 2), amplitudes).unflatten(1, (-1, number))
        found = _differing(size, factor, self.along_left - by_star)
        drifted, doubt = found[..., -2:], (factor[..., -2:] ** 2).sum(dim=2)
        fit = star + times(linear.continuum, level[:, None, None] * drifted)
        parameters = (inverse * fisher.mT).sum(dim=(1, 2)) + (1.0 - doubt).sum(dim=(1, 2))
        if not whole:
            return None, fit, None, parameters, amplitudes, drifted, doubt
        mean = star + times(self.root, size * found)
        remains = factor @ (self.root * size[:, :, None]).mT
        weighted = self.by_directions - (size[..., None] * self.along).mT @ (
            factor.mT @ lost.view_as(self.along_directions)
        )
        left = linear.directions - self.root @ (size[..., None] ** 2 * (self.root.mT @ weighted))
        covariance = remains.mT @ remains + left @ inverse[:, None] @ left.mT
        return mean, fit, covariance, parameters, amplitudes, drifted, doubt


def _differing(size, factor, along_left):
    """Most likely deviations from the star model, in units of their prior."""
    return times(factor.mT, times(factor, size * along_left))


def times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (vector[..., None, :] @ matrix.mT)[..., 0, :]  # a row takes less time than a column


__all__ = ["Kinds", "Likelihood", "Stars", "times"]

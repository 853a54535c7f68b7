# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Covariance function and hyperparameters of a Gaussian process on groups of inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.configuration_spectrafm import SCALAR_GROUPS
from ..models.correction_spectrafm import covariance, variance_of_inputs
from ..statistics import MAD_TO_SIGMA


CONSTANT = 10.0  # variance of the unknown zero point, in units of the variance of the label


MOST_UNSURE = 0.5  # variance of ln of the noise


LEAST_NOISE = 1e-4  # of the variance of the label


NOISE_WIDTH = 0.5  # of the prior of ln of the noise variance, if the errors of the predictions determine its centre


#: Labels further than this from the prediction of the other stars, in sigma, get a smaller weight.
FAR = 2.0


@dataclass(frozen=True)
class Head:
    """
    A model of a label.

    Attributes
    ----------
    name : str
        Its name in reports.
    groups : dict of str to str
        Inputs of the Gaussian process (of `CORRECTION_GROUPS`), and its parts: `"linear"` or `"both"`.
    adds : bool
        Whether it is added to the prediction of the model for the label.
    constant : bool
        Whether the zero point is free.
    """

    name: str
    groups: Mapping[str, str]
    adds: bool = False
    constant: bool = True


class Kernel:
    """
    Hyperparameters of a head as one vector of logarithms, with their priors.

    Parameters
    ----------
    head : Head
    sizes : sequence of int
        Features of each of its groups.
    noise : float, optional
        Expected variance of the noise.
    unknown : torch.Tensor of shape (stars, features), optional
        Variances of inputs with errors. Methods with features of fewer stars use its first rows.
    """

    def __init__(
        self, head: Head, sizes: Sequence[int], noise: float | None = None, unknown: torch.Tensor | None = None
    ):
        self.sizes, self.constant, self.unknown = list(sizes), CONSTANT if head.constant else 0.0, unknown
        # A length for each prediction and scalar, one for all other inputs.
        self.groups = [
            (size, size if group in ("answers", *SCALAR_GROUPS) else 1, kind)
            for (group, kind), size in zip(head.groups.items(), sizes, strict=True)
        ]
        # Start, mean and width of the prior: for the noise and its growth, then for each group.
        rows = [(math.log(0.1), math.log(0.1), 2.0), (1.0, 1.0, 1.0)]
        if noise is not None:
            rows[0] = (math.log(noise), math.log(noise), NOISE_WIDTH)
        for _, number, kind in self.groups:
            rows += [(-0.7, -1.0, 2.0)] * number
            if kind == "both":
                rows += [(-0.7, -1.0, 2.0)] + [(0.9 if number > 1 else 0.4, 0.7, 1.0)] * number
        self.start, self.middle, self.width = torch.tensor(rows, dtype=torch.float64).T.contiguous()

    def unpack(self, parameters: torch.Tensor) -> dict[str, Any]:
        """Noise, its growth, and linear, length (features,) and amplitude (groups,) for [`covariance`]."""
        numbers = parameters.exp()
        linear, length, amplitude, place = [numbers[:0]], [numbers[:0]], [numbers[:0]], 2
        for size, number, kind in self.groups:
            linear.append(numbers[place : place + number].expand(size))
            place += number
            if kind == "both":
                amplitude.append(numbers[place : place + 1])
                length.append(numbers[place + 1 : place + 1 + number].expand(size))
                place += 1 + number
            else:
                amplitude.append(torch.zeros(1, dtype=numbers.dtype))
                length.append(torch.ones(size, dtype=numbers.dtype))
        joined = {"linear": torch.cat(linear), "length": torch.cat(length), "amplitude": torch.cat(amplitude)}
        return {"noise": numbers[0] + LEAST_NOISE, "growth": parameters[1], **joined}

    def prepared(self, features: torch.Tensor) -> list[Any]:
        """
        Parts of each group that do not depend on the hyperparameters: products and squared distances of all pairs of
        stars, (N, N) each, if its features share one length, otherwise the features themselves.
        """
        found: list[Any] = []
        for (size, number, _), own in zip(self.groups, features.split(self.sizes, dim=1), strict=True):
            if number == size:
                found.append(own)
            else:
                squares = (own**2).sum(dim=1)
                product = own @ own.T
                found.append((product, (squares[:, None] + squares - 2.0 * product).clamp(min=0.0)))
        return found

    def matrix(self, parameters, features, doubt, label_variance) -> torch.Tensor:
        """Covariance of labels of stars, with noise and label errors, (N, N); the features may be `prepared`."""
        own = self.unpack(parameters)
        parts = self.prepared(features) if isinstance(features, torch.Tensor) else features
        matrix, start = torch.full((len(doubt), len(doubt)), self.constant, dtype=doubt.dtype), 0
        for part, size, amplitude in zip(parts, self.sizes, own["amplitude"], strict=True):
            linear, length = (own[name][start : start + size] for name in ("linear", "length"))
            if isinstance(part, tuple):
                product, squares = part
                matrix = matrix + linear[0] * product + amplitude * torch.exp(-0.5 * squares / length[0] ** 2)
            else:
                matrix = matrix + covariance(part, part, 0.0, linear, length, [amplitude], [size])
            start += size
        if self.unknown is not None:
            shape = own["linear"], own["length"], own["amplitude"], self.sizes
            label_variance = label_variance + variance_of_inputs(self.unknown[: len(doubt)], *shape)
        return matrix + torch.diag(own["noise"] * torch.exp(own["growth"] * doubt) + label_variance)

    def reweighted(self, parameters, features, doubt, stated, variance, target) -> torch.Tensor:
        """
        Variances of the labels (N,), increased over `stated` for labels that are far from the prediction of the other
        stars. `variance` holds those of the previous iteration.
        """
        own = self.unpack(parameters)
        factor, failed = torch.linalg.cholesky_ex(self.matrix(parameters, features, doubt, variance))
        if failed:
            return variance
        inverse = torch.cholesky_inverse(factor)
        left = (inverse @ target) / inverse.diagonal()
        spread = (1.0 / inverse.diagonal() - variance + stated).clamp(min=LEAST_NOISE).sqrt()
        far = left / spread
        far = far / (MAD_TO_SIGMA * far.abs().median()).clamp(min=0.3)
        noise = own["noise"] * torch.exp(own["growth"] * doubt)
        return stated + (noise + stated) * ((far / FAR) ** 2 - 1.0).clamp(min=0.0)

    def noise_of(self, parameters, features, doubt, label_variance, number: int) -> torch.Tensor:
        """
        Posterior mean of the noise variance rather than its mode: it is larger if stars are few, or if labels are much
        noisier than the predictions. `features` are those of some of `number` stars.
        """
        noise, width = self.unpack(parameters)["noise"], float(self.width[0])
        inverse = torch.cholesky_inverse(
            torch.linalg.cholesky(self.matrix(parameters, features, doubt, label_variance))
        )
        information = 0.5 * ((noise * torch.exp(parameters[1] * doubt) * inverse.diagonal()) ** 2).mean() * number
        return noise * torch.exp(0.5 * (1.0 / (width**-2.0 + information)).clamp(max=MOST_UNSURE))

    def optimum(self, start, iterations, features, doubt, label_variance, target) -> torch.Tensor:
        """Hyperparameters at the maximum of the posterior probability, optimised from `start`."""
        features = self.prepared(features)
        parameters = start.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [parameters], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=1e-4
        )

        def closure():
            optimizer.zero_grad()
            factor, failed = torch.linalg.cholesky_ex(self.matrix(parameters, features, doubt, label_variance))
            if failed:
                return torch.tensor(math.inf)
            solved = torch.cholesky_solve(target[:, None], factor)[:, 0]
            loss = 0.5 * target @ solved + factor.diagonal().log().sum()
            loss = loss + 0.5 * (((parameters - self.middle) / self.width) ** 2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found = parameters.detach()
        return found if bool(found.isfinite().all()) else start

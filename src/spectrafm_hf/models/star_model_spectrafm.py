# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The star model: labels -> coefficients of the intervals, with derivatives."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from .configuration_spectrafm import SpectraFMConfig
from .evidence_spectrafm import InFullPrecision
from .modeling_emulator import REFERENCE_TEFF, CovarianceGroup
from .products_spectrafm import product


class SpectraFMStarModel(InFullPrecision):
    """
    Labels -> coefficients of the intervals, with derivatives: an emulator of spectra, in the basis of the tokens.

    The weights of spectral components are Gaussian processes over the labels, as in [`SpectrumEmulator`]; coefficients
    are linear in them. It is not trained: `bases.fill_star_model` computes it.
    """

    center: torch.Tensor
    scale: torch.Tensor
    stars: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    population: torch.Tensor
    precision: torch.Tensor
    components: torch.Tensor
    velocity_of_width: torch.Tensor
    spread: torch.Tensor

    def __init__(self, config: SpectraFMConfig):
        super().__init__()
        n_labels, n_components = len(config.star_labels), sum(config.star_components)
        first, last = config.star_intervals
        self.first = first
        self.register_buffer("center", torch.zeros(n_labels))
        self.register_buffer("scale", torch.ones(n_labels))
        self.register_buffer("stars", torch.zeros(config.num_stars, n_labels))
        self.register_buffer("low", torch.zeros(n_labels))
        self.register_buffer("high", torch.zeros(n_labels))
        # Mean and inverse covariance of the labels of stars, standardised.
        self.register_buffer("population", torch.zeros(n_labels))
        self.register_buffer("precision", torch.eye(n_labels))
        # Spectrum and its derivatives by velocity and line width; the last component is the mean spectrum.
        # To second order a velocity also widens lines: velocity^2 times this, in the unit of the width.
        self.register_buffer("velocity_of_width", torch.ones(()))
        shape = (3, last - first, config.num_coefficients, n_components + 1)
        self.register_buffer("components", torch.zeros(shape))
        # Unit of the coefficients: their spread among stars, in flux.
        self.register_buffer("spread", torch.ones(shape[1:3]))
        self.groups = nn.ModuleList(
            CovarianceGroup(n_labels, config.num_stars, size).as_buffers() for size in config.star_components
        )
        self._kept: tuple[list[tuple[int, int]], Sums] | None = None

    def standardise(self, labels: torch.Tensor) -> torch.Tensor:
        """(B, labels) in physical units -> standardised; lines change with 5040 K / Teff, the first label."""
        features = torch.cat((REFERENCE_TEFF / labels[:, :1].double(), labels[:, 1:].double()), dim=1)
        return ((features - self.center.double()) / self.scale.double()).float()

    def limits(self) -> torch.Tensor:
        """Lowest and highest of the labels of its stars, (2, labels), standardised."""
        return self.standardise(torch.stack((self.low, self.high))).sort(dim=0).values

    def physical(self, standardised: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised labels (B, labels) -> in physical units, and the derivatives of each with respect to its own."""
        features = standardised * self.scale + self.center
        inverse = REFERENCE_TEFF / features[:, :1]
        slope = torch.cat((-inverse / features[:, :1], torch.ones_like(features[:, 1:])), dim=1) * self.scale
        return torch.cat((inverse, features[:, 1:]), dim=1), slope

    def weights(self, labels: torch.Tensor) -> torch.Tensor:
        """Standardised labels (B, labels) -> weights of the components (B, components), the mean spectrum included."""
        return self.processes(labels).weights

    def slopes(self, labels: torch.Tensor) -> torch.Tensor:
        """Derivatives of the weights but the last, (B, labels, components)."""
        return self.processes(labels).slopes()

    def processes(self, labels: torch.Tensor, sums: "Sums | None" = None) -> "Processes":
        """The Gaussian processes at standardised labels (B, labels), with their [`sums`]."""
        return Processes(self, labels, self.sums() if sums is None else sums)

    def sums(self) -> "Sums":
        """Sums that do not depend on the labels; cached."""
        tensors = [*self.buffers(), *self.parameters()]
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
            return self._made_sums()
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]  # changes with any tensor
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = state, self._made_sums()
        return self._kept[1]

    def _made_sums(self) -> "Sums":
        stars, groups = self.stars.double(), [cast(CovarianceGroup, part) for part in self.groups]
        trends, weights, slopes, inverse_squares = [], [], [], []
        far = stars.new_zeros(len(groups), stars.shape[1] + len(groups) + 1, len(stars))
        for number, group in enumerate(groups):
            linear, quadratic, variance = group.log_amplitude.double().exp()
            weight, scaled = group.weight.double(), stars * (2.0 * group.log_scale.double()).exp()
            products = (scaled[:, :, None] * scaled[:, None, :]).flatten(1)
            first, second = (linear + 2.0 * quadratic) * scaled.T @ weight, quadratic * products.T @ weight
            trends.append(torch.cat((quadratic * weight.sum(dim=0, keepdim=True), first, second)))
            squares = torch.exp(-2.0 * group.log_length.double()).expand(stars.shape[1])
            inverse_squares.append(squares)
            weights.append(variance * weight)
            local = ((stars * squares).T[:, None] * weights[-1].T).flatten(0, 1)
            of_trend = 2.0 * second.view(stars.shape[1], -1).T
            slopes.append((torch.cat((local, of_trend), dim=1).float(), first.flatten().float()))
            # -distance^2 / 2 as one product of matrices: of labels, their squares in the unit of each group, and one
            far[number, : stars.shape[1]] = (stars * squares).T
            far[number, stars.shape[1] + number] = 1.0
            far[number, -1] = -0.5 * (stars**2) @ squares
        far = far.transpose(0, 1).flatten(1).contiguous()
        return Sums(torch.cat(trends, dim=1), weights, slopes, far, torch.stack(inverse_squares, dim=1))

    def rows(self, intervals: torch.Tensor) -> torch.Tensor:
        """Components of some intervals (T,), as matrices: (3 * T, components + 1, num_coefficients)."""
        return self.components[:, intervals - self.first].flatten(0, 1).mT.contiguous()

    def coefficients(
        self, weights: torch.Tensor, intervals: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        (B, components + 1), numbers of intervals (T,) -> (3, B, T, num_coefficients): spectrum and its changes; with
        the [`rows`] of these intervals.
        """
        rows = self.rows(intervals) if rows is None else rows
        found = torch.bmm(weights.expand(3 * len(intervals), -1, -1), rows)  # interval after interval, as it is used
        return found.unflatten(0, (3, -1)).transpose(1, 2)

    def jacobian(
        self,
        slopes: torch.Tensor,
        intervals: torch.Tensor,
        by_velocity: torch.Tensor,
        by_width: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Derivatives of coefficients with respect to labels, velocity and width, (T, B, P + 2, num_coefficients), from
        the [`slopes`].
        """
        spectrum = (self.rows(intervals) if rows is None else rows)[: len(intervals), :-1]
        # The other rows are overwritten, which is faster than copying the derivatives.
        padded = nn.functional.pad(slopes, (0, 0, 0, 2))
        found = torch.bmm(padded.flatten(0, 1).expand(len(intervals), -1, -1), spectrum)
        found = found.unflatten(1, padded.shape[:2])
        end = slopes.shape[1]
        found[:, :, end], found[:, :, end + 1] = by_velocity.transpose(0, 1), by_width.transpose(0, 1)
        return found


@dataclass
class Sums:
    """
    Sums over the stars of a star model, float64: all but the local terms of the covariance functions, which are
    polynomials of second order, (1 + labels + labels^2, components). What the local terms of each group are products
    with: `weights` (stars, components); and for derivatives, float32, what they and the labels are products with,
    (labels * components, stars + labels), and what adds to it. Of all groups, distances (labels + groups + 1, groups *
    stars), and 1 / length^2 (labels, groups).
    """

    trends: torch.Tensor
    weights: list[torch.Tensor]
    slopes: list[tuple[torch.Tensor, torch.Tensor]]
    far: torch.Tensor
    inverse_squares: torch.Tensor


class Processes:
    """
    Gaussian processes of a star model at some labels: weights of its components, and their derivatives. In float64,
    because large terms cancel; derivatives need less precision.
    """

    def __init__(self, star: SpectraFMStarModel, labels: torch.Tensor, sums: Sums):
        self.star, self.labels, self.sums = star, labels.double(), sums
        ones = torch.ones_like(self.labels[:, :1])
        powers = torch.cat((ones, self.labels, (self.labels[:, :, None] * self.labels[:, None, :]).flatten(1)), dim=1)
        squares = -0.5 * (self.labels.square() @ sums.inverse_squares)
        near = (torch.cat((self.labels, squares, ones), dim=1) @ sums.far).clamp_(max=0.0).exp_()
        self.near = near.tensor_split(len(sums.weights), dim=1)  # the local terms, (B, stars) of each group
        self.local = torch.cat([part @ weight for part, weight in zip(self.near, sums.weights, strict=True)], dim=1)
        self.weights = nn.functional.pad((powers @ sums.trends + self.local).float(), (0, 1), value=1.0)

    def slopes(self) -> torch.Tensor:
        """Derivatives of the weights but the last, (B, labels, components)."""
        labels, sums = self.labels.float(), self.sums
        n_labels = labels.shape[1]
        scaled = (labels[:, :, None] * sums.inverse_squares.float()).unbind(dim=2)
        local = self.local.float().split([weight.shape[1] for weight in sums.weights], dim=1)
        found = []
        for near, (rows, linear), own_scale, own in zip(self.near, sums.slopes, scaled, local, strict=True):
            moved = product(torch.cat((near.float(), labels), dim=1), rows, linear).unflatten(1, (n_labels, -1))
            found.append(moved.addcmul_(own_scale[:, :, None], own[:, None], value=-1.0))
        return torch.cat(found, dim=2)

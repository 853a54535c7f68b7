# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Derivatives of predictions with respect to the flux of each pixel, exact, through the least squares of the tokens.

For fixed pixel weights, evidence is linear in the flux, except for the level by which it is divided. By the chain rule
the derivative of a prediction is that with respect to the evidence (by torch, through the network or the fit with the
star model) times that of the evidence with respect to the flux (from the design of each interval). Weights,
reliabilities, clipped pixels and hyper-parameters of the fit are held fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.schema import PIXEL_COLUMNS
from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from ..models.rungs_spectrafm import Design, Rung
from ..models.tokens_spectrafm import EvidenceOnGrid


Array = NDArray[np.float64]


def answers_and_derivatives(
    model: SpectraFMForPrediction, inputs: Mapping[str, torch.Tensor]
) -> tuple[Array, Array, Array]:
    """
    Predictions, and their derivatives with respect to the evidence.

    Parameters
    ----------
    model : SpectraFMForPrediction
        In eval mode.
    inputs : mapping
        Output of the tokenizer for B stars with T intervals, K coefficients and R requests.

    Returns
    -------
    values : array of shape (B, R)
    by_coefficients, by_pull : array of shape (B, R, T, K)
        Only the second is not 0 for predictions from the fit with the star model.
    """
    coefficients, pull = (inputs[name].detach().clone().requires_grad_() for name in ("coefficients", "pull"))
    with torch.enable_grad():
        output = model(**{**inputs, "coefficients": coefficients, "pull": pull})
        # Stars of a batch are independent, so the derivative of their sum is that of each.
        found = [
            torch.autograd.grad(answer, (coefficients, pull), retain_graph=True, materialize_grads=True)
            for answer in output.predictions.sum(dim=0)
        ]
    derivatives = (torch.stack(parts, dim=1).double().cpu().numpy() for parts in zip(*found, strict=True))
    by_coefficients, by_pull = (np.nan_to_num(part) for part in derivatives)
    return output.predictions.detach().double().cpu().numpy(), by_coefficients, by_pull


def flux_response(design: Design, grid: EvidenceOnGrid, by_coefficients: Array, by_pull: Array) -> tuple[Array, Array]:
    """
    Derivatives of predictions with respect to the flux of each pixel.

    Parameters
    ----------
    design : Design
        Of the grid.
    grid : EvidenceOnGrid
        B stars, T intervals.
    by_coefficients, by_pull : array of shape (B, R, T, K)
        Derivatives of R predictions with respect to the evidence.

    Returns
    -------
    response : array of shape (B, R, pixels)
        Unit of the prediction over that of the flux.
    variance : array of shape (B, pixels)
        Variance of the pixels, model errors included; 0 for unused pixels.
    """
    evidence = grid.evidence
    response = np.zeros((*by_coefficients.shape[:2], len(grid.wavelength)))
    kept = np.where(evidence.clipped, 0.0, grid.inverse_variance)
    weights = np.zeros_like(kept)
    for i, pixels in enumerate(design.pixels):
        rows = design.rows[i].double().numpy()
        level, unit = (part[:, i, None].astype(np.float64) for part in (evidence.level, evidence.unit))
        weight = kept[:, pixels] / (1.0 + design.rung.model_error**2 * kept[:, pixels] * level**2)
        weights[:, pixels] = weight
        # The least squares are in units of the level.
        gram = np.einsum("kp,bp,lp->bkl", rows, weight * level**2, rows)
        covariance = np.linalg.inv(gram + np.eye(len(rows)))
        found = evidence.estimate[:, i].astype(np.float64) / unit
        by_found = _by_found(design.rung, evidence.reliability[:, i], found, covariance, by_coefficients[:, :, i])
        along = (by_found @ covariance + by_pull[:, :, i] / unit[:, None]) @ rows
        response[:, :, pixels] += along * (weight * level)[:, None]
    if not design.rung.over_continuum:
        _add_level_of_star(response, design, grid, by_coefficients)
    return response, np.divide(1.0, weights, out=np.zeros_like(weights), where=weights > 0)


def _by_found(rung: Rung, reliability: NDArray[Any], found: Array, covariance: Array, by_coefficients: Array) -> Array:
    """Derivatives (B, R, K) with respect to coefficients -> with respect to the least-squares solutions."""
    reliability = reliability.astype(np.float64)
    level = np.clip(found[:, :1], 0.2, 5.0)
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    shrunk = np.where(reliability > 0, (1.0 - reliability) * level**2 / variance, 0.0) / level  # by level and prior
    answer = by_coefficients * shrunk[:, None]
    by_level = -(answer[..., 1:] * found[:, None, 1:] / level[:, None]).sum(axis=2)
    by_level += by_coefficients[..., 0] * reliability[:, :1] / rung.level_prior / level
    answer[..., 0] = np.where(found[:, :1] == level, by_level, 0.0)
    return answer


def _add_level_of_star(response: Array, design: Design, grid: EvidenceOnGrid, by_coefficients: Array) -> None:
    """Derivative of the level of the star (the median of those of the intervals) with respect to the pixels."""
    evidence = grid.evidence
    known = evidence.reliability[..., 0].astype(np.float64)
    by_scale = (
        -(by_coefficients[..., 0] * known[:, None]).sum(axis=2) / design.rung.level_prior / evidence.scale[:, None]
    )
    levels = np.full(known.shape, np.nan)
    shares: list[Array] = []
    for i, pixels in enumerate(design.pixels):
        weight, row = grid.inverse_variance[:, pixels], design.rows[i][0].double().numpy()
        norm = weight @ row**2
        share = weight * row / np.where(norm > 0, norm, 1.0)[:, None]
        levels[:, i] = np.where(norm > 0, (share * grid.flux[:, pixels]).sum(axis=1), np.nan)
        shares.append(share)
    for star, level in enumerate(levels):
        order = np.argsort(level)[: np.isfinite(level).sum()]
        middle = order[(len(order) - 1) // 2 : len(order) // 2 + 1]
        if len(middle) and level[middle].mean() > 0:
            for i in middle:
                response[star][:, design.pixels[i]] += by_scale[star, :, None] * shares[i][star] / len(middle)


@dataclass(frozen=True)
class PixelResponses:
    """
    Predictions for B stars on one grid of N pixels, and their derivatives. R requests, T intervals.

    Attributes
    ----------
    stars : int array of shape (B,)
        Indices of the rows.
    wavelength : array of shape (N,)
        Angstrom.
    flux : array of shape (B, N)
    level : array of shape (B,)
        Level of the star, in the unit of the flux.
    valid : array of bool, shape (B, N)
        Pixels that are not masked.
    variance : array of shape (B, N)
        Variance of the flux, model errors included; 0 where a pixel is masked or clipped.
    values : array of shape (B, R)
        NaN for missing predictions.
    response : array of shape (B, R, N)
        Derivative of each prediction with respect to the flux of each pixel.
    intervals : int array of shape (T,)
        Numbers of the intervals.
    pixels : list of T slices
        Of each interval.
    """

    stars: NDArray[np.int64]
    wavelength: Array
    flux: Array
    level: Array
    valid: NDArray[np.bool_]
    variance: Array
    values: Array
    response: Array
    intervals: NDArray[np.int64]
    pixels: list[slice]

    def information(self) -> Array:
        """(B, R, T): share of each interval in the variance of each prediction due to the errors of the flux."""
        squared = self.response**2 * self.variance[:, None]
        parts = np.stack([squared[:, :, pixels].sum(axis=2) for pixels in self.pixels], axis=2)
        total = parts.sum(axis=2, keepdims=True)
        return np.divide(parts, total, out=np.zeros_like(parts), where=total > 0)


def pixel_responses(
    model: SpectraFMForPrediction,
    tokenizer: SpectraFMTokenizer,
    rows: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, torch.Tensor],
) -> list[PixelResponses]:
    """
    Derivatives of the predictions for stars with respect to their flux, by grid.

    Parameters
    ----------
    model : SpectraFMForPrediction
        On evidence, in eval mode.
    tokenizer : SpectraFMTokenizer
        From `schema_tokenizer`; it made `inputs` from `rows`.
    rows : sequence of rows
        In the schema of this project.
    inputs : mapping
        With requests of labels.
    """
    basis = tokenizer.basis
    assert basis is not None
    values, by_coefficients, by_pull = answers_and_derivatives(model, inputs)
    columns = {name: [row[name] for row in rows] for name in PIXEL_COLUMNS}
    powers, normalised = ([row.get(name) for row in rows] for name in ("resolving_power", "normalised"))
    intervals = inputs["interval_ids"][0].cpu().numpy()
    found = []
    for grid in tokenizer.evidence(columns, powers, normalised):
        design, stars = basis.design(grid.wavelength, grid.resolving_power), grid.stars
        own = np.searchsorted(intervals, design.intervals)
        parts = (part[stars][:, :, own] for part in (by_coefficients, by_pull))
        response, variance = flux_response(design, grid, *parts)
        level = grid.evidence.scale.astype(np.float64)
        found.append(
            PixelResponses(
                stars,
                grid.wavelength,
                grid.flux.astype(np.float64),
                level,
                grid.inverse_variance > 0,
                variance,
                values[stars],
                response,
                design.intervals,
                design.pixels,
            )  # fmt: skip
        )
    return found

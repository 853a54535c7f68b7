# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Alternatives to a fine-tuned checkpoint, fitted to the same stars: ridge regression, a Gaussian process and a neural
network on pixels, a Gaussian process and a neural network on the predictions of the frozen model, and TabICL if it is
installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..files import one_line
from ..inference.states import States
from ..models.correction_spectrafm import covariance, own_variance
from .baseline import Spectra, _without_empty, transform_flux
from .baselines import MLPBaseline
from .heads import ITERATIONS, LIKELIHOOD_STARS, MOST_STARS
from .kernels import Head, Kernel
from .weights import error_factor


FloatArray = NDArray[np.floating[Any]]
MLP_STEPS, MLP_EPOCHS = 1500, 100  # at most
LEAST_SPREAD = 0.25  # of coefficients among stars, in units of their prior
RESAMPLINGS = 1000
TABICL_COMPONENTS = 40  # of the pixels: hundreds of columns take minutes on a CPU
ONE_SIGMA = (0.1587, 0.8413)  # quantiles
TINY = 1e-9


@dataclass(frozen=True)
class Sample:
    """
    Labelled stars, the input of the rivals.

    Attributes
    ----------
    flux, flux_error : array of shape (stars, pixels)
        On one grid, divided by the median flux; NaN where unknown.
    states : States
    labels, label_errors : array of shape (stars, labels)
        NaN where unknown.
    """

    flux: FloatArray
    flux_error: FloatArray
    states: States
    labels: FloatArray
    label_errors: FloatArray

    def tokens(self) -> tuple[FloatArray, FloatArray]:
        """Informative predictions and coefficients of the frozen model, (stars, features), and errors of 0."""
        states = self.states
        known = (states.coefficients * np.sqrt(states.reliability)).reshape(len(states), -1)
        found = np.concatenate([states.values, known[:, known.std(axis=0) > LEAST_SPREAD]], axis=1)
        return found, np.zeros_like(found)


def _common_grid(spectra: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Wavelengths of the spectrum with most pixels, used as the grid if an instrument has no common one."""
    return np.sort(np.asarray(max(spectra, key=lambda row: len(row["wavelength"]))["wavelength"], np.float64))


def _on_grid(spectra: Sequence[Mapping[str, Any]], grid: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Flux and error on a grid, (spectra, pixels) each; NaN where a neighbour is masked or far."""
    columns = np.full((2, len(spectra), grid.size), np.nan, np.float32)
    for i, row in enumerate(spectra):
        wavelength = np.asarray(row["wavelength"], np.float64)
        pixels = [np.where(row["mask"], np.nan, np.asarray(row[name])) for name in ("flux", "flux_error")]
        if np.array_equal(wavelength, grid):
            columns[:, i] = pixels
            continue
        order = np.argsort(wavelength)
        wavelength = wavelength[order]
        place = np.searchsorted(wavelength, grid).clip(1, max(wavelength.size - 1, 1))
        near = wavelength[place] - wavelength[place - 1] < 2.5 * np.median(np.diff(wavelength))
        for column, values in zip(columns[:, i], pixels, strict=True):
            column[near] = np.interp(grid, wavelength, values[order], left=np.nan, right=np.nan)[near]
    return columns[0], columns[1]


def pixels_of(stars: Dataset) -> tuple[NDArray[Any], NDArray[Any]]:
    """Fluxes over their medians, and errors, of spectra of one instrument on one grid, (stars, pixels)."""
    rows = list(tqdm(cast(Any, stars), desc="spectra for rivals", delay=2, leave=False, disable=None))
    flux, error = _on_grid(rows, _common_grid(rows))
    median = np.nan_to_num(np.nanmedian(np.where(np.isfinite(flux).any(axis=1)[:, None], flux, 1.0), axis=1), nan=1.0)
    median = np.where(median > 0, median, 1.0)[:, None].astype(np.float32)
    return flux / median, error / median


Rows = NDArray[np.int64]
Predict = Callable[[Sample, Rows, Rows, int], tuple[FloatArray, FloatArray]]


def _components(columns: FloatArray, fitted: Rows) -> FloatArray:
    """All principal components of the fitted rows, for all rows, in units of the first."""
    centered = np.nan_to_num(columns - np.nanmedian(_without_empty(columns[fitted]), axis=0))
    _, sizes, vectors = np.linalg.svd(centered[fitted], full_matrices=False)
    return centered @ vectors.T / (sizes[0] / np.sqrt(len(fitted)))


def _pixels(sample: Sample, fitted: Rows) -> FloatArray:
    """Principal components of the pixels for all rows, in units of the first."""
    return _components(transform_flux(sample.flux, sample.flux_error, "asinh")[0], fitted)


def _answers(sample: Sample, fitted: Rows) -> FloatArray:
    """Predictions of the frozen model, and scalars, standardised, for all rows; unknown scalars are the median."""
    values = sample.states.values.copy()
    if "teff" in sample.states.inputs:
        column = values[:, sample.states.inputs.index("teff")]
        column[:] = np.log(np.maximum(column, 1.0))
    if sample.states.scalars is not None:
        scalars = sample.states.scalars[..., 0].astype(np.float64)
        middle = np.nanmedian(_without_empty(scalars[fitted]), axis=0)
        values = np.concatenate([values, np.where(np.isfinite(scalars), scalars, middle)], axis=1)
    spread = values[fitted].std(axis=0)
    return (values - values[fitted].mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def _process(columns: Callable[[Sample, Rows], FloatArray], group: str, kind: str) -> Predict:
    """A Gaussian process on columns; with `kind` "linear", ridge regression whose penalty maximises the evidence."""

    def predict(sample: Sample, fitted: Rows, tested: Rows, seed: int) -> tuple[FloatArray, FloatArray]:
        inputs = torch.from_numpy(columns(sample, fitted[:MOST_STARS]))
        found = np.empty((2, len(tested), sample.labels.shape[1]))
        kernel = Kernel(Head("rival", {group: kind}), [inputs.shape[1]])
        for column, (label, error) in enumerate(zip(sample.labels.T, sample.label_errors.T, strict=True)):
            rows = fitted[np.isfinite(label[fitted])][:MOST_STARS]
            middle, unit = np.median(label[rows]), np.std(label[rows]) or 1.0
            target = torch.from_numpy((label[rows] - middle) / unit)
            variance = torch.from_numpy(np.nan_to_num(error[rows] / unit) ** 2)
            x, doubt, some = inputs[rows], torch.zeros(len(rows), dtype=torch.float64), slice(0, LIKELIHOOD_STARS)
            best = kernel.optimum(kernel.start, ITERATIONS, x[some], doubt[some], variance[some], target[some])
            own = kernel.unpack(best)
            factor = torch.linalg.cholesky(kernel.matrix(best, x, doubt, variance))
            weight = torch.cholesky_solve(target[:, None], factor)[:, 0]
            settings = (kernel.constant, own["linear"], own["length"], own["amplitude"])
            between = covariance(inputs[tested], x, *settings, kernel.sizes)
            solved = torch.linalg.solve_triangular(factor, between.T, upper=False)
            left = own_variance(inputs[tested], kernel.constant, own["linear"], own["amplitude"])
            left = (left - (solved**2).sum(dim=0)).clamp(min=0.0) + own["noise"]
            found[0, :, column] = middle + unit * (between @ weight).numpy()
            found[1, :, column] = unit * left.sqrt().numpy()
        return found[0], found[1]

    return predict


def _network(columns: Callable[[Sample], tuple[FloatArray, FloatArray]], transform: str) -> Predict:
    """A multilayer perceptron on the output of `columns`, with errors, and on its principal components."""

    def predict(sample: Sample, fitted: Rows, tested: Rows, seed: int) -> tuple[FloatArray, FloatArray]:
        inputs, errors = columns(sample)
        batch_size = int(np.clip(len(fitted) // 4, 16, 256))
        epochs = int(np.clip(MLP_STEPS * batch_size // len(fitted), 5, MLP_EPOCHS))
        network = MLPBaseline(
            batch_size=batch_size, epochs=epochs, degrees_of_freedom=3.0, dropout=0.1, noise=1.0, weight_decay=0.1,
            transform=transform, seed=seed,
        )  # fmt: skip
        spectra = Spectra(inputs, errors, sample.labels, sample.label_errors, np.empty((len(inputs), 0)))
        return network.fit(spectra[fitted]).raw_predict(inputs[tested], errors[tested])

    return predict


def _tabicl(sample: Sample, fitted: Rows, tested: Rows, seed: int) -> tuple[FloatArray, FloatArray]:
    """
    The tabular foundation model TabICL on the predictions of the frozen model and the first principal components of the
    pixels. It must be installed, with its weights on this machine: none are downloaded, ValueError without them.
    """
    regressor = importlib.import_module("tabicl").TabICLRegressor
    inputs = np.concatenate([_answers(sample, fitted), _pixels(sample, fitted)[:, :TABICL_COMPONENTS]], axis=1)
    found = np.empty((2, len(tested), sample.labels.shape[1]))
    for column, label in enumerate(sample.labels.T):
        rows = fitted[np.isfinite(label[fitted])]
        model = regressor(allow_auto_download=False, random_state=seed).fit(inputs[rows], label[rows])
        answer = model.predict(inputs[tested], output_type=["mean", "quantiles"], alphas=ONE_SIGMA)
        found[0, :, column] = answer["mean"]
        found[1, :, column] = 0.5 * np.diff(answer["quantiles"], axis=1)[:, 0]
    return found[0], np.maximum(found[1], TINY)


TABICL = "TabICL on its answers and pixels"
RIVALS: dict[str, Predict] = {
    "Gaussian process on its answers": _process(_answers, "answers", "both"),
    "ridge on pixels": _process(_pixels, "shape", "linear"),
    "Gaussian process on pixels": _process(_pixels, "shape", "both"),
    "PCA + MLP on pixels": _network(lambda sample: (sample.flux, sample.flux_error), "asinh"),
    "MLP on tokens": _network(Sample.tokens, "raw"),
}


def ask_rivals(
    sample: Sample,
    parts: Sequence[tuple[Rows, Rows]],
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, tuple[FloatArray, FloatArray]]:
    """
    Predictions of all rivals for stars that they were not fitted to.

    Parameters
    ----------
    sample : Sample
    parts : sequence of (rows, rows)
        Stars to fit to, and stars to predict; each star is predicted at most once.
    seed : int
    say : callable
        Prints a line if TabICL is installed but cannot be used.

    Returns
    -------
    dict
        Values and errors by name, of shape (stars, labels), NaN for other stars. Errors are calibrated on the predicted
        stars themselves.
    """
    answers = {}
    rivals = {**RIVALS, **({TABICL: _tabicl} if importlib.util.find_spec("tabicl") else {})}
    for name, predict in tqdm(rivals.items(), desc="rivals", delay=2, leave=False, disable=None):
        found = np.full((2, *sample.labels.shape), np.nan)
        try:
            for fitted, tested in parts:
                found[:, tested] = predict(sample, fitted, tested, seed)
        except Exception as failure:  # TabICL is optional
            if name != TABICL:
                raise
            say(f"TabICL is installed but cannot be used, so it is not compared: {one_line(failure)}")
            continue
        for column, label in enumerate(sample.labels.T):
            known = np.isfinite(label) & np.isfinite(found[0, :, column])
            residual, error = found[0, known, column] - label[known], found[1, known, column]
            stated = np.nan_to_num(sample.label_errors[known, column])
            found[1, :, column] *= error_factor(residual, error, stated, 0.0)
        answers[name] = found[0], found[1]
    return answers


def verdict(label: str, unit: str, own: FloatArray, others: Mapping[str, FloatArray], seed: int = 0) -> str:
    """
    A line that names the best model for a label.

    Parameters
    ----------
    label, unit : str
    own : array of shape (stars,)
        Predicted - true of the fine-tuned checkpoint.
    others : mapping of str to array
        Predicted - true of the other models.
    """

    def rmse(residual: Any) -> float:
        return float(np.sqrt(np.mean(np.square(residual))))

    best = min(others, key=lambda name: rmse(others[name]))
    rows = np.random.default_rng([seed, 6]).integers(len(own), size=(RESAMPLINGS, len(own)))
    ahead = np.mean((own[rows] ** 2).mean(axis=1) < (others[best][rows] ** 2).mean(axis=1))
    figures = {"fine-tuned": rmse(own), best: rmse(others[best])}
    first, second = sorted(figures, key=lambda name: figures[name])
    sure = ahead if first == "fine-tuned" else 1.0 - ahead
    unit = f" {unit}" if unit else ""
    return (
        f"{label}: {first} is ahead, RMSE {figures[first]:.4g}{unit}; {second} {figures[second]:.4g}{unit} "
        f"(ahead in {sure:.0%} of bootstrap samples)"
    )


__all__ = ["RIVALS", "TABICL", "Sample", "ask_rivals", "pixels_of", "verdict"]

# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Explain predictions: their derivatives with respect to the flux of each pixel, the information in each part of the
spectrum, and the spectral lines there.

The model on evidence has no attention to plot, but exact derivatives of each prediction with respect to the flux of
each pixel ([`response`]). The squared derivative times the variance of the pixel is the pixel's contribution to the
variance of the prediction; for least squares this is its share of the information about the label. Peaks are matched to
`resources/lines.csv` and compared with shifted lines, because dense peaks match any list of lines.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import find_peaks

from ..checkpoints import demand_evidence
from ..data.lines import Line, line_list
from ..files import complete_file
from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from ..models.flags_spectrafm import QUALITY
from .prediction import NO_ANSWER, answered_labels, schema_tokenizer, tokenize_rows
from .response import PixelResponses, pixel_responses


#: log g that separates giants from dwarfs, and Teff (K) that separates cool from hot stars.
GIANT_LOGG, HOT_TEFF = 3.5, 5000.0
TYPES = ("all", "giants", "dwarfs", "cool", "hot")
#: Name of the combination of all labels.
ALL_LABELS = "all"
#: A line and a peak this near (Angstrom) are the same; half the width of a line where that is more.
TOLERANCE = 1.0
#: Angstrom a pixel: in coarser spectra most lines are blends.
COARSE_STEP = 5.0
#: The most prominent peaks of a curve are used: so many for each 1,000 pixels, and at least `MIN_PEAKS`.
PEAKS_PER_1000_PIXELS, MIN_PEAKS = 10, 10
DRAWS = 10_000
#: Default width of a line: about a resolution element of well sampled spectra.
LINE_PIXELS = 3


# ------------------------------------------------------------------------------------------------------ a set of stars


@dataclass(frozen=True)
class Explanation:
    """Explanations averaged over stars, with N pixels, T intervals, R requests.

    Attributes
    ----------
    labels : list of str
        The R requests; several are followed by `ALL_LABELS`: the root of the sum of their squared gradients and
        responses, each in units of the scale of its label, and the mean of their information.
    n_stars : int
    wavelength, flux : array of shape (N,)
        Angstrom; flux over the level of the star.
    gradient : array of shape (R, N)
        Change of the prediction, in its unit, for 1 % more flux in one pixel.
    response : array of shape (R, N)
        Change of the prediction, in its unit, when a line of the width `line_width` becomes 1 % deeper: minus the sum
        of the gradients below the line. Gradients of neighbouring pixels may cancel, so this measures the effect of a
        line better than the gradient of one pixel.
    intervals : array of shape (T, 2)
        Edges of the intervals of the model, Angstrom.
    information : array of shape (R, T)
        Share of each interval in the variance of the prediction due to the errors of the flux.
    step, line_width : float
        Size of a pixel, and full width of a line at half depth, Angstrom.
    """

    labels: list[str]
    n_stars: int
    wavelength: NDArray[np.float64]
    flux: NDArray[np.float64]
    gradient: NDArray[np.float64]
    response: NDArray[np.float64]
    intervals: NDArray[np.float64]
    information: NDArray[np.float64]
    step: float
    line_width: float


class Explainer:
    """Averages explanations over stars, on the wavelengths of the first one.

    Parameters
    ----------
    model : SpectraFMForPrediction
        It is put into eval mode.
    tokenizer : SpectraFMTokenizer
        With a basis.
    requests : sequence of str, optional
        Labels. Default: those predicted for the first star.
    line_width : float, optional
        Full width at half depth, Angstrom. Default: `LINE_PIXELS` pixels.
    by_type : bool
        Average each of the `TYPES` separately, by the `teff` and `logg` of the rows or, where unknown, of the model.

    Raises
    ------
    ValueError
        For an unknown label, a width that is not positive, or a model whose tokens are fluxes.
    """

    def __init__(
        self,
        model: SpectraFMForPrediction,
        tokenizer: SpectraFMTokenizer,
        requests: Sequence[str] | None = None,
        *,
        line_width: float | None = None,
        by_type: bool = False,
    ) -> None:
        demand_evidence(tokenizer, "explain")
        self.model, self.tokenizer = model.eval(), schema_tokenizer(tokenizer)
        self.requests = list(requests or ())
        tokenizer.label_ids(self.requests)
        if line_width is not None and not line_width > 0:
            raise ValueError(f"line_width: expected a positive number, got {line_width:g}")
        self.line_width = line_width
        self.types = TYPES if by_type else TYPES[:1]
        self.grid = np.empty(0)
        self.n_stars = dict.fromkeys(self.types, 0)
        # A row each: how many stars have the pixel, their flux, then the gradient of each request; and the shares of
        # the intervals, a row for each request.
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.shares: dict[str, NDArray[np.float64]] = {}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """Add a batch of rows of the schema; returns why a row could not be used."""
        reasons = [row.get("refused") or "" for row in rows]
        usable = [i for i, reason in enumerate(reasons) if not reason]
        if usable and not self.requests:
            self.requests = answered_labels(self.model, self.tokenizer, rows[usable[0]])
        causes = [""] * len(usable)
        parts = list(tokenize_rows(self.tokenizer, [rows[i] for i in usable], self.requests, causes)) if usable else []
        for inputs, part in sorted(parts, key=lambda part: int(part[1].min())):  # the first star comes first
            members = np.array(usable)[part]
            tokens = {name: value.to(self.model.device) for name, value in inputs.items() if name not in QUALITY}
            for found in pixel_responses(self.model, self.tokenizer, [rows[i] for i in members], tokens):
                for i, member in enumerate(members[found.stars]):
                    reasons[member] = self._add_star(found, i, rows[member])
        for i, cause in zip(usable, causes, strict=True):
            reasons[i] = reasons[i] or cause
        return {i: reason for i, reason in enumerate(reasons) if reason}

    def _add_star(self, found: PixelResponses, i: int, row: Mapping[str, Any]) -> str:
        """Add one star; returns why, if it could not be added."""
        if not self.grid.size:
            self.grid = found.wavelength
            self.sums = {name: np.zeros((2 + len(self.requests), self.grid.size)) for name in self.types}
            n_intervals = self.model.config.num_intervals
            self.shares = {name: np.zeros((len(self.requests), n_intervals)) for name in self.types}
        valid = found.valid[i]
        wavelength = found.wavelength[valid]
        right = np.searchsorted(self.grid, wavelength).clip(1, max(self.grid.size - 1, 1))
        left, right = right - 1, np.minimum(right, self.grid.size - 1)
        pixel = np.where(wavelength - self.grid[left] < self.grid[right] - wavelength, left, right)
        near = np.abs(self.grid[pixel] - wavelength) < 0.75 * (self.grid[right] - self.grid[left])
        if 2 * np.unique(pixel[near]).size < max(wavelength.size, np.count_nonzero(np.isfinite(row["flux"])) // 2):
            return "expected the wavelengths of the first star, got others"
        unknown = [name for name, value in zip(self.requests, found.values[i], strict=True) if not np.isfinite(value)]
        if unknown:
            return f"{NO_ANSWER}: {', '.join(unknown)}"
        flux = found.flux[i][valid]
        gradient = found.response[i][:, valid] * 0.01 * flux
        columns = np.concatenate([np.ones((1, wavelength.size)), flux[None] / found.level[i], gradient])
        for name in star_types(row, dict(zip(self.requests, found.values[i], strict=True))):
            if name in self.sums:
                for total, column in zip(self.sums[name], columns, strict=True):
                    np.add.at(total, pixel[near], column[near])
                self.shares[name][:, found.intervals] += found.information()[i]
                self.n_stars[name] += 1
        return ""

    def explanations(self) -> dict[str, Explanation]:
        """By type of star; types without a star are left out."""
        return {name: self._explanation(name) for name in self.types if self.n_stars[name]}

    def _explanation(self, name: str) -> Explanation:
        # Pixels that few stars have, such as those at the edges, are noisier.
        common = self.sums[name][0] > 0.5 * self.sums[name][0].max()
        count, flux, *rest = self.sums[name][:, common]
        gradient = np.array(rest) / count
        wavelength = self.grid[common]
        step = float(np.median(np.diff(wavelength))) if wavelength.size > 1 else 0.0
        width = self.line_width or LINE_PIXELS * step
        response = -spread_over_line(wavelength, gradient, width)
        seen = self.shares[name].any(axis=0)
        information = self.shares[name][:, seen] / self.n_stars[name]
        assert self.tokenizer.basis is not None
        intervals = self.tokenizer.basis.interval_edges[seen]
        labels = list(self.requests)
        if len(labels) > 1:
            labels.append(ALL_LABELS)
            information = np.concatenate([information, information.mean(axis=0, keepdims=True)])
            config = self.model.config
            known = dict(zip(config.label_names, config.label_scales, strict=True))
            scales = np.array([known[label] for label in self.requests])[:, None]
            gradient, response = (
                np.concatenate([curves, np.sqrt(((curves / scales) ** 2).sum(axis=0, keepdims=True))])
                for curves in (gradient, response)
            )
        return Explanation(
            labels, self.n_stars[name], wavelength, flux / count, gradient, response, intervals, information,
            step, width,
        )  # fmt: skip


def spread_over_line(
    wavelength: NDArray[np.float64], gradient: NDArray[np.float64], width: float
) -> NDArray[np.float64]:
    """(N,), (R, N) -> (R, N): at each pixel, the sum of the gradients under a Gaussian of that full width."""
    reach = int(np.ceil(1.5 * width / np.min(np.diff(wavelength)))) if wavelength.size > 1 else 0
    total = gradient.copy()
    for shift in range(1, min(reach + 1, wavelength.size)):
        # Distances are in Angstrom, so that lines do not cross gaps between detectors.
        weight = np.exp(-4 * np.log(2) * ((wavelength[shift:] - wavelength[:-shift]) / width) ** 2)
        total[:, shift:] += weight * gradient[:, :-shift]
        total[:, :-shift] += weight * gradient[:, shift:]
    return total


def star_types(row: Mapping[str, Any], predicted: Mapping[str, float]) -> list[str]:
    """One of `TYPES`, by the labels of a row or, if it has none, the predicted ones."""
    teff, logg = (
        known if np.isfinite(known := row.get(name, np.nan)) else predicted.get(name, np.nan)
        for name in ("teff", "logg")
    )
    types = ["all"]
    if np.isfinite(logg):
        types.append("giants" if logg < GIANT_LOGG else "dwarfs")
    if np.isfinite(teff):
        types.append("hot" if teff > HOT_TEFF else "cool")
    return types


# ------------------------------------------------------------------------------------------------------ peaks and lines


@dataclass(frozen=True)
class Peak:
    """A peak of a curve, and the nearest line within the tolerance, if any."""

    wavelength: float
    height: float
    prominence: float
    line: Line | None


def peaks_of(
    wavelength: NDArray[np.float64], curve: NDArray[np.float64], lines: Sequence[Line], tolerance: float
) -> list[Peak]:
    """The most prominent peaks of a curve, whatever its sign, the most prominent first.

    Parameters
    ----------
    wavelength, curve : array of shape (N,)
    lines : sequence of Line
    tolerance : float
        Angstrom.
    """
    height = np.abs(curve)
    index, found = find_peaks(np.pad(height, 1), prominence=0)  # a peak may lie at an end
    index -= 1
    n_peaks = max(MIN_PEAKS, PEAKS_PER_1000_PIXELS * len(curve) // 1000)
    order = np.argsort(-found["prominences"], kind="stable")[:n_peaks]
    peaks = []
    for i, prominence in zip(index[order], found["prominences"][order], strict=True):
        near = min(lines, key=lambda line: abs(line.wavelength - wavelength[i]), default=None)
        if near is not None and abs(near.wavelength - wavelength[i]) > tolerance:
            near = None
        peaks.append(Peak(float(wavelength[i]), float(height[i]), float(prominence), near))
    return peaks


@dataclass(frozen=True)
class Recovery:
    """Number of lines at peaks, compared with shifted lines.

    Attributes
    ----------
    n_found, n_lines : int
        Of the lines that lie within the spectrum.
    random, random_spread : float
        Mean and standard deviation over the draws.
    p_value : float
        Fraction of draws with as many or more, counting the lines themselves as one draw.
    """

    n_found: int
    n_lines: int
    random: float
    random_spread: float
    p_value: float


def recovery(
    peaks: ArrayLike, lines: ArrayLike, wavelength: NDArray[np.float64], tolerance: float, seed: int = 0
) -> Recovery:
    """Compare lines with random wavelengths.

    In each of the `DRAWS` draws all lines are shifted by the same random number of pixels, cyclically. Independent
    random wavelengths would overstate the significance, because lines and peaks cluster.

    Parameters
    ----------
    peaks, lines : array of wavelengths
    wavelength : array of shape (N,)
        Of the pixels, sorted. Lines further than `tolerance` from all of them do not count.
    tolerance : float
        Angstrom.
    seed : int
    """
    marks, known = np.sort(np.asarray(peaks, np.float64)), np.asarray(lines, np.float64)
    known = known[_distance(known, wavelength) <= tolerance]
    n_found = int(np.count_nonzero(_distance(known, marks) <= tolerance))
    pixel = np.arange(wavelength.size)
    # Shifts within the tolerance do not count.
    step = np.median(np.diff(wavelength)) if wavelength.size > 1 else 1.0
    least = min(2 * tolerance / step, 0.4 * wavelength.size)
    shift = np.random.default_rng(seed).uniform(least, wavelength.size - least, size=(DRAWS, 1))
    place = (np.interp(known, wavelength, pixel) + shift) % wavelength.size
    drawn = wavelength[np.rint(place).astype(int) % wavelength.size]
    hits = np.count_nonzero(_distance(drawn, marks) <= tolerance, axis=1)
    p_value = (1 + np.count_nonzero(hits >= n_found)) / (1 + DRAWS)
    return Recovery(n_found, known.size, float(hits.mean()), float(hits.std()), float(p_value))


@dataclass(frozen=True)
class Match:
    """Peaks of the response of a label, and how many of the known lines and of the paper's 14 lines are at them."""

    label: str
    peaks: list[Peak]
    known: Recovery
    paper: Recovery


def match_lines(explanation: Explanation) -> list[Match]:
    """Peaks of the response of every label, the lines at them, and the number expected by chance.

    For low resolution only the lines that are visible there are used.
    """
    lines = [line for line in line_list() if line.rank < 4 or explanation.step < COARSE_STEP]
    tolerance = max(TOLERANCE, 0.5 * explanation.line_width)
    matches = []
    for label, values in zip(explanation.labels, explanation.response, strict=True):
        peaks = peaks_of(explanation.wavelength, values, lines, tolerance)
        places = [peak.wavelength for peak in peaks]
        known, paper = (
            recovery(places, [line.wavelength for line in some], explanation.wavelength, tolerance)
            for some in (lines, [line for line in lines if line.paper])
        )
        matches.append(Match(label, peaks, known, paper))
    return matches


def _distance(points: NDArray[np.float64], marks: NDArray[np.float64]) -> NDArray[np.float64]:
    """From each point to the nearest of the sorted marks; any shape."""
    if not marks.size:
        return np.full(np.shape(points), np.inf)
    right = np.searchsorted(marks, points).clip(0, marks.size - 1)
    return np.minimum(np.abs(marks[right] - points), np.abs(marks[np.maximum(right - 1, 0)] - points))


# -------------------------------------------------------------------------------------------------------------- tables


def write_curves(path: str | os.PathLike[str], explanations: Mapping[str, Explanation]) -> None:
    """CSV with a row for each pixel and type of star, and gradient and response of each label."""
    with complete_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines)
        labels = next(iter(explanations.values())).labels
        names = [f"{label}_{curve}" for label in labels for curve in ("gradient", "response")]
        table.writerow(["stars", "wavelength", "flux", *names])
        for name, found in explanations.items():
            curves = np.stack([found.gradient, found.response], axis=1)
            numbers = np.concatenate([found.flux[None], curves.reshape(-1, found.wavelength.size)]).T
            for wavelength, values in zip(found.wavelength, numbers, strict=True):
                table.writerow([name, f"{wavelength:.3f}", *(f"{value:.5g}" for value in values)])


def write_intervals(path: str | os.PathLike[str], explanations: Mapping[str, Explanation]) -> None:
    """CSV with a row for each interval and type of star: its edges, and its share of the information on each label."""
    with complete_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines)
        table.writerow(["stars", "low", "high", *next(iter(explanations.values())).labels])
        for name, found in explanations.items():
            for (low, high), shares in zip(found.intervals, found.information.T, strict=True):
                table.writerow([name, f"{low:.2f}", f"{high:.2f}", *(f"{share:.5g}" for share in shares)])


def write_peaks(path: str | os.PathLike[str], matches: Mapping[str, Sequence[Match]]) -> None:
    """CSV with a row for each peak, the most prominent of a label first, and the line at it if one is known."""
    with complete_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines)
        table.writerow(["stars", "label", "wavelength", "height", "prominence", "line", "line_wavelength"])
        for name, of_type in matches.items():
            for match in of_type:
                for peak in match.peaks:
                    line = [peak.line.name, f"{peak.line.wavelength:.2f}"] if peak.line else ["", ""]
                    numbers = f"{peak.wavelength:.2f}", f"{peak.height:.5g}", f"{peak.prominence:.5g}"
                    table.writerow([name, match.label, *numbers, *line])

# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What a model looks at: attention and input gradients over wavelength, their peaks, and the spectral lines at those.

Attention says which tokens a request reads; it is as coarse as a token and says nothing of what is made of them. The
gradient says, pixel by pixel, by how much the answer moves when the flux does: where the two agree, a line is both read
and used. Peaks are matched to `resources/lines.csv`, and that is judged against random wavelengths, as peaks that are
dense enough hit any list of lines.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.signal import find_peaks

from .augmentation import without_first
from .data.schema import PIXEL_COLUMNS
from .files import complete_file
from .models import SpectraFMForPrediction, SpectraFMTokenizer
from .prediction import schema_tokenizer, tokenize_rows


#: log g that parts giants from dwarfs, and Teff (K) that parts cool from hot stars.
GIANT_LOGG, HOT_TEFF = 3.5, 5000.0
TYPES = ("all", "giants", "dwarfs", "cool", "hot")
#: The name of all labels together, beside theirs.
ALL_LABELS = "all"
#: What has peaks: `gradient`, pixel by pixel, is in the table only.
CURVES = ("attention", "response")
#: A line and a peak this near (Angstrom) are the same; half the width of a line, or of the part of a token by which the
#: phases differ, where that is more.
TOLERANCE = 1.0
#: Angstrom a pixel: in coarser spectra most lines are blends.
COARSE_STEP = 5.0
MIN_TOKENS = 20
#: Of the peaks of a curve, the most prominent count: so many for each 1,000 pixels, and at least `MIN_PEAKS`.
PEAKS_PER_1000_PIXELS, MIN_PEAKS = 10, 10
DRAWS = 10_000
#: Width of a line if none is given: about that of a resolution element in well sampled spectra.
LINE_PIXELS = 3


# -------------------------------------------------------------------------------------------------------- one batch


@dataclass(frozen=True)
class Attributions:
    """What a model looks at in each of B stars: T tokens of P pixels, R requests.

    Attributes
    ----------
    wavelength : array of shape (B, T, P)
        Angstrom, vacuum, rest frame.
    valid : array of bool, shape (B, T, P)
        Which pixels the model sees.
    flux : array of shape (B, T, P)
        Over the continuum of the tokenizer.
    attention : array of shape (B, R, T, P)
        Of a pixel, as a multiple of what even attention would give it. A token spreads its own over its valid pixels.
    gradient : array of shape (B, R, T, P)
        Change of the answer, in its unit, for 1 % more flux in one pixel, the continuum held fixed.
    values : array of shape (B, R)
        The answers.
    """

    wavelength: NDArray[np.float64]
    valid: NDArray[np.bool_]
    flux: NDArray[np.float64]
    attention: NDArray[np.float64]
    gradient: NDArray[np.float64]
    values: NDArray[np.float64]


@contextlib.contextmanager
def eager_attention(model: SpectraFMForPrediction) -> Iterator[None]:
    """The attention that tells its weights, for as long as it is needed."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attributions(
    model: SpectraFMForPrediction,
    tokenizer: SpectraFMTokenizer,
    inputs: Mapping[str, Any],
    *,
    layer: int = -1,
    head: int | None = None,
) -> Attributions:
    """Attention and input gradients of a batch.

    Parameters
    ----------
    model : SpectraFMForPrediction
        In eval mode.
    tokenizer : SpectraFMTokenizer
        The one that made `inputs`.
    inputs : mapping
        Without scalars.
    layer : int
        Of the decoder, from 0; -1 is the last.
    head : int, optional
        Of the layer, from 0. Default: their mean.

    Raises
    ------
    ValueError
        For a layer or head that is not there.
    """
    n_heads = list(model.config.decoder_attention_heads)
    if not -len(n_heads) <= layer < len(n_heads):
        raise ValueError(f"layer: expected 0 to {len(n_heads) - 1}, or -1 for the last, got {layer}")
    if head is not None and not 0 <= head < n_heads[layer]:
        raise ValueError(f"head: expected 0 to {n_heads[layer] - 1} in layer {layer}, got {head}")
    standardised = inputs["flux"].detach().clone().requires_grad_()
    with eager_attention(model), torch.enable_grad():
        output = model(**{**inputs, "flux": standardised}, output_attentions=True)
        # The stars of a batch do not see each other, so the sum over them has the gradient of each.
        answers = output.values.sum(dim=0)
        gradient = torch.stack([torch.autograd.grad(y, standardised, retain_graph=True)[0] for y in answers], dim=1)
    # Of a learned key that belongs to no token nothing is shown: with one, attention adds up to less than 1.
    weights = output.cross_attentions[layer][..., : standardised.shape[1]].detach()
    weights = weights.mean(dim=1) if head is None else weights[:, head]

    numbers = {name: value.double().cpu().numpy() for name, value in inputs.items() if name != "pixel_mask"}
    valid = inputs["pixel_mask"].cpu().numpy()
    pixels = np.arange(valid.shape[-1]) - 0.5 * (valid.shape[-1] - 1)
    wavelength = numbers["wavelength"][..., None] + pixels * numbers["wavelength_step"][..., None]
    center, scale = tokenizer._center_and_scale(wavelength)
    flux = numbers["flux"] * scale + center
    per_token = valid.sum(axis=-1)
    even = per_token / valid.sum(axis=(1, 2))[:, None]
    attention = weights.double().cpu().numpy() / np.maximum(even, 1e-12)[:, None]
    return Attributions(
        wavelength,
        valid,
        flux,
        np.where(valid[:, None], attention[..., None], 0.0),
        gradient.double().cpu().numpy() * np.where(valid, 0.01 * flux / scale, 0.0)[:, None],
        output.values.detach().double().cpu().numpy(),
    )


# ------------------------------------------------------------------------------------------------------ a set of stars


@dataclass(frozen=True)
class Explanation:
    """What a model looks at in a set of stars, N pixels, R requests: means over the stars.

    Attributes
    ----------
    labels : list of str
        The R requests; several are followed by `ALL_LABELS`: the mean of their attention, and the root of the sum of
        their squared gradients and responses, each in units of the scale of its label.
    n_stars : int
    wavelength, flux : array of shape (N,)
        Angstrom; over the continuum.
    attention, gradient : array of shape (R, N)
        As in [`Attributions`].
    response : array of shape (R, N)
        Change of the answer, in its unit, when a line of the width `line_width` becomes 1 % deeper: minus the sum of
        the gradients below the line. Neighbouring pixels see the same line, and a model may weigh them against each
        other; so this, and not the gradient of one pixel, says what a line does.
    step, token_width, line_width : float
        Of a pixel, of a token, and of a line at half its depth, Angstrom.
    phases : int
        So many times were the tokens laid, each time by an equal part of `token_width` further on.
    """

    labels: list[str]
    n_stars: int
    wavelength: NDArray[np.float64]
    flux: NDArray[np.float64]
    attention: NDArray[np.float64]
    gradient: NDArray[np.float64]
    response: NDArray[np.float64]
    step: float
    token_width: float
    line_width: float
    phases: int = 1


class Explainer:
    """Adds up what a model looks at, star by star, on the wavelengths of the first one.

    Parameters
    ----------
    model : SpectraFMForPrediction
        It is put into eval mode.
    tokenizer : SpectraFMTokenizer
    requests : sequence of str, optional
        Labels. Default: what the tokenizer asks for by itself.
    layer, head
        See [`attributions`].
    line_width : float, optional
        Full width at half depth, Angstrom. Default: `LINE_PIXELS` pixels.
    by_type : bool
        Keep the `TYPES` apart, by the `teff` and `logg` of the rows or, where these are not known, of the model.
    phases : int
        Look at each star so many times, without ever more of the first pixels of each detector, and take the mean: the
        tokens of one time overlap those of another, and what their attention has in common is narrower than a token.

    Raises
    ------
    ValueError
        For an unknown label, a width that is not positive, or more phases than a token has pixels.
    """

    def __init__(
        self,
        model: SpectraFMForPrediction,
        tokenizer: SpectraFMTokenizer,
        requests: Sequence[str] | None = None,
        *,
        layer: int = -1,
        head: int | None = None,
        line_width: float | None = None,
        by_type: bool = False,
        phases: int = 1,
    ) -> None:
        self.model, self.tokenizer = model.eval(), schema_tokenizer(tokenizer)
        self.requests = list(requests if requests is not None else tokenizer.requests or tokenizer.label_names)
        tokenizer.label_ids(self.requests)
        scales = dict(zip(model.config.label_names, model.config.label_scales, strict=True))
        self.scales = np.array([scales[name] for name in self.requests])
        if line_width is not None and not line_width > 0:
            raise ValueError(f"line_width: expected a positive number, got {line_width:g}")
        if not 1 <= phases <= tokenizer.patch_size:
            raise ValueError(f"phases: expected 1 to {tokenizer.patch_size}, the pixels of a token, got {phases}")
        self.layer, self.head, self.line_width, self.phases = layer, head, line_width, phases
        self.types = TYPES if by_type else TYPES[:1]
        self.grid = np.empty(0)
        self.token_width = 0.0
        self.n_stars = dict.fromkeys(self.types, 0)
        # A row each: how many stars have the pixel, their flux, then attention and gradient of each request.
        self.sums: dict[str, NDArray[np.float64]] = {}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """Add a batch of rows in the schema of this project; which of them could not be used, and why."""
        reasons = self._add_phase(rows, first=True)
        for phase in range(1, self.phases):
            n_pixels = phase * self.tokenizer.patch_size // self.phases
            self._add_phase([_without_first(row, n_pixels) for row, why in zip(rows, reasons, strict=True) if not why])
        return {i: reason for i, reason in enumerate(reasons) if reason}

    def _add_phase(self, rows: Sequence[Mapping[str, Any]], first: bool = False) -> list[str]:
        """Add rows as they are; for each, why not, if it could not be used."""
        reasons = [""] * len(rows)
        parts = list(tokenize_rows(self.tokenizer, rows, self.requests, reasons))
        for inputs, members in sorted(parts, key=lambda part: int(part[1].min())):  # the first star comes first
            inputs = inputs.to(self.model.device)
            found = attributions(self.model, self.tokenizer, inputs, layer=self.layer, head=self.head)
            if not self.grid.size:
                wavelength = np.asarray(rows[members[0]]["wavelength"], np.float64)
                self.grid = np.unique(wavelength[np.isfinite(wavelength)])
                self.sums = {name: np.zeros((2 + 2 * len(self.requests), self.grid.size)) for name in self.types}
                self.token_width = float(np.median(np.ptp(found.wavelength[0], axis=-1)))
            for i, member in enumerate(members):
                reasons[member] = self._add_star(found, i, rows[member], first)
        return reasons

    def _add_star(self, found: Attributions, i: int, row: Mapping[str, Any], first: bool) -> str:
        """Add one star, and count it if this is the first time; why not, if it does not fit."""
        valid = found.valid[i]
        wavelength = found.wavelength[i][valid]
        right = np.searchsorted(self.grid, wavelength).clip(1, max(self.grid.size - 1, 1))
        left, right = right - 1, np.minimum(right, self.grid.size - 1)
        pixel = np.where(wavelength - self.grid[left] < self.grid[right] - wavelength, left, right)
        near = np.abs(self.grid[pixel] - wavelength) < 0.75 * (self.grid[right] - self.grid[left])
        if 2 * np.unique(pixel[near]).size < max(wavelength.size, np.count_nonzero(np.isfinite(row["flux"])) // 2):
            return "expected the wavelengths of the first star, got others"
        columns = np.concatenate(
            [np.ones((1, wavelength.size)), found.flux[i][valid][None], found.attention[i][:, valid]]
            + [found.gradient[i][:, valid]]
        )
        for name in star_types(row, dict(zip(self.requests, found.values[i], strict=True))):
            if name in self.sums:
                for total, column in zip(self.sums[name], columns, strict=True):
                    np.add.at(total, pixel[near], column[near])
                self.n_stars[name] += first
        return ""

    def explanations(self) -> dict[str, Explanation]:
        """By type of star; types without a star are left out."""
        return {name: self._explanation(name) for name in self.types if self.n_stars[name]}

    def _explanation(self, name: str) -> Explanation:
        # Pixels that few of the stars have, such as those at the edges, are noisier than the rest.
        common = self.sums[name][0] > 0.5 * self.sums[name][0].max()
        count, flux, *rest = self.sums[name][:, common]
        attention, gradient = (np.array(rest) / count).reshape(2, len(self.requests), -1)
        wavelength = self.grid[common]
        step = float(np.median(np.diff(wavelength))) if wavelength.size > 1 else 0.0
        width = self.line_width or LINE_PIXELS * step
        response = -spread_over_line(wavelength, gradient, width)
        labels = list(self.requests)
        if len(labels) > 1:
            labels.append(ALL_LABELS)
            attention = np.concatenate([attention, attention.mean(axis=0, keepdims=True)])
            gradient, response = (
                np.concatenate([curves, np.sqrt(((curves / self.scales[:, None]) ** 2).sum(axis=0, keepdims=True))])
                for curves in (gradient, response)
            )
        return Explanation(
            labels, self.n_stars[name], wavelength, flux / count, attention, gradient, response,
            step, self.token_width, width, self.phases,
        )  # fmt: skip


def spread_over_line(
    wavelength: NDArray[np.float64], gradient: NDArray[np.float64], width: float
) -> NDArray[np.float64]:
    """(N,), (R, N) -> (R, N): at each pixel, the sum of the gradients under a Gaussian of that full width."""
    reach = int(np.ceil(1.5 * width / np.min(np.diff(wavelength)))) if wavelength.size > 1 else 0
    total = gradient.copy()
    for shift in range(1, min(reach + 1, wavelength.size)):
        # Distances in Angstrom: over a gap between detectors no line reaches.
        weight = np.exp(-4 * np.log(2) * ((wavelength[shift:] - wavelength[:-shift]) / width) ** 2)
        total[:, shift:] += weight * gradient[:, :-shift]
        total[:, :-shift] += weight * gradient[:, shift:]
    return total


def star_types(row: Mapping[str, Any], predicted: Mapping[str, float]) -> list[str]:
    """Out of `TYPES`, by the labels of a row or, where it has none, the predicted ones."""
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


def _without_first(row: Mapping[str, Any], n_pixels: int) -> dict[str, Any]:
    wavelength, flux, flux_error, mask = (np.asarray(row[name]) for name in PIXEL_COLUMNS)
    shorter = without_first((wavelength, flux, flux_error, mask), n_pixels)
    return {**row, **dict(zip(PIXEL_COLUMNS, shorter, strict=True))}


# ------------------------------------------------------------------------------------------------------ peaks and lines


@dataclass(frozen=True)
class Line:
    """A line of `resources/lines.csv`, which says whence it is.

    Attributes
    ----------
    wavelength : float
        Angstrom, vacuum.
    name : str
    rank : int
        1 is marked first in pictures; 4, the lines of the synthesis list, only at a peak.
    paper : bool
        One of the 14 at which the attention of the published model peaks.
    """

    wavelength: float
    name: str
    rank: int
    paper: bool


@cache
def line_list() -> tuple[Line, ...]:
    """All lines, by wavelength."""
    text = (files("spectrafm_hf") / "resources" / "lines.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return tuple(Line(float(row["wavelength"]), row["name"], int(row["rank"]), row["paper"] == "yes") for row in rows)


@dataclass(frozen=True)
class Peak:
    """A peak of a curve, and the line nearest to it, if one lies within the tolerance."""

    wavelength: float
    height: float
    prominence: float
    line: Line | None


def peaks_of(
    wavelength: NDArray[np.float64], curve: NDArray[np.float64], lines: Sequence[Line], tolerance: float
) -> list[Peak]:
    """The most prominent peaks of |curve|, the most prominent first.

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
    """How many of some lines are at peaks, and how many would be by chance.

    Attributes
    ----------
    n_found, n_lines : int
        Of the lines that lie within the spectrum.
    random, random_spread : float
        Mean and standard deviation over the draws.
    p_value : float
        How often a draw finds as many or more, counting the lines themselves as one draw.
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

    In each of the `DRAWS` draws all lines move by the same random number of pixels, around the ends: lines cluster, and
    so do peaks, and random wavelengths that do not would make too much of that.

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
    # A shift by less than what counts as the same place is none.
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
    """The peaks of a curve of a label, and how many of the known lines, and of the paper's 14, are at them."""

    label: str
    curve: str
    peaks: list[Peak]
    known: Recovery
    paper: Recovery


def match_lines(explanation: Explanation) -> list[Match]:
    """Peaks of every curve, the lines at them, and what chance would find.

    In coarse spectra only the lines that show there are known; where there are less than `MIN_TOKENS` tokens, their
    attention is not compared with lines.
    """
    lines = [line for line in line_list() if line.rank < 4 or explanation.step < COARSE_STEP]
    matches = []
    for curve in CURVES:
        if curve == "attention" and np.ptp(explanation.wavelength) < MIN_TOKENS * explanation.token_width:
            continue
        width = explanation.line_width
        if curve == "attention":
            width = explanation.token_width / explanation.phases
        tolerance = max(TOLERANCE, 0.5 * width)
        for label, values in zip(explanation.labels, getattr(explanation, curve), strict=True):
            peaks = peaks_of(explanation.wavelength, values, lines, tolerance)
            places = [peak.wavelength for peak in peaks]
            known, paper = (
                recovery(places, [line.wavelength for line in some], explanation.wavelength, tolerance)
                for some in (lines, [line for line in lines if line.paper])
            )
            matches.append(Match(label, curve, peaks, known, paper))
    return matches


def _distance(points: NDArray[np.float64], marks: NDArray[np.float64]) -> NDArray[np.float64]:
    """From each point to the nearest of the sorted marks; any shape."""
    if not marks.size:
        return np.full(np.shape(points), np.inf)
    right = np.searchsorted(marks, points).clip(0, marks.size - 1)
    return np.minimum(np.abs(marks[right] - points), np.abs(marks[np.maximum(right - 1, 0)] - points))


# -------------------------------------------------------------------------------------------------------------- tables


def write_curves(path: str | os.PathLike[str], explanations: Mapping[str, Explanation]) -> None:
    """CSV with a row for each pixel and type of star, and attention, gradient and response of each label."""
    with complete_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines)
        labels = next(iter(explanations.values())).labels
        names = [f"{label}_{curve}" for label in labels for curve in ("attention", "gradient", "response")]
        table.writerow(["stars", "wavelength", "flux", *names])
        for name, found in explanations.items():
            curves = np.stack([found.attention, found.gradient, found.response], axis=1)
            numbers = np.concatenate([found.flux[None], curves.reshape(-1, found.wavelength.size)]).T
            for wavelength, values in zip(found.wavelength, numbers, strict=True):
                table.writerow([name, f"{wavelength:.3f}", *(f"{value:.5g}" for value in values)])


def write_peaks(path: str | os.PathLike[str], matches: Mapping[str, Sequence[Match]]) -> None:
    """CSV with a row for each peak, the most prominent of a curve first, and the line at it if one is known."""
    with complete_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines)
        table.writerow(["stars", "label", "curve", "wavelength", "height", "prominence", "line", "line_wavelength"])
        for name, of_type in matches.items():
            for match in of_type:
                for peak in match.peaks:
                    line = [peak.line.name, f"{peak.line.wavelength:.2f}"] if peak.line else ["", ""]
                    numbers = f"{peak.wavelength:.2f}", f"{peak.height:.5g}", f"{peak.prominence:.5g}"
                    table.writerow([name, match.label, match.curve, *numbers, *line])

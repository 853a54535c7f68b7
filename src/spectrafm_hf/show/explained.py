# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of explanations. Each `plot_` function writes one PNG file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from ..data.lines import Line, line_list
from ..inference.explain import COARSE_STEP, Explanation, Peak
from .spectra import ZOOM_WIDTH, _flux_limits, draw_spectrum, mark_lines, name_line
from .style import BLUE, GREY, INK, ORANGE, WAVELENGTH, axis_label, legend_below, save_figure, style_axes, symbol


def plot_explanation(
    path: str | os.PathLike[str],
    explanation: Explanation,
    label: str,
    peaks: Sequence[Peak],
    units: Mapping[str, str],
    title: str = "",
) -> None:
    """Explanation of one label: spectrum, information, response to a line, close-ups of the highest peaks.

    Parameters
    ----------
    path : path
        PNG file to write.
    explanation : Explanation
    label : str
        One of `explanation.labels`.
    peaks : sequence of Peak
        Of the response, the most prominent first. Their lines are named; in spectra of more than 2,000 pixels the
        first five have close-ups.
    units : mapping of label to str
    title : str
    """
    wavelength = explanation.wavelength
    x, flux, response = _curves(explanation, label)
    size = len(wavelength)
    chosen = _apart(peaks, ZOOM_WIDTH, 5) if size > 2000 else []
    figure = Figure(figsize=(13.33, 7.5), layout=ConstrainedLayoutEngine(h_pad=0.04, w_pad=0.06, hspace=0.03))
    heights = [2, 1.1, 1.8, 2.1] if chosen else [2, 1.1, 1.8]
    grid = figure.add_gridspec(len(heights), max(len(chosen), 1), height_ratios=heights)
    top = figure.add_subplot(grid[0, :])
    middle, bottom = (figure.add_subplot(grid[i, :], sharex=top) for i in (1, 2))
    width = 1.4 if size < 1000 else 0.5
    top.plot(x, flux, color=INK, lw=width, drawstyle="steps-mid")
    top.set_ylim(_flux_limits(explanation.flux))
    _draw_information(middle, explanation, label)
    _draw_response(bottom, explanation, label, units)
    top.set_xlim(wavelength[0], wavelength[-1])
    top.set_ylabel("Flux", fontsize=12)
    for axes in (top, middle):
        axes.tick_params(labelbottom=False)
    room = 0.014 * (wavelength[-1] - wavelength[0])
    named = [peak.line for peak in peaks if peak.line]
    if explanation.step > COARSE_STEP:  # few lines are at peaks there; well-known ones give orientation
        named += [line for line in line_list() if line.rank == 1]
    marked: list[Line] = []
    for line in named:
        apart = all(abs(line.wavelength - other.wavelength) > room for other in marked)
        if apart and wavelength[0] < line.wavelength < wavelength[-1]:
            marked.append(line)
            name_line(top, line)
            for axes in (middle, bottom):
                axes.axvline(line.wavelength, color=GREY, lw=0.5, zorder=0)
    for column, peak in enumerate(sorted(chosen, key=lambda peak: peak.wavelength)):
        axes = figure.add_subplot(grid[3, column])
        low, high = peak.wavelength - ZOOM_WIDTH / 2, peak.wavelength + ZOOM_WIDTH / 2
        within = np.flatnonzero((x > low) & (x < high))
        inside = slice(within[0], within[-1] + 1)  # with the gaps, at which x is NaN
        axes.plot(x[inside], flux[inside], color=INK, lw=1.2, drawstyle="steps-mid")
        axes.set_xlim(low, high)
        below = axes.twinx()
        below.fill_between(x[inside], response[inside], color=ORANGE, alpha=0.6, lw=0, step="mid")
        # Flux above and response below share a panel.
        reach = np.nanmax(np.abs(response[inside])) or 1.0
        below.set_ylim(-1.1 * reach, 3.6 * reach)
        below.set_yticks([])
        lowest, highest = np.nanmin(flux[inside]), np.nanmax(flux[inside])
        axes.set_ylim(lowest - 0.9 * (highest - lowest or 1.0), highest + 0.08 * (highest - lowest or 1.0))
        for line in _lines_within(np.nanmin(x[inside]), np.nanmax(x[inside]), peaks):
            name_line(axes, line)
        axes.ticklabel_format(useOffset=False)
        axes.locator_params(axis="x", nbins=4)
        style_axes(axes)
        if column == 0:
            axes.set_ylabel("Close-ups", fontsize=12)
    for axes in (top, middle, bottom):
        style_axes(axes)
    if not chosen:
        bottom.set_xlabel(WAVELENGTH, fontsize=13)
    else:
        figure.supxlabel(WAVELENGTH, fontsize=13, color=INK)
    figure.align_ylabels()
    subject = symbol(label) if label in units else "All labels"
    figure.suptitle(f"{subject}: {title}", x=0.012, ha="left", fontsize=15, color=INK)
    save_figure(figure, path)


def plot_explained_star(
    path: str | os.PathLike[str] | BinaryIO,
    row: Mapping[str, Any],
    explanation: Explanation,
    label: str,
    units: Mapping[str, str],
    *,
    wavelength_range: tuple[float, float] | None = None,
    flux_label: str = "Flux",
    narrow: bool = False,
) -> None:
    """One spectrum with errors and masked pixels, and below it the explanation of one label.

    Parameters
    ----------
    path : path or binary stream
        PNG file to write.
    row : mapping
        A spectrum in the schema of this project.
    explanation : Explanation
        Of this spectrum.
    label : str
        One of `explanation.labels`.
    units : mapping of label to str
    wavelength_range : (low, high), optional
        Draw this part only, Angstrom.
    flux_label : str
        Of the vertical axis.
    narrow : bool
        For the screen of a phone, upright.
    """
    figure = Figure(figsize=(5.0, 6.4) if narrow else (11.5, 6.6), layout=ConstrainedLayoutEngine(hspace=0.03))
    top, middle, bottom = figure.subplots(3, sharex=True, height_ratios=[2.2, 1, 1.3])
    draw_spectrum(top, row, wavelength_range)
    mark_lines(top, row, 0.036 if narrow else 0.014)
    top.set_xlabel("")
    top.set_ylabel(flux_label, fontsize=11)
    low, high = top.get_xlim()
    _draw_information(middle, explanation, label)
    _draw_response(bottom, explanation, label, units)
    top.set_xlim(low, high)
    for axes in (middle, bottom):
        style_axes(axes)
    bottom.set_xlabel(WAVELENGTH, fontsize=12)
    if narrow:
        bottom.locator_params(axis="x", nbins=4)
    figure.align_ylabels()
    for line in legend_below(figure, top, ncols=4, fontsize=11).get_lines():
        line.set_linewidth(2.0)
    save_figure(figure, path)


def _curves(explanation: Explanation, label: str) -> list[NDArray[np.float64]]:
    """Wavelength, flux and response, with NaN at gaps and masked pixels."""
    row = explanation.labels.index(label)
    step = np.diff(explanation.wavelength)
    gaps = np.flatnonzero(step > 2.5 * explanation.step) + 1 if explanation.step else np.empty(0, int)
    curves = explanation.wavelength, explanation.flux, explanation.response[row]
    return [np.insert(curve, gaps, np.nan) for curve in curves]


def _draw_information(axes: Axes, explanation: Explanation, label: str) -> None:
    """A bar for each interval."""
    shares = 100.0 * explanation.information[explanation.labels.index(label)]
    low, high = explanation.intervals.T
    axes.bar(low, shares, high - low, align="edge", color=BLUE, alpha=0.75, ec="white", lw=0.8)
    axes.set_ylim(0, 1.08 * shares.max() or 1.0)
    axes.set_ylabel("Information\n[% of all]", fontsize=12)


def _draw_response(axes: Axes, explanation: Explanation, label: str, units: Mapping[str, str]) -> None:
    x, _, response = _curves(explanation, label)
    axes.fill_between(x, response, color=ORANGE, lw=0.6, step="mid")
    axes.axhline(0, color=GREY, lw=0.6)
    number = axis_label(label, units) if label in units else "all labels, scaled"
    axes.set_ylabel(f"{number}\nfor a line\n1 % deeper", fontsize=12)


def _apart(peaks: Sequence[Peak], distance: float, number: int) -> list[Peak]:
    """The first peaks that are at least `distance` apart."""
    chosen: list[Peak] = []
    for peak in peaks:
        if len(chosen) < number and all(abs(peak.wavelength - other.wavelength) >= distance for other in chosen):
            chosen.append(peak)
    return chosen


def _lines_within(low: float, high: float, peaks: Sequence[Peak]) -> list[Line]:
    """Lines of a close-up whose names fit: at the most prominent peaks first, then the best known."""
    at_peaks = [peak.line for peak in peaks if peak.line]
    others = sorted((line for line in line_list() if line not in at_peaks), key=lambda line: line.rank)
    chosen: list[Line] = []
    for line in [*at_peaks, *others]:
        room = all(abs(line.wavelength - other.wavelength) > 0.09 * ZOOM_WIDTH for other in chosen)
        if low < line.wavelength < high and room:
            chosen.append(line)
    return chosen

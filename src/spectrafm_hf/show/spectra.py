# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of spectra. Each `plot_` function writes one PNG file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from astropy.units import Unit
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from ..data.lines import Line, line_list
from ..data.readers import formats
from ..data.readers.base import OpenFile
from ..data.schema import OVER_CONTINUUM, SURFACE, digits, valid_pixels
from .style import BLUE, GREY, INK, ORANGE, RUST, WAVELENGTH, legend_below, save_figure, style_axes, symbol


if TYPE_CHECKING:
    from ..models.spectrum_spectrafm import BestFit


#: Angstrom of spectrum in a close-up.
ZOOM_WIDTH = 24.0
SHADED = 20  # at most so many ranges of a residual
#: Of an axis, for the unit of a predicted spectrum.
FLUX_LABELS = {
    OVER_CONTINUUM: "Flux / continuum",
    SURFACE: r"Flux at the surface [erg s$^{-1}$ cm$^{-2}$ $\mathrm{\AA}^{-1}$]",
}


def flux_label(file: str | os.PathLike[str], format: str | None = None) -> str:
    """Axis label of the flux of a file, from its format (detected if None)."""
    with OpenFile(Path(file)) as content:
        found = next(known for known in formats() if (known.name == format if format else known.identify(content)))
    if found.normalisation.startswith("the "):
        return f"Flux / {found.normalisation.removeprefix('the ')}"
    try:
        unit = Unit(found.flux_unit).to_string("latex_inline")
    except ValueError:
        unit = "units of the file" if found.flux_unit == "as stated" else found.flux_unit
    return f"Flux [{unit}]".replace("1 \\times ", "")


def plot_star(
    path: str | os.PathLike[str],
    row: Mapping[str, Any],
    values: Mapping[str, float],
    errors: Mapping[str, float],
    units: Mapping[str, str],
    flags: str = "",
    fit: BestFit | None = None,
) -> None:
    """One spectrum with masked pixels, predicted labels and, if available, the best-fit star.

    Parameters
    ----------
    path : path
        PNG file to write.
    row : mapping
        A spectrum in the schema of this project; with its `file`, the axis has the unit of the flux.
    values, errors, units : mapping of label to number, number, str
    flags : str
        Written below the labels.
    fit : BestFit, optional
        Drawn over the data, with the residual below it.
    """
    figure = Figure(figsize=(10, 4.6 if fit is None else 6.4), layout="constrained")
    axes = figure.add_subplot() if fit is None else draw_fit(figure, row, fit)
    if fit is None:
        draw_spectrum(axes, row)
    if "file" in row:
        axes.set_ylabel(flux_label(row["file"]))
    labels = [
        f"{symbol(name)} = {values[name]:.{digits(units[name])}f} $\\pm$ {errors[name]:.{digits(units[name])}f}"
        + (" K" if units[name] == "K" else "")
        for name in values
        if np.isfinite(values[name])
    ]
    lines = ["     ".join(labels[first : first + 4]) for first in range(0, len(labels), 4)]
    figure.suptitle("\n".join(lines) or "no labels", fontsize=13, color=INK)
    figure.legend(loc="outside lower right", ncols=4, frameon=False, fontsize=9)
    axes.set_title(str(row["object_id"]), loc="left", fontsize=10, color=GREY)
    if flags:
        axes.set_title(flags if len(flags) < 80 else f"{flags[:77]}...", loc="right", fontsize=10, color=ORANGE)
    save_figure(figure, path)


def plot_fit(
    path: str | os.PathLike[str] | BinaryIO,
    row: Mapping[str, Any],
    fit: BestFit,
    *,
    title: str = "",
    flux_label: str = "Flux",
    wavelength_range: tuple[float, float] | None = None,
    narrow: bool = False,
) -> None:
    """A spectrum with its best-fit star, and below it the residual in units of the error.

    Parameters
    ----------
    path : path or binary stream
        PNG file to write.
    row : mapping
        A spectrum in the schema of this project.
    fit : BestFit
        Of this spectrum.
    title, flux_label : str
    wavelength_range : (low, high), optional
        Draw this part only, Angstrom.
    narrow : bool
        For the screen of a phone, upright.
    """
    figure = Figure(figsize=(5.0, 5.6) if narrow else (11.5, 6.4), layout=ConstrainedLayoutEngine(hspace=0.03))
    top = draw_fit(figure, row, fit, wavelength_range)
    top.set_ylabel(flux_label, fontsize=13)
    if not narrow:
        mark_lines(top, row, 0.02)
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=15, color=INK)
    legend_below(figure, top, ncols=2 if narrow else 5, fontsize=12)
    save_figure(figure, path)


def draw_fit(
    figure: Figure, row: Mapping[str, Any], fit: BestFit, wavelength_range: tuple[float, float] | None = None
) -> Axes:
    """Data and model above, residual below, shaded where it is not noise. Returns the upper axes."""
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[2.2, 1])
    draw_spectrum(top, row, wavelength_range)
    limits = top.get_xlim()
    x, model, residual = with_breaks(fit.wavelength, fit.model, fit.residual)
    width = 1.3 if np.count_nonzero((x >= limits[0]) & (x <= limits[1])) < 1500 else 0.6
    power = f", R = {float(f'{fit.resolving_power:.3g}'):,.0f}" if np.isfinite(fit.resolving_power) else ""
    top.plot(x, model, color=ORANGE, lw=width, label=f"best-fit star{power}")
    low, high = top.get_ylim()
    inside = np.isfinite(model) & (x >= limits[0]) & (x <= limits[1])
    if inside.any():
        margin = 0.04 * (np.ptp(model[inside]) or 1.0)
        top.set_ylim(min(low, model[inside].min() - margin), max(high, model[inside].max() + margin))
    top.set_xlabel("")
    top.tick_params(labelbottom=False)
    bottom.axhspan(-1, 1, color=GREY, alpha=0.25, lw=0)
    bottom.plot(x, residual, color=BLUE, lw=width, drawstyle="steps-mid")
    bottom.axhline(0, color=ORANGE, lw=0.8)
    shades: dict[str, Any] = {"transform": bottom.get_xaxis_transform(), "lw": 0, "zorder": 0.5}
    if fit.no_noise:
        least = 0.004 * (limits[1] - limits[0])  # to be visible
        spans = [(0.5 * (a + b) - 0.5 * max(b - a, least), max(b - a, least)) for a, b, _ in fit.no_noise[:SHADED]]
        bottom.broken_barh(spans, (0, 1), color=ORANGE, alpha=0.25, **shades)
        number = len(fit.no_noise)
        name = "significant residual" if number <= SHADED else f"{SHADED} of {number} significant residuals"
        top.broken_barh([(0.0, 0.0)], (0, 1), color=ORANGE, alpha=0.25, label=name)
    known = np.abs(residual[np.isfinite(residual)])
    most, usual = np.quantile(known, [0.997, 0.9]) if known.size else (4.0, 4.0)
    # A few strange pixels do not set the scale; where most are off, they do.
    reach = float(max(4.0, min(1.3 * most, 30.0), 2.0 * usual))
    bottom.set_ylim(-reach, reach)
    bottom.set_xlim(limits)
    bottom.set_ylabel("Residual\n[errors]", fontsize=12)
    bottom.set_xlabel(WAVELENGTH, fontsize=12)
    words = f"$\\chi^2$ / degrees of freedom = {fit.chi2:,.0f} / {fit.degrees_of_freedom:,.0f}"
    box = {"facecolor": "white", "alpha": 0.85, "lw": 0, "pad": 2}
    bottom.text(0.01, 0.05, words, transform=bottom.transAxes, fontsize=11, color=INK, bbox=box)
    style_axes(bottom)
    figure.align_ylabels()
    return top


def with_breaks(wavelength: NDArray[np.float64], *curves: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Wavelengths and curves (pixels,), with NaN at gaps so that lines end there."""
    step = np.diff(wavelength)
    gaps = np.flatnonzero(step > 5 * np.median(step)) + 1 if len(step) else np.empty(0, int)
    return [np.insert(np.asarray(values, float), gaps, np.nan) for values in (wavelength, *curves)]


def plot_predicted(
    path: str | os.PathLike[str],
    spectra: Sequence[Mapping[str, Any]],
    *,
    seen: Mapping[str, Any] | None = None,
    title: str = "",
    flux_label: str = "Flux",
    label: str = "predicted",
) -> None:
    """Predicted spectra with error bands, and the errors below them.

    Parameters
    ----------
    path : path
        PNG file to write.
    spectra : sequence of mapping
        Rows in the schema of this project; at most five are drawn.
    seen : mapping, optional
        The input spectrum, drawn over the first.
    title, flux_label, label : str
    """
    figure = Figure(figsize=(11.5, 6.4), layout=ConstrainedLayoutEngine(hspace=0.03))
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[2.6, 1])
    colors = [ORANGE, BLUE, INK, GREY, RUST]
    if seen is not None:
        known = valid_pixels(seen)
        flux = np.where(known, np.asarray(seen["flux"], float), np.nan)
        x, y = with_breaks(np.asarray(seen["wavelength"], float), flux)
        top.plot(x, y, color=BLUE, lw=2.2, alpha=0.8, label="input", drawstyle="steps-mid")
    for row, color in zip(spectra, colors, strict=False):
        x, flux, error = with_breaks(np.asarray(row["wavelength"], float), row["flux"], row["flux_error"])
        name = label if len(spectra) == 1 else str(row["object_id"])
        top.plot(x, flux, color=color, lw=1.2 if len(x) < 1000 else 0.6, label=name)
        top.fill_between(x, flux - error, flux + error, color=color, alpha=0.3, lw=0, label="$\\pm 1 \\sigma$")
        bottom.plot(x, error, color=color, lw=1.0 if len(x) < 1000 else 0.5)
    every = np.concatenate([np.asarray(row["wavelength"], float)[[0, -1]] for row in spectra])
    top.set_xlim(every.min(), every.max())
    top.set_ylabel(flux_label, fontsize=13)
    bottom.set_ylim(0, None)
    bottom.set_ylabel("Error", fontsize=13)
    bottom.set_xlabel(WAVELENGTH, fontsize=13)
    for axes in (top, bottom):
        style_axes(axes)
    figure.align_ylabels()
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=15, color=INK)
    handles = dict(reversed(list(zip(*reversed(top.get_legend_handles_labels()), strict=True))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=12)
    save_figure(figure, path)


def plot_spectrum(
    path: str | os.PathLike[str],
    row: Mapping[str, Any],
    *,
    wavelength_range: tuple[float, float] | None = None,
    flux_label: str = "Flux",
) -> None:
    """One spectrum for a slide: error band, masked pixels, gaps between detectors, lines by name.

    Where gaps cut the spectrum into parts, each part has a panel below the whole.

    Parameters
    ----------
    path : path
        PNG file to write.
    row : mapping
        A spectrum in the schema of this project; the title has `survey`, `snr`,
        `rest_frame` and `radial_velocity` where they are known.
    wavelength_range : (low, high), optional
        Draw this part only, Angstrom.
    flux_label : str
        Of the vertical axis.

    Raises
    ------
    ValueError
        If the range holds no valid pixel.
    """
    wavelength = np.asarray(row["wavelength"], np.float64)
    used = wavelength[valid_pixels(row)]
    if wavelength_range is not None:
        low, high = wavelength_range
        used = used[(used >= low) & (used <= high)]
        if not used.size:
            raise ValueError(f"range: expected a range with valid pixels, got {low:g} to {high:g} Angstrom")
        parts = [(low, high)]
    else:
        inner = [gap for gap in find_gaps(row) if used.size and used.min() < gap[0] and gap[1] < used.max()]
        limits = [used.min(), *(edge for gap in inner for edge in gap), used.max()] if used.size else []
        parts = [(limits[i], limits[i + 1]) for i in range(0, len(limits), 2)]
    figure = Figure(figsize=(13.33, 7.5), layout=ConstrainedLayoutEngine(h_pad=0.06, hspace=0.0))
    panels = [None, *parts] if len(parts) in (2, 3, 4) else parts[:1] if wavelength_range else [None]
    for axes, part in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        draw_spectrum(axes, row, part)
        axes.set_xlabel("")
        axes.set_ylabel("")
        if part is not None or len(panels) == 1:
            mark_lines(axes, row)
    figure.suptitle(_title(row), x=0.012, ha="left", fontsize=15, color=INK)
    figure.supxlabel(WAVELENGTH, fontsize=14, color=INK)
    figure.supylabel(flux_label, fontsize=14, color=INK)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="upper right", ncols=4, frameon=False, fontsize=12)
    save_figure(figure, path)


def _title(row: Mapping[str, Any]) -> str:
    words = [str(row["object_id"])]
    if row.get("survey"):
        words.append(str(row["survey"]))
    if np.isfinite(row.get("snr", np.nan)):
        words.append(f"S/N {row['snr']:.0f}")
    velocity = row.get("radial_velocity", np.nan)
    if row.get("rest_frame") is False:
        words.append("not shifted to the rest frame")
    elif velocity is not None and np.isfinite(velocity):
        words.append(f"rest frame ({velocity:+.1f} km/s)")
    return "    ".join(words)


def find_gaps(row: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Gaps in a spectrum, as between detectors: pairs of wavelengths, of the last and the next pixel.

    A gap is wider than 20 pixels and a hundredth of the spectrum. Masked pixels with a flux are not gaps.
    """
    flux = np.asarray(row["flux"], np.float64)
    measured = np.isfinite(flux) & (flux != 0)
    wavelength = np.sort(np.asarray(row["wavelength"], np.float64)[measured])
    if wavelength.size < 2:
        return []
    step = np.diff(wavelength)
    wide = np.flatnonzero(step > max(20 * np.median(step), 0.01 * np.ptp(wavelength)))
    return [(float(wavelength[i]), float(wavelength[i + 1])) for i in wide]


def mark_lines(axes: Axes, row: Mapping[str, Any], room: float = 0.011) -> None:
    """Mark lines whose names fit above the axes; in coarse spectra only those of rank 1.

    `room` is the width of a name as a fraction of the axes.
    """
    low, high = axes.get_xlim()
    wavelength = np.sort(np.asarray(row["wavelength"], np.float64)[valid_pixels(row)])
    coarse = wavelength.size > 1 and np.median(np.diff(wavelength)) > 5
    gaps = find_gaps(row)
    marked: list[float] = []
    for line in sorted(line_list(), key=lambda line: line.rank):
        place = line.wavelength
        hidden = any(first < place < last for first, last in gaps)
        crowded = any(abs(place - other) < room * (high - low) for other in marked)
        unknown = line.rank > (1 if coarse else 3)
        if low < place < high and not (hidden or crowded or unknown):
            marked.append(place)
            name_line(axes, line)


def draw_spectrum(axes: Axes, row: Mapping[str, Any], wavelength_range: tuple[float, float] | None = None) -> None:
    """Flux with a one-sigma band; masked pixels are shaded, with grey flux; gaps are hatched."""
    wavelength = np.asarray(row["wavelength"], np.float64)
    order = np.argsort(wavelength)
    if wavelength_range is not None:
        inside = (wavelength >= wavelength_range[0]) & (wavelength <= wavelength_range[1])
        order = order[inside[order]]
    wavelength, valid = wavelength[order], valid_pixels(row)[order]
    measured = np.asarray(row["flux"], np.float64)[order]
    flux = np.where(valid, measured, np.nan)
    error = np.where(valid, np.asarray(row["flux_error"], np.float64)[order], np.nan)
    gaps = [gap for gap in find_gaps(row) if wavelength.size and wavelength[0] <= gap[0] and gap[1] <= wavelength[-1]]
    # Lines end at gaps, which may hold no pixel.
    middle = [(first + last) / 2 for first, last in gaps]
    at = np.searchsorted(wavelength, middle)
    x, y, dy, masked = (
        np.insert(values, at, fill)
        for values, fill in ((wavelength, middle), (flux, np.nan), (error, np.nan), (measured, np.nan))
    )
    if not valid.any():
        axes.text(0.5, 0.5, "no valid pixel", transform=axes.transAxes, ha="center", color=ORANGE)
    style: dict[str, Any] = {
        "lw": 1.4 if len(flux) < 1000 else 0.9 if len(flux) < 5000 else 0.5,
        "drawstyle": "steps-mid",
    }
    axes.plot(x, y, color=BLUE, label="flux", **style)
    if np.isfinite(dy).any():
        axes.fill_between(x, y - dy, y + dy, color=BLUE, alpha=0.25, lw=0, step="mid", label="$\\pm 1 \\sigma$")
    # From the middle before the first masked pixel to the middle after the last.
    middles = np.concatenate([wavelength[:1], (wavelength[1:] + wavelength[:-1]) / 2, wavelength[-1:]])
    in_gap = np.any([(wavelength > first) & (wavelength < last) for first, last in gaps], axis=0) if gaps else False
    edges = np.flatnonzero(np.diff(np.concatenate([[0], ~valid & ~np.asarray(in_gap), [0]]).astype(int))).reshape(-1, 2)
    shades: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "lw": 0, "zorder": 0.5}
    if len(edges):
        spans = [(middles[start], middles[stop] - middles[start]) for start, stop in edges]
        axes.broken_barh(spans, (0, 1), color=GREY, alpha=0.3, label="masked", **shades)
        axes.plot(x, np.where(np.isfinite(y), np.nan, masked), color=GREY, zorder=1, **{**style, "lw": 0.7})
    if gaps:
        spans = [(first, last - first) for first, last in gaps]
        axes.broken_barh(spans, (0, 1), facecolor="none", edgecolor=GREY, hatch="////", label="gap", **shades)
    if valid.any():
        axes.set_ylim(_flux_limits(flux))
        first, last = wavelength_range or wavelength[valid][[0, -1]]
        axes.set_xlim(first, last)
    style_axes(axes)
    axes.set_xlabel(WAVELENGTH)
    axes.set_ylabel("Flux [units of the file]")


def _flux_limits(flux: NDArray[np.float64]) -> tuple[float, float]:
    """The range of the flux without outliers, such as cosmic rays and noisy edges."""
    low, high = np.nanpercentile(flux, [1, 99])
    reach = high - low
    low, high = max(np.nanmin(flux), low - reach), min(np.nanmax(flux), high + 0.5 * reach)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def name_line(axes: Axes, line: Line) -> None:
    """Mark a line, with its name above the axes."""
    axes.axvline(line.wavelength, color=ORANGE, lw=0.8, alpha=0.7, zorder=0)
    axes.text(
        line.wavelength, 1.02, line.name, transform=axes.get_xaxis_transform(), rotation=90, ha="center", va="bottom",
        fontsize=10, color=RUST,
    )  # fmt: skip

# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of spectra and of predicted labels. Every function that begins with `plot_` writes one PNG file."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from astropy.units import Unit
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import ArrayLike, NDArray

from ..data.readers import formats
from ..data.readers.base import OpenFile
from ..files import complete_file
from ..inference.explain import COARSE_STEP, Explanation, Line, Peak, line_list
from ..inference.prediction import valid_pixels
from ..inference.spectrum import OVER_CONTINUUM, SURFACE
from ..models.spectrum_spectrafm import BestFit
from ..statistics import robust_scatter
from ..training.metrics import label_metrics


#: Angstrom of spectrum in a close-up.
ZOOM_WIDTH = 24.0
SHADED = 20  # places of a residual that is no noise
INK, BLUE, ORANGE, GREY = "#222222", "#1f5fa8", "#d9730d", "#9a9a9a"
#: Of small letters: orange enough, and dark enough to be read.
RUST = "#9c4a00"
#: Of an axis, for the unit of a predicted spectrum.
FLUX_LABELS = {
    OVER_CONTINUUM: "Flux / continuum",
    SURFACE: r"Flux at the surface [erg s$^{-1}$ cm$^{-2}$ $\mathrm{\AA}^{-1}$]",
}
SYMBOLS = {"teff": r"$T_\mathrm{eff}$", "logg": r"$\log g$", "vmicro": r"$v_\mathrm{micro}$", "vsini": r"$v \sin i$"}


def symbol(label: str) -> str:
    """How astronomers write a label: `fe_h` is [Fe/H]."""
    if label in SYMBOLS:
        return SYMBOLS[label]
    numerator, _, denominator = label.partition("_")
    if denominator not in ("fe", "h", "m"):
        return label
    above = r"$\alpha$" if numerator == "alpha" else numerator.capitalize()
    return f"[{above}/{denominator.capitalize()}]"


def digits(unit: str) -> int:
    """Decimals worth printing of a label in this unit."""
    return 0 if unit == "K" else 2


def axis_label(label: str, units: Mapping[str, str], prefix: str = "") -> str:
    return f"{prefix}{symbol(label)}" + (f" [{units[label]}]" if units.get(label) else "")


def flux_label(file: str | os.PathLike[str], format: str | None = None) -> str:
    """What the format of a file (that of this name, or the one that knows it) says of its flux, for an axis."""
    with OpenFile(Path(file)) as content:
        found = next(known for known in formats() if (known.name == format if format else known.identify(content)))
    if found.normalisation.startswith("the "):
        return f"Flux / {found.normalisation.removeprefix('the ')}"
    try:
        unit = Unit(found.flux_unit).to_string("latex_inline")
    except ValueError:
        unit = "units of the file" if found.flux_unit == "as given" else found.flux_unit
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
    """One spectrum, what of it is masked, and the labels predicted from it; with the star that fits best, if known.

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
        Drawn over the data, with the residual below.
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
    _save(figure, path)


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
    """A spectrum with the star that fits it best, and below it what is left, in units of the error.

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
    handles = top.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2 if narrow else 5, frameon=False, fontsize=12)
    _save(figure, path)


def draw_fit(
    figure: Figure, row: Mapping[str, Any], fit: BestFit, wavelength_range: tuple[float, float] | None = None
) -> Axes:
    """Data and model above, residual below; where it is no noise, it is shaded. The axes of the data."""
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[2.2, 1])
    draw_spectrum(top, row, wavelength_range)
    limits = top.get_xlim()
    x, model, residual = with_breaks(fit.wavelength, fit.model, fit.residual)
    width = 1.3 if np.count_nonzero((x >= limits[0]) & (x <= limits[1])) < 1500 else 0.6
    top.plot(x, model, color=ORANGE, lw=width, label="star that fits best")
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
        least = 0.004 * (limits[1] - limits[0])  # narrower ones could not be seen
        spans = [(0.5 * (a + b) - 0.5 * max(b - a, least), max(b - a, least)) for a, b, _ in fit.no_noise[:SHADED]]
        bottom.broken_barh(spans, (0, 1), color=ORANGE, alpha=0.25, **shades)
        number = len(fit.no_noise)
        name = "no noise" if number <= SHADED else f"no noise: {SHADED} of {number} places"
        top.broken_barh([(0.0, 0.0)], (0, 1), color=ORANGE, alpha=0.25, label=name)
    known = np.abs(residual[np.isfinite(residual)])
    reach = float(np.clip(1.3 * np.quantile(known, 0.997), 4.0, 30.0)) if known.size else 4.0
    bottom.set_ylim(-reach, reach)
    bottom.set_xlim(limits)
    bottom.set_ylabel("Residual\n[errors]", fontsize=12)
    bottom.set_xlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]", fontsize=12)
    words = f"$\\chi^2$ / degrees of freedom = {fit.chi2:,.0f} / {fit.degrees_of_freedom:,.0f}"
    box = {"facecolor": "white", "alpha": 0.85, "lw": 0, "pad": 2}
    bottom.text(0.01, 0.05, words, transform=bottom.transAxes, fontsize=11, color=INK, bbox=box)
    _style(bottom)
    figure.align_ylabels()
    return top


def with_breaks(wavelength: NDArray[np.float64], *curves: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Wavelengths and curves (pixels,), whose lines end where pixels are missing."""
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
    """Predicted spectra with their errors, below them the errors alone.

    Parameters
    ----------
    path : path
        PNG file to write.
    spectra : sequence of mapping
        Rows in the schema of this project; at most five are drawn.
    seen : mapping, optional
        The spectrum that was given, drawn over the first.
    title, flux_label, label : str
    """
    figure = Figure(figsize=(11.5, 6.4), layout=ConstrainedLayoutEngine(hspace=0.03))
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[2.6, 1])
    colors = [ORANGE, BLUE, INK, GREY, RUST]
    if seen is not None:
        known = valid_pixels(seen)
        flux = np.where(known, np.asarray(seen["flux"], float), np.nan)
        x, y = with_breaks(np.asarray(seen["wavelength"], float), flux)
        top.plot(x, y, color=BLUE, lw=2.2, alpha=0.8, label="given", drawstyle="steps-mid")
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
    bottom.set_xlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]", fontsize=13)
    for axes in (top, bottom):
        _style(axes)
    figure.align_ylabels()
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=15, color=INK)
    handles = dict(reversed(list(zip(*reversed(top.get_legend_handles_labels()), strict=True))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=12)
    _save(figure, path)


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
        A spectrum in the schema of this project; `survey`, `snr`, `rest_frame` and `radial_velocity` are written above
        it where they are known.
    wavelength_range : (low, high), optional
        Draw this part only, Angstrom.
    flux_label : str
        Of the vertical axis.

    Raises
    ------
    ValueError
        If the range holds no pixel that can be used.
    """
    wavelength = np.asarray(row["wavelength"], np.float64)
    used = wavelength[valid_pixels(row)]
    if wavelength_range is not None:
        low, high = wavelength_range
        used = used[(used >= low) & (used <= high)]
        if not used.size:
            raise ValueError(
                f"range: expected one that holds pixels that can be used, got {low:g} to {high:g} Angstrom"
            )
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
    figure.supxlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]", fontsize=14, color=INK)
    figure.supylabel(flux_label, fontsize=14, color=INK)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="upper right", ncols=4, frameon=False, fontsize=12)
    _save(figure, path)


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
    """Where a spectrum has no flux, as between detectors: pairs of wavelengths, from the last pixel to the next.

    A gap is wider than 20 pixels and a hundredth of the spectrum. Pixels that were measured but are masked are none.
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
    """Mark the lines that have room for their names above the axes; in a coarse spectrum those of rank 1 only.

    `room` is that of a name, as a share of the width of the axes.
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
            _name(axes, line)


def draw_spectrum(axes: Axes, row: Mapping[str, Any], wavelength_range: tuple[float, float] | None = None) -> None:
    """Flux with a band of one sigma; pixels that are not used are shaded, their flux is grey; gaps are hatched."""
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
    # A line ends at a gap, though there may be no pixel in it.
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
    _style(axes)
    axes.set_xlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]")
    axes.set_ylabel("Flux [units of the file]")


def _flux_limits(flux: NDArray[np.float64]) -> tuple[float, float]:
    """All of the flux, but for what sticks out: a cosmic ray or a noisy edge must not set the scale."""
    low, high = np.nanpercentile(flux, [1, 99])
    reach = high - low
    low, high = max(np.nanmin(flux), low - reach), min(np.nanmax(flux), high + 0.5 * reach)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def plot_overview(path: str | os.PathLike[str], columns: Mapping[str, ArrayLike], n_stars: int) -> None:
    """Kiel diagram: surface gravity over temperature, coloured by metallicity where it is known.

    Parameters
    ----------
    path : path
        PNG file to write.
    columns : mapping of label to array, shape (stars,)
        With `teff` and `logg`, perhaps `fe_h`.
    n_stars : int
        How many stars there are, if only some are drawn.
    """
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    axes = figure.add_subplot()
    teff, logg = np.asarray(columns["teff"]), np.asarray(columns["logg"])
    size = float(np.clip(20_000 / max(len(teff), 1), 3, 40))
    if "fe_h" in columns:
        metallicity = np.asarray(columns["fe_h"])
        low, high = np.nanpercentile(metallicity, [1, 99]) if np.isfinite(metallicity).any() else (-1.0, 0.0)
        points = axes.scatter(
            teff, logg, c=metallicity, s=size, cmap="viridis", vmin=low, vmax=high, lw=0, rasterized=True
        )
        figure.colorbar(points, ax=axes, label="Predicted [Fe/H] [dex]", extend="both")
    else:
        axes.scatter(teff, logg, s=size, color=BLUE, lw=0, rasterized=True)
    axes.invert_xaxis()
    axes.invert_yaxis()
    axes.set_xlabel(r"Predicted $T_\mathrm{eff}$ [K]")
    axes.set_ylabel(r"Predicted $\log g$ [dex]")
    drawn = f"{len(teff):,} stars" if len(teff) == n_stars else f"the first {len(teff):,} of {n_stars:,} stars"
    axes.set_title(drawn, loc="left", fontsize=10, color=GREY)
    _style(axes)
    _save(figure, path)


def plot_comparison(
    path: str | os.PathLike[str],
    predicted: Mapping[str, NDArray[Any]],
    catalogue: Mapping[str, NDArray[Any]],
    units: Mapping[str, str],
    example: Mapping[str, Any],
    tokens: Sequence[tuple[float, float]],
) -> None:
    """Predicted over catalogued labels with residuals, above one of the spectra they were predicted from.

    Parameters
    ----------
    path : path
        PNG file to write.
    predicted, catalogue : mapping of `<label>` and `<label>_err` to array, shape (stars,)
    units : mapping of label to str
        The labels to show, in order.
    example : mapping
        A spectrum in the schema of this project.
    tokens : sequence of (first, last)
        Wavelengths that the tokens of the example cover; none are drawn where there are none.
    """
    names = list(units)
    figure = Figure(figsize=(4.1 * len(names), 8.6), layout="constrained")
    grid = figure.add_gridspec(3, len(names), height_ratios=[3, 1.15, 2.1])
    for column, name in enumerate(names):
        truth, value = catalogue[name], predicted[name]
        truth_error, error = catalogue[f"{name}_err"], predicted[f"{name}_err"]
        total = np.hypot(np.nan_to_num(truth_error), error)
        figures = label_metrics(value, error, truth, truth_error)
        above = figure.add_subplot(grid[0, column])
        below = figure.add_subplot(grid[1, column], sharex=above)
        bars: dict[str, Any] = {
            "fmt": "o",
            "ms": 4,
            "color": BLUE,
            "ecolor": BLUE,
            "elinewidth": 0.9,
            "alpha": 0.75,
            "mew": 0,
        }
        above.errorbar(truth, value, xerr=truth_error, yerr=error, **bars)
        below.errorbar(truth, value - truth, yerr=total, **bars)
        finite = np.isfinite(truth) & np.isfinite(value)
        both = np.concatenate([truth[finite], value[finite]])
        margin = 0.06 * np.ptp(both)
        limits = both.min() - margin, both.max() + margin
        above.plot(limits, limits, color=INK, lw=1, zorder=0)
        above.set(xlim=limits, ylim=limits)
        below.axhline(0, color=INK, lw=1, zorder=0)
        reach = 1.15 * np.abs((value - truth)[finite]).max()
        below.set_ylim(-reach, reach)
        number = digits(units[name])
        unit = f" {units[name]}" if units[name] else ""
        number += number > 0
        scatter, bias = f"{figures['robust_scatter']:.{number}f}{unit}", f"{figures['bias']:+.{number}f}{unit}"
        above.set_title(f"{symbol(name)}:  scatter {scatter},  bias {bias}", fontsize=11, color=INK)
        above.tick_params(labelbottom=False)
        above.locator_params(nbins=5)
        if column == 0:
            above.set_ylabel("Predicted from Gaia XP", fontsize=12)
            below.set_ylabel("Residual", fontsize=12)
            figure.align_ylabels([above, below])
        below.set_xlabel(axis_label(name, units, "APOGEE "), fontsize=12)
        _style(above)
        _style(below)

    axes = figure.add_subplot(grid[2, :])
    draw_spectrum(axes, example)
    for i, (first, last) in enumerate(tokens):
        if i % 2:
            axes.axvspan(first, last, color=ORANGE, alpha=0.13, lw=0)
    axes.set_ylabel("Flux / median", fontsize=12)
    axes.set_xlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]", fontsize=12)
    stripes = f"; each stripe, white or tinted, is one of its {len(tokens)} tokens" if tokens else ""
    axes.set_title(
        f"Gaia DR3 {example['object_id']}: the observed XP spectrum{stripes}",
        loc="left",
        fontsize=12,
        color=INK,
    )
    _save(figure, path)


def plot_given(
    path: Path,
    values: Mapping[str, NDArray[Any]],
    errors: Mapping[str, NDArray[Any]],
    given: Any,
    units: Mapping[str, str],
) -> None:
    """Predicted over given labels with the errors of both, above error over sigma.

    Parameters
    ----------
    path : path
        PNG file to write.
    values, errors : mapping of label to array, shape (spectra,)
    given : data set, or mapping of array
        `<label>` and `<label>_err` of the same spectra.
    units : mapping of label to str
        The labels to show.
    """
    figure = Figure(figsize=(4.2 * len(units), 6.6), layout="constrained")
    axes = figure.subplots(2, len(units), squeeze=False, height_ratios=[2.2, 1])
    for above, below, name in zip(*axes, units, strict=True):
        columns = [np.asarray(c[:]) for c in (given[name], given[f"{name}_err"], values[name], errors[name])]
        truth, truth_error, value, error = (column[np.isfinite(columns[0])] for column in columns)
        truth_error = np.nan_to_num(truth_error)
        above.errorbar(
            truth, value, error, truth_error if truth_error.any() else None, fmt="o", ms=3 if truth.size < 2000 else 1,
            color=BLUE, ecolor=GREY, elinewidth=0.5, alpha=0.7, rasterized=True,
        )  # fmt: skip
        above.axline((truth[0], truth[0]), slope=1, color=ORANGE, lw=1)
        figures = label_metrics(value, error, truth, truth_error)
        text = f"{truth.size:,} test spectra: scatter {figures['robust_scatter']:.3g}, bias {figures['bias']:.2g}"
        above.set_title(text, loc="left", fontsize=10, color=INK)
        above.set(xlabel=axis_label(name, units, "Given "), ylabel=axis_label(name, units, "Predicted "))
        z = (value - truth) / np.hypot(error, truth_error)
        below.hist(np.clip(z, -5, 5), np.linspace(-5, 5, 31), density=True, color=BLUE, alpha=0.6)
        normal = np.linspace(-5, 5, 200)
        below.plot(normal, np.exp(-(normal**2) / 2) / np.sqrt(2 * np.pi), color=INK, lw=1)
        below.set(xlabel=r"(predicted $-$ given) / $\sigma$", yticks=[], xlim=(-5, 5))
        _style(above)
        _style(below)
    _save(figure, path)


def plot_curves(path: str | os.PathLike[str], curves: str | os.PathLike[str], kept: int) -> None:
    """The loss of training and validation stars over the steps, from `curves.csv` of a run, and which step was kept."""
    with open(curves, encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, text, color in (("loss", "training", GREY), ("eval_loss", "validation", BLUE)):
        points = [(float(line["step"]), float(line[name])) for line in lines if line.get(name)]
        axes.plot([step for step, _ in points], [loss for _, loss in points], "o-", ms=3, color=color, label=text)
    axes.axvline(kept, color=ORANGE, lw=1, zorder=0, label="kept (least residuals)")
    axes.set(xlabel="Steps of the optimizer", ylabel="Loss (negative log-likelihood)")
    axes.legend(frameon=False)
    _style(axes)
    _save(figure, path)


def plot_label_distribution(path: str | os.PathLike[str], columns: Mapping[str, ArrayLike]) -> None:
    """Kiel diagram, and every other label over [Fe/H] (microturbulence over gravity); for any number of stars.

    Parameters
    ----------
    path : path
        PNG file to write.
    columns : mapping of label to array, shape (stars,)
        With `teff`, `logg` and `fe_h`.
    """
    values = {name: np.asarray(column) for name, column in columns.items()}
    others = [name for name in values if name not in ("teff", "logg", "fe_h")]
    n_columns = 4
    n_rows = 2 + -(-max(len(others) - 4, 0) // n_columns)
    figure = Figure(figsize=(3.3 * n_columns, 2.6 * n_rows))
    # A layout by hand: to find one for so many axes would take longer than to draw them.
    grid = figure.add_gridspec(
        n_rows, n_columns, left=0.05, right=0.99, bottom=0.06, top=0.96, wspace=0.32, hspace=0.32
    )
    kiel = figure.add_subplot(grid[:2, :2])
    # A cell shows the stars in it by its colour, however many they are.
    cells = kiel.hexbin(
        values["teff"], values["logg"], C=values["fe_h"], reduce_C_function=np.mean, gridsize=70, cmap="viridis", lw=0.1
    )
    figure.colorbar(cells, ax=kiel, label=f"mean {symbol('fe_h')} [dex]")
    kiel.invert_xaxis()
    kiel.invert_yaxis()
    kiel.set(xlabel=r"$T_\mathrm{eff}$ [K]", ylabel=r"$\log g$ [dex]")
    kiel.set_title(f"{len(values['teff']):,} stars", loc="left", fontsize=10, color=GREY)
    _style(kiel)
    places = [(row, column) for row in range(n_rows) for column in range(n_columns) if row > 1 or column > 1]
    for name, place in zip(others, places, strict=False):
        axes = figure.add_subplot(grid[place])
        below = "logg" if name == "vmicro" else "fe_h"
        axes.hexbin(values[below], values[name], gridsize=45, norm=LogNorm(0.3), mincnt=1, cmap="Blues", lw=0.1)
        axes.set(xlabel=axis_label(below, {}), ylabel=symbol(name) + (" [km/s]" if name == "vmicro" else ""))
        axes.tick_params(direction="in", top=True, right=True)
    _save(figure, path)


def plot_observed(path: str | os.PathLike[str], columns: Mapping[str, NDArray[Any]]) -> None:
    """Four synthetic spectra with and without noise (600 pixels from the middle of long ones), and the noise itself.

    Parameters
    ----------
    path : path
        PNG file to write.
    columns : mapping of str to array
        `wavelength`, `flux`, `clean`, `flux_error` of shape (stars, pixels), `snr` and labels of shape (stars,).
    """
    figure = Figure(figsize=(13, 9))
    grid = figure.add_gridspec(4, 4, left=0.05, right=0.99, bottom=0.06, top=0.96, wspace=0.25, hspace=0.35)
    # From the coolest to the hottest, at the ends not quite.
    order = np.argsort(columns["teff"])
    stars = order[(np.linspace(0.05, 0.95, 4) * (len(order) - 1)).astype(int)]
    n_pixels = columns["flux"].shape[1]
    shown = slice(None) if n_pixels < 1000 else slice(n_pixels // 2 - 300, n_pixels // 2 + 300)
    for place, star in enumerate(stars):
        axes = figure.add_subplot(grid[place, :3])
        wavelength = columns["wavelength"][star][shown]
        # Lines end where pixels are missing.
        gaps = np.flatnonzero(np.diff(wavelength) > 5 * np.median(np.diff(wavelength))) + 1
        noisy, clean = (np.insert(columns[name][star][shown], gaps, np.nan) for name in ("flux", "clean"))
        wavelength = np.insert(wavelength, gaps, np.nan)
        axes.plot(wavelength, noisy, color=BLUE, lw=0.6, label="with noise")
        axes.plot(wavelength, clean, color=ORANGE, lw=0.6, label="without")
        texts = [
            f"{symbol(name)} {columns[name][star]:.{digits('K' if name == 'teff' else 'dex')}f}"
            for name in ("teff", "logg", "fe_h")
        ]
        axes.set_title(", ".join([*texts, f"S/N {columns['snr'][star]:.0f}"]), loc="left", fontsize=10, color=INK)
        axes.set_ylabel("Flux")
        axes.tick_params(direction="in", top=True, right=True)
    axes.set_xlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]")
    figure.axes[0].legend(frameon=False, fontsize=9, ncols=2)
    deviation = ((columns["flux"] - columns["clean"]) / columns["flux_error"]).ravel()
    x = np.linspace(-5, 5, 101)
    axes = figure.add_subplot(grid[:2, 3])
    axes.hist(deviation, x.tolist(), density=True, color=BLUE, alpha=0.6)
    axes.plot(x, np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi), color=INK, lw=1)
    axes.set_title(f"1.4826 MAD {robust_scatter(deviation):.4f}", loc="left", fontsize=10, color=INK)
    axes.set(xlabel="(with noise - without) / error", yscale="log", ylim=(1e-6, 1))
    axes.tick_params(direction="in", top=True, right=True)
    axes = figure.add_subplot(grid[2:, 3])
    axes.hist(columns["snr"], 40, color=BLUE, alpha=0.6)
    axes.set(xlabel="S/N per pixel", ylabel="Stars")
    axes.tick_params(direction="in", top=True, right=True)
    _save(figure, path)


def plot_explanation(
    path: str | os.PathLike[str],
    explanation: Explanation,
    label: str,
    peaks: Sequence[Peak],
    units: Mapping[str, str],
    title: str = "",
) -> None:
    """What a model looks at for one label: spectrum, information, response to a line; close-ups of the highest peaks.

    Parameters
    ----------
    path : path
        PNG file to write.
    explanation : Explanation
    label : str
        One of `explanation.labels`.
    peaks : sequence of Peak
        Of the response, the most prominent first. The lines at them are named, and in a spectrum of more than 2,000
        pixels the first five have close-ups.
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
    if explanation.step > COARSE_STEP:  # few lines are at peaks there, and the famous ones help to find one's way
        named += [line for line in line_list() if line.rank == 1]
    marked: list[Line] = []
    for line in named:
        apart = all(abs(line.wavelength - other.wavelength) > room for other in marked)
        if apart and wavelength[0] < line.wavelength < wavelength[-1]:
            marked.append(line)
            _name(top, line)
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
        # The two share a panel: the flux above, the response below.
        reach = np.nanmax(np.abs(response[inside])) or 1.0
        below.set_ylim(-1.1 * reach, 3.6 * reach)
        below.set_yticks([])
        lowest, highest = np.nanmin(flux[inside]), np.nanmax(flux[inside])
        axes.set_ylim(lowest - 0.9 * (highest - lowest or 1.0), highest + 0.08 * (highest - lowest or 1.0))
        for line in _lines_within(np.nanmin(x[inside]), np.nanmax(x[inside]), peaks):
            _name(axes, line)
        axes.ticklabel_format(useOffset=False)
        axes.locator_params(axis="x", nbins=4)
        _style(axes)
        if column == 0:
            axes.set_ylabel("Close-ups", fontsize=12)
    for axes in (top, middle, bottom):
        _style(axes)
    if not chosen:
        bottom.set_xlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]", fontsize=13)
    else:
        figure.supxlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]", fontsize=13, color=INK)
    figure.align_ylabels()
    subject = symbol(label) if label in units else "All labels"
    figure.suptitle(f"{subject}: {title}", x=0.012, ha="left", fontsize=15, color=INK)
    _save(figure, path)


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
    """One spectrum with its errors and masked pixels, and below it what a model looks at in it for one label.

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
        _style(axes)
    bottom.set_xlabel(r"Wavelength in vacuum [$\mathrm{\AA}$]", fontsize=12)
    if narrow:
        bottom.locator_params(axis="x", nbins=4)
    figure.align_ylabels()
    handles = top.get_legend_handles_labels()
    legend = figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    for line in legend.get_lines():
        line.set_linewidth(2.0)
    _save(figure, path)


def _curves(explanation: Explanation, label: str) -> list[NDArray[np.float64]]:
    """Wavelength, flux and response; lines end at gaps and where pixels are masked."""
    row = explanation.labels.index(label)
    step = np.diff(explanation.wavelength)
    gaps = np.flatnonzero(step > 2.5 * explanation.step) + 1 if explanation.step else np.empty(0, int)
    curves = explanation.wavelength, explanation.flux, explanation.response[row]
    return [np.insert(curve, gaps, np.nan) for curve in curves]


def _draw_information(axes: Axes, explanation: Explanation, label: str) -> None:
    """A bar for each interval, as wide as it is."""
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
    """The first peaks that are this far from each other."""
    chosen: list[Peak] = []
    for peak in peaks:
        if len(chosen) < number and all(abs(peak.wavelength - other.wavelength) >= distance for other in chosen):
            chosen.append(peak)
    return chosen


def _lines_within(low: float, high: float, peaks: Sequence[Peak]) -> list[Line]:
    """Lines of a close-up with room for their names: those at the most prominent peaks first, then the best known."""
    at_peaks = [peak.line for peak in peaks if peak.line]
    others = sorted((line for line in line_list() if line not in at_peaks), key=lambda line: line.rank)
    chosen: list[Line] = []
    for line in [*at_peaks, *others]:
        room = all(abs(line.wavelength - other.wavelength) > 0.09 * ZOOM_WIDTH for other in chosen)
        if low < line.wavelength < high and room:
            chosen.append(line)
    return chosen


def _name(axes: Axes, line: Line) -> None:
    """Mark a line, its name above the axes."""
    axes.axvline(line.wavelength, color=ORANGE, lw=0.8, alpha=0.7, zorder=0)
    axes.text(
        line.wavelength, 1.02, line.name, transform=axes.get_xaxis_transform(), rotation=90, ha="center", va="bottom",
        fontsize=10, color=RUST,
    )  # fmt: skip


def _style(axes: Axes) -> None:
    axes.tick_params(direction="in", top=True, right=True, colors=INK)
    axes.minorticks_on()
    axes.tick_params(which="minor", direction="in", top=True, right=True)


def _save(figure: Figure, path: str | os.PathLike[str] | BinaryIO) -> None:
    """Never half a picture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box in a name is no reason to complain
        if hasattr(path, "write"):
            figure.savefig(cast(BinaryIO, path), dpi=150, format="png")
            return
        with complete_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")

# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of predicted labels. Each `plot_` function writes one PNG file."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from ..data.schema import digits
from ..statistics import robust_scatter
from ..training.metrics import label_metrics
from .spectra import draw_spectrum
from .style import BLUE, GREY, INK, ORANGE, WAVELENGTH, axis_label, save_figure, style_axes, symbol


def plot_overview(path: str | os.PathLike[str], columns: Mapping[str, ArrayLike], n_stars: int) -> None:
    """Kiel diagram: surface gravity over temperature, coloured by metallicity where it is known.

    Parameters
    ----------
    path : path
        PNG file to write.
    columns : mapping of label to array, shape (stars,)
        With `teff` and `logg`, perhaps `fe_h`.
    n_stars : int
        Total number of stars, if only some are drawn.
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
    style_axes(axes)
    save_figure(figure, path)


def plot_comparison(
    path: str | os.PathLike[str],
    predicted: Mapping[str, NDArray[Any]],
    catalogue: Mapping[str, NDArray[Any]],
    units: Mapping[str, str],
    example: Mapping[str, Any],
    tokens: Sequence[tuple[float, float]],
) -> None:
    """Predicted against catalogue labels with residuals, and below them one of the spectra.

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
        Wavelength ranges of the tokens of the example; may be empty.
    """
    names = list(units)
    width, height = 4.1 * len(names), 8.6
    figure = Figure(figsize=(width, height))
    # Fixed margins (in inches): a constrained layout takes as long as the drawing.
    sides = {"left": 0.8 / width, "right": 1 - 0.12 / width}
    grid = figure.add_gridspec(
        2,
        len(names),
        height_ratios=[3, 1.15],
        top=1 - 0.32 / height,
        bottom=3.35 / height,
        hspace=0.05,
        wspace=0.2,
        **sides,
    )
    spectrum = figure.add_gridspec(1, 1, top=2.48 / height, bottom=0.55 / height, **sides)
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
        style_axes(above)
        style_axes(below)

    axes = figure.add_subplot(spectrum[0])
    draw_spectrum(axes, example)
    for i, (first, last) in enumerate(tokens):
        if i % 2:
            axes.axvspan(first, last, color=ORANGE, alpha=0.13, lw=0)
    axes.set_ylabel("Flux / median", fontsize=12)
    axes.set_xlabel(WAVELENGTH, fontsize=12)
    stripes = f"; each stripe, white or tinted, is one of its {len(tokens)} tokens" if tokens else ""
    axes.set_title(
        f"Gaia DR3 {example['object_id']}: the observed XP spectrum{stripes}",
        loc="left",
        fontsize=12,
        color=INK,
    )
    save_figure(figure, path)


def plot_given(
    path: Path,
    values: Mapping[str, NDArray[Any]],
    errors: Mapping[str, NDArray[Any]],
    truths: Any,
    units: Mapping[str, str],
) -> None:
    """Predicted against true labels with both errors, and below them the residuals over sigma.

    Parameters
    ----------
    path : path
        PNG file to write.
    values, errors : mapping of label to array, shape (spectra,)
    truths : data set, or mapping of array
        True `<label>` and `<label>_err` of the same spectra.
    units : mapping of label to str
        The labels to show.
    """
    figure = Figure(figsize=(4.2 * len(units), 6.6), layout="constrained")
    axes = figure.subplots(2, len(units), squeeze=False, height_ratios=[2.2, 1])
    for above, below, name in zip(*axes, units, strict=True):
        columns = [np.asarray(c[:]) for c in (truths[name], truths[f"{name}_err"], values[name], errors[name])]
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
        above.set(xlabel=axis_label(name, units, "True "), ylabel=axis_label(name, units, "Predicted "))
        z = (value - truth) / np.hypot(error, truth_error)
        below.hist(np.clip(z, -5, 5), np.linspace(-5, 5, 31), density=True, color=BLUE, alpha=0.6)
        normal = np.linspace(-5, 5, 200)
        below.plot(normal, np.exp(-(normal**2) / 2) / np.sqrt(2 * np.pi), color=INK, lw=1)
        below.set(xlabel=r"(predicted $-$ true) / $\sigma$", yticks=[], xlim=(-5, 5))
        style_axes(above)
        style_axes(below)
    save_figure(figure, path)


def plot_curves(path: str | os.PathLike[str], curves: str | os.PathLike[str], kept: int) -> None:
    """Training and validation loss over the steps, from `curves.csv` of a run, and the best checkpoint."""
    with open(curves, encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, text, color in (("loss", "training", GREY), ("eval_loss", "validation", BLUE)):
        points = [(float(line["step"]), float(line[name])) for line in lines if line.get(name)]
        axes.plot([step for step, _ in points], [loss for _, loss in points], "o-", ms=3, color=color, label=text)
    axes.axvline(kept, color=ORANGE, lw=1, zorder=0, label="best checkpoint")
    axes.set(xlabel="Optimizer step", ylabel="Loss (negative log-likelihood)")
    axes.legend(frameon=False)
    style_axes(axes)
    save_figure(figure, path)


def plot_label_distribution(path: str | os.PathLike[str], columns: Mapping[str, ArrayLike]) -> None:
    """Kiel diagram, and all other labels against [Fe/H] (microturbulence against gravity); for any number of stars.

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
    # A fixed layout: to compute one for so many axes takes longer than to draw them.
    grid = figure.add_gridspec(
        n_rows, n_columns, left=0.05, right=0.99, bottom=0.06, top=0.96, wspace=0.32, hspace=0.32
    )
    kiel = figure.add_subplot(grid[:2, :2])
    # Cells instead of points, for any number of stars.
    cells = kiel.hexbin(
        values["teff"], values["logg"], C=values["fe_h"], reduce_C_function=np.mean, gridsize=70, cmap="viridis", lw=0.1
    )
    figure.colorbar(cells, ax=kiel, label=f"mean {symbol('fe_h')} [dex]")
    kiel.invert_xaxis()
    kiel.invert_yaxis()
    kiel.set(xlabel=r"$T_\mathrm{eff}$ [K]", ylabel=r"$\log g$ [dex]")
    kiel.set_title(f"{len(values['teff']):,} stars", loc="left", fontsize=10, color=GREY)
    style_axes(kiel)
    places = [(row, column) for row in range(n_rows) for column in range(n_columns) if row > 1 or column > 1]
    for name, place in zip(others, places, strict=False):
        axes = figure.add_subplot(grid[place])
        below = "logg" if name == "vmicro" else "fe_h"
        axes.hexbin(values[below], values[name], gridsize=45, norm=LogNorm(0.3), mincnt=1, cmap="Blues", lw=0.1)
        axes.set(xlabel=axis_label(below, {}), ylabel=symbol(name) + (" [km/s]" if name == "vmicro" else ""))
        axes.tick_params(direction="in", top=True, right=True)
    save_figure(figure, path)


def plot_observed(path: str | os.PathLike[str], columns: Mapping[str, NDArray[Any]]) -> None:
    """Four synthetic spectra with and without noise (600 central pixels of long ones), and the noise.

    Parameters
    ----------
    path : path
        PNG file to write.
    columns : mapping of str to array
        `wavelength`, `flux`, `clean`, `flux_error` of shape (stars, pixels), `snr` and labels of shape (stars,).
    """
    figure = Figure(figsize=(13, 9))
    grid = figure.add_gridspec(4, 4, left=0.05, right=0.99, bottom=0.06, top=0.96, wspace=0.25, hspace=0.35)
    # From cool to hot, without the extremes.
    order = np.argsort(columns["teff"])
    stars = order[(np.linspace(0.05, 0.95, 4) * (len(order) - 1)).astype(int)]
    n_pixels = columns["flux"].shape[1]
    shown = slice(None) if n_pixels < 1000 else slice(n_pixels // 2 - 300, n_pixels // 2 + 300)
    for place, star in enumerate(stars):
        axes = figure.add_subplot(grid[place, :3])
        wavelength = columns["wavelength"][star][shown]
        # Lines end at missing pixels.
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
    axes.set_xlabel(WAVELENGTH)
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
    save_figure(figure, path)

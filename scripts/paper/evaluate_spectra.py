#!/usr/bin/env python
# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Accuracy of predicted spectra: from labels, from spectra with holes, and from spectra in another range.

    python scripts/paper/evaluate_spectra.py --grids DIR --gaia-xp DIR --apogee apogee-demo \\
        --output spectrafm-base-spectra.md --pictures DIR

DIR of --grids has the grids to which the emulators were fitted, hband_grid_turbospectrum_marcs.npz and
optical_grid_turbospectrum_marcs.npz; their last 100 and 80 stars are held out. --gaia-xp is the data set of that name,
--apogee observed stars, such as `spectrafm data apogee-demo`, of which the best fit is plotted.

Error per pixel is the rms of (predicted - true) flux over the continuum, or over the mean flux of the star;
error/sigma is its rms with deviations clipped at five sigma, and in brackets the robust one (1.4826 MAD). Every other
held-out star is used. All of them were also used to choose constants (one factor of the errors in the optical, one
guess in the H band), except for Gaia XP, where they are test stars. Baselines use the same stars: a Cannon (a quadratic
polynomial of the labels for each pixel), and quadratic ridge regression from principal components of the observed
pixels to those of the predicted pixels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from scipy.optimize import least_squares

from spectrafm_cli.arguments import Parser
from spectrafm_hf import load_checkpoint
from spectrafm_hf.checkpoints import BASE_CHECKPOINT
from spectrafm_hf.data.readers import find_files, read_spectra
from spectrafm_hf.files import complete_file
from spectrafm_hf.inference.emulated import EmulatedSpectra, with_usual_labels
from spectrafm_hf.inference.prediction import predict_batches
from spectrafm_hf.inference.spectrum import SpectrumPredictor, _grids, best_fit
from spectrafm_hf.models.spectrum_spectrafm import best_fits
from spectrafm_hf.show.spectra import flux_label, plot_fit
from spectrafm_hf.show.style import BLUE, INK, ORANGE, save_figure, style_axes
from spectrafm_hf.statistics import MAD_TO_SIGMA
from spectrafm_hf.synthesis.emulation import Grid, read_grid
from spectrafm_hf.synthesis.instruments import Instrument
from spectrafm_hf.synthesis.synthetic import SyntheticStars


Array = NDArray[Any]
HELD_OUT = {"hband": 100, "optical": 80}
SNR = 100.0
#: Ranges that are withheld, Angstrom.
XP_HOLES = ((4000.0, 4800.0), (5200.0, 5800.0), (6300.0, 7300.0), (8000.0, 9200.0))
H_HOLES = ((15600.0, 15800.0), (16200.0, 16800.0))
TEFF = (3500.0, 6500.0)  # K, of the test stars of Gaia XP
NAMES = ("teff", "logg", "fe_h", "alpha_m")
COMPONENTS, TRAINING, TESTED, XP_TESTED = 30, 3000, 200, 1000
PENALTIES = tuple(10.0**power for power in range(-9, 2))
WAVELENGTH = r"Wavelength in vacuum [$\mathrm{\AA}$]"


def figures(found: Array, truth: Array, error: Array | None = None, noise: Array | float = 0.0) -> str:
    """Median rms in percent; error/sigma."""
    level = np.maximum(np.abs(truth).mean(axis=1, keepdims=True), 1e-30)
    rms = np.sqrt(np.mean(((found - truth) / level) ** 2, axis=1))
    text = f"{100 * np.median(rms):.2f} %"
    if error is None:
        return text
    z = ((found - truth) / np.hypot(error, noise)).ravel()
    clipped = np.sqrt(np.mean(np.clip(z, -5, 5) ** 2))
    return f"{text}; {clipped:.2f} ({MAD_TO_SIGMA * np.median(np.abs(z)):.2f})"


# ---------------------------------------------------------------------------------------------------------- the rivals


def quadratic(labels: Array, center: Array, scale: Array) -> Array:
    """(stars, labels) -> 1, labels and their products."""
    x = (labels - center) / scale
    i, j = np.triu_indices(x.shape[1])
    return np.concatenate([np.ones((len(x), 1)), x, x[:, i] * x[:, j]], axis=1)


def ridge(inputs: Array, outputs: Array, penalty: float) -> Array:
    gram = inputs.T @ inputs
    return np.linalg.solve(gram + penalty * np.eye(len(gram)) * np.trace(gram) / len(gram), inputs.T @ outputs)


def cannon(fitted: Grid, outputs: Array, labels: Array) -> Array:
    """Spectra of labels by a quadratic polynomial for each pixel, whose penalty a fifth of the stars has chosen."""
    center, scale = fitted.labels.mean(axis=0), fitted.labels.std(axis=0)
    table = quadratic(fitted.labels, center, scale)
    own = np.arange(len(table)) % 5 > 0
    tried = []
    for penalty in PENALTIES:
        left = table[~own] @ ridge(table[own], outputs[own], penalty) - outputs[~own]
        tried.append(np.median(np.sqrt(np.mean(left**2, axis=1))))
    best = PENALTIES[int(np.argmin(tried))]
    return quadratic(labels, center, scale) @ ridge(table, outputs, best)


def by_components(seen: Array, hidden: Array, tested: Array) -> Array:
    """Predict withheld from observed pixels by ridge regression between principal components of training stars."""
    center, other = seen.mean(axis=0), hidden.mean(axis=0)
    directions = np.linalg.svd(seen - center, full_matrices=False)[2][:COMPONENTS]
    weights = (seen - center) @ directions.T
    there = weights.std(axis=0) > 1e-9 * weights.std()
    directions, weights = directions[there], weights[:, there]
    scale = weights.std(axis=0)
    table = quadratic(weights / scale, np.zeros(len(scale)), np.ones(len(scale)))
    targets = np.linalg.svd(hidden - other, full_matrices=False)[2][:COMPONENTS]
    outputs = (hidden - other) @ targets.T
    own = np.arange(len(table)) % 5 > 0
    tried = []
    for penalty in PENALTIES:
        left = (table[~own] @ ridge(table[own], outputs[own], penalty) - outputs[~own]) @ targets
        tried.append(np.median(np.sqrt(np.mean(left**2, axis=1))))
    solution = ridge(table, outputs, PENALTIES[int(np.argmin(tried))])
    new = quadratic(((tested - center) @ directions.T) / scale, np.zeros(len(scale)), np.ones(len(scale)))
    return new @ solution @ targets + other


# ----------------------------------------------------------------------------------------------------------- the parts


def of_labels(grids: Path) -> list[str]:
    lines = ["| spectrum from labels | stars | spectrafm: error; error/sigma | Cannon |", "|---|---|---|---|"]
    for name, emulator in (("hband", "emulator-hband"), ("optical", "emulator-optical")):
        grid = read_grid(grids / f"{name}_grid_turbospectrum_marcs.npz")
        fitted, held_out = grid[: -HELD_OUT[name]], grid[-HELD_OUT[name] :]
        cases: list[tuple[str, Any, float | None]] = [("its own pixels", grid.wavelength[5:-5], None)]
        if name == "optical":
            cases = [("2.5 Å pixels", grid.wavelength[5:-5], None), ("Gaia XP", Instrument.load("gaia-xp"), None)]
        for what, wavelength, power in cases:
            xp = isinstance(wavelength, Instrument)
            emulated = EmulatedSpectra(emulator, wavelength, power, normalised=not xp)
            table = emulated.emulator.label_table(dict(zip(grid.label_names, held_out.labels.T, strict=True)))
            covered = np.flatnonzero(emulated.emulator.covers(table))
            covered = covered[covered % 2 == 1]
            stars = held_out[covered]
            found = emulated(dict(zip(grid.label_names, stars.labels.T, strict=True)))

            def seen(part: Grid, xp: bool = xp, wavelength: Any = wavelength) -> Array:
                if not xp:
                    return part.flux[:, 5:-5].astype(float)
                assert part.continuum is not None
                flux = (part.flux * part.continuum).astype(np.float32)
                return (wavelength.response(part.wavelength) @ flux.T).T.astype(float)

            truth, training = seen(stars), seen(fitted)
            if xp:
                rival = np.exp(cannon(fitted, np.log(np.maximum(training, 1e-30)), stars.labels))
            else:
                rival = cannon(fitted, training, stars.labels)
            warm = stars.labels[:, 0] > 4000
            for words, chosen in (("above 4,000 K", warm), ("below", ~warm)):
                row = figures(found.flux[chosen], truth[chosen], found.error[chosen])
                other = figures(rival[chosen], truth[chosen])
                lines.append(f"| {name}, {what}, {words} | {chosen.sum()} | {row} | {other} |")
    return lines


def hband_stars(grids: Path, seed: int) -> tuple[Grid, list[dict[str, Any]], Array]:
    """Held-out stars with noise, and which pixels are observed."""
    held_out = read_grid(grids / "hband_grid_turbospectrum_marcs.npz")[-HELD_OUT["hband"] :]
    covered = SyntheticStars("apogee")._stars.emulator.covers(held_out.labels)
    covered &= np.arange(len(held_out)) % 2 == 1
    stars = held_out[covered]
    observed = (stars.wavelength > 15_152) & (stars.wavelength < 16_952)
    noise = np.random.default_rng(seed).standard_normal(stars.flux.shape) / SNR
    rows = [
        {
            "object_id": str(i),
            "wavelength": stars.wavelength[observed],
            "flux": (stars.flux[i] + noise[i])[observed],
            "flux_error": np.full(observed.sum(), 1 / SNR),
            "mask": np.zeros(observed.sum(), bool),
            "normalised": True,
        }
        for i in range(len(stars))
    ]
    return stars, rows, observed


def with_hole(rows: list[dict[str, Any]], low: float, high: float) -> tuple[list[dict[str, Any]], Array]:
    """Rows without the pixels of a range, and which these are."""
    hole = (rows[0]["wavelength"] > low) & (rows[0]["wavelength"] < high)
    return [{**row, "mask": np.asarray(row["mask"], bool) | hole} for row in rows], hole


def of_holes(predictor: SpectrumPredictor, grids: Path, gaia_xp: Path) -> list[str]:
    lines = [
        "| filled hole | stars | spectrafm: error; error/sigma | principal components | stated error of the data |",
        "|---|---|---|---|---|",
    ]
    rows, flux, error = xp_stars(gaia_xp, "test", XP_TESTED)
    training = xp_stars(gaia_xp, "train", TRAINING)[1]
    for low, high in XP_HOLES:
        masked, hole = with_hole(rows, low, high)
        found = predictor.from_spectra(masked, wavelength=rows[0]["wavelength"][hole])
        rival = by_components(training[:, ~hole], training[:, hole], flux[:, ~hole])
        truth, noise = flux[:, hole], error[:, hole]
        level = truth.mean(axis=1, keepdims=True)
        stated = 100 * np.median(np.sqrt(np.mean((noise / level) ** 2, axis=1)))
        lines.append(
            f"| observed Gaia XP, {low:,.0f}-{high:,.0f} Å | {len(rows):,} | "
            f"{figures(found.flux, truth, found.error, noise)} | {figures(rival, truth)} | {stated:.2f} % |"
        )
    stars, rows, observed = hband_stars(grids, seed=1)
    fitted = (
        read_grid(grids / "hband_grid_turbospectrum_marcs.npz")[: -HELD_OUT["hband"]].flux[:, observed].astype(float)
    )
    values = np.stack([row["flux"] for row in rows])
    for low, high in H_HOLES:
        masked, hole = with_hole(rows, low, high)
        found = predictor.from_spectra(masked, wavelength=rows[0]["wavelength"][hole])
        rival = by_components(fitted[:, ~hole], fitted[:, hole], values[:, ~hole])
        truth = stars.flux[:, observed][:, hole].astype(float)
        lines.append(
            f"| synthesised H band, S/N {SNR:.0f}, {low:,.0f}-{high:,.0f} Å | {len(rows)} | "
            f"{figures(found.flux, truth, found.error)} | {figures(rival, truth)} | {100 / SNR:.2f} % |"
        )
    found = predictor.from_spectra(rows)
    truth = stars.flux[:, observed].astype(float)
    lines.append(
        f"| the same, observed pixels, denoised | {len(rows)} | {figures(found.flux, truth, found.error)} | | "
        f"{100 / SNR:.2f} % |"
    )
    return lines


def xp_stars(folder: Path, split: str, most: int | None = None) -> tuple[list[dict[str, Any]], Array, Array]:
    """Stars of 3,500 to 6,500 K: rows, flux and its error (stars, pixels)."""
    stars = load_dataset(str(folder), split=split if most is None else f"{split}[:{2 * most}]").with_format("numpy")
    rows = [row for row in stars if TEFF[0] < row["teff"] < TEFF[1]][:most]
    flux, error = (np.stack([row[name] for row in rows]).astype(float) for name in ("flux", "flux_error"))
    return rows, flux, error


def of_other_range(predictor: SpectrumPredictor, gaia_xp: Path) -> list[str]:
    """Gaia XP -> H band: observed stars, against the emulator at APOGEE's labels; synthetic stars, both ways."""
    lines = [
        "| another range | stars | spectrafm: error; error/sigma | principal components | mean of all stars |",
        "|---|---|---|---|---|",
    ]
    apogee = Instrument.load("apogee")
    emulated = EmulatedSpectra("emulator-hband", apogee)

    def labelled(split: str, most: int) -> tuple[list[dict[str, Any]], Array, Array]:
        """Rows, fluxes, and H bands by the emulator at the labels of APOGEE, of stars that it covers."""
        rows, flux, _ = xp_stars(gaia_xp, split, most)
        known = np.flatnonzero([all(np.isfinite(row[name]) for name in NAMES) for row in rows])
        labels = usual_labels(emulated, [rows[i] for i in known])
        covered = emulated.emulator.covers(emulated.emulator.label_table(labels))
        good = known[covered]
        truth = emulated({name: values[covered] for name, values in labels.items()}).flux
        return [rows[i] for i in good], flux[good], truth.astype(float)

    rows, flux, truth = labelled("test", XP_TESTED)
    _, training, outputs = labelled("train", TRAINING)
    keep, found = usable(predictor, rows, apogee)
    rival = by_components(training, outputs, flux[keep])
    mean = np.broadcast_to(outputs.mean(axis=0), truth[keep].shape)
    lines.append(
        f"| H band from observed Gaia XP, test stars, against the emulator at the labels of APOGEE | {len(keep):,} | "
        f"{figures(found.flux, truth[keep], found.error)} | {figures(rival, truth[keep])} | "
        f"{figures(mean, truth[keep])} |"
    )
    # Synthetic stars have both, with all their abundances.
    optical, generator = SyntheticStars("gaia-xp", seed=3), np.random.default_rng(3)
    stars = optical.draw(TRAINING + TESTED, generator)
    table = np.stack([stars[name] for name in emulated.emulator.config.label_names], axis=1).astype(float)
    both = np.flatnonzero(emulated.emulator.covers(table) & (stars["teff"] > 4000))
    labels = {name: stars[name][both].astype(float) for name in emulated.emulator.config.label_names}
    truth, flux = emulated(labels).flux, stars["flux"][both].astype(float)
    test = np.arange(len(both)) >= len(both) - TESTED
    rows = [
        {
            "object_id": str(i),
            **{name: stars[name][i] for name in ("wavelength", "flux", "flux_error", "mask")},
        }
        for i in both[test]
    ]
    keep, found = usable(predictor, rows, apogee)
    tested = np.flatnonzero(test)[keep]
    rival = by_components(flux[~test], truth[~test], flux[tested])
    mean = np.broadcast_to(truth[~test].mean(axis=0), truth[tested].shape)
    lines.append(
        f"| H band from synthetic Gaia XP, above 4,000 K | {len(keep)} | "
        f"{figures(found.flux, truth[tested], found.error)} | {figures(rival, truth[tested])} | "
        f"{figures(mean, truth[tested])} |"
    )
    # Back: the optical over its continuum, as dust is not in the H band.
    noise = generator.standard_normal(truth.shape) / SNR
    wavelength = np.arange(4000.0, 9000.0, 20.0)
    blue = EmulatedSpectra("emulator-optical", wavelength, 300.0)
    wanted = np.full((len(both), len(wavelength)), np.nan)
    covered = blue.emulator.covers(blue.emulator.label_table(labels))
    wanted[covered] = blue({name: values[covered] for name, values in labels.items()}).flux
    rows = [
        {
            "object_id": str(i),
            "wavelength": apogee.wavelength,
            "flux": truth[i] + noise[i],
            "flux_error": np.full(len(apogee.wavelength), 1 / SNR),
            "mask": apogee.mask,
            "normalised": True,
        }
        for i in np.flatnonzero(test & covered)
    ]
    keep, found = usable(predictor, rows, wavelength, 300.0)
    tested = np.flatnonzero(test & covered)[keep]
    own = ~test & covered
    rival = by_components(truth[own] + noise[own], wanted[own], truth[tested] + noise[tested])
    mean = np.broadcast_to(wanted[own].mean(axis=0), wanted[tested].shape)
    lines.append(
        f"| optical over its continuum, R = 300, from synthetic H band, S/N {SNR:.0f} | {len(keep)} | "
        f"{figures(found.flux, wanted[tested], found.error)} | {figures(rival, wanted[tested])} | "
        f"{figures(mean, wanted[tested])} |"
    )
    return lines


def usable(
    predictor: SpectrumPredictor, rows: list[dict[str, Any]], wavelength: Any, power: float | None = None
) -> tuple[Array, Any]:
    """Stars whose labels are within the grid of the emulator, and their spectra in another range."""
    assert predictor.model is not None and predictor.tokenizer is not None
    emulated = predictor._emulated(wavelength, power, True)
    names = [name for name in predictor.tokenizer.requests or [] if name in ("teff", "logg", "fe_h")]
    batches = [rows[i : i + 200] for i in range(0, len(rows), 200)]
    found = predict_batches(predictor.model, predictor.tokenizer, batches, names or ["teff", "logg", "fe_h"])
    parts = list(found)
    columns = {name: np.concatenate([part[name] for part in parts]).astype(float) for name in ("teff", "logg", "fe_h")}
    known = np.isfinite(np.stack(list(columns.values()))).all(axis=0)
    good = np.flatnonzero(known)
    table = emulated.emulator.label_table({name: values[good] for name, values in columns.items()})
    good = good[emulated.emulator.covers(table)]
    return good, predictor.from_spectra([rows[i] for i in good], wavelength=wavelength, resolving_power=power)


def usual_labels(emulated: EmulatedSpectra, rows: list[dict[str, Any]]) -> dict[str, Array]:
    """Labels of the emulator for stars whose `NAMES` are known."""
    known = {name: np.array([row[name] for row in rows], float) for name in NAMES}
    return with_usual_labels(emulated.emulator, known, {})[0]


def of_speed(predictor: SpectrumPredictor, grids: Path) -> list[str]:
    """Fits of one core: ours, and that of the emulator's labels by scipy."""
    torch.set_num_threads(1)
    model, tokenizer = predictor.model, predictor.tokenizer
    assert model is not None and tokenizer is not None and tokenizer.basis is not None
    stars, rows, observed = hband_stars(grids, seed=2)
    best_fits(model, tokenizer.basis, _grids(tokenizer, rows))
    start = time.process_time()
    fits = best_fits(model, tokenizer.basis, _grids(tokenizer, rows))
    ours = len(rows) / (time.process_time() - start)
    emulator = SyntheticStars("apogee")._stars.emulator
    low, high = emulator._range()
    center = np.median(stars.labels, axis=0)
    begun, costs = time.process_time(), []
    n_stars = 10
    for row in rows[:n_stars]:

        def residual(u: Array, row: dict[str, Any] = row) -> Array:
            with torch.no_grad():
                flux = emulator(torch.from_numpy((low + u * (high - low))[None]))[0][0].numpy()
            return (flux[observed] - row["flux"]) / row["flux_error"]

        fit = least_squares(residual, ((center - low) / (high - low)).clip(0.01, 0.99), bounds=(0, 1), diff_step=1e-3)
        costs.append(2 * fit.cost)
    scipy = n_stars / (time.process_time() - begun)
    emulated = EmulatedSpectra("emulator-hband", stars.wavelength[observed])
    labels = dict(zip(stars.label_names, np.tile(stars.labels, (4, 1)).T, strict=True))
    emulated(labels)
    begun = time.process_time()
    emulated(labels)
    made = len(labels["teff"]) / (time.process_time() - begun)
    chi2 = np.median([fit.chi2 for fit in fits[:n_stars]])
    return [
        f"CPU time of one core, {len(rows)} H-band spectra of {observed.sum():,} pixels at S/N {SNR:.0f}: {ours:.0f} "
        f"best fits a second (median chi^2 {chi2:,.0f}); scipy's least squares of the 14 labels of the same emulator, "
        f"from the median star: {scipy:.2f} a second (median chi^2 {np.median(costs):,.0f}), which is "
        f"{ours / scipy:.0f} times slower. From labels, {made:.0f} spectra a second with errors, "
        f"{made / scipy:.0f} times as many."
    ]


# -------------------------------------------------------------------------------------------------------- the pictures


def pictures(predictor: SpectrumPredictor, folder: Path, gaia_xp: Path, grids: Path, apogee: Path) -> None:
    assert predictor.model is not None and predictor.tokenizer is not None
    model, tokenizer = predictor.model, predictor.tokenizer
    fits = [(row, best_fit(model, tokenizer, row)) for row in read_spectra(find_files([apogee]))]
    row, fit = min(fits, key=lambda pair: pair[1].chi2 / pair[1].degrees_of_freedom)
    plot_fit(
        folder / "spectra-fit.png", row, fit, title=f"{row['object_id']}, observed by APOGEE",
        wavelength_range=(15_560, 15_800), flux_label=flux_label(row["file"]),
    )  # fmt: skip
    rows, flux, error = xp_stars(gaia_xp, "test", 200)
    i = int(np.argmin(np.abs([r["teff"] - 4200 for r in rows])))
    figure = Figure(figsize=(11.5, 6.4), layout=ConstrainedLayoutEngine(hspace=0.05))
    axes = figure.subplots(2)
    masked, hole = with_hole(rows[i : i + 1], 6300.0, 7300.0)
    found = predictor.from_spectra(masked, wavelength=rows[0]["wavelength"][1:])
    draw_hole(axes[0], rows[i]["wavelength"], flux[i], hole, found.wavelength, found.flux[0], found.error[0])
    axes[0].set_ylabel("Flux / median", fontsize=13)
    axes[0].set_title("observed by Gaia XP, test star", loc="left", fontsize=12, color=INK)
    stars, h_rows, observed = hband_stars(grids, seed=1)
    j = int(np.argmin(np.abs(stars.labels[:, 0] - 4700)))
    masked, hole = with_hole(h_rows[j : j + 1], 15_700.0, 15_760.0)
    found = predictor.from_spectra(masked)
    near = (found.wavelength > 15_680) & (found.wavelength < 15_780)
    wavelength = h_rows[j]["wavelength"]
    close = (wavelength > 15_680) & (wavelength < 15_780)
    draw_hole(
        axes[1], wavelength[close], h_rows[j]["flux"][close], hole[close], found.wavelength[near],
        found.flux[0, near], found.error[0, near], truth=stars.flux[j, observed][close],
    )  # fmt: skip
    axes[1].set_ylabel("Flux / continuum", fontsize=13)
    axes[1].set_title(f"synthesised, held out, S/N {SNR:.0f}", loc="left", fontsize=12, color=INK)
    for each in axes:
        each.set_xlabel(WAVELENGTH, fontsize=12)
    axes[0].legend(frameon=False, fontsize=12, loc="upper left")
    axes[1].legend(frameon=False, fontsize=12, loc="lower left", ncols=2)
    save_figure(figure, folder / "spectra-hole.png")
    draw_other_range(predictor, folder / "spectra-xp-to-hband.png", rows[i])


def draw_hole(axes, wavelength, flux, hole, grid, found, error, truth=None) -> None:
    axes.plot(wavelength, np.where(hole, np.nan, flux), color=BLUE, lw=2.2, drawstyle="steps-mid", label="observed")
    label = "withheld" if truth is None else "true, withheld"
    axes.plot(
        wavelength, np.where(hole, flux if truth is None else truth, np.nan), color=INK, lw=2.2, ls=":", label=label
    )
    axes.plot(grid, found, color=ORANGE, lw=1.4, label="predicted")
    axes.fill_between(grid, found - error, found + error, color=ORANGE, alpha=0.35, lw=0, label="$\\pm 1 \\sigma$")
    axes.axvspan(wavelength[hole][0], wavelength[hole][-1], color="0.9", zorder=0)
    axes.set_xlim(wavelength[0], wavelength[-1])
    style_axes(axes)


def draw_other_range(predictor: SpectrumPredictor, path: Path, row: dict[str, Any]) -> None:
    wavelength = np.arange(15_660.0, 15_790.0, 0.22)
    found = predictor.from_spectra([row], wavelength=wavelength)
    emulated = EmulatedSpectra("emulator-hband", wavelength)
    truth = emulated(usual_labels(emulated, [row])).flux[0]
    figure = Figure(figsize=(11.5, 6.8), layout=ConstrainedLayoutEngine(hspace=0.05))
    top, middle, bottom = figure.subplots(3, height_ratios=[1.1, 1.6, 0.8])
    top.plot(row["wavelength"], row["flux"], color=BLUE, lw=2, drawstyle="steps-mid", label="observed by Gaia XP")
    top.set_ylabel("Flux / median", fontsize=12)
    middle.plot(wavelength, truth, color=BLUE, lw=1.4, label="emulator at the labels of APOGEE")
    flux, error = found.flux[0], found.error[0]
    middle.plot(wavelength, flux, color=ORANGE, lw=1.4, label="predicted from XP")
    middle.fill_between(
        wavelength, flux - error, flux + error, color=ORANGE, alpha=0.35, lw=0, label="$\\pm 1 \\sigma$"
    )
    middle.set_ylabel("Flux / continuum", fontsize=12)
    bottom.axhspan(-1, 1, color="0.85", lw=0)
    bottom.plot(wavelength, (truth - flux) / error, color=BLUE, lw=1.2)
    bottom.set_ylabel("Difference\n[errors]", fontsize=12)
    bottom.set_ylim(-4, 4)
    for each in (top, bottom):
        each.set_xlabel(WAVELENGTH, fontsize=12)
    top.legend(frameon=False, fontsize=12, loc="lower right")
    middle.legend(frameon=False, fontsize=12, loc="lower left", ncols=3)
    middle.set_ylim(min(flux.min(), truth.min()) - 0.13, 1.03)
    middle.tick_params(labelbottom=False)
    for axes in (top, middle, bottom):
        style_axes(axes)
    for axes in (middle, bottom):
        axes.set_xlim(wavelength[0], wavelength[-1])
    figure.align_ylabels()
    save_figure(figure, path)


def main() -> int:
    parser = Parser(description="Accuracy of predicted spectra.")
    parser.add_argument("--model", default=BASE_CHECKPOINT, metavar="NAME_OR_PATH")
    parser.add_argument("--grids", type=Path, required=True, metavar="DIR")
    parser.add_argument("--gaia-xp", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown")
    parser.add_argument("--apogee", type=Path, metavar="PATH", help="observed spectra, for the pictures")
    parser.add_argument("--pictures", type=Path, metavar="DIR")
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART", help="default: all"
    )
    arguments = parser.parse_args()
    if arguments.pictures and not arguments.apogee:
        parser.error("--apogee: expected an observed spectrum for the pictures, got none")
    predictor = SpectrumPredictor(*load_checkpoint(arguments.model))
    assert predictor.model is not None
    predictor.model.eval()
    text = []
    for part in arguments.parts:
        lines = PARTS[part](predictor, arguments)
        print("\n".join(lines), flush=True)
        text += [*lines, ""]
    if arguments.output:
        with complete_file(arguments.output) as temporary:
            temporary.write_text("\n".join(text), encoding="utf-8")
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        pictures(predictor, arguments.pictures, arguments.gaia_xp, arguments.grids, arguments.apogee)
    return 0


PARTS: dict[str, Callable[[SpectrumPredictor, argparse.Namespace], list[str]]] = {
    "labels": lambda _, arguments: of_labels(arguments.grids),
    "holes": lambda predictor, arguments: of_holes(predictor, arguments.grids, arguments.gaia_xp),
    "range": lambda predictor, arguments: of_other_range(predictor, arguments.gaia_xp),
    "speed": lambda predictor, arguments: of_speed(predictor, arguments.grids),
}


if __name__ == "__main__":
    sys.exit(main())
